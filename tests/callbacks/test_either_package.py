import subprocess
import sys

import pytest
import torch

from tests.callbacks.tiny import assert_equal_states
from tests.composing import ROOT


@pytest.mark.slow
def test_callbacks__in_pytorch_lightning__do_what_they_do_in_lightning(tmp_path):
    results = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        folder = tmp_path / package
        folder.mkdir()
        script = [sys.executable, "-m", "tests.callbacks.either_package", package, str(folder)]
        done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "found the attention of Module in 'net.attention'" in done.stderr
        assert "FSDPStrategy shards them" in (folder / "refusal.txt").read_text()
        assert (folder / "attention.csv").read_text().count("\n") == 1 + 2 * 12
        results.append(torch.load(folder / "result.pt", weights_only=True))

    (state, metrics), (other_state, other_metrics) = results
    assert_equal_states(state, other_state)
    assert metrics == other_metrics
    assert metrics["anchor/kl"] > 0
