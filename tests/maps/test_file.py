import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.bags import Bag, MicrometreCoords, PixelCoords
from mil_anchor.maps.file import MapWriter, read_map, read_maps


def _bag(bag_id="a", n_instances=6, **entries):
    return Bag(torch.ones(n_instances, 2), 1, bag_id, **entries)


def _log_attention(n_rows=2, n_instances=6, *, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(n_rows, n_instances, generator=generator)
    return scores.log_softmax(dim=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "attention.h5"


def test_maps__written_and_read__hold_all_that_is_known_of_a_bag(path):
    coords = MicrometreCoords(torch.arange(12).reshape(6, 2) / 4, 0.5)
    labels, lesion = torch.tensor([0, 1, -1, 2, 0, 1]), torch.tensor([0, 1, 0, 2, 0, 1])
    writer = MapWriter(path)
    writer.add_bag(_bag(coords=coords, instance_label=labels, lesion=lesion), "test")
    writer.add_bag(_bag("bare", 3), "val")
    epochs = {epoch: _log_attention(seed=epoch) for epoch in (0, 2, 10)}
    for epoch, log_attention in epochs.items():
        writer.add_epoch("a", epoch, log_attention)
    writer.add_best("a", epochs[2])

    slide = read_map(path, "a")
    assert (slide.bag_id, slide.label, slide.part) == ("a", 1, "test")
    assert isinstance(slide.coords, MicrometreCoords)
    assert slide.coords.pitch == 0.5
    assert torch.equal(slide.coords.xy, coords.xy)
    assert torch.equal(slide.instance_label, labels)
    assert torch.equal(slide.lesion, lesion)
    assert slide.epochs == [0, 2, 10]
    for epoch, log_attention in {**epochs, None: epochs[2]}.items():
        torch.testing.assert_close(
            slide.attention(epoch), log_attention.exp().mean(dim=0), rtol=0.004, atol=0
        )
        torch.testing.assert_close(
            slide.attention(epoch, row=1), log_attention[1].exp(), rtol=0.004, atol=0
        )
    bare = read_map(path, "bare")
    assert (bare.coords, bare.instance_label, bare.lesion, bare.epochs) == (None, None, None, [])
    assert read_maps(path) == [
        ("a", "test", 1, 6, [0, 2, 10], True),
        ("bare", "val", 1, 3, [], False),
    ]
    assert [file.name for file in path.parent.iterdir()] == ["attention.h5"]


def test_maps__pixel_coords__stay_whole_numbers(path):
    xy = torch.tensor([[0, 256], [100_000_000, 512]], dtype=torch.int32)
    MapWriter(path).add_bag(_bag(n_instances=2, coords=PixelCoords(xy, 256.0)), "val")

    coords = read_map(path, "a").coords
    assert isinstance(coords, PixelCoords)
    assert coords.xy.dtype == torch.int32
    assert torch.equal(coords.xy, xy)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(codec=None), max_size=8), unique=True, max_size=4))
def test_maps__any_text__can_be_an_id(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("maps") / "attention.h5"
    writer = MapWriter(path)
    for position, bag_id in enumerate(ids):
        writer.add_bag(_bag(bag_id, 1 + position), "val")
        writer.add_epoch(bag_id, 0, _log_attention(1, 1 + position))

    assert [kept.bag_id for kept in read_maps(path)] == ids if ids else not path.exists()
    for position, bag_id in enumerate(ids):
        assert len(read_map(path, bag_id).attention(0)) == 1 + position


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.integers(1, 4), st.integers(1, 3000), st.floats(0, 3), st.integers(0, 2**31), st.booleans()
)
def test_maps__any_attention__keeps_weights_within_4_permille(
    tmp_path_factory, n_rows, n_instances, scale, seed, zero
):
    path = tmp_path_factory.mktemp("maps") / "attention.h5"
    log_attention = _log_attention(n_rows, n_instances, seed=seed, scale=scale)
    if zero and n_instances > 1:
        log_attention[:, 0] = -torch.inf
        log_attention = log_attention.log_softmax(dim=1)
    writer = MapWriter(path)
    writer.add_bag(_bag(n_instances=n_instances), "val")
    writer.add_best("a", log_attention)

    expected, kept = log_attention.exp(), read_map(path, "a")
    for row in range(n_rows):
        read = kept.attention(None, row=row)
        above = expected[row] > 1.2e-7
        assert ((read - expected[row])[above].abs() < 0.004 * expected[row][above]).all()
        assert (read[~above] <= 1.21e-7).all()
        assert ((expected[row] == 0) == (read == 0)).all()
        assert abs(float(read.double().sum()) - 1) < 0.004


def test_map_writer__epoch_written_twice__keeps_the_later_one(path):
    writer = MapWriter(path)
    writer.add_bag(_bag(), "val")
    writer.add_epoch("a", 0, _log_attention(1, seed=0))
    writer.add_epoch("a", 0, _log_attention(3, seed=1))

    torch.testing.assert_close(
        read_map(path, "a").attention(0),
        _log_attention(3, seed=1).exp().mean(dim=0),
        rtol=0.004,
        atol=0,
    )


def test_map_writer__resumed_run__forgets_what_it_repeats(path):
    writer = MapWriter(path)
    for bag_id in ("a", "b"):
        writer.add_bag(_bag(bag_id), "val")
        for epoch in (0, 1, 2, 10):
            writer.add_epoch(bag_id, epoch, _log_attention())
        writer.add_best(bag_id, _log_attention())

    resumed = MapWriter(path)
    resumed.drop_epochs_from(2)
    resumed.add_bag(_bag("a"), "val")

    assert [(kept.epochs, kept.has_best) for kept in read_maps(path)] == [([0, 1], False)] * 2


def test_map_writer__nothing_to_forget__makes_no_file(path):
    MapWriter(path).drop_epochs_from(0)
    assert not path.parent.exists()


def test_map_writer__bag_without_maps_in_another_size__takes_its_place(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    writer.add_bag(_bag("b"), "val")
    writer.drop_epochs_from(0)
    writer.add_bag(_bag("a", 9), "val")
    writer.add_bag(_bag("c"), "val")

    assert [(kept.bag_id, kept.n_instances) for kept in read_maps(path)] == [
        ("b", 6),
        ("a", 9),
        ("c", 6),
    ]


def test_map_writer__bag_with_maps_in_another_size__is_refused(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    writer.add_epoch("a", 0, _log_attention())
    with pytest.raises(ValueError, match="bag 'a' came with 9 and has maps of 6"):
        writer.add_bag(_bag("a", 9), "val")
    assert read_map(path, "a").epochs == [0]


def test_map_writer__unknown_bag__lists_the_kept_ones(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a/1"), "val")
    with pytest.raises(ValueError, match=r"'b' is none of \['a/1'\]"):
        writer.add_epoch("b", 0, _log_attention())
    assert [kept.bag_id for kept in read_maps(path)] == ["a/1"]


def test_map_writer__padding_left_in__is_refused(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    with pytest.raises(ValueError, match="bag 'a' has 6 instances and 8 columns came"):
        writer.add_epoch("a", 0, _log_attention(n_instances=8))


@pytest.mark.parametrize(
    "log_attention",
    [torch.zeros(2, 6), torch.full((2, 6), float("nan")), torch.zeros(0, 6), -torch.ones(1, 6)],
    ids=["scores", "nan", "no row", "weights"],
)
def test_map_writer__no_log_of_a_distribution__is_refused(path, log_attention):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    with pytest.raises(ValueError, match="log of weights that sum to 1, but for bag 'a'"):
        writer.add_epoch("a", 0, log_attention)


def test_map_writer__negative_epoch__is_refused(path):
    with pytest.raises(ValueError, match="from 0, but -1 came for bag 'a'"):
        MapWriter(path).add_epoch("a", -1, _log_attention())


@pytest.mark.slow
def test_map_writer__killed_while_writing__begins_anew_with_a_warning(path):
    MapWriter(path).add_bag(_bag("a"), "val")
    # The second map of an epoch takes the place of the first: there the process hangs, mid-write.
    script = f"""
import time
from dataclasses import replace
from pathlib import Path
import h5py, torch
from mil_anchor.maps.file import MapWriter
h5py.Group.__delitem__ = lambda group, name: (print("writing", flush=True), time.sleep(60))
writer = MapWriter(Path({str(path)!r}))
writer.add_epoch("a", 0, torch.full((1, 6), 1 / 6).log())
writer.add_epoch("a", 0, torch.full((1, 6), 1 / 6).log())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(ValueError, match="there is no such file"):
        read_maps(path)

    writer = MapWriter(path)
    with pytest.warns(
        UserWarning, match="its writer was stopped while writing.*attention.h5.broken"
    ):
        writer.drop_epochs_from(1)
    writer.add_bag(_bag("a"), "val")
    writer.add_epoch("a", 1, _log_attention())
    assert read_map(path, "a").epochs == [1]
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["attention.h5", "attention.h5.broken"]


def test_map_writer__ctrl_c_while_writing__keeps_what_was_written(path):
    class Interrupting(PixelCoords):
        @property
        def unit(self):
            raise KeyboardInterrupt

    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    writer.add_epoch("a", 0, _log_attention())
    bag = _bag("b")
    stopped = replace(bag, coords=Interrupting(torch.zeros(6, 2), 1.0))
    with pytest.raises(KeyboardInterrupt):
        writer.add_bag(stopped, "val")

    assert [(kept.bag_id, kept.epochs) for kept in read_maps(path)] == [("a", [0])]
    writer.add_bag(bag, "test")
    assert [kept.part for kept in read_maps(path)] == ["val", "test"]


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_map_writer__damaged_file__is_set_aside_with_a_warning(path, keep):
    writer = MapWriter(path)
    writer.add_bag(_bag("a", 2000), "val")
    for epoch in range(5):
        writer.add_epoch("a", epoch, _log_attention(n_instances=2000))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"cannot be read \(.*truncated file"):
        read_maps(path)

    with pytest.warns(UserWarning, match=r"cannot be continued \(.*truncated file"):
        writer.add_bag(_bag("a", 2000), "val")
    assert read_map(path, "a").epochs == []


def test_map_writer__file_that_may_not_be_read__is_left_alone(path, monkeypatch):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        writer.add_bag(_bag("b"), "val")
    monkeypatch.undo()
    assert [kept.bag_id for kept in read_maps(path)] == ["a"]


def test_map_writer__file_open_in_the_same_process__is_left_alone(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    with h5py.File(path, "r", locking=False), pytest.raises(OSError, match="already open"):
        writer.add_bag(_bag("b"), "val")
    assert [kept.bag_id for kept in read_maps(path)] == ["a"]


def test_map_writer__another_process_reads__writes_on(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    script = f"import h5py; file = h5py.File({str(path)!r}); print(flush=True); input()"
    reader = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdout.readline() == b"\n"
    writer.add_epoch("a", 0, _log_attention())
    reader.communicate(b"\n")
    assert read_map(path, "a").epochs == [0]


def test_read_maps__no_file__says_so(path):
    with pytest.raises(ValueError, match=r"attention.h5, but there is no such file"):
        read_maps(path)


def test_read_maps__other_hdf5_file__is_refused(tmp_path):
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = [1.0]
    with pytest.raises(ValueError, match="must be a file of attention maps"):
        read_maps(tmp_path / "features.h5")


def test_read_map__unknown_slide__lists_the_kept_ones(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    writer.add_bag(_bag("b"), "test")
    with pytest.raises(ValueError, match=r"'c' came and there are \['a', 'b'\]"):
        read_map(path, "c")


def test_slide_map__epoch_not_kept__lists_the_kept_ones(path):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    writer.add_epoch("a", 0, _log_attention())
    writer.add_epoch("a", 5, _log_attention())
    slide = read_map(path, "a")
    with pytest.raises(
        ValueError, match=r"bag 'a', but epoch 3 came and there are \[0, 5\] and no chosen"
    ):
        slide.attention(3)
    with pytest.raises(ValueError, match="the chosen checkpoint came"):
        slide.attention(None)


@pytest.mark.parametrize("row", [-1, 2])
def test_slide_map__unknown_row__is_refused(path, row):
    writer = MapWriter(path)
    writer.add_bag(_bag("a"), "val")
    writer.add_epoch("a", 0, _log_attention())
    with pytest.raises(ValueError, match=rf"one of 0..1 .* bag 'a', but {row} came"):
        read_map(path, "a").attention(0, row=row)


@pytest.mark.slow
def test_map_writer__all_test_slides_of_camelyon16__take_seconds(path):
    writer = MapWriter(path)
    log_attention = _log_attention(1, 8000)
    for number in range(129):
        writer.add_bag(_bag(str(number), 8000), "test")
    start = time.perf_counter()
    for number in range(129):
        writer.add_epoch(str(number), 0, log_attention)
    assert time.perf_counter() - start < 5  # measured: about a second on a busy core
