"""What SlowWeights and AnchorCallback(evaluate="anchor") share: swaps, checkpoints, refusals."""

import re
import signal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from baselines.abmil import ABMIL
from mil_anchor import AnchorCallback, AttentionMonitor, RandomState
from mil_anchor.callbacks.evaluated import evaluated_weights
from mil_anchor.callbacks.slow import SlowWeights
from mil_anchor.module import MILModule
from tests.callbacks.tiny import (
    TinyModule,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

PLUGINS = {
    "slow": lambda: SlowWeights(decay=0.9),
    "anchor": lambda: AnchorCallback("net.attention", weight=0.5, decay=0.9, evaluate="anchor"),
}
ONLINE = {
    "slow": list,
    "anchor": lambda: [AnchorCallback("net.attention", weight=0.5, decay=0.9)],
}


@pytest.fixture(params=PLUGINS)
def name(request):
    return request.param


class Trace(Callback):
    """Keeps the training weights after every batch, and what validation and tests see."""

    def __init__(self) -> None:
        self.trained, self.seen = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained.append(parameters_of(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.seen.append(parameters_of(pl_module))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def _trainer(folder, *callbacks, epochs=2, **options):
    keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    options = {"max_epochs": epochs, "enable_checkpointing": True, **options}
    return make_trainer(folder, *callbacks, RandomState(), keeper, **options)


def _fit(folder, plugins, module=None, *, ckpt_path=None, epochs=2, **options):
    module, trace, batches = module or seeded_module(), Trace(), make_batches(3)
    trainer = _trainer(folder, *plugins, trace, epochs=epochs, **options)
    trainer.fit(
        module, make_loader(batches, shuffle=True), make_loader(batches), ckpt_path=ckpt_path
    )
    return module, trace, trainer


def _differ(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


def _read(path):
    return torch.load(path, weights_only=True)


def test_evaluated_weights__a_fit__trains_as_without_and_ends_with_what_it_validated(
    tmp_path, name
):
    module, trace, _ = _fit(tmp_path / "with", [PLUGINS[name]()], num_sanity_val_steps=2)
    _, without, _ = _fit(tmp_path / "without", ONLINE[name](), num_sanity_val_steps=2)

    for one, other in zip(trace.trained, without.trained, strict=True):
        assert_equal_states(one, other)
    assert _differ(trace.seen[-1], trace.trained[-1])
    assert_equal_states(parameters_of(module), trace.seen[-1])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluated_weights__evaluation_after_the_fit__uses_them(tmp_path, name, stage):
    class Predicting(TinyModule):
        def predict_step(self, batch, batch_idx):
            return self.net(batch["features"])

    module, trace, trainer = _fit(tmp_path, [PLUGINS[name]()], seeded_module(Predicting))

    getattr(trainer, stage)(module, make_loader())

    assert len(trace.seen) == 3 + 3 + 6
    assert_equal_states(trace.seen[-1], trace.seen[5])
    assert evaluated_weights(trainer) == name


PLACES = (
    "training_step",
    "validation_step",
    "on_validation_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "on_save_checkpoint",
)


@pytest.mark.parametrize(
    ("where", "error"),
    [*((place, KeyError) for place in PLACES), ("validation_step", KeyboardInterrupt)],
)
def test_evaluated_weights__exception_anywhere__leaves_the_training_weights(
    tmp_path, name, where, error
):
    module, trace = seeded_module(), Trace()
    held = getattr(module, where)

    def fail(*args):
        if module.current_epoch >= 1:
            raise error("broken on purpose")
        return held(*args)

    setattr(module, where, fail)
    trainer = _trainer(tmp_path, PLUGINS[name](), trace)
    handler = signal.getsignal(signal.SIGINT)
    try:
        # Lightning leaves by SystemExit on Ctrl-C, and ignores it from then on.
        with pytest.raises((KeyError, SystemExit)):
            trainer.fit(module, *2 * [make_loader(make_batches(3))])
    finally:
        signal.signal(signal.SIGINT, handler)

    assert_equal_states(parameters_of(module), trace.trained[-1])


@pytest.mark.parametrize("from_checkpoint", [True, False])
def test_evaluated_weights__evaluation_after_a_broken_fit__is_of_what_the_model_holds(
    tmp_path, name, from_checkpoint
):
    module, trace, loader = seeded_module(), Trace(), make_loader(make_batches(3))
    trainer = _trainer(tmp_path, PLUGINS[name](), trace)

    def fail():
        if trainer.state.fn == "fit" and trainer.current_epoch == 1:
            raise KeyError("broken on purpose")

    module.on_validation_end = fail
    with pytest.raises(KeyError, match="on purpose"):
        trainer.fit(module, loader, loader)

    checkpoint = tmp_path / "last.ckpt" if from_checkpoint else None
    trainer.validate(module, loader, ckpt_path=checkpoint, verbose=False)
    assert evaluated_weights(trainer) == (name if from_checkpoint else "online")
    expected = trace.seen[2] if from_checkpoint else trace.trained[-1]
    assert_equal_states(trace.seen[-1], expected)


def test_evaluated_weights__exception_in_a_test__leaves_what_the_fit_ended_with(tmp_path, name):
    module, _, trainer = _fit(tmp_path, [PLUGINS[name]()])
    after = parameters_of(module)

    def fail(*_):
        raise KeyError("broken on purpose")

    module.test_step = fail
    with pytest.raises(KeyError, match="on purpose"):
        trainer.test(module, make_loader())

    assert_equal_states(parameters_of(module), after)


def test_evaluated_weights__checkpoint__holds_both_sets_and_a_bare_model_loads_either(
    tmp_path, name
):
    _, trace, _ = _fit(tmp_path, [PLUGINS[name]()])

    checkpoint = _read(tmp_path / "last.ckpt")

    assert checkpoint["evaluated_weights"] == name
    for entry, expected in (("state_dict", trace.seen), ("current_model_state", trace.trained)):
        bare = TinyModule()
        bare.load_state_dict(checkpoint[entry], strict=True)
        assert_equal_states(parameters_of(bare), expected[-1])
    loaded = TinyModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert_equal_states(parameters_of(loaded), trace.seen[-1])


class Saving(Callback):
    """Saves a checkpoint at some hook."""

    def __init__(self, hook, path) -> None:
        setattr(self, hook, lambda trainer, *_: trainer.save_checkpoint(path))


@pytest.mark.parametrize(
    "hook", ["on_validation_batch_end", "on_validation_end", "on_train_end", "on_fit_end"]
)
def test_evaluated_weights__checkpoint_saved_at_any_time__is_the_same(tmp_path, name, hook):
    one, other = (Saving(hook, tmp_path / f"{file}.ckpt") for file in ("one", "other"))
    _, trace, trainer = _fit(tmp_path, [one, PLUGINS[name](), other])
    trainer.save_checkpoint(tmp_path / "after.ckpt")

    for file in ("one.ckpt", "other.ckpt", "after.ckpt"):
        checkpoint = _read(tmp_path / file)
        assert_equal_states(checkpoint["state_dict"], trace.seen[-1])
        assert_equal_states(checkpoint["current_model_state"], trace.trained[-1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_evaluated_weights__stop_and_resume__equals_the_uninterrupted_run_bit_for_bit(
    tmp_path, name
):
    whole, trace, _ = _fit(tmp_path / "whole", [PLUGINS[name]()], epochs=4)
    _, _, trainer = _fit(tmp_path / "halves", [PLUGINS[name]()])
    trainer.save_checkpoint(tmp_path / "after.ckpt")

    for path in (tmp_path / "halves" / "last.ckpt", tmp_path / "after.ckpt"):
        again = {"ckpt_path": path, "epochs": 4}
        resumed, rest, _ = _fit(tmp_path / "halves", [PLUGINS[name]()], **again)
        assert_equal_states(trace.trained[-1], rest.trained[-1])
        assert_equal_states(trace.seen[-1], rest.seen[-1])
        assert_equal_states(parameters_of(whole), parameters_of(resumed))
        one, other = (_read(tmp_path / part / "last.ckpt") for part in ("whole", "halves"))
        for entry in ("state_dict", "current_model_state"):
            assert_equal_states(one[entry], other[entry])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_evaluated_weights__resumed_with_nothing_left_to_do__ends_as_the_fit_did(tmp_path, name):
    module, trace, _ = _fit(tmp_path, [PLUGINS[name]()])

    path = tmp_path / "last.ckpt"
    again, _, trainer = _fit(tmp_path, [PLUGINS[name]()], ckpt_path=path)

    assert_equal_states(parameters_of(again), parameters_of(module))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert_equal_states(_read(tmp_path / "again.ckpt")["current_model_state"], trace.trained[-1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_evaluated_weights__resumed_with_an_online_anchor__trains_on_from_training_weights(
    tmp_path,
):
    _, trace, _ = _fit(tmp_path, [PLUGINS["anchor"]()])

    started, module = [], seeded_module()
    plugin = AnchorCallback("net.attention", weight=0.5, decay=0.9)
    module.on_train_start = lambda: started.append(parameters_of(module))
    _fit(tmp_path, [plugin], module, ckpt_path=tmp_path / "last.ckpt", epochs=3)

    assert_equal_states(started[0], trace.trained[-1])


def test_evaluated_weights__test_of_an_earlier_checkpoint__names_and_uses_what_it_holds(
    tmp_path, name
):
    bare = make_trainer(tmp_path, max_epochs=1)
    plain = seeded_module()
    bare.fit(plain, make_loader())
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    module, trace, trainer = _fit(tmp_path / "fit", [PLUGINS[name]()])
    last = tmp_path / "fit" / "last.ckpt"

    trainer.test(module, make_loader(), ckpt_path=tmp_path / "bare.ckpt", verbose=False)
    assert evaluated_weights(trainer) == "online"
    assert_equal_states(parameters_of(module), parameters_of(plain))
    trainer.save_checkpoint(tmp_path / "of_bare.ckpt")
    saved = _read(tmp_path / "of_bare.ckpt")
    assert saved["evaluated_weights"] == "online"
    assert_equal_states(saved["state_dict"], parameters_of(plain))
    assert "current_model_state" not in saved

    trainer.test(module, make_loader(), ckpt_path=last, verbose=False)
    assert evaluated_weights(trainer) == name
    assert_equal_states(trace.seen[-1], _read(last)["state_dict"])


def _bags():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "features": torch.randn(1, 6, 5, generator=generator) + index % 2,
            "mask": torch.ones(1, 6, dtype=torch.bool),
            "label": torch.tensor([index % 2]),
            "bag_id": [f"bag{index}"],
        }
        for index in range(8)
    ]


def _mil_module():
    torch.manual_seed(0)
    return MILModule(ABMIL(5, 2, hidden=4), n_classes=2, lr=0.05)


@pytest.mark.parametrize("plugin", [SlowWeights(0.9), AnchorCallback(decay=0.9, evaluate="anchor")])
def test_evaluated_weights__best_checkpoint_of_a_mil_module__tests_as_a_bare_model_does(
    tmp_path, plugin
):
    best = ModelCheckpoint(
        tmp_path, filename="best", monitor="val/selection", mode="max", save_on_train_epoch_end=True
    )
    monitor = AttentionMonitor(path=tmp_path / "attention.csv", strict=False)
    callbacks = [plugin, monitor, RandomState(), best]
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=5, enable_checkpointing=True)
    module, loader = _mil_module(), make_loader(_bags())
    trainer.fit(module, loader, loader)

    tested = trainer.test(module, loader, ckpt_path=best.best_model_path, verbose=False)[0]
    validated = trainer.validate(module, loader, ckpt_path=best.best_model_path, verbose=False)[0]

    checkpoint = _read(best.best_model_path)
    bare = _mil_module()
    bare.load_state_dict(checkpoint["state_dict"])
    alone = make_trainer(tmp_path).test(bare, loader, verbose=False)[0]
    assert tested == alone
    assert validated["val/selection"] == best.best_model_score.item()
    assert evaluated_weights(trainer) == checkpoint["evaluated_weights"] == plugin.evaluate


def test_evaluated_weights__trainer__is_asked_through_its_callbacks(tmp_path):
    cases = {
        "online": [[], [AnchorCallback()], [AttentionMonitor()]],
        "slow": [[SlowWeights()], [AnchorCallback(), SlowWeights()], [EMAWeightAveraging()]],
        "anchor": [[AnchorCallback(evaluate="anchor")]],
    }

    for expected, callbacks in cases.items():
        for case in callbacks:
            assert evaluated_weights(make_trainer(tmp_path, *case)) == expected


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [SlowWeights(), AnchorCallback(evaluate="anchor")],
            "SlowWeights ('slow') and AnchorCallback do",
        ),
        (
            [AnchorCallback(evaluate="anchor"), SlowWeights()],
            "AnchorCallback ('anchor') and SlowWeights do",
        ),
        (
            [SlowWeights(), EMAWeightAveraging()],
            "SlowWeights ('slow') and EMAWeightAveraging do",
        ),
        (
            [SlowWeights(), ModelCheckpoint(save_weights_only=True)],
            "SlowWeights must put the weights it evaluates into every checkpoint",
        ),
    ],
)
def test_evaluated_weights__what_cannot_be_right__is_refused_before_training(
    tmp_path, callbacks, message
):
    trainer = make_trainer(tmp_path, *callbacks, enable_checkpointing=True)

    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        trainer.fit(TinyModule(), make_loader(), make_loader())


def test_evaluated_weights__sharded_parameters__are_refused(tmp_path):
    class FSDPStrategy(SingleDeviceStrategy):
        """By its name one that shards."""

    trainer = make_trainer(tmp_path, SlowWeights(), strategy=FSDPStrategy())

    with pytest.raises(MisconfigurationException, match="SlowWeights needs whole parameters"):
        trainer.fit(TinyModule(), make_loader())


def test_evaluated_weights__tied_weights__are_swapped_once(tmp_path, name):
    class Tied(TinyModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.again = nn.ModuleList([self.net.attention, self.net.head])

    _, trace, _ = _fit(tmp_path / "with", [PLUGINS[name]()], seeded_module(Tied))
    _, without, _ = _fit(tmp_path / "without", ONLINE[name](), seeded_module(Tied))

    assert_equal_states(trace.trained[-1], without.trained[-1])
    state = _read(tmp_path / "with" / "last.ckpt")["state_dict"]
    assert torch.equal(state["again.1.weight"], state["net.head.weight"])
