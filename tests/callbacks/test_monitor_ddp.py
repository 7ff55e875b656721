import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

from mil_anchor.callbacks.monitor import MEASURES, read_attention
from tests.callbacks.ddp_monitor import N_BAGS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_monitor__two_processes__write_each_bag_once_and_resume_exactly(tmp_path):
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.ddp_monitor", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    files = {name: tmp_path / name / "attention.csv" for name in ("all", "three", "resumed")}
    ids = [f"bag{index}_0" for index in range(N_BAGS)]
    for name, expected in (("all", ids), ("three", ids[:3])):
        rows = read_attention(files[name])
        for epoch in range(4):
            assert sorted(row.bag_id for row in rows if row.epoch == epoch) == expected
        assert all((row.jsd is None) == (row.epoch == 0) for row in rows)
    assert files["resumed"].read_bytes() == files["three"].read_bytes()
    one, other = (torch.load(tmp_path / "all" / f"logged{rank}.pt") for rank in range(2))
    assert one == other
    rows = [row for row in read_attention(files["all"]) if row.epoch == 3]
    defined = [name for name in MEASURES if getattr(rows[0], name) is not None]
    means = {f"attention/{name}": fmean(getattr(row, name) for row in rows) for name in defined}
    assert one == pytest.approx(means, rel=1e-6)
