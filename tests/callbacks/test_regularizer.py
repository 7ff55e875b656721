"""What every plug-in shares: its term in the loss, and what it leaves alone."""

import copy
import gc
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from mil_anchor import AnchorCallback, AttentionRegularizer
from mil_anchor.attention import softmax
from tests.callbacks.tiny import (
    assert_equal_states,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)


class Ceiling(AttentionRegularizer):
    """The plug-in of the docstring: a penalty on the largest attention weight."""

    def penalty(self, attention):
        return softmax(attention.scores, attention.mask).amax(dim=-1)

    def log_values(self, penalty):
        return {"ceiling/largest": penalty}


def test_regularizer__plugin_of_ten_lines__acts_on_the_training(tmp_path, subject):
    largest = {}
    for weight in (0.0, 20.0):
        plugin = Ceiling(subject.site, weight=weight)
        trainer = make_trainer(tmp_path, plugin, max_epochs=10)
        module = seeded_module(subject.module, dropout=0.0)
        trainer.fit(module, make_loader(subject.batches()))
        largest[weight] = trainer.callback_metrics["ceiling/largest"].item()

    assert largest[20.0] < largest[0.0] - 0.1


def test_regularizer__two_plugins_on_one_block__add_up_in_any_order(tmp_path, subject):
    trained = []
    for order in (1, -1):
        plugins = [
            Ceiling(subject.site, weight=0.3),
            AnchorCallback(subject.site, weight=0.5, decay=0.9),
        ][::order]
        module = seeded_module(subject.module, dropout=0.0)
        trainer = make_trainer(tmp_path, *plugins, precision="64-true")
        trainer.fit(module, make_loader(subject.batches()))
        trained.append(parameters_of(module))

    for name, tensor in trained[0].items():
        assert torch.allclose(tensor, trained[1][name], atol=1e-9), name


class MidFit(Callback):
    """Looks at the module while a fit runs."""

    def __init__(self, look) -> None:
        self.look = look
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(self.look(pl_module))

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(self.look(pl_module))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_regularizer__copy_of_the_module_in_mid_fit__is_a_plain_module(tmp_path, subject, copied):
    batch = subject.batches(1)[0]
    module, undisturbed = (seeded_module(subject.module, dropout=0.0) for _ in range(2))
    keys = list(module.state_dict())
    plugin = AnchorCallback(subject.site, weight=0.5)

    def look(online):
        twin = copied(online)
        loss = twin.training_step(batch, 0)
        loss.backward()
        assert list(online.state_dict()) == list(twin.state_dict()) == keys
        assert torch.equal(loss, online.loss(batch))
        assert twin.training_step.__self__ is twin

    watch = MidFit(look)
    loader = make_loader(subject.batches())
    make_trainer(tmp_path, plugin, watch).fit(module, loader)

    assert len(watch.seen) == 12
    make_trainer(tmp_path, AnchorCallback(subject.site, weight=0.5)).fit(undisturbed, loader)
    assert_equal_states(parameters_of(module), parameters_of(undisturbed))


def test_regularizer__validation_step_that_calls_the_training_step__trains_as_without(
    tmp_path, subject
):
    class ValidatesByTraining:
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    trained = []
    for limit in (0, 2):
        module = seeded_module(subject.variant(ValidatesByTraining), dropout=0.0)
        plugin = AnchorCallback(subject.site, weight=0.5, decay=0.9)
        trainer = make_trainer(
            tmp_path, plugin, limit_val_batches=limit, num_sanity_val_steps=limit
        )
        loader = make_loader(subject.batches())
        trainer.fit(module, loader, loader)
        trained.append(parameters_of(module) | plugin.state_dict()["anchor"])

    assert_equal_states(*trained)


class ValidatesWithGradients:
    """Takes gradients while it validates, as attribution methods do."""

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            self.loss(batch).backward()
        self.zero_grad()


@pytest.fixture
def only_new_objects():
    """What exists already is hidden from the garbage collector, which makes it fast."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
def test_regularizer__after_each_step__keeps_no_tensor_with_a_graph(tmp_path, subject):
    def look(online):
        gc.collect()
        return sum(
            issubclass(type(o), torch.Tensor) and o.grad_fn is not None for o in gc.get_objects()
        )

    graphs = []
    loader = make_loader(subject.batches(2))
    for plugins in ([], [AnchorCallback(subject.site, weight=0.5)]):
        watch = MidFit(look)
        trainer = make_trainer(tmp_path, *plugins, watch, val_check_interval=1, max_epochs=1)
        module = seeded_module(subject.variant(ValidatesWithGradients))
        trainer.fit(module, loader, loader)
        graphs.append(watch.seen)

    assert len(graphs[0]) == 4
    assert graphs[0] == graphs[1]


def test_regularizer__validation_inside_training__records_nothing(tmp_path, subject):
    calls = []

    class Counting(Ceiling):
        def penalty(self, attention):
            calls.append(attention.scores.requires_grad)
            return super().penalty(attention)

    trainer = make_trainer(tmp_path, Counting(subject.site, weight=0.1), val_check_interval=2)
    loader = make_loader(subject.batches())
    trainer.fit(seeded_module(subject.module), loader, loader)

    assert calls == [True] * 12


def test_regularizer__validation_with_gradients_inside_training__changes_nothing(tmp_path, subject):
    trained = []
    for limit in (0, 2):
        module = seeded_module(subject.variant(ValidatesWithGradients), dropout=0.0)
        plugin = AnchorCallback(subject.site, weight=0.5, decay=0.9)
        trainer = make_trainer(
            tmp_path, plugin, val_check_interval=2, limit_val_batches=limit, inference_mode=False
        )
        loader = make_loader(subject.batches())
        trainer.fit(module, loader, loader)
        trained.append(parameters_of(module) | plugin.state_dict()["anchor"])

    assert_equal_states(*trained)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_regularizer__sharded_strategy__is_refused(tmp_path, monkeypatch, subject, strategy):
    # A real one needs CUDA or another package; only its type matters.
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(Trainer, "strategy", object.__new__(strategy))
    plugin = AnchorCallback(subject.site)

    with pytest.raises(
        MisconfigurationException, match=rf"{strategy.__name__} shards them\. Use strategy='ddp'"
    ):
        plugin.setup(trainer, subject.module(), "fit")
