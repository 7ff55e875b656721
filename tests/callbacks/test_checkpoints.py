"""Checkpoints: stop and resume, evaluation from them, and models that go on without the plug-in."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mil_anchor import AnchorCallback, AttentionMonitor, RandomState, TemporalEnsembleCallback
from tests.callbacks.tiny import (
    assert_equal_states,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

ROOT = Path(__file__).parents[2]


class Breaking:
    """Stops for good in the middle of the third epoch, if it is told to."""

    breaks = False

    def training_step(self, batch, batch_idx):
        if self.breaks and self.current_epoch == 2 and batch_idx == 3:
            raise KeyError("power cut")
        return super().training_step(batch, batch_idx)


def _fit(subject, folder, *, epochs=4, breaks=False, ckpt_path=None):
    """What a run with dropout, a shuffled loader and random states in its checkpoints ends with."""
    module = seeded_module(subject.variant(Breaking))
    module.breaks = breaks
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = make_trainer(
        folder, callback, RandomState(), keeper, max_epochs=epochs, enable_checkpointing=True
    )
    batches = subject.batches()
    trainer.fit(
        module, make_loader(batches, shuffle=True), make_loader(batches), ckpt_path=ckpt_path
    )
    return parameters_of(module), callback.state_dict()["anchor"], torch.get_rng_state()


def _assert_equal_runs(one, other):
    assert_equal_states(one[0], other[0])
    assert_equal_states(one[1], other[1])
    assert torch.equal(one[2], other[2])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_anchor_callback__stop_and_resume__equals_the_uninterrupted_run_bit_for_bit(
    tmp_path, subject, caplog
):
    whole = _fit(subject, tmp_path / "whole")
    _fit(subject, tmp_path / "halves", epochs=2)
    torch.rand(100)
    with caplog.at_level("INFO"):
        resumed = _fit(subject, tmp_path / "halves", ckpt_path=tmp_path / "halves" / "last.ckpt")

    assert "holds no anchor" not in caplog.text
    _assert_equal_runs(whole, resumed)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_anchor_callback__interrupted_epoch__is_repeated_on_resume(tmp_path, subject):
    whole = _fit(subject, tmp_path / "whole")
    with pytest.raises(KeyError, match="power cut"):
        _fit(subject, tmp_path / "broken", breaks=True)
    resumed = _fit(subject, tmp_path / "broken", ckpt_path=tmp_path / "broken" / "last.ckpt")

    _assert_equal_runs(whole, resumed)


def test_anchor_callback__checkpoint__loads_with_weights_only(tmp_path, subject):
    callback = AnchorCallback(subject.site)
    trainer = make_trainer(tmp_path, callback, RandomState())
    trainer.fit(seeded_module(subject.module), make_loader(subject.batches()))
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)

    assert_equal_states(
        checkpoint["callbacks"][callback.state_key]["anchor"], callback.state_dict()["anchor"]
    )
    assert not any("anchor" in name for name in checkpoint["state_dict"])


class Watched:
    """Looks at a callback's anchor when training starts."""

    callback = None

    def on_train_start(self):
        self.seen = self.callback.state_dict()["anchor"]


def test_anchor_callback__checkpoint_without_plugin__starts_from_its_weights_and_says_so(
    tmp_path, subject, caplog
):
    loader = make_loader(subject.batches())
    bare = make_trainer(tmp_path, max_epochs=1)
    trained = seeded_module(subject.module)
    bare.fit(trained, loader)
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    module = subject.variant(Watched)()
    module.callback = AnchorCallback(subject.site, decay=0.0)

    with caplog.at_level("INFO"):
        trainer = make_trainer(tmp_path, module.callback)
        trainer.fit(module, loader, ckpt_path=tmp_path / "bare.ckpt")

    assert_equal_states(module.seen, parameters_of(subject.block_of(trained)))
    assert "holds no anchor" in caplog.text


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "make",
    [
        lambda site: AnchorCallback(site, weight=0.5, decay=0.9),
        lambda site: TemporalEnsembleCallback(site, weight=0.5, decay=0.9),
        AttentionMonitor,
    ],
    ids=["anchor", "temporal", "monitor"],
)
def test_callbacks__site_found_then_and_named_now__go_on_with_what_they_knew(tmp_path, make):
    def fit(folder, site, *, epochs, ckpt_path=None):
        module, callback = seeded_module(), make(site)
        trainer = make_trainer(folder, callback, RandomState(), max_epochs=epochs)
        trainer.fit(module, make_loader(shuffle=True), make_loader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "last.ckpt")
        return parameters_of(module), folder / "attention.csv"

    whole = fit(tmp_path / "whole", None, epochs=3)
    fit(tmp_path / "halves", None, epochs=2)
    last = tmp_path / "halves" / "last.ckpt"
    resumed = fit(tmp_path / "halves", "net.attention", epochs=3, ckpt_path=last)

    assert_equal_states(whole[0], resumed[0])
    if make is AttentionMonitor:
        assert resumed[1].read_bytes() == whole[1].read_bytes()


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_anchor_callback__evaluation_from_its_checkpoint__works_and_leaks_nothing(
    tmp_path, subject, stage
):
    loader = make_loader(subject.batches())
    trainer = make_trainer(tmp_path, AnchorCallback(subject.site, weight=0.5, decay=0.9))
    trainer.fit(seeded_module(subject.module), loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    other = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, other, max_epochs=1)
    evaluate = getattr(trainer, stage)
    evaluate(subject.module(), loader, ckpt_path=tmp_path / "end.ckpt", verbose=False)

    fresh = subject.variant(Watched)()
    fresh.callback = other
    before = parameters_of(subject.block_of(fresh))
    trainer.fit(fresh, loader)
    assert_equal_states(fresh.seen, before)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint__of_a_run_with_the_plugin__loads_strictly_into_the_bare_module(
    tmp_path, subject, weights_only
):
    keeper = ModelCheckpoint(
        tmp_path / "kept", filename="end", save_weights_only=weights_only, every_n_epochs=2
    )
    plugin = AnchorCallback(subject.site, weight=0.5)
    module, loader = seeded_module(subject.module), make_loader(subject.batches())
    trainer = make_trainer(tmp_path, plugin, keeper, enable_checkpointing=True)
    trainer.fit(module, loader)

    bare = subject.module.load_from_checkpoint(
        tmp_path / "kept" / "end.ckpt", strict=True, weights_only=True
    )

    assert_equal_states(parameters_of(bare), parameters_of(module))
    make_trainer(tmp_path, max_epochs=1).fit(bare, loader)


_WITHOUT_THE_PACKAGE = """
import sys

sys.modules["mil_anchor"] = None  # any import of it fails
import torch
from {module} import {make}

folder, path = sys.argv[1:]
weights = torch.load(f"{{folder}}/end.ckpt", weights_only=True)["state_dict"]
model = {make}().eval()
model.load_state_dict({{name.removeprefix(path + "."): w for name, w in weights.items()}})
with torch.no_grad():
    torch.save(model(*torch.load(f"{{folder}}/batch.pt")), f"{{folder}}/logits.pt")
assert not [name for name in sys.modules if name.startswith("mil_anchor.")]
"""


@pytest.mark.slow
def test_checkpoint__loaded_where_the_package_is_not_installed__gives_the_trained_model(
    tmp_path, subject
):
    batches = subject.batches()
    module = seeded_module(subject.module)
    trainer = make_trainer(tmp_path, AnchorCallback(subject.site, weight=0.5))
    trainer.fit(module, make_loader(batches))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    inputs = [batches[0][name] for name in ("features", "mask") if name in batches[0]]
    torch.save(inputs, tmp_path / "batch.pt")
    make = subject.model
    script = _WITHOUT_THE_PACKAGE.format(module=make.__module__, make=make.__name__)

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, subject.path],
        cwd=ROOT,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = module.eval().get_submodule(subject.path)(*inputs)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
