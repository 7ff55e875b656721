import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from baselines.clam import CLAMSB
from mil_anchor.data.bags import Bag
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.metrics import bag_metrics
from mil_anchor.module import MILModule
from tests.callbacks.tiny import make_trainer


def _bags(n_bags=8, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Bag(
            torch.randn(3 + index % 4, width, generator=generator) + index % 2,
            label=index % 2,
            bag_id=f"bag{index}",
        )
        for index in range(n_bags)
    ]


def _data(**options):
    return BagDataModule(_bags(), _bags(6, seed=1), test_bags=_bags(5, seed=2), **options)


class PlainLogits(nn.Module):
    """A third-party model: takes only features, returns bare logits."""

    def __init__(self, n_logits) -> None:
        super().__init__()
        self.head = nn.Linear(4, n_logits or 1)
        self.n_logits = n_logits

    def forward(self, features):
        logits = self.head(features.mean(dim=1))
        return logits if self.n_logits else logits.squeeze(-1)


def _step(module, batch):
    output = module.training_step(batch, 0)
    output.backward()
    return output


def test_module__baseline_with_auxiliary_loss__weighs_both_terms():
    torch.manual_seed(0)
    model = CLAMSB(4, 2, hidden=8, attention_width=4, dropout=0.0)
    data = _data(batch_size=2)
    batch = next(iter(data.train_dataloader()))

    loss = _step(MILModule(model, n_classes=2), batch)

    output = model(batch["features"], batch["mask"], batch["label"])
    log_probability = output.logits.log_softmax(-1)[range(2), batch["label"]]
    expected = 0.7 * -log_probability.mean() + output.auxiliary_loss
    assert output.auxiliary_loss > 0
    assert torch.allclose(loss, expected)


def test_module__auxiliary_loss_without_a_bag_weight__is_added():
    class Auxiliary(PlainLogits):
        def forward(self, features):
            return SimpleNamespace(
                logits=super().forward(features), auxiliary_loss=torch.tensor(3.0)
            )

    batch = next(iter(_data().train_dataloader()))
    module = MILModule(Auxiliary(2), n_classes=2)
    plain = -module(batch).logits.log_softmax(-1)[0, batch["label"]].squeeze()

    assert torch.allclose(module.training_step(batch, 0), plain + 3)


@pytest.mark.parametrize("n_logits", [0, 1, 2])
def test_module__plain_logits__trains_and_predicts(tmp_path, n_logits):
    torch.manual_seed(0)
    module = MILModule(PlainLogits(n_logits), n_classes=2, lr=0.05)
    data = _data()
    batch = next(iter(data.train_dataloader()))
    logits = module.model(batch["features"])
    probability = (
        torch.softmax(logits, -1)[:, 1] if n_logits == 2 else torch.sigmoid(logits).flatten()
    )
    truth = batch["label"][0]
    expected = -torch.log(probability if truth else 1 - probability).squeeze()

    assert torch.allclose(_step(module, batch), expected)

    trainer = make_trainer(tmp_path, max_epochs=20)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert [row.bag_id for row in module.predictions] == [f"bag{index}" for index in range(5)]
    assert all(sum(row.probabilities) == pytest.approx(1) for row in module.predictions)
    assert trainer.callback_metrics["test/accuracy"] > 0.7


def test_module__learning_rate__falls_by_a_cosine_to_zero(tmp_path):
    module = MILModule(PlainLogits(2), n_classes=2, lr=0.1)
    seen = []
    step = module.training_step

    def watched(batch, batch_idx):
        seen.append(module.optimizers().param_groups[0]["lr"])
        return step(batch, batch_idx)

    module.training_step = watched
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(module, datamodule=_data())

    expected = [0.05 * (1 + math.cos(math.pi * step / 24)) for step in range(24)]
    assert seen == pytest.approx(expected, abs=1e-9)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


class PlainAdam(MILModule):
    """Steps weight by weight, as checkpoints of before were written."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["fused"] = False
        return configured


def _fitted(tmp_path, cls, *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = cls(PlainLogits(2), n_classes=2, lr=0.05, weight_decay=0.01)
    precision = "64-true" if dtype == torch.float64 else "32-true"
    trainer = make_trainer(tmp_path, max_epochs=3, precision=precision, **options)
    trainer.fit(module, datamodule=_data())
    return module, trainer


def test_module__fused_adam__steps_as_the_plain_one_does(tmp_path):
    fused, _ = _fitted(tmp_path / "fused", MILModule)
    plain, _ = _fitted(tmp_path / "plain", PlainAdam)
    assert fused.optimizers().param_groups[0]["fused"]
    assert not plain.optimizers().param_groups[0]["fused"]
    for weight, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(weight, expected, rtol=1e-10, atol=0)


def test_module__checkpoint_of_a_plain_adam__is_continued_by_the_fused_one(tmp_path):
    _, trainer = _fitted(tmp_path / "plain", PlainAdam)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    resumed = {}
    for cls in (MILModule, PlainAdam):
        module = cls(PlainLogits(2), n_classes=2, lr=0.05, weight_decay=0.01)
        trainer = make_trainer(tmp_path / cls.__name__, max_epochs=5, precision="64-true")
        torch.manual_seed(1)  # the order of the bags
        trainer.fit(module, datamodule=_data(), ckpt_path=tmp_path / "plain.ckpt")
        assert trainer.global_step == 40
        resumed[cls] = module
    assert resumed[MILModule].optimizers().param_groups[0]["fused"]
    pairs = zip(resumed[MILModule].parameters(), resumed[PlainAdam].parameters(), strict=True)
    for weight, expected in pairs:
        assert torch.allclose(weight, expected, rtol=1e-10, atol=0)


def test_module__clipped_gradients__are_not_left_to_a_fused_step(tmp_path):
    module, _ = _fitted(tmp_path, MILModule, gradient_clip_val=0.1)
    assert not module.optimizers().param_groups[0]["fused"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_module__metrics_at_the_end_of_an_epoch__are_those_of_updates_bag_by_bag(
    tmp_path, batch_size
):
    torch.manual_seed(0)
    module = MILModule(PlainLogits(2), n_classes=2)
    data = _data(batch_size=batch_size)
    measured = make_trainer(tmp_path).test(module, datamodule=data, verbose=False)[0]
    metrics = bag_metrics(2, prefix="test/")
    module.eval()
    for bag in data.test_bags:
        probabilities = module.model(bag.features[None]).softmax(-1)
        metrics.update(probabilities, torch.tensor([bag.label]))
    for name, value in metrics.compute().items():
        assert measured[name] == pytest.approx(float(value), abs=1e-7)
    assert [row.label for row in module.predictions] == data.test_bags.labels


def test_module__validation__logs_the_metrics_and_their_score(tmp_path):
    module = MILModule(PlainLogits(2), n_classes=2)
    trainer = make_trainer(tmp_path, max_epochs=1)

    trainer.fit(module, datamodule=_data())

    logged = trainer.callback_metrics
    names = {"loss", "f1", "auroc", "accuracy", "balanced_accuracy", "score", "selection"}
    assert {f"val/{name}" for name in names} <= logged.keys()
    assert torch.allclose(logged["val/score"], logged["val/auroc"] + logged["val/f1"])
    loss = logged["val/loss"]
    assert torch.allclose(logged["val/selection"], logged["val/score"] - 1e-4 * loss / (1 + loss))
    assert logged["train/loss"] > 0


def test_module__batches_of_unequal_size__weigh_bags_not_batches(tmp_path):
    losses = []
    for batch_size in (1, 4):
        torch.manual_seed(0)
        module = MILModule(CLAMSB(4, 2, hidden=8, dropout=0.0), n_classes=2)
        trainer = make_trainer(tmp_path, max_epochs=1)
        metrics = trainer.test(module, datamodule=_data(batch_size=batch_size), verbose=False)
        losses.append(metrics[0]["test/loss"])

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_module__model_without_logits__is_refused(tmp_path):
    class Tuple(PlainLogits):
        def forward(self, features):
            return super().forward(features), None

    with pytest.raises(TypeError, match=r"object with \.logits, but it returned a tuple"):
        make_trainer(tmp_path).fit(MILModule(Tuple(2), n_classes=2), datamodule=_data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, but got 0.0"),
        ({"lr": math.inf}, "but got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be .* but got -1.0"),
    ],
)
def test_module__argument_out_of_range__is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MILModule(PlainLogits(2), n_classes=2, **arguments)
