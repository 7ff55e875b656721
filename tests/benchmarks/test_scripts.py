import json
import logging
import sys

import pytest
import torch

from benchmarks import growth, memory, modes, peers, plugin
from benchmarks.record import machine
from benchmarks.timing import again

DSMIL = "DSMIL 1024"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script for one round and returns what it has written."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch")]
    before = [logger.level for logger in loggers], torch.get_num_threads()

    def run_script(script, **constants):
        name = script.__name__.rpartition(".")[2]
        for key, value in constants.items():
            monkeypatch.setattr(script, key, value)
        monkeypatch.setattr(sys, "argv", [name, "--rounds", "1", "--folder", str(tmp_path)])
        script.main()
        return json.loads((tmp_path / f"{name}.json").read_text())

    yield run_script
    for logger, level in zip(loggers, before[0], strict=True):
        logger.setLevel(level)
    torch.set_num_threads(before[1])


def test_plugin__one_model__writes_its_ratio_and_control(run, capsys):
    written = run(plugin, CASES=((DSMIL, 30),), multiplies_in_bf16=lambda _: False)
    row = written["ratios"][f"{DSMIL}, 30"]
    assert row["ratio"] == pytest.approx(row["milliseconds"] / row["reference_milliseconds"])
    assert row["control"] > 0
    assert written["rounds"] == 1
    out = capsys.readouterr().out
    assert "bfloat16" in out
    assert DSMIL in out


def test_multiplies_in_bf16__device_without_it__is_false():
    assert not plugin.multiplies_in_bf16("meta")


@pytest.mark.skipif(not plugin.multiplies_in_bf16("cpu"), reason="no bfloat16 here")
def test_plugin__bfloat16__has_a_ratio_of_its_own(run):
    written = run(plugin, CASES=((DSMIL, 30),))
    assert list(written["ratios"]) == [f"{DSMIL}, 30", f"{DSMIL}, 30, bf16"]


def test_peers__two_peers__compares_ours_with_each(run):
    written = run(peers, TABLES=((DSMIL, ("torchmil DSMIL 1024", "textbook DSMIL 1024"), 30),))
    keys = [f"{DSMIL} / torchmil DSMIL 1024, 30", f"{DSMIL} / textbook DSMIL 1024, 30"]
    assert list(written["ratios"]) == [*keys, f"products of {DSMIL} / torchmil DSMIL 1024, 30"]


def test_modes__one_model__compares_each_with_float32(run):
    # Compiling takes long, and does not see through the checks of shapes that tests run with.
    asked = {mode: options for mode, options in modes.MODES.items() if "compiles" not in options}
    written = run(modes, MODELS=(DSMIL,), N_INSTANCES=30, MODES=asked)
    assert list(written["ratios"]) == [f"{DSMIL}, bf16-mixed"]


@pytest.mark.slow
def test_memory__one_model_and_peer__writes_both_ratios(run):
    pairs = ((DSMIL, "torchmil DSMIL 1024"),)
    written = run(memory, MODELS=(DSMIL,), PAIRS=pairs, N_INSTANCES=2000)
    assert list(written["ratios"]) == [f"{DSMIL}, plug-in", f"{DSMIL} / torchmil DSMIL 1024"]
    assert all(row["megabytes"] > 0 for row in written["ratios"].values())


def test_growth__one_model__compares_a_tile_of_the_largest_bag(run, monkeypatch):
    def peaks(runs, **_):
        return [run.n_instances / 1000 for run in runs]

    monkeypatch.setattr(growth, "training_peaks", peaks)
    sizes = (20, 40, 80)
    written = run(growth, MODELS=(DSMIL,), SIZES=sizes, REFERENCE=40, LARGEST=80)
    milliseconds = written["models"][DSMIL]["milliseconds"]
    row = written["ratios"][f"{DSMIL}, time"]
    assert row["ratio"] == pytest.approx(milliseconds["80"] / milliseconds["40"] / 2)
    assert written["ratios"][f"{DSMIL}, memory"] == {"ratio": 1.0, "control": 1.0}


@pytest.mark.parametrize("script", [plugin, peers, memory, growth, modes])
def test_script__help__says_what_it_measures(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--help"])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    assert f"python -m {script.__name__}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is skipped only without a GPU")
def test_script__cuda_without_a_gpu__is_skipped_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plugin", "--device", "cuda"])
    with pytest.raises(SystemExit, match="0"):
        plugin.main()
    assert "Skipped: --device cuda needs a CUDA GPU" in capsys.readouterr().out


def test_machine__here__names_processor_peers_and_date():
    assert {"processor", "n_cores", "torch", "torchmil", "monai", "date"} <= machine().keys()


def test_again__name__is_told_apart():
    assert again("bare") == "bare again"
