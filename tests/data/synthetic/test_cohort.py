import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mil_anchor.data.synthetic import PRESETS, Size, SyntheticCohort, SyntheticStore

_NAMES = sorted(PRESETS)


def _bytes(cohort, index):
    stored = cohort.read_stored(index)
    entries = (
        stored.features,
        stored.coords.xy,
        stored.instance_label,
        stored.lesion,
        stored.coverage,
    )
    return b"".join(entry.numpy().tobytes() for entry in entries)


def _seventh():
    return _bytes(SyntheticCohort("bracs_like", seed=3), 7)


def test_cohort__any_order_or_length__draws_the_same_bytes():
    cohort = SyntheticCohort("bracs_like", seed=3)
    for index in range(7):
        cohort.read(index)
    again = pickle.loads(pickle.dumps(cohort))
    longer = SyntheticCohort("bracs_like", seed=3, n_slides=500)
    assert _bytes(cohort, 7) == _seventh() == _bytes(again, 7) == _bytes(longer, 7)
    assert longer.labels[:60] == cohort.labels
    assert longer.centres[:60] == cohort.centres


@pytest.mark.slow
def test_cohort__new_process__draws_the_same_bytes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_seventh) == _seventh()


def test_cohort__global_random_state__is_neither_read_nor_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = _seventh()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert _seventh() == first


def test_cohort__other_seed_or_index__draws_others():
    drawn = [_bytes(SyntheticCohort(seed=seed), index) for seed in (0, 1) for index in (0, 8)]
    assert len(set(drawn)) == 4


@settings(derandomize=True, deadline=None, max_examples=40)
@given(name=st.sampled_from(_NAMES), index=st.integers(0, 59), seed=st.integers(0, 5))
def test_cohort__any_slide__is_consistent(name, index, seed):
    cohort = SyntheticCohort(name, seed=seed)
    bag, stored = cohort.read(index), cohort.read_stored(index)
    assert (bag.bag_id, bag.label) == (cohort.bag_ids[index], cohort.labels[index])
    assert torch.equal(bag.features, stored.features)
    assert bag.features.dtype == torch.float32
    assert bag.features.shape == (cohort.plans[index].n_tiles, cohort.width)

    assert int(bag.instance_label.max()) == cohort.true_labels[index]
    assert torch.equal(bag.lesion > 0, bag.instance_label > 0)
    assert torch.equal(stored.coverage > 0, bag.instance_label > 0)
    assert float(stored.coverage.max()) <= 1

    assert (bag.coords.unit, bag.coords.pitch) == ("px", 256)
    cell = bag.coords.xy // 256
    assert torch.equal(cell * 256, bag.coords.xy)
    grid = torch.zeros(*(cell.max(dim=0).values.flip(0) + 1), dtype=torch.int64)
    grid[cell[:, 1], cell[:, 0]] = bag.lesion
    assert len(cell.unique(dim=0)) == len(cell)
    np.testing.assert_array_equal(grid, ndimage.label(grid > 0, np.ones((3, 3)))[0])


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_parts__any_cohort__hold_out_the_last_centre_and_every_class_everywhere(name, size):
    cohort = SyntheticCohort(name, size)
    parts = cohort.parts
    assert sorted(parts.train + parts.val + parts.test) == list(range(len(cohort)))
    assert {cohort.centres[index] for index in parts.test} == {3}
    for part in (parts.train, parts.val):
        met = {(cohort.centres[index], cohort.true_labels[index]) for index in part}
        assert met == {(c, g) for c in range(3) for g in range(len(cohort.classes))}
    assert 0.15 < len(parts.val) / (len(parts.train) + len(parts.val)) < 0.35


@pytest.mark.parametrize("name", _NAMES)
def test_table__any_cohort__agrees_with_the_bags(name):
    cohort = SyntheticCohort(name)
    table = cohort.table
    assert (table.slide_ids, table.labels) == (cohort.bag_ids, cohort.labels)
    assert table.classes == cohort.classes
    assert [i for i, part in enumerate(table.parts) if part == "val"] == cohort.parts.val
    assert len(set(table.cases)) == len(cohort)


def test_cohort__own_preset_and_size__are_taken():
    preset = replace(PRESETS["camelyon_like"], class_names=("no", "yes"))
    cohort = SyntheticCohort(preset, Size(n_slides=9, n_tiles=50, width=8), n_slides=5)
    assert (len(cohort), cohort.classes, cohort.width) == (5, ["no", "yes"], 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"preset": "camelyon"},
            r"preset must be one of \['bracs_like', 'camelyon_like'\], but 'c",
        ),
        ({"size": "huge"}, r"size must be one of .*, but 'huge' came"),
        ({"seed": -1}, "seed must be at least 0, but -1 came"),
        ({"n_slides": 0}, "n_slides must be at least 1, but 0 came"),
    ],
)
def test_cohort__unknown_argument__is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticCohort(**arguments)


def test_store__every_slide__is_that_of_the_cohort():
    cohort = SyntheticCohort("bracs_like", n_slides=12)
    store = SyntheticStore(cohort)
    assert store.slide_ids == cohort.bag_ids
    for index, slide_id in enumerate(store.slide_ids):
        stored = store.read(slide_id)
        assert store.shape(slide_id) == stored.features.shape
        assert store.label(slide_id) == cohort.classes[cohort.labels[index]]
        assert torch.equal(stored.features, cohort.read(index).features)


def test_store__path__names_the_cohort():
    paths = [
        SyntheticStore(cohort).path
        for cohort in (
            SyntheticCohort(),
            SyntheticCohort("camelyon_like"),
            SyntheticCohort(seed=1),
            SyntheticCohort(n_slides=9),
            SyntheticCohort("bracs_like"),
        )
    ]
    assert paths[0] == paths[1]
    assert len(set(paths)) == 4


def test_store__unknown_slide__is_refused_by_name():
    store = SyntheticStore(SyntheticCohort(n_slides=12))
    for read in (store.shape, store.read, store.label):
        with pytest.raises(ValueError, match="'slide_0012' is none of its 12"):
            read("slide_0012")
