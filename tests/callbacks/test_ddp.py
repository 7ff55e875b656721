import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mil_anchor.callbacks.monitor import read_attention
from tests.callbacks.by_hand import hand_written_fit
from tests.callbacks.ddp_fit import STRATEGIES, make_batches, make_module
from tests.callbacks.subjects import SUBJECTS
from tests.callbacks.tiny import assert_equal_states

ROOT = Path(__file__).parents[2]


def _fit(
    folder, name, epochs, *, strategy="ddp", precision="32-true", dropout=0.3, checkpoint=None
):
    """What each of two processes ends with."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.callbacks.ddp_fit", folder, name, strategy, epochs]
    command += [precision, dropout, *([checkpoint] if checkpoint else [])]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}_after{epochs}.pt") for rank in range(2)]


# One run stays in the quick tests.
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(name, strategy, marks=[] if name + strategy == "tinyddp" else pytest.mark.slow)
        for name in SUBJECTS
        for strategy in STRATEGIES
    ],
)
def test_anchor_callback__two_processes__equal_the_method_written_by_hand(tmp_path, name, strategy):
    subject = SUBJECTS[name]
    batches = make_batches(name, strategy)
    of_ranks = list(zip(batches[::2], batches[1::2], strict=True))
    anchor, kl, reference = hand_written_fit(
        subject, make_module(name, strategy, 0.0), of_ranks, weight=0.7, decay=0.8
    )

    one, two = _fit(tmp_path, name, 2, strategy=strategy, precision="64-true", dropout=0.0)

    assert_equal_states(one["anchor"], two["anchor"])
    assert_equal_states(one["module"], two["module"])
    for entry, tensor in anchor.state_dict().items():
        assert torch.allclose(one["anchor"][entry], tensor, atol=1e-10), entry
    for entry, tensor in reference.state_dict().items():
        assert torch.allclose(one["module"][entry], tensor, atol=1e-10), entry
    assert one["kl"] == two["kl"] == pytest.approx(kl, rel=1e-6)
    rows = read_attention(tmp_path / "attention.csv")
    assert {row.bag_id for row in rows} == {b for batch in batches for b in batch["bag_id"]}
    assert len(rows) == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "torchmil"])
def test_anchor_callback__two_processes_stopped_and_resumed__equal_the_uninterrupted_run(
    tmp_path, name
):
    whole = _fit(tmp_path / "whole", name, 4)
    _fit(tmp_path / "halves", name, 2)
    resumed = _fit(tmp_path / "halves", name, 4, checkpoint=tmp_path / "halves" / "last.ckpt")

    # Batch norm has seen other bags on each process; the anchor is one all the same.
    assert ("1.running_mean" in whole[0]["anchor"]) == (name == "tiny")
    assert_equal_states(whole[0]["anchor"], whole[1]["anchor"])
    for one, other in zip(whole, resumed, strict=True):
        assert_equal_states(one["module"], other["module"])
        assert_equal_states(one["anchor"], other["anchor"])
        assert torch.equal(one["random"], other["random"])
    assert read_attention(tmp_path / "whole" / "attention.csv") == read_attention(
        tmp_path / "halves" / "attention.csv"
    )
