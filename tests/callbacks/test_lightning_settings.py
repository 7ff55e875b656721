"""The plug-in in the settings of Lightning that people use."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch.utils.checkpoint import checkpoint

from mil_anchor import AnchorCallback, AttentionMonitor
from tests.callbacks.tiny import (
    TinyModule,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

BLOCK = "net.attention"


def _assert_clean(module):
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())


class Checkpointed(TinyModule):
    """Runs its attention block under activation checkpointing."""

    reentrant = False

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        scores = checkpoint(self.net.attention, hidden, use_reentrant=self.reentrant)
        pooled = torch.softmax(scores, dim=1).transpose(1, 2) @ hidden
        return torch.nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


class NotCheckpointed(Checkpointed):
    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        pooled = torch.softmax(self.net.attention(hidden), dim=1).transpose(1, 2) @ hidden
        return torch.nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


def test_checkpointing__non_reentrant__trains_like_without(tmp_path):
    trained = []
    for cls in (NotCheckpointed, Checkpointed):
        module = seeded_module(cls, dropout=0.0)
        callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
        make_trainer(tmp_path, callback).fit(module, make_loader())
        trained.append(parameters_of(module) | callback.state_dict()["anchor"])

    assert_equal_states(*trained)


def test_checkpointing__reentrant__is_refused(tmp_path):
    module = seeded_module(Checkpointed)
    module.reentrant = True

    with pytest.raises(Exception, match="reentrant checkpointing"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(module, make_loader())
    _assert_clean(module)


def test_lbfgs__closure_called_many_times__moves_the_anchor_once_a_step(tmp_path):
    class LBFGS(TinyModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    module = seeded_module(LBFGS, dropout=0.0)
    start = parameters_of(module.net.attention)
    callback = AnchorCallback(BLOCK, weight=0.1, decay=0.5)

    make_trainer(tmp_path, callback, max_steps=1).fit(module, make_loader(make_batches(1)))

    end = parameters_of(module.net.attention)
    for name, tensor in callback.state_dict()["anchor"].items():
        assert torch.allclose(tensor, (start[name] + end[name]) / 2), name


@pytest.mark.parametrize("order", [1, -1])
def test_weight_averaging__beside_the_plugin__changes_neither(tmp_path, order):
    trained = []
    for averaging in ([], [EMAWeightAveraging(decay=0.9)]):
        module = seeded_module()
        plugin = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
        callbacks = [plugin, AttentionMonitor(BLOCK), *averaging][::order]
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.fit(module, make_loader(), make_loader())
        trained.append(plugin.state_dict()["anchor"])
        _assert_clean(module)

    assert_equal_states(*trained)


@pytest.mark.filterwarnings("ignore:.*fast_dev_run.*|.*lr scheduler.*")
def test_fast_dev_run_and_sanity_validation__work(tmp_path):
    for options in ({"fast_dev_run": True}, {"num_sanity_val_steps": 2}):
        module = seeded_module()
        trainer = make_trainer(tmp_path, AnchorCallback(BLOCK, weight=0.5), **options)
        trainer.fit(module, make_loader(), make_loader())
        assert trainer.callback_metrics["anchor/kl"] >= 0
        _assert_clean(module)


@pytest.mark.filterwarnings("ignore")
def test_learning_rate_finder__before_fit__leaves_model_and_plugin_ready(tmp_path):
    class Tunable(TinyModule):
        lr = 0.05

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    module = seeded_module(Tunable)
    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, callback, max_epochs=3)
    before = parameters_of(module)

    Tuner(trainer).lr_find(module, make_loader(make_batches(30)), num_training=20, max_lr=0.5)

    assert_equal_states(before, parameters_of(module))
    _assert_clean(module)
    trainer.fit(module, make_loader())
    assert not torch.equal(callback.state_dict()["anchor"]["0.weight"], before[f"{BLOCK}.0.weight"])


@pytest.mark.parametrize("compiled", ["module", "model", "block"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile__anything__trains_like_the_plain_module(tmp_path, compiled):
    trained = []
    for compile_it in (False, True):
        module = seeded_module(dropout=0.0)
        fitted = module
        if compile_it and compiled == "module":
            fitted = torch.compile(module, backend="eager")
        elif compile_it:
            part = module.net if compiled == "model" else module.net.attention
            part.compile(backend="eager")
        callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
        make_trainer(tmp_path, callback).fit(fitted, make_loader())
        trained.append(parameters_of(module) | callback.state_dict()["anchor"])
        torch.compiler.reset()

    assert_equal_states(*trained)


def test_checkpoint__of_a_run_with_the_plugin__loads_strictly_into_the_bare_module(tmp_path):
    trainer = make_trainer(tmp_path, AnchorCallback(BLOCK, weight=0.5))
    module = seeded_module()
    trainer.fit(module, make_loader())
    for weights_only in (False, True):
        trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
        bare = TinyModule()
        bare.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
        assert_equal_states(parameters_of(bare), parameters_of(module))
