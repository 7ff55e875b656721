"""What the tests of the first step's search share."""

import re
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import mil_anchor
from mil_anchor import AnchorCallback, AttentionSite, RandomState
from tests.callbacks.tiny import (
    assert_equal_states,
    make_loader,
    make_trainer,
    parameters_of,
)

BLOCK = "net.attention"
SITE = AttentionSite(BLOCK, layout="b n r")


class Steps(Callback):
    """What training and anchor are after each step."""

    def __init__(self) -> None:
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = parameters_of(pl_module)
        for plugin in trainer.callbacks:
            if isinstance(plugin, AnchorCallback):
                anchor = plugin.state_dict().get("anchor", {})
                state |= {f"anchor of {name}": value.clone() for name, value in anchor.items()}
        self.states.append(state)


def anchor_plugin(site=None, **options):
    return AnchorCallback(site, **{"weight": 0.5, "decay": 0.9, **options})


def train(folder, module, callbacks=(), *, batches=None, fitted=None, validate=False, **options):
    """What training is after each step, and what it ends with."""
    torch.manual_seed(1)
    steps = Steps()
    trainer = make_trainer(folder, *callbacks, steps, **options)
    loader = make_loader(batches)
    trainer.fit(module if fitted is None else fitted, loader, loader if validate else None)
    end = {"random": torch.get_rng_state()}
    if "anchor/kl" in trainer.callback_metrics:
        end["kl"] = trainer.callback_metrics["anchor/kl"]
    assert len(steps.states) > 1
    return [*steps.states, end]


def assert_same(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert_equal_states(mine, theirs)


def drop_anchors(*states):
    for state in states:
        for name in [name for name in state if name.startswith("anchor of")]:
            del state[name]


def found_lines(caplog):
    """The log lines that say what was found, each with what it tells to paste."""
    said = [r.getMessage() for r in caplog.records if "mil_anchor" in Path(r.pathname).parts]
    assert all("found the attention" in line for line in said), said
    return [re.search(r"To name it: (.*)\.$", line)[1] for line in said]


def run_pasted(line, **options):
    """The callback that a line makes, as its user would run it."""
    return eval(line[:-1] + "".join(f", {k}={v!r}" for k, v in options.items()) + ")", PASTED)


PASTED = dict(vars(mil_anchor))


def whole_and_resumed(folder, module, plugin, batches, **options):
    """The last states of an uninterrupted run, and of one that was stopped and resumed."""
    ends = []
    for name, epochs, ckpt_path in (
        ("whole", 4, None),
        ("halves", 2, None),
        ("halves", 4, folder / "halves" / "last.ckpt"),
    ):
        own, online = plugin(), module()
        keeper = ModelCheckpoint(folder / name, save_last=True, save_on_train_epoch_end=True)
        trainer = make_trainer(
            folder,
            own,
            RandomState(),
            keeper,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        trainer.fit(online, make_loader(batches, shuffle=True), ckpt_path=ckpt_path)
        ends.append(
            parameters_of(online)
            | {f"anchor of {k}": v for k, v in own.state_dict()["anchor"].items()}
            | {"random": torch.get_rng_state(), "kl": trainer.callback_metrics["anchor/kl"]}
        )
    return ends[0], ends[2]
