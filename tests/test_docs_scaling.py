"""Generated parts of docs/scaling.md."""

import pytest

from benchmarks.goals import read_measured
from benchmarks.record import FOLDER
from docs.scaling import PAGE, TABLE_MODELS, limits, page, price, steps, widths

MACHINE = {"processor": "An abacus", "torch": "2.13.0"}


@pytest.fixture
def measured():
    model = {
        "milliseconds": {"1000": 36.0, "10000": 360.0},
        "megabytes": {"1000": 9.5, "10000": 95.0},
    }
    abmil = {
        f"ABMIL {widths} / torchmil ABMIL {widths}, {size}": {"milliseconds": size * factor}
        for widths, factor in (("384-128-128", 0.01), ("1024-512-128", 0.05))
        for size in (1000, 10_000)
    }
    fit = {"milliseconds": 600.0, "reference_milliseconds": 450.0}
    loop = {"epochs": 3, "train_bags": 80, "val_bags": 20}
    return {
        "growth": {"machine": MACHINE, "models": dict.fromkeys(TABLE_MODELS, model)},
        "peers": {"ratios": abmil},
        "loop": {**loop, "ratios": {"bare Trainer, 10 tiles": fit}},
        "sweep": {"ratios": {"joblib": {"ratio": 0.5}}},
        "read_bag": {
            "sizes": {
                "10000 x 1024": {
                    "packed float32": {"cpu_ms": 9.0},
                    "packed float32, mapped": {"cpu_ms": 0.9},
                }
            }
        },
    }


def test_steps__model__has_seconds_and_megabytes(measured):
    text = steps(measured)
    assert "One thread of An abacus, torch 2.13.0" in text
    assert "| DSMIL 1024 | 0.036 (10) | 0.36 (95) |" in text


def test_widths__two_models__are_compared(measured):
    assert "| 384-128-128 | 0.01 | 0.1 |\n| 1024-512-128 | 0.05 | 0.5 |" in widths(measured)


def test_price__workers_without_loss__share_the_hours(measured, monkeypatch):
    text = price(measured)
    (n_epochs,) = {int(word) for word in text.partition(" epochs")[0].split()[-1:]}
    one = 3 * 5 * 500 * n_epochs * 0.36 / 3600
    cells = (f"{one / n:,.1f}" for n in (1, 2, 8, 64))
    assert f"| DSMIL 1024 | {' | '.join(cells)} |" in text
    assert f"| all | {4 * one:,.1f} |" in text


def test_price__one_worker__is_singular(measured):
    assert "| model | 1 worker (h) | 2 workers (h) | 8 workers (h) |" in price(measured)


def test_price__two_workers_that_lose__cost_more(measured):
    measured["sweep"]["ratios"]["joblib"]["ratio"] = 0.625
    assert "two of them have done 1.60 times the work of one" in price(measured)


def test_limits__reading_and_loop__are_shares_of_a_step(measured):
    text = limits(measured)
    assert f"| reading the bag, repacked as float32 | 9.00 |{' 2.5% |' * 4}" in text
    assert f"| Lightning's loop, beyond a plain one | 0.50 |{' 0.1% |' * 4}" in text


def test_page__committed__is_what_the_committed_figures_give():
    text = PAGE.read_text()
    assert page(text, read_measured(FOLDER)) == text, "run: python -m docs.scaling"
