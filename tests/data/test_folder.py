import pytest
import torch
from lightning.pytorch import Trainer

from mil_anchor.data.bags import PixelCoords
from mil_anchor.data.folder import FolderDataModule, SyntheticDataModule
from mil_anchor.data.synthetic import MPP, SyntheticCohort, write_cohort
from tests.data.stores.layouts import WIDTH, write_uni2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny cohort in CLAM's layout."""
    folder = tmp_path_factory.mktemp("cohort")
    cohort = SyntheticCohort("camelyon_like", "tiny", seed=3)
    write_cohort(cohort, folder, progress=False)
    return cohort, folder


def _ids(data):
    return {part: list(bags.bag_ids) for part, bags in data.parts.items()}


def test_synthetic_data_module__parts__are_those_of_the_cohort():
    cohort = SyntheticCohort("bracs_like", "tiny", seed=5)
    data = SyntheticDataModule("bracs_like", "tiny", world=2, fold=3)
    data.setup("fit")

    for part, own in cohort.parts.parts.items():
        assert _ids(data)[part] == [cohort.bag_ids[index] for index in own]
    assert (data.n_classes, data.in_features, data.mpp) == (3, cohort.width, MPP)
    first = cohort.parts.test[0]
    assert torch.equal(data.test_bags[0].features, cohort[first].features)
    assert torch.equal(data.test_bags[0].lesion, cohort[first].lesion)


def test_folder__cohort_written_as_clam_does__gives_the_same_bags(written):
    cohort, folder = written
    data = FolderDataModule(folder, folder / "labels.csv", splits=folder)
    data.setup("fit")

    for part, own in cohort.parts.parts.items():
        assert _ids(data)[part] == [cohort.bag_ids[index] for index in own]
    for bag, index in zip(data.val_bags, cohort.parts.val, strict=True):
        expected = cohort[index]
        assert bag.label == expected.label
        assert torch.equal(bag.features, expected.features)
        assert torch.equal(bag.coords.xy, expected.coords.xy)
        assert bag.coords.pitch == expected.coords.pitch
        assert isinstance(bag.coords, PixelCoords)
        assert torch.equal(bag.instance_label, expected.instance_label)
        assert torch.equal(bag.lesion, expected.lesion)


def test_folder__no_split_given__makes_folds_that_test_every_slide_once(written):
    _, folder = written
    tested = []
    for fold in range(3):
        data = FolderDataModule(
            folder, folder / "labels.csv", n_folds=3, fold=fold, val_fraction=0.2, seed=1
        )
        data.setup("fit")
        parts = _ids(data)
        assert not set(parts["train"]) & set(parts["val"] + parts["test"])
        tested += parts["test"]

    assert sorted(tested) == sorted(data.train_bags.bag_ids + data.val_bags.bag_ids + parts["test"])


def test_folder__patients_of_several_slides__are_known(written, tmp_path):
    cohort, folder = written
    cases = {slide_id: f"p{index // 2}" for index, slide_id in enumerate(cohort.bag_ids)}
    rows = [
        f"{slide_id},{label},{cases[slide_id]}"
        for slide_id, label in zip(cohort.bag_ids, cohort.labels, strict=True)
    ]
    (tmp_path / "patients.csv").write_text("\n".join(["slide_id,label,case_id", *rows]))

    of_slides = FolderDataModule(folder, folder / "labels.csv", splits=folder)
    of_patients = FolderDataModule(folder, tmp_path / "patients.csv", n_folds=2)
    for data in (of_slides, of_patients):
        data.setup("fit")

    assert of_slides.cases == {}
    assert of_patients.cases == cases


def test_folder__column_of_parts__is_the_split_and_allows_no_fold(written, tmp_path):
    cohort, folder = written
    rows = [
        f"{name},{label},{part}"
        for name, label, part in zip(
            cohort.bag_ids, cohort.labels, ["train", "train", "val", "test"] * 15, strict=True
        )
    ]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["slide_id,label,split", *rows]))
    data = FolderDataModule(folder, table)
    data.setup("fit")

    assert [len(own) for own in _ids(data).values()] == [30, 15, 15]
    with pytest.raises(ValueError, match="one split, but fold 1 came"):
        FolderDataModule(folder, table, fold=1).setup("fit")


def test_folder__slides_of_the_table_that_are_not_on_disk__are_listed_together(written, tmp_path):
    _, folder = written
    table = tmp_path / "labels.csv"
    table.write_text((folder / "labels.csv").read_text() + "p,gone_1,positive\np,gone_2,negative\n")

    with pytest.raises(ValueError, match=r"2 of 62 are not in .*'gone_1', 'gone_2'"):
        FolderDataModule(folder, table).setup("fit")


def test_folder__slides_without_any_label__asks_for_a_table(written):
    _, folder = written
    with pytest.raises(ValueError, match=r"holds none\. .* data\.labels=labels\.csv"):
        FolderDataModule(folder).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cohort": "camelyon18"}, r"one of \['bracs', .*\] or null, but 'camelyon18'"),
        ({"mpp": 0.0}, r"mpp must be .* above 0, but 0\.0 came"),
        ({"batch_size": 0}, "batch_size must be at least 1, but 0 came"),
        ({"num_workers": -1}, "num_workers must be at least 0, but -1 came"),
        ({"cohort": "bracs", "label": "grade"}, "label and classes must be null, but 'grade'"),
        ({"cohort": "bracs", "classes": ["N"]}, r"must be null, but None and \['N'\] came"),
        ({"label": "grade"}, "'grade' came without a table"),
    ],
)
def test_folder__argument_out_of_range__is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FolderDataModule(tmp_path, **options)


def test_folder__class_that_validation_lacks__is_named(written, tmp_path):
    cohort, folder = written
    seen = iter(range(60))
    parts = ["val" if label == 0 and next(seen) % 3 == 0 else "train" for label in cohort.labels]
    rows = [
        ",".join(row) for row in zip(cohort.bag_ids, map(str, cohort.labels), parts, strict=True)
    ]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["slide_id,label,split", *rows]))

    with pytest.raises(ValueError, match=r"part 'val' has none of class .*1"):
        FolderDataModule(folder, table, classes=["0", "1"]).setup("fit")


@pytest.mark.parametrize("keep", [False, True, 0.0001])
def test_folder__workers__serve_every_bag_whatever_is_kept(written, keep):
    _, folder = written
    data = FolderDataModule(
        folder, folder / "labels.csv", splits=folder, keep_in_memory=keep, num_workers=2
    )
    data.setup("fit")
    for loader, bags in (
        (data.val_dataloader(), data.val_bags),
        (data.test_dataloader(), data.test_bags),
    ):
        served = [name for batch in loader for name in batch["bag_id"]]
        assert served == bags.bag_ids
    assert sorted(name for batch in data.train_dataloader() for name in batch["bag_id"]) == sorted(
        data.train_bags.bag_ids
    )


def test_folder__several_processes__share_the_memory(written, monkeypatch):
    _, folder = written
    asked = []
    monkeypatch.setattr(
        "mil_anchor.data.folder.MemoryBudget",
        lambda **options: asked.append(options["n_processes"]),
    )
    data = FolderDataModule(folder, folder / "labels.csv", splits=folder)
    data.trainer = Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    data.setup("fit")

    assert asked == [2]


def test_folder__names_with_the_suffix_of_slides_on_disk__are_found(tmp_path):
    ids = [f"s{index}" for index in range(12)]
    for slide_id in ids:
        write_uni2(tmp_path / "features", f"{slide_id}.svs")
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,label\n" + "".join(f"{s}.svs,{s[1:] < '5'}\n" for s in ids))
    splits = tmp_path / "splits_0.csv"
    splits.write_text("train,val,test\ns0,s1.svs,s2\ns5,s6,s7\n")
    data = FolderDataModule(tmp_path / "features", table, splits=splits)
    with pytest.warns(UserWarning, match="leaves out 6"):
        data.setup("fit")

    assert _ids(data)["train"] == ["s0.svs", "s5.svs"]
    assert _ids(data)["val"] == ["s1.svs", "s6.svs"]
    assert data.val_bags[0].features.shape == (5, WIDTH)


def test_folder__home_folder_in_a_path__is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = FolderDataModule("~/features", "~/labels.csv", splits="~/splits")

    assert (data.root, data.labels, data.splits) == (
        tmp_path / "features",
        tmp_path / "labels.csv",
        tmp_path / "splits",
    )


@pytest.fixture(params=["features", "test/features"])
def bracs(request, tmp_path):
    """Slides of BRACS in one folder, also below one named like a part, and their types."""
    slides = [(f"BRACS_{index}", ("N", "ADH", "IC")[index % 3]) for index in range(9)]
    for slide_id, _ in slides:
        write_uni2(tmp_path / request.param, slide_id)
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,label\n" + "".join(f"{name},{kind}\n" for name, kind in slides))
    return tmp_path / request.param, table


def test_folder__cohort_without_folders_of_parts__takes_a_split_file(bracs, tmp_path):
    root, table = bracs
    splits = tmp_path / "splits.csv"
    parts = ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    rows = [f"BRACS_{index},{part}\n" for index, part in enumerate(parts)]
    splits.write_text("slide_id,split\n" + "".join(rows))
    data = FolderDataModule(root, table, cohort="bracs", splits=splits)
    data.setup("fit")

    assert _ids(data)["val"] == ["BRACS_3", "BRACS_4", "BRACS_5"]
    assert data.val_bags.labels == [0, 1, 2]


def test_folder__cohort_without_any_parts__draws_none(bracs):
    root, table = bracs
    with pytest.raises(ValueError, match=r"need their official parts, .* give data\.splits"):
        FolderDataModule(root, table, cohort="bracs").setup("fit")
