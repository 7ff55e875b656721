import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mil_anchor.callbacks.monitor import read_attention
from tests.callbacks.tiny import assert_equal_states, hand_written_fit, make_batches, seeded_module

ROOT = Path(__file__).parents[2]


def _fit(folder, epochs, *, precision="32-true", dropout=0.3, checkpoint=None):
    """What each of two processes ends with."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.callbacks.ddp_fit", folder, epochs, precision, dropout]
    command += [checkpoint] if checkpoint else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}_after{epochs}.pt") for rank in range(2)]


def test_anchor_callback__two_processes__equal_the_method_written_by_hand(tmp_path):
    batches = make_batches()
    of_ranks = list(zip(batches[::2], batches[1::2], strict=True))
    anchor, kl, reference = hand_written_fit(
        seeded_module(dropout=0.0), of_ranks, weight=0.7, decay=0.8
    )

    one, two = _fit(tmp_path, 2, precision="64-true", dropout=0.0)

    assert_equal_states(one["anchor"], two["anchor"])
    assert_equal_states(one["module"], two["module"])
    for name, tensor in anchor.state_dict().items():
        assert torch.allclose(one["anchor"][name], tensor, atol=1e-10), name
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(one["module"][name], tensor, atol=1e-10), name
    assert one["kl"] == two["kl"] == pytest.approx(kl, rel=1e-6)
    rows = read_attention(tmp_path / "attention.csv")
    assert {row.bag_id for row in rows} == {b for batch in batches for b in batch["bag_id"]}
    assert len(rows) == 24


def test_anchor_callback__two_processes_stopped_and_resumed__equal_the_uninterrupted_run(tmp_path):
    whole = _fit(tmp_path / "whole", 4)
    _fit(tmp_path / "halves", 2)
    resumed = _fit(tmp_path / "halves", 4, checkpoint=tmp_path / "halves" / "last.ckpt")

    # Batch norm has seen other bags on each process; the anchor is one all the same.
    assert "1.running_mean" in whole[0]["anchor"]
    assert_equal_states(whole[0]["anchor"], whole[1]["anchor"])
    for one, other in zip(whole, resumed, strict=True):
        assert_equal_states(one["module"], other["module"])
        assert_equal_states(one["anchor"], other["anchor"])
        assert torch.equal(one["random"], other["random"])
    assert read_attention(tmp_path / "whole" / "attention.csv") == read_attention(
        tmp_path / "halves" / "attention.csv"
    )
