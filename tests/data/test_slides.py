import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader
from typing_extensions import override

from mil_anchor.data.bags import PixelCoords, collate_bags
from mil_anchor.data.memory import MemoryBudget
from mil_anchor.data.repack import repack
from mil_anchor.data.slides import SlideBags
from mil_anchor.data.stores import BagShape, Store, StoredBag, open_store
from tests.data.stores import layouts

SLIDES = ["a", "b", "c", "d"]


class _CountingStore(Store):
    """float16 slides of 4 tiles x 8 features that notes what is read. 64 bytes each."""

    layout = "test"

    def __init__(self, path, slide_ids=SLIDES):
        super().__init__(path)
        self.reads = []
        self._slide_ids = slide_ids

    @property
    @override
    def slide_ids(self):
        return self._slide_ids

    @override
    def shape(self, slide_id):
        return BagShape(4, 8)

    @override
    def read_stored(self, slide_id):
        self.reads.append(slide_id)
        features = torch.from_numpy(layouts.features_of(slide_id, 4)).half()
        return StoredBag(slide_id, features, lesion=torch.zeros(4, dtype=torch.int64))


N_BYTES = 4 * 8 * 2 + 4 * 8


def _bags(path, **options):
    store = _CountingStore(path)
    return SlideBags(store, SLIDES, [0, 1, 0, 1], **options), store


def test_slide_bags__slides_and_labels__are_bags(tmp_path):
    layouts.write_torchmil(tmp_path, "a.1", 4)
    layouts.write_torchmil(tmp_path, "b", 2)
    bags = SlideBags(open_store(tmp_path), ["b", "a.1"], [2, 0])
    assert (bags.bag_ids, bags.labels, bags.width) == (["b", "a.1"], [2, 0], layouts.WIDTH)
    bag = bags[-1]
    assert (bag.bag_id, bag.label) == ("a.1", 0)
    assert np.array_equal(bag.features, layouts.features_of("a.1", 4))
    assert type(bag.coords) is PixelCoords
    assert bag.coords.pitch == 256
    assert bag.instance_label.tolist() == [0, 1, 0, 1]
    assert [bag.bag_id for bag in bags] == ["b", "a.1"]


def test_slide_bags__nothing_kept__reads_each_time(tmp_path):
    bags, store = _bags(tmp_path)
    for _ in range(2):
        assert bags[1].features.dtype == torch.float32
    assert store.reads == ["b", "b"]
    assert bags[1].lesion.tolist() == [0, 0, 0, 0]


def test_slide_bags__kept__reads_once_and_holds_the_stored_dtype(tmp_path):
    budget = MemoryBudget(keep_in_memory=True)
    bags, store = _bags(tmp_path, keep=budget)
    first, second = bags[1], bags[1]
    assert store.reads == ["b"]
    assert torch.equal(first.features, second.features)
    assert second.features.dtype == torch.float32
    assert budget.used == N_BYTES


@pytest.mark.parametrize(("dtype", "once"), [("float32", True), ("float16", False)])
def test_slide_bags__kept__is_checked_once_where_nothing_is_converted(tmp_path, dtype, once):
    layouts.write_uni2(tmp_path / "source", "a")
    repack(open_store(tmp_path / "source"), tmp_path / "a.h5", dtype=dtype, progress=False)
    store = open_store(tmp_path / "a.h5")
    kept = SlideBags(store, ["a"], [1], keep=MemoryBudget(keep_in_memory=True))
    bag = kept[0]
    assert (kept[0] is bag) == once
    assert torch.equal(kept[0].features, store.read("a").features)
    passing = SlideBags(store, ["a"], [1])
    assert passing[0] is not passing[0]


def test_slide_bags__budget_for_two__keeps_two_and_reads_the_rest(tmp_path):
    budget = MemoryBudget(keep_in_memory=(2 * N_BYTES + 10) / 1e9)
    bags, store = _bags(tmp_path, keep=budget)
    for _ in range(3):
        for slide_id, bag in zip(SLIDES, bags, strict=True):
            assert np.array_equal(bag.features, layouts.features_of(slide_id, 4))
    assert [store.reads.count(slide_id) for slide_id in SLIDES] == [1, 1, 3, 3]
    assert budget.used <= budget.limit


def test_slide_bags__budget_shared_by_parts__holds_for_all_together(tmp_path):
    budget = MemoryBudget(keep_in_memory=3 * N_BYTES / 1e9)
    train, train_store = _bags(tmp_path, keep=budget)
    val, val_store = _bags(tmp_path, keep=budget)
    for _ in range(2):
        _ = train[0], train[1], val[0], val[1]
    assert train_store.reads == ["a", "b"]
    assert val_store.reads == ["a", "b", "b"]


def test_slide_bags__preload__reads_what_fits_once(tmp_path):
    bags, store = _bags(tmp_path, keep=MemoryBudget(keep_in_memory=True))
    assert bags.preload(progress=False) == 4
    assert bags.preload(progress=False) == 4
    _ = bags[:]
    assert store.reads == SLIDES


def test_slide_bags__preload_with_a_small_budget__stops_at_the_first_that_does_not_fit(tmp_path):
    bags, store = _bags(tmp_path, keep=MemoryBudget(keep_in_memory=1.5 * N_BYTES / 1e9))
    assert bags.preload(progress=False) == 1
    assert store.reads == ["a", "b"]


def test_slide_bags__preload_without_budget__reads_nothing(tmp_path):
    bags, store = _bags(tmp_path)
    assert bags.preload() == 0
    assert store.reads == []


def test_slide_bags__preload__shows_a_bar_that_can_be_switched_off(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    bags, _ = _bags(tmp_path, keep=MemoryBudget(keep_in_memory=True))
    bags.preload()
    assert "Reading slides" in capsys.readouterr().err
    bags.preload(progress=False)
    assert capsys.readouterr().err == ""


def test_slide_bags__pickled__takes_no_kept_bags_along(tmp_path):
    budget = MemoryBudget(keep_in_memory=True)
    bags, _ = _bags(tmp_path, keep=budget)
    empty = len(pickle.dumps(bags))
    bags.preload(progress=False)
    copy = pickle.loads(pickle.dumps(bags))
    assert len(pickle.dumps(bags)) < empty + 100
    assert torch.equal(copy[2].features, bags[2].features)
    assert budget.used == 4 * N_BYTES


def test_slide_bags__labels_of_other_number__are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 labels came for 4 slides"):
        SlideBags(_CountingStore(tmp_path), SLIDES, [0, 1])


def test_slide_bags__slides_that_do_not_fit__are_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 3 are not in .*: 'x', 'y'"):
        SlideBags(_CountingStore(tmp_path), ["x", "a", "y"], [0, 1, 0])
    layouts.write_uni2(tmp_path, "a")
    layouts.write_hdf5(tmp_path / "b.h5", {"features": np.ones((2, 4), np.float32)})
    with pytest.raises(ValueError, match=r"must have one feature width, but .* 4 in 1 slides 'b'"):
        SlideBags(open_store(tmp_path), ["a", "b"], [0, 1])


def test_slide_bags__forked_workers__share_what_the_parent_kept(tmp_path):
    bags, store = _bags(tmp_path, keep=MemoryBudget(keep_in_memory=2.5 * N_BYTES / 1e9))
    assert bags.preload(progress=False) == 2
    reads_before = 3  # the third did not fit
    loader = DataLoader(
        _Watched(bags, store), num_workers=2, batch_size=None, multiprocessing_context="fork"
    )
    for _ in range(2):
        reads = dict(iter(loader))
        # Each worker counts on from the parent: it reads one of the kept slides, which adds
        # nothing, and one of the others.
        assert {slide_id: n - reads_before for slide_id, n in reads.items()} == {
            "a": 0,
            "b": 0,
            "c": 1,
            "d": 1,
        }
    assert bags.preload(progress=False) == 2


def test_slide_bags__worker__keeps_nothing_of_its_own(tmp_path):
    bags, store = _bags(tmp_path, keep=MemoryBudget(keep_in_memory=True))
    loader = DataLoader(
        _Watched(bags, store),
        num_workers=1,
        batch_size=None,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    assert [max(dict(iter(loader)).values()) for _ in range(2)] == [4, 8]


class _Watched(torch.utils.data.Dataset):
    """Gives, for each bag, its id and how many bags its process has read, itself included."""

    def __init__(self, bags, store):
        self._bags, self._store = bags, store

    def __len__(self):
        return len(self._bags)

    def __getitem__(self, index):
        bag = self._bags[index]
        return bag.bag_id, len(self._store.reads)


@pytest.mark.parametrize(
    "context",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow)],  # two processes import torch
)
def test_slide_bags__workers_after_the_parent_has_read__read_every_store(context, tmp_path):
    for name, writer in layouts.WRITERS.items():
        for slide_id in SLIDES:
            writer(tmp_path / name, slide_id, 4)
    repack(open_store(tmp_path / "uni2"), tmp_path / "packed.h5", progress=False)
    layouts.write_acmil(tmp_path / "acmil.h5", dict.fromkeys(SLIDES, 4))
    parts = [
        SlideBags(open_store(tmp_path / name), SLIDES, [0, 1, 0, 1])
        for name in (*layouts.WRITERS, "packed.h5", "acmil.h5")
    ]
    expected = [bag.features for part in parts for bag in part]
    loader = DataLoader(
        ConcatDataset(parts),
        num_workers=2,
        collate_fn=collate_bags,
        multiprocessing_context=context,
    )
    for features, batch in zip(expected, loader, strict=True):
        assert torch.equal(batch["features"][0], features)
    # The parent's own handle still works.
    assert torch.equal(parts[-1][3].features, expected[-1])
