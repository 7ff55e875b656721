"""AnchorCallback(evaluate="anchor"): only the attention block is another one in evaluation."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from mil_anchor import AnchorCallback, AttentionMonitor, RandomState
from mil_anchor.attention import log_softmax, normalized_entropy
from mil_anchor.callbacks.monitor import read_attention
from tests.callbacks.subjects import SUBJECTS
from tests.callbacks.tiny import (
    assert_clean,
    assert_equal_states,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)


class Trace(Callback):
    """Keeps the training weights after every batch, and what validation sees."""

    def __init__(self) -> None:
        self.trained, self.seen = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained.append(parameters_of(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.seen.append(parameters_of(pl_module))


def _fit(folder, subject, *callbacks, ckpt_path=None, epochs=2, **options):
    trace, module = Trace(), seeded_module(subject.module)
    keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = make_trainer(
        folder,
        *callbacks,
        trace,
        RandomState(),
        keeper,
        max_epochs=epochs,
        enable_checkpointing=True,
        **options,
    )
    batches = subject.batches()
    trainer.fit(module, *2 * [make_loader(batches)], ckpt_path=ckpt_path)
    return module, trace


def _expected(trained, block, callback):
    """The training weights with the anchor's parameters in the place of the block's."""
    parameters = {name for name, _ in callback.anchor.block.named_parameters()}
    anchor = callback.state_dict()["anchor"]
    return {**trained, **{f"{block}.{name}": anchor[name] for name in parameters}}


def test_evaluate_anchor__a_fit__swaps_the_block_and_nothing_else(tmp_path, subject):
    options = {"weight": 0.5, "decay": 0.9}
    callback = AnchorCallback(subject.site, evaluate="anchor", **options)
    module, trace = _fit(tmp_path / "anchor", subject, callback, num_sanity_val_steps=2)
    online = AnchorCallback(subject.site, **options)
    _, without = _fit(tmp_path / "online", subject, online, num_sanity_val_steps=2)

    assert_equal_states(trace.trained[-1], without.trained[-1])
    assert_equal_states(callback.state_dict()["anchor"], online.state_dict()["anchor"])
    # Before the first step the anchor is the block.
    assert_equal_states(trace.seen[0], without.seen[0])
    assert_equal_states(
        parameters_of(module), _expected(trace.trained[-1], subject.block, callback)
    )
    assert_equal_states(parameters_of(module), trace.seen[-1])
    assert_clean(module)


def test_evaluate_anchor__monitor__sees_the_anchors_attention(tmp_path, subject):
    callback = AnchorCallback(subject.site, decay=0.9, evaluate="anchor")
    monitor = AttentionMonitor(subject.site, path=tmp_path / "attention.csv")
    module, trace = _fit(tmp_path, subject, monitor, callback)

    batch = subject.batches()[0]
    rows = {row.bag_id: row for row in read_attention(monitor.path) if row.epoch == 1}
    module.load_state_dict(trace.trained[-1])
    module.eval()
    with torch.no_grad():
        scores = subject.scores(callback.anchor.block, subject.hidden(module, batch))
    entropies = normalized_entropy(log_softmax(scores, batch.get("mask"))).mean(dim=-1)
    for bag_id, entropy in zip(batch["bag_id"], entropies.tolist(), strict=True):
        assert rows[bag_id].entropy == pytest.approx(entropy, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_evaluate_anchor__attention_that_is_found__resumes_as_the_uninterrupted_run(
    tmp_path, unknown
):
    def plugin():
        return AnchorCallback(weight=0.5, decay=0.9, evaluate="anchor")

    whole, trace = _fit(tmp_path / "whole", unknown, plugin(), epochs=3)
    _fit(tmp_path / "halves", unknown, plugin(), epochs=1)
    path = tmp_path / "halves" / "last.ckpt"
    resumed, rest = _fit(tmp_path / "halves", unknown, plugin(), epochs=3, ckpt_path=path)

    assert_equal_states(trace.trained[-1], rest.trained[-1])
    assert_equal_states(parameters_of(whole), parameters_of(resumed))


def test_evaluate_anchor__scope_encoder__swaps_the_model_around_the_block(tmp_path):
    subject = SUBJECTS["tiny"]
    callback = AnchorCallback(subject.site, decay=0.9, evaluate="anchor", scope="encoder")
    module, trace = _fit(tmp_path, subject, callback)

    expected = _expected(trace.trained[-1], subject.path, callback)
    assert_equal_states(parameters_of(module), expected)
    moved = {name for name in expected if not torch.equal(expected[name], trace.trained[-1][name])}
    assert not all(name.startswith(subject.block) for name in moved)


@pytest.mark.parametrize(
    "options", [{"update": "never"}, {"update": "epoch"}, {"target": "uniform"}]
)
def test_evaluate_anchor__no_anchor_that_follows__is_refused(options):
    with pytest.raises(ValueError, match="must have an anchor that follows the block step by"):
        AnchorCallback(evaluate="anchor", **options)


def test_evaluate_anchor__unknown_name__is_refused():
    with pytest.raises(ValueError, match="evaluate must be one of online, anchor, but got 'ema'"):
        AnchorCallback(evaluate="ema")
