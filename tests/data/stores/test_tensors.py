import numpy as np
import pytest
import torch

from mil_anchor.data.stores import open_store
from tests.data.stores import layouts


def _save(folder, value, **options):
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / "s.1.pt", **options)
    return open_store(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensor_store__both_formats_of_torch__are_read(zipped, tmp_path):
    features = torch.from_numpy(layouts.features_of("s.1"))
    store = _save(tmp_path, features, _use_new_zipfile_serialization=zipped)
    assert store.shape("s.1") == (5, layouts.WIDTH)
    assert torch.equal(store.read("s.1").features, features)
    assert store.read("s.1").coords is None


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_tensor_store__other_dtypes__are_float16_or_float32(dtype, stored, tmp_path):
    store = _save(tmp_path, torch.ones(3, 4, dtype=dtype))
    assert store.read_stored("s.1").features.dtype == stored
    assert store.read("s.1").features.dtype == torch.float32


def test_tensor_store__parameter_with_leading_axis__is_a_plain_bag(tmp_path):
    store = _save(tmp_path, torch.nn.Parameter(torch.ones(1, 1, 4)))
    features = store.read("s.1").features
    assert features.shape == (1, 4)
    assert not features.requires_grad


def test_tensor_store__whole_numbers__are_no_features(tmp_path):
    with pytest.raises(ValueError, match=r"slide 's.1' has torch.int64"):
        _save(tmp_path, torch.ones(3, 4, dtype=torch.int64)).read("s.1")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensor_store__file_cut_off__names_slide_and_file(zipped, tmp_path):
    store = _save(tmp_path, torch.ones(300, 4), _use_new_zipfile_serialization=zipped)
    path = tmp_path / "s.1.pt"
    whole = path.read_bytes()
    for content in (b"", b"text", *(whole[:size] for size in range(10, len(whole), 199))):
        path.write_bytes(content)
        for look in (store.shape, store.read):
            with pytest.raises(ValueError, match=r"torch.load .* slide 's.1' in .*s.1.pt is not"):
                look("s.1")


class _Arbitrary:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_tensor_store__code_in_the_file__is_not_run(tmp_path, capsys):
    store = _save(tmp_path, _Arbitrary())
    # Torch's own advice, to load the code, is not passed on.
    with pytest.raises(
        ValueError, match=r"slide 's.1' in .* is not: Weights only load failed\. Copy"
    ):
        store.read("s.1")
    assert capsys.readouterr().out == ""


def test_tensor_store__no_tensor__is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"one tensor, but slide 's.1' holds a dict"):
        _save(tmp_path, {"features": torch.ones(2, 3)}).read("s.1")


def test_tensor_store__empty_slide__is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"at least one tile, but slide 's.1'"):
        _save(tmp_path, torch.empty(0, 8)).shape("s.1")


def test_tensor_store__slideflow_centres__become_corners(tmp_path):
    layouts.write_slideflow(tmp_path, "s.1", 7)
    coords = open_store(tmp_path).read("s.1").coords
    assert coords.xy.dtype == torch.int64
    assert np.array_equal(coords.xy, layouts.grid(7))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4"])
def test_tensor_store__slideflow_index_broken__names_slide_and_file(content, tmp_path):
    layouts.write_slideflow(tmp_path, "s.1")
    (tmp_path / "s.1.index.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"of slide 's.1' in .*s.1.index.npz cannot be read"):
        open_store(tmp_path).read("s.1")


def test_tensor_store__slideflow_index_without_its_array__names_slide_and_file(tmp_path):
    layouts.write_slideflow(tmp_path, "s.1")
    np.savez(tmp_path / "s.1.index.npz", other=np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"of slide 's.1' in .*s.1.index.npz cannot be read"):
        open_store(tmp_path).read("s.1")


def test_tensor_store__slideflow_index_of_other_length__names_the_slide(tmp_path):
    layouts.write_slideflow(tmp_path, "s.1")
    np.savez(tmp_path / "s.1.index.npz", np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"slide 's.1' has shape \(4, 2\) for 5 tiles"):
        open_store(tmp_path).read("s.1")
