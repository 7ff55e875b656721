import h5py
import numpy as np
import pytest
import torch

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.data.repack import repack
from mil_anchor.data.stores import open_store
from tests.data.stores import layouts

# Ids contain dots: only one suffix is cut.
SLIDES = {"TCGA-2J-AAB1.01.DX1": 5, "normal_001": 1, "b.pt": 40}


@pytest.mark.parametrize("name", layouts.WRITERS)
def test_open_store__each_layout__gives_the_same_bags(name, tmp_path):
    for slide_id, n_instances in SLIDES.items():
        layouts.WRITERS[name](tmp_path, slide_id, n_instances)
    store = open_store(str(tmp_path))
    assert store.slide_ids == sorted(SLIDES)
    for slide_id, n_instances in SLIDES.items():
        assert store.shape(slide_id) == (n_instances, layouts.WIDTH)
        stored = store.read(slide_id)
        assert stored.slide_id == slide_id
        assert stored.features.dtype == torch.float32
        expected = layouts.features_of(slide_id, n_instances)
        assert np.array_equal(stored.features.numpy(), expected)
        assert store.file(slide_id).name.startswith(slide_id)


@pytest.mark.parametrize(
    ("name", "kind", "pitch", "dtype"),
    [
        ("clam_h5", PixelCoords, 256, torch.int32),
        ("trident", PixelCoords, 512, torch.int64),
        ("trident_f16", PixelCoords, 512, torch.int64),
        ("uni2", PixelCoords, 256, torch.int64),
        ("stamp", MicrometreCoords, 256, torch.float64),
        ("torchmil", PixelCoords, 256, torch.int64),
        ("torchmil_h5", PixelCoords, 256, torch.int64),
        ("torchmil_h5_folders", PixelCoords, 256, torch.int64),
        ("slideflow", PixelCoords, 256, torch.int64),
    ],
)
def test_open_store__each_layout_with_coords__says_their_unit_and_pitch(
    name, kind, pitch, dtype, tmp_path
):
    layouts.WRITERS[name](tmp_path, "s", 7)
    coords = open_store(tmp_path).read("s").coords
    assert type(coords) is kind
    assert coords.pitch == pitch
    assert coords.xy.dtype == dtype
    assert np.array_equal(coords.xy.numpy(), layouts.grid(7, step=pitch))


@pytest.mark.parametrize("name", ["clam_h5", "uni2", "slideflow", "torchmil"])
def test_open_store__lone_tile_of_unknown_size__leaves_coords_out(name, tmp_path):
    layouts.WRITERS[name](tmp_path, "s", 1)
    assert open_store(tmp_path).read("s").coords is None


@pytest.mark.parametrize("name", ["trident", "stamp"])
def test_open_store__lone_tile_of_known_size__has_coords(name, tmp_path):
    layouts.WRITERS[name](tmp_path, "s", 1)
    assert open_store(tmp_path).read("s").coords is not None


@pytest.mark.parametrize("name", ["torchmil", "torchmil_h5", "torchmil_h5_folders"])
def test_open_store__torchmil__has_labels_of_bag_and_instances(name, tmp_path):
    layouts.WRITERS[name](tmp_path, "s", 4)
    store = open_store(tmp_path)
    assert store.label("s") == "1"
    assert store.read("s").instance_label.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("writer", [layouts.write_torchmil, layouts.write_torchmil_h5_folders])
def test_open_store__features_folder_of_torchmil__finds_the_folders_beside(writer, tmp_path):
    writer(tmp_path, "s", 4)
    stored = open_store(tmp_path / "features").read("s")
    assert stored.coords.pitch == 256
    assert stored.instance_label.tolist() == [0, 1, 0, 1]


def test_open_store__clam_with_both_kinds__prefers_hdf5(tmp_path):
    layouts.write_clam_h5(tmp_path, "s")
    layouts.write_clam_pt(tmp_path, "s")
    layouts.write_clam_patches(tmp_path, "s")
    store = open_store(tmp_path)
    assert store.file("s").suffix == ".h5"
    assert store.read("s").coords.pitch == 256


def test_open_store__clam_with_more_tensors__takes_them_with_coords_where_there(tmp_path):
    layouts.write_clam_h5(tmp_path, "a")
    for slide_id in ("a", "b", "c"):
        layouts.write_clam_pt(tmp_path, slide_id)
    layouts.write_clam_patches(tmp_path, "b")
    store = open_store(tmp_path)
    assert store.slide_ids == ["a", "b", "c"]
    pitches = [store.read(slide).coords and store.read(slide).coords.pitch for slide in "abc"]
    assert pitches == [256, 512, None]


def test_open_store__clam_pt_folder__takes_coords_beside_it(tmp_path):
    layouts.write_clam_pt(tmp_path, "s")
    layouts.write_clam_h5(tmp_path, "s")
    store = open_store(tmp_path / "pt_files")
    assert store.file("s").suffix == ".pt"
    assert np.array_equal(store.read("s").coords.xy, layouts.grid(5))


def test_open_store__clam_pt_and_patches__takes_their_attributes(tmp_path):
    layouts.write_clam_pt(tmp_path, "s", 1)
    layouts.write_clam_patches(tmp_path, "s", 1)
    assert open_store(tmp_path).read("s").coords.pitch == 512


def test_open_store__tensors_and_trident_patches__share_the_slide_id(tmp_path):
    layouts.write_clam_pt(tmp_path, "s")
    layouts.write_trident_patches(tmp_path, "s")
    assert open_store(tmp_path).read("s").coords.pitch == 512


def test_open_store__clam_without_features__says_so(tmp_path):
    (tmp_path / "h5_files").mkdir()
    with pytest.raises(ValueError, match="A CLAM store must hold features"):
        open_store(tmp_path)


@pytest.mark.parametrize("above", ["", "20x_256px_0px_overlap"])
def test_open_store__trident_job__finds_its_only_encoder(above, tmp_path):
    job = tmp_path / above
    layouts.write_trident(job, "s")
    layouts.write_trident_patches(job, "s")
    layouts.write_trident_slide_embedding(job, "s")
    for path in (tmp_path, job, job / "features_uni_v1"):
        assert open_store(path).read("s").coords.pitch == 512


def test_open_store__trident_job_of_several_encoders__lists_them(tmp_path):
    layouts.write_trident(tmp_path / "20x", "s", encoder="uni_v1")
    layouts.write_trident(tmp_path / "20x", "s", encoder="conch_v15")
    with pytest.raises(ValueError, match=r"\['20x/features_conch_v15', '20x/features_uni_v1'\]"):
        open_store(tmp_path)


def test_open_store__folders_in_folders__are_searched(tmp_path):
    for folder, slide in (("train/Group_BT/Type_N", "BRACS_1"), ("test/Group_AT/Type_FEA", "B_2")):
        layouts.write_uni2(tmp_path / folder, slide)
    store = open_store(tmp_path)
    assert store.slide_ids == ["BRACS_1", "B_2"]
    assert store.file("BRACS_1").parent.name == "Type_N"


def test_open_store__ids_with_several_files__lists_ids_and_files(tmp_path):
    for folder in ("train", "test"):
        for slide in ("a", "b"):
            layouts.write_uni2(tmp_path / folder, slide)
    expected = r"2 in .* have several: 'a': \['test/a.h5', 'train/a.h5'\]; 'b': \['test/b.h5', "
    with pytest.raises(ValueError, match=expected):
        open_store(tmp_path)


def test_open_store__files_of_the_system__are_left_alone(tmp_path):
    layouts.write_uni2(tmp_path, "a")
    (tmp_path / "._a.h5").write_bytes(b"\0")
    assert open_store(tmp_path).slide_ids == ["a"]


def test_open_store__first_file_empty_or_broken__is_still_recognised(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    layouts.write_hdf5(tmp_path / "b.h5", {"features": np.empty(0, np.float32)})
    layouts.write_uni2(tmp_path, "c")
    assert open_store(tmp_path).slide_ids == ["a", "b", "c"]


def test_open_store__grouped_file__is_found_in_its_folder_too(tmp_path):
    layouts.write_acmil(tmp_path / "patch_feats_pretrain_vit.h5", {"s.1": 3})
    for path in (tmp_path, tmp_path / "patch_feats_pretrain_vit.h5"):
        store = open_store(path)
        assert store.slide_ids == ["s.1"]
        assert np.array_equal(store.read("s.1").features, layouts.features_of("s.1", 3))


def test_open_store__grouped_files_of_several_encoders__asks_for_one(tmp_path):
    for encoder in ("a", "b"):
        layouts.write_acmil(tmp_path / f"patch_feats_pretrain_{encoder}.h5", {"s": 3})
    with pytest.raises(ValueError, match=r"patch_feats_pretrain_a.h5, .* and 1 other HDF5 files"):
        open_store(tmp_path)


def test_open_store__packed_file__gives_what_it_was_made_of(tmp_path):
    source = tmp_path / "source"
    layouts.write_stamp(source, "s.1", 3)
    repack(open_store(source), tmp_path / "packed.h5", progress=False)
    store = open_store(tmp_path / "packed.h5")
    assert store.slide_ids == ["s.1"]
    stored = store.read("s.1")
    assert np.array_equal(stored.features, layouts.features_of("s.1", 3))
    assert type(stored.coords) is MicrometreCoords
    assert np.array_equal(stored.coords.xy, layouts.grid(3))


def test_open_store__slide_embeddings__are_refused(tmp_path):
    path = layouts.write_trident_slide_embedding(tmp_path, "s")
    with pytest.raises(ValueError, match=r"one embedding per slide\. Give the features of"):
        open_store(path.parent)


def test_open_store__slide_embeddings_with_a_row_axis__are_refused_by_folder(tmp_path):
    folder = tmp_path / "slide_features_mean-uni"
    layouts.write_hdf5(folder / "s.h5", {"features": np.ones((1, 4), np.float32)})
    with pytest.raises(ValueError, match="one embedding per slide"):
        open_store(folder)


@pytest.mark.parametrize(
    "writer", [layouts.write_clam_patches, layouts.write_trident_patches], ids=["clam", "trident"]
)
def test_open_store__coords_only__are_refused(writer, tmp_path):
    path = writer(tmp_path, "s")
    for place in (tmp_path, path.parent, path):
        with pytest.raises(
            ValueError, match=r"of tiles without features\. Give the features' folder"
        ):
            open_store(place)


def test_open_store__other_hdf5__is_refused(tmp_path):
    layouts.write_hdf5(tmp_path / "model.h5", {"weights": np.ones(3)})
    with pytest.raises(ValueError, match=r"model.h5 holds no features that we know"):
        open_store(tmp_path)


def test_open_store__file_of_one_slide__asks_for_its_folder(tmp_path):
    path = layouts.write_uni2(tmp_path, "s")
    with pytest.raises(ValueError, match=r"s.h5 holds one. Give its folder"):
        open_store(path)


def test_open_store__nothing_there__says_so(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist"):
        open_store(tmp_path / "absent")
    with pytest.raises(
        ValueError, match=r"must hold .h5, .pt or .npy files, but .* holds no files"
    ):
        open_store(tmp_path)


def test_open_store__files_of_another_kind__names_them(tmp_path):
    (tmp_path / "slide.svs").touch()
    with pytest.raises(ValueError, match=r"holds files of kind \['.svs'\]"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match=r"must be HDF5, but .*slide.svs is not"):
        open_store(tmp_path / "slide.svs")


def test_open_store__broken_files_only__names_the_first(tmp_path):
    path = layouts.write_uni2(tmp_path, "a")
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "b.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"must be readable HDF5, but .*a.h5 is not"):
        open_store(tmp_path)


def test_open_store__unknown_slide__is_refused_by_every_store(tmp_path):
    for name, writer in layouts.WRITERS.items():
        writer(tmp_path / name, "s", 2)
    layouts.write_acmil(tmp_path / "grouped.h5", {"s": 2})
    for name in (*layouts.WRITERS, "grouped.h5"):
        with pytest.raises(ValueError, match=r"'t' is not in .* holds \['s'\]"):
            open_store(tmp_path / name).read("t")


def test_open_store__big_endian_and_double__become_float32(tmp_path):
    layouts.write_hdf5(
        tmp_path / "s.h5",
        {
            "features": layouts.features_of("s").astype(">f8"),
            "coords": layouts.grid(5).astype(">u4"),
        },
    )
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["features"].dtype == np.dtype(">f8")
    stored = open_store(tmp_path).read_stored("s")
    assert stored.features.dtype == torch.float32
    assert np.array_equal(stored.features, layouts.features_of("s"))
    assert np.array_equal(stored.coords.xy, layouts.grid(5))
    assert stored.coords.xy.dtype == torch.int64


def test_open_store__first_file_of_another_kind__does_not_decide(tmp_path):
    layouts.write_hdf5(tmp_path / "a.h5", {"statistics": np.ones(3)})
    layouts.write_uni2(tmp_path, "b")
    assert len(open_store(tmp_path).read("b").features) == 5


def test_open_store__patches_beside_features__are_left_alone(tmp_path):
    layouts.write_uni2(tmp_path / "uni", "s")
    layouts.write_clam_patches(tmp_path, "s")
    assert open_store(tmp_path).file("s") == tmp_path / "uni" / "s.h5"


def test_open_store__patches_beside_tensors__give_the_coords(tmp_path):
    layouts.write_slideflow(tmp_path / "tensors", "s")
    layouts.write_clam_patches(tmp_path, "t")
    assert open_store(tmp_path).slide_ids == ["s"]


def test_open_store__files_beside_a_folder_of_features__belong_together(tmp_path):
    layouts.write_uni2(tmp_path, "a")
    layouts.write_uni2(tmp_path / "features_more", "b")
    assert open_store(tmp_path).slide_ids == ["a", "b"]
