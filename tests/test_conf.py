import copy
import inspect
import math
from pathlib import Path

import h5py
import hydra
import numpy as np
import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from mil_anchor import AnchorCallback
from mil_anchor.composition import check_arguments, plugin_parts
from mil_anchor.data.bags import Bag, collate_bags
from mil_anchor.run_folder import folder_name
from tests.composing import ROOT, composed

CONF = ROOT / "conf"
BASES = {"data/classic"}  # what other files build on; it names no data set
TWO = {"slow_anchor", "slow_anchor_nsf", "slow_aem", "anchor_nsf_aem"}


def _options(group):
    names = [file.stem for file in sorted((CONF / group).glob("*.yaml"))]
    return [name for name in names if f"{group}/{name}" not in BASES]


@pytest.mark.parametrize("name", _options("model"))
def test_conf__every_model__is_built_and_run(name):
    config = composed(f"model={name}", "hidden=16")
    check_arguments(config)

    model = hydra.utils.instantiate(config.model, in_features=7, n_classes=2)

    # One logit of torchmil's, which are binary.
    expected = (1,) if name.startswith("torchmil_") else (1, 2)
    assert model(torch.randn(1, 5, 7)).logits.shape == expected


def _train_a_step(config):
    """Train the configured model with its plug-in on one bag, and validate."""
    check_arguments(config)
    callbacks = [hydra.utils.instantiate(node) for _, node in plugin_parts(config)]
    model = hydra.utils.instantiate(config.model, in_features=7, n_classes=2)
    module = hydra.utils.instantiate(config.module, model=model, n_classes=2)
    torch.manual_seed(0)
    bags = [
        collate_bags([Bag(torch.randn(5, 7), label, bag_id=f"bag {label}")]) for label in (0, 1)
    ]
    loaders = [DataLoader(bags, batch_size=None, shuffle=False) for _ in range(2)]
    trainer = Trainer(
        callbacks=callbacks,
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = copy.deepcopy(model.state_dict())
    trainer.fit(module, *loaders)
    trained = model.state_dict()
    assert any((before[key] != trained[key]).any() for key in before)
    return callbacks


@pytest.mark.parametrize("name", _options("plugin"))
def test_conf__every_plugin__trains_a_step(name):
    callbacks = _train_a_step(composed(f"plugin={name}", "hidden=16"))

    assert len(callbacks) == (0 if name == "none" else 2 if name in TWO else 1)
    assert all(isinstance(callback, Callback) for callback in callbacks)


def test_conf__plugins__have_the_defaults_that_the_evidence_supports():
    nsf, softmax = composed("plugin=anchor_nsf").plugin, composed("plugin=anchor").plugin

    assert (nsf.target, nsf.weight, nsf.decay) == ("nsf", 0.03, 0.999)
    assert (softmax.target, softmax.weight, softmax.decay) == ("softmax", 0.1, 0.999)
    # The callback itself has the values of plugin=anchor_nsf.
    defaults = inspect.signature(AnchorCallback).parameters
    assert all(defaults[key].default == nsf[key] for key in nsf if key != "_target_")


# For the choices that read a user's folder: names of slides, columns of the table of labels (None:
# the folders tell them), number of classes.
ON_DISK = {
    "folder": ([f"s{i}" for i in range(20)], "slide_id,label", 2),
    "camelyon16": (
        [f"{kind}_{i:03}" for kind in ("normal", "tumor", "test") for i in range(1, 6)],
        "slide_id,label",
        2,
    ),
    "camelyon17": (
        [f"patient_{i:03}_node_{j}" for i in (0, 3, 30, 45, 70) for j in range(4)],
        "patient,stage",
        4,
    ),
    "bracs": (
        [
            f"{part}/Group_X/Type_{kind}/BRACS_{i}{j}{k}"
            for i, part in enumerate(("train", "val", "test"))
            for j, kind in enumerate(("N", "ADH", "IC"))
            for k in range(2)
        ],
        None,
        3,
    ),
}


def _write_features(folder, names):
    for name in names:
        file = folder / f"{name}.h5"
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(file, "w") as store:
            store["features"] = np.ones((3, 5), dtype=np.float32)
            store["coords"] = np.array([[0, 0], [256, 0], [0, 256]])


@pytest.mark.parametrize("name", _options("data"))
def test_conf__every_data_set__is_loaded(name, tmp_path):
    overrides, n_classes = ["data.fold=1"], 2
    if name in ON_DISK:
        names, header, n_classes = ON_DISK[name]
        _write_features(tmp_path / "features", names)
        fold = f"data.fold={int(name == 'folder')}"  # a cohort has one split
        overrides = [fold, f"data.root={tmp_path / 'features'}", "data.val_fraction=0.3"]
        rows = {
            "folder": [f"s{i},{i % 2}" for i in range(20)],
            "camelyon16": [f"test_00{i},{'tumor' if i % 2 else 'normal'}" for i in range(1, 6)],
            "camelyon17": [
                f"{slide}.tif,{('negative', 'itc', 'micro', 'macro')[i % 4]}"
                for i, slide in enumerate(names)
            ],
        }.get(name)
        if rows:
            (tmp_path / "labels.csv").write_text("\n".join([header, *rows]))
            overrides.append(f"data.labels={tmp_path / 'labels.csv'}")
    config = composed(f"data={name}", *overrides)
    check_arguments(config)

    data = hydra.utils.instantiate(config.data)
    data.setup("fit")

    assert data.in_features > 0
    assert data.n_classes == n_classes
    assert min(len(data.train_bags), len(data.val_bags), len(data.test_bags)) > 0
    assert config.names.data == name


@pytest.mark.parametrize("name", _options("trainer"))
def test_conf__every_trainer_and_logger__has_known_arguments_only(name):
    for logger in _options("logger"):
        config = composed(f"trainer={name}", f"logger={logger}")
        check_arguments(config)


def test_conf__cpu_trainer_and_logger__are_built(tmp_path):
    config = composed(folder=tmp_path)

    logger = list(hydra.utils.instantiate(config.logger).values())
    trainer = hydra.utils.instantiate(config.trainer, logger=logger)

    assert trainer.max_epochs == 40  # the data set's protocol wins over the trainer's
    assert Path(trainer.log_dir) == tmp_path / "logs" / "version_0"


def _jobs(params):
    """Overrides of the jobs of a sweep over these values: of every value one at least."""
    values = [
        [f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()
    ]
    for index in range(max(map(len, values), default=1)):
        yield [own[index % len(own)] for own in values]


def _question(file):
    return file.read_text().splitlines()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", _options("experiment"))
def test_conf__every_experiment__trains_a_step_of_each_job_and_says_what_it_asks(name):
    question = _question(CONF / "experiment" / f"{name}.yaml")
    composed(f"+experiment={name}")  # what Hydra does before the first job

    for job in _jobs(HydraConfig.get().sweeper.params or {}):
        _train_a_step(composed(f"+experiment={name}", *job, "hidden=16"))

    assert question.startswith("# ")
    assert question.endswith("?")


@pytest.mark.parametrize("name", _options("experiment"))
def test_conf__key_that_an_experiment_sweeps__can_be_set_on_the_command_line(name):
    composed(f"+experiment={name}")

    # Hydra composes a sweep with what the command line says, and without the experiment's values.
    for key, values in (HydraConfig.get().sweeper.params or {}).items():
        composed(f"+experiment={name}", f"{key}={str(values).split(',')[0]}")


def _job_set(name):
    """How many jobs an experiment makes, and of which models and plug-ins."""
    config = composed(f"+experiment={name}")
    params = {key: str(value).split(",") for key, value in HydraConfig.get().sweeper.params.items()}
    models, plugins = (set(params.get(key, [config.names[key]])) for key in ("model", "plugin"))
    return math.prod(map(len, params.values())), models, plugins


def test_conf__tables_of_the_paper__have_its_rows():
    models = {"abmil", "clam_sb", "transmil", "dsmil"}

    assert _job_set("table2") == (60, models, {"none", "anchor", "anchor_nsf"})
    assert _job_set("table3") == (30, {"asmil"}, {"none", "anchor", "anchor_nsf"})
    for name in ("report", "report_synthetic"):
        assert _job_set(name) == (80, models, {"none", "anchor", "anchor_nsf", "aem"})


@pytest.mark.parametrize("name", ["report", "report_synthetic"])
def test_conf__report__has_another_fold_for_each_seed_and_both_in_one_folder(name):
    config = composed(f"+experiment={name}", "seed=3")

    assert config.data.fold == 3
    assert config.out == "outputs/report"
    assert config.maps == (2 if name == "report_synthetic" else 0)


@pytest.mark.parametrize("name", _options("sweep"))
def test_conf__every_search__trains_a_step_and_sees_validation_only(name, tmp_path):
    config = composed(f"sweep={name}", "plugin=anchor", f"out={tmp_path}", "hidden=16")
    sweeper = HydraConfig.get().sweeper

    _train_a_step(config)
    assert _question(CONF / "sweep" / f"{name}.yaml").endswith("?")
    assert not config.test
    assert sweeper.storage == f"sqlite:///{tmp_path}/search.db"
    assert set(sweeper.params) == {"plugin.weight", "plugin.decay", "module.lr"}
    assert sweeper.max_failure_rate == 1.0


def test_conf__every_file__is_reached_by_these_tests():
    groups = {file.parent.name for file in CONF.rglob("*.yaml")} - {"conf"}
    assert groups == {"model", "plugin", "data", "trainer", "logger", "experiment", "sweep"}


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("sed=1", ConfigCompositionException, "Key 'sed' not in 'Config'|Could not override 'sed'"),
        ("model.hiden=1", ConfigCompositionException, "Could not override 'model.hiden'"),
        ("trainer.max_epoch=1", ConfigCompositionException, "Could not override"),
        ("model=foo", MissingConfigException, "(?s)Could not find 'model/foo'.*abmil"),
        ("plugin=foo", MissingConfigException, "(?s)Could not find 'plugin/foo'.*anchor_nsf"),
        ("data=foo", MissingConfigException, "(?s)Could not find 'data/foo'.*ucsb_breast"),
    ],
)
def test_conf__misspelled_override__is_refused(override, error, message):
    with pytest.raises(error, match=message):
        composed(override)


@pytest.mark.parametrize(
    ("group", "text", "message"),
    [
        ("model", {"_target_": "baselines.abmil.ABMIL", "hiden": 3}, r"'model' .* \['hiden'\]"),
        ("plugin", {"_target_": "mil_anchor.AnchorCallback", "wieght": 1}, r"\['wieght'\]"),
        ("experiment", {"trainer": {"max_epoch": 3}}, r"'trainer' .* \['max_epoch'\]"),
        ("experiment", {"module": {"learning_rate": 3}}, r"'module' .* It takes: model, n_classes"),
        ("plugin", {"_tagret_": "mil_anchor.AnchorCallback"}, "misspelled _target_"),
        ("experiment", {"names": {"mdoel": "x"}}, "'names' must have the keys"),
        ("experiment", {"threads": 0}, "at least 1, or null .* got 0"),
        ("experiment", {"early_stopping": -3}, "at least 1 epoch, or null .* got -3"),
        (
            "experiment",
            {"plugin": {"_target_": "mil_anchor.AnchorCallback", "warmup": "no"}},
            "'plugin.warmup' must be true or false, but got 'no'",
        ),
        (
            "experiment",
            {"plugin": {"_target_": "mil_anchor.AnchorCallback", "weight": None}},
            "'plugin.weight' must be a number, but got None",
        ),
        (
            "plugin",
            {"_target_": "mil_anchor.AEMCallback", "top_k": 2.5},
            "'plugin.top_k' must be a whole number or null, but got 2.5",
        ),
        (
            "plugin",
            {"also": {"slow": {"_target_": "mil_anchor.SlowWeights", "decay": "abc"}}},
            "'plugin.also.slow.decay' must be a number, but got 'abc'",
        ),
        ("experiment", {"sed": 3}, "'sed' not in 'Config'"),
        (
            "data",
            {"_target_": "mil_anchor.data.datamodule.ClassicDataModule", "nfolds": 3},
            "nfolds",
        ),
    ],
)
def test_conf__misspelled_key_in_a_file__is_refused(tmp_path, group, text, message):
    (tmp_path / group).mkdir()
    head = "# @package _global_\n" if group == "experiment" else ""
    (tmp_path / group / "typo.yaml").write_text(head + yaml.safe_dump(text))
    add = "+" if group == "experiment" else ""

    with pytest.raises((ValueError, ConfigCompositionException), match=message):
        check_arguments(composed(f"{add}{group}=typo", f"hydra.searchpath=[file://{tmp_path}]"))


def test_conf__width_that_the_data_decides__is_refused():
    with pytest.raises(ValueError, match=r"\['in_features'\] of the model follow from the data"):
        check_arguments(composed("+model.in_features=5"))


def test_conf__run_folder__names_choices_and_other_overrides():
    composed()  # registers the resolver
    folder = OmegaConf.create(
        {
            "names": {"model": "m", "plugin": "p", "data": "d"},
            "plain": '${run_folder:${names},1,2,""}',
            "other": '${run_folder:${names},1,2,"a=b"}',
            "path": '${run_folder:${names},1,2,"a=/b/c.csv"}',
        }
    )

    assert folder.plain == "m/p/d/seed=1,fold=2"
    assert folder.other == "m/p/d/seed=1,fold=2,a=b"
    assert folder.path == "m/p/d/seed=1,fold=2,a=_b_c.csv"


def test_conf__run_folder_of_long_overrides__has_a_name_that_a_disk_takes():
    names = OmegaConf.create({"model": "m", "plugin": "p", "data": "d"})
    one, other = (folder_name(names, 0, 0, "x" * 300 + end) for end in "ab")

    assert len(one.split("/")[-1]) < 200
    assert one != other
