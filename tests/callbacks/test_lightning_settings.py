"""The plug-in in the settings of Lightning that people use."""

import functools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.checkpoint import checkpoint

from mil_anchor import AnchorCallback, AttentionMonitor
from tests.callbacks.subjects import SUBJECTS
from tests.callbacks.tiny import (
    assert_clean,
    assert_equal_states,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)


def _fit(subject, module, folder, **options):
    """What the plug-in makes of a module: its weights and those of the anchor."""
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    make_trainer(folder, callback, **options).fit(module, make_loader(subject.batches()))
    return parameters_of(module) | callback.state_dict()["anchor"]


class CheckpointedLoss:
    """Runs the whole model under activation checkpointing."""

    reentrant = False

    def loss(self, batch):
        # The reentrant kind wants an input with a gradient.
        start = torch.zeros((), requires_grad=True)
        return checkpoint(self._loss, start, batch, use_reentrant=self.reentrant)

    def _loss(self, start, batch):
        return start + super().loss(batch)


def test_checkpointing__of_the_model_non_reentrant__trains_like_without(tmp_path, subject):
    plain = seeded_module(subject.module, dropout=0.0)
    checkpointed = seeded_module(subject.variant(CheckpointedLoss), dropout=0.0)

    assert_equal_states(
        _fit(subject, plain, tmp_path, precision="64-true"),
        _fit(subject, checkpointed, tmp_path, precision="64-true"),
    )


def test_checkpointing__inside_the_block_non_reentrant__trains_like_without(tmp_path, subject):
    plain, checkpointed = (seeded_module(subject.module, dropout=0.0) for _ in range(2))
    block = subject.block_of(checkpointed)
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    assert_equal_states(
        _fit(subject, plain, tmp_path, precision="64-true"),
        _fit(subject, checkpointed, tmp_path, precision="64-true"),
    )


def test_checkpointing__reentrant__is_refused(tmp_path, subject):
    module = subject.variant(CheckpointedLoss)()
    module.reentrant = True

    with pytest.raises(MisconfigurationException, match="reentrant checkpointing"):
        _fit(subject, module, tmp_path)
    assert_clean(module)


def test_checkpointing__of_a_tap_by_the_reentrant_kind__is_refused(tmp_path):
    subject = SUBJECTS["torchmil"]
    module = seeded_module(subject.module)
    block = subject.block_of(module)
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=True)

    with pytest.raises((MisconfigurationException, ValueError), match="reentrant checkpointing"):
        _fit(subject, module, tmp_path)
    assert_clean(module)


@pytest.mark.parametrize("order", [1, -1])
def test_weight_averaging__beside_the_plugin__leaves_the_anchor(tmp_path, subject, order):
    anchors = []
    loader = make_loader(subject.batches())
    for averaging in ([], [EMAWeightAveraging(decay=0.9)]):
        module = seeded_module(subject.module)
        plugin = AnchorCallback(subject.site, weight=0.5, decay=0.9)
        callbacks = [plugin, AttentionMonitor(subject.site), *averaging][::order]
        make_trainer(tmp_path, *callbacks).fit(module, loader, loader)
        anchors.append(plugin.state_dict()["anchor"])
        assert_clean(module)

    assert_equal_states(*anchors)


@pytest.mark.parametrize("order", [1, -1])
def test_weight_averaging__beside_a_plugin_of_weight_0__averages_the_same(tmp_path, subject, order):
    averages = []
    loader = make_loader(subject.batches())
    for plugin in ([], [AnchorCallback(subject.site, weight=0.0, decay=0.9)]):
        module = seeded_module(subject.module)
        callbacks = [*plugin, EMAWeightAveraging(decay=0.9)][::order]
        make_trainer(tmp_path, *callbacks).fit(module, loader, loader)
        averages.append(parameters_of(module))

    assert_equal_states(*averages)


@pytest.mark.filterwarnings("ignore:.*fast_dev_run.*")
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"num_sanity_val_steps": 2}])
def test_fast_dev_run_and_sanity_validation__work(tmp_path, subject, options):
    module, loader = seeded_module(subject.module), make_loader(subject.batches())
    trainer = make_trainer(tmp_path, AnchorCallback(subject.site, weight=0.5), **options)

    trainer.fit(module, loader, loader)

    assert trainer.callback_metrics["anchor/kl"] > 0
    assert_clean(module)


def test_sanity_validation__before_the_fit__changes_nothing(tmp_path, subject):
    trained = []
    loader = make_loader(subject.batches())
    for n_sanity in (0, 2):
        module = seeded_module(subject.module, dropout=0.0)
        plugin = AnchorCallback(subject.site, weight=0.5, decay=0.9)
        trainer = make_trainer(tmp_path, plugin, num_sanity_val_steps=n_sanity)
        trainer.fit(module, loader, loader)
        trained.append(parameters_of(module) | plugin.state_dict()["anchor"])

    assert_equal_states(*trained)


class Tunable:
    """Has what the finders change."""

    lr, batch_size, make_batches = 0.05, 2, None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return make_loader(self.make_batches(30, n_bags=self.batch_size))

    def val_dataloader(self):
        return self.train_dataloader()


def _tunable(subject, **tuned):
    module = seeded_module(subject.variant(Tunable), dropout=0.0)
    module.make_batches = subject.batches
    for name, value in tuned.items():
        setattr(module, name, value)
    return module


def _tune(finder, trainer, module):
    if finder == "lr":
        Tuner(trainer).lr_find(module, num_training=20, max_lr=0.5)
    else:
        Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2)


def _assert_fit_without_finder(folder, subject, finder, trainer, callback):
    """The fit that is over equals one that was given the value the finder has found."""
    module = trainer.lightning_module
    known = _tunable(subject, **{finder: getattr(module, finder)})
    again = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    other = make_trainer(folder, again, max_epochs=1)
    other.fit(known)
    assert_equal_states(parameters_of(known), parameters_of(module))
    assert_equal_states(again.state_dict()["anchor"], callback.state_dict()["anchor"])
    assert other.callback_metrics["anchor/kl"] == trainer.callback_metrics["anchor/kl"]


@pytest.mark.slow
# The finders' own: an early stop of the search, a scheduler without a step, files they clean up.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finder", ["lr", "batch_size"])
def test_finder__before_fit__leaves_a_fit_that_knows_nothing_of_it(tmp_path, subject, finder):
    module = _tunable(subject)
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    before = parameters_of(module)
    _tune(finder, trainer, module)
    assert_equal_states(before, parameters_of(module))
    assert_clean(module)
    assert getattr(module, finder) != getattr(Tunable, finder)

    trainer.fit(module)

    _assert_fit_without_finder(tmp_path, subject, finder, trainer, callback)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finder", ["lr", "batch_size"])
def test_finder__as_a_callback_beside_the_plugin__changes_its_value_only(tmp_path, subject, finder):
    module = _tunable(subject)
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    searching = (
        LearningRateFinder(num_training_steps=20, max_lr=0.5)
        if finder == "lr"
        else BatchSizeFinder(max_trials=2, steps_per_trial=2)
    )
    trainer = make_trainer(tmp_path, searching, callback, max_epochs=1)

    trainer.fit(module)

    assert getattr(module, finder) != getattr(Tunable, finder)
    _assert_fit_without_finder(tmp_path, subject, finder, trainer, callback)


# Dynamo looks at .grad of an intermediate tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", ["module", "model", "forward", "block"])
def test_compile__anything__trains_like_the_plain_module(tmp_path, subject, compiled):
    plain, module = (seeded_module(subject.module, dropout=0.0) for _ in range(2))
    fitted = module
    if compiled == "module":
        fitted = torch.compile(module, backend="eager")
    elif compiled == "forward":  # of a model whose own loss calls its forward, not the model
        model = module.get_submodule(subject.path)
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        part = subject.path if compiled == "model" else subject.block
        module.get_submodule(part).compile(backend="eager")
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.9)

    make_trainer(tmp_path, callback).fit(fitted, make_loader(subject.batches()))
    torch.compiler.reset()

    assert_equal_states(
        _fit(subject, plain, tmp_path), parameters_of(module) | callback.state_dict()["anchor"]
    )
