import json
import logging
import sys

import pytest
import torch

from benchmarks import (
    first_step,
    growth,
    loop,
    memory,
    modes,
    peers,
    plugin,
    read_bag,
    scope,
    sweep,
)
from benchmarks.record import machine
from benchmarks.timing import again

DSMIL = "DSMIL 1024"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script for one round and returns what it has written."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch")]
    before = [logger.level for logger in loggers], torch.get_num_threads()

    def run_script(script, *options, **constants):
        name = script.__name__.rpartition(".")[2]
        for key, value in constants.items():
            monkeypatch.setattr(script, key, value)
        monkeypatch.setattr(
            sys, "argv", [name, "--rounds", "1", "--folder", str(tmp_path), *options]
        )
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
    floor = written["ratios"][f"{DSMIL}, 30, floor"]
    assert floor["milliseconds"] > floor["reference_milliseconds"]
    assert floor["reference_milliseconds"] == row["reference_milliseconds"]
    assert floor["ratio"] == pytest.approx(floor["milliseconds"] / floor["reference_milliseconds"])
    assert written["rounds"] == 1
    out = capsys.readouterr().out
    assert "bfloat16" in out
    assert DSMIL in out


def test_multiplies_in_bf16__device_without_it__is_false():
    assert not plugin.multiplies_in_bf16("meta")


@pytest.mark.skipif(not plugin.multiplies_in_bf16("cpu"), reason="no bfloat16 here")
def test_plugin__bfloat16__has_a_ratio_of_its_own(run):
    written = run(plugin, CASES=((DSMIL, 30),))
    keys = (f"{DSMIL}, 30", f"{DSMIL}, 30, bf16")
    assert list(written["ratios"]) == [key + end for key in keys for end in ("", ", floor")]


def test_peers__two_peers__compares_ours_with_each(run):
    written = run(peers, TABLES=((DSMIL, ("torchmil DSMIL 1024", "textbook DSMIL 1024"), 30),))
    keys = [f"{DSMIL} / torchmil DSMIL 1024, 30", f"{DSMIL} / textbook DSMIL 1024, 30"]
    floor = f"products of {DSMIL} + step on 10 tiles / torchmil DSMIL 1024, 30"
    assert list(written["ratios"]) == [*keys, floor]
    ratios = written["ratios"]
    assert ratios[floor]["reference_milliseconds"] == ratios[keys[0]]["reference_milliseconds"]


def test_modes__one_model__compares_each_with_float32(run):
    # Compiling takes long, and does not see through the checks of shapes that tests run with.
    asked = {mode: options for mode, options in modes.MODES.items() if "compiles" not in options}
    written = run(modes, MODELS=(DSMIL,), N_INSTANCES=30, MODES=asked)
    assert list(written["ratios"]) == [f"{DSMIL}, bf16-mixed"]


def test_scope__one_model__compares_each_scope_with_the_bare_model(run):
    made = {"dsmil": scope.MODELS["dsmil"]}
    written = run(scope, "--instances", "30", "--width", "8", MODELS=made)
    assert written["models"] == ["dsmil"]
    block, encoder = (written["ratios"][f"dsmil, {name}"] for name in ("block", "encoder"))
    assert 0 < block["mirrored_parameters"] < encoder["mirrored_parameters"]
    assert block["reference_milliseconds"] == encoder["reference_milliseconds"]


def test_first_step__few_steps__tells_the_first_from_later_ones(run):
    written = run(first_step, "--steps", "3", "--instances", "30", "--width", "8")
    assert list(written["ratios"]) == list(first_step.VARIANTS)
    assert all(row["first_milliseconds"] > 0 for row in written["ratios"].values())
    assert written["ratios"]["bare"]["ratio"] == 1


def test_read_bag__small_bags__compares_with_a_copy(run):
    written = run(read_bag, BAGS=((50, 8),))
    row = written["ratios"]["read, 50 x 8"]
    assert row["milliseconds"] == written["sizes"]["50 x 8"]["packed float32"]["cpu_ms"]


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


SCRIPTS = (plugin, peers, memory, growth, modes, scope, first_step, read_bag, loop, sweep)


@pytest.mark.parametrize("script", SCRIPTS)
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


def test_script__that_measures_no_gpu__offers_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loop", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        loop.main()
    assert "unrecognized arguments: --device cuda" in capsys.readouterr().err


def test_machine__here__names_processor_peers_and_date():
    assert {"processor", "n_cores", "torch", "torchmil", "monai", "date"} <= machine().keys()


def test_again__name__is_told_apart():
    assert again("bare") == "bare again"
