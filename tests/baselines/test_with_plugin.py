import pytest
import torch

from baselines.abmil import ABMIL
from baselines.asmil import ASMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.dsmil import DSMIL
from baselines.transmil import TransMIL
from mil_anchor import AnchorCallback, AttentionMonitor, find_site
from mil_anchor.attention import log_normalized_sigmoid, log_softmax
from mil_anchor.callbacks.monitor import read_attention
from mil_anchor.data.bags import Bag
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.module import MILModule
from tests.callbacks.tiny import make_loader, make_trainer

MODELS = {
    "abmil": lambda: ABMIL(6, 2, hidden=8, attention_width=4, n_rows=2),
    "clam_sb": lambda: CLAMSB(6, 2, hidden=8, attention_width=4),
    "clam_mb": lambda: CLAMMB(6, 3, hidden=8, attention_width=4),
    "transmil": lambda: TransMIL(6, 2, hidden=16),
    "dsmil": lambda: DSMIL(6, 2, attention_width=4),
    "asmil": lambda: ASMIL(6, 2, hidden=16, n_tokens=4),
}


def _data(batch_size):
    generator = torch.Generator().manual_seed(0)
    bags = [
        Bag(torch.randn(2 + 3 * i % 7, 6, generator=generator), label=i % 2, bag_id=f"bag{i}")
        for i in range(10)
    ]
    return BagDataModule(bags[:6], bags[6:], test_bags=bags[6:], batch_size=batch_size)


# Six bags teach these models no preference, and the monitor says so.
@pytest.mark.filterwarnings("ignore:The validation attention has become uniform")
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_plugin__every_baseline__is_found_trained_and_monitored(tmp_path, name, batch_size):
    torch.manual_seed(0)
    model = MODELS[name]()
    module = MILModule(model, n_classes=3 if name == "clam_mb" else 2, lr=0.01)
    callback = AnchorCallback(weight=0.1, decay=0.5)
    start = find_site(model).find_block(model).state_dict()
    start = {key: value.clone() for key, value in start.items()}
    trainer = make_trainer(tmp_path, callback, AttentionMonitor(), max_epochs=3)

    trainer.fit(module, datamodule=_data(batch_size))

    anchor = callback.state_dict()["anchor"]
    online = find_site(model).find_block(model).state_dict()
    assert anchor.keys() == online.keys()
    for key, value in anchor.items():
        if not torch.equal(online[key], start[key]):
            assert not torch.equal(value, start[key])
            assert not torch.equal(value, online[key])
    assert trainer.callback_metrics["anchor/kl"] >= 0
    assert len(read_attention(tmp_path / "attention.csv")) == 12


@pytest.mark.parametrize("name", MODELS)
def test_plugin__first_step_of_a_baseline__penalises_its_own_scores(tmp_path, name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    seen = []

    class Looking(AnchorCallback):
        def penalty(self, attention):
            seen.append(attention)
            return super().penalty(attention)

    data = _data(3)
    batch = next(iter(data.val_dataloader()))
    scores = model(batch["features"], batch["mask"]).scores

    class OneBatch(BagDataModule):
        def train_dataloader(self):
            return make_loader([batch])

    module = MILModule(model, n_classes=3 if name == "clam_mb" else 2)
    module.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    trainer = make_trainer(tmp_path, Looking(weight=0.1), max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=OneBatch(data.train_bags, data.val_bags))

    # At the first step the anchor is the online block: the divergence is that of NSF and softmax.
    log_online, log_target = log_softmax(scores), log_normalized_sigmoid(scores)
    real = batch["mask"][:, None].expand_as(scores)
    difference = (log_target - log_online).masked_fill(~real, 0)
    expected = (log_target.exp() * difference).sum(-1).mean()
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(
        expected.item(), rel=1e-4, abs=1e-7
    )
    assert sum(len(call.scores) for call in seen) == len(scores)
