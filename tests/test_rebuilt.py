import pytest
import torch

from mil_anchor.experiment import run
from mil_anchor.rebuilt import holds_anchor, rebuild, validation_scores
from tests.composing import composed


def _train(folder, *overrides):
    run(
        composed(
            "data=ucsb_breast",
            "trainer.max_epochs=1",
            "trainer.enable_progress_bar=false",
            *overrides,
            folder=folder,
        )
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "none": _train(root / "none", "model=abmil", "hidden=16", "plugin=none"),
        # Far from the online block at once.
        "anchor": _train(
            root / "anchor", "model=abmil", "hidden=16", "plugin=anchor", "plugin.decay=0.9"
        ),
        "dsmil": _train(
            root / "dsmil",
            "model=dsmil",
            "plugin=anchor",
            "plugin.decay=0.9",
            "site=model.attention",
        ),
    }


def _checkpoint(folder):
    return torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)


def test_rebuild__run__has_its_weights_its_bags_and_evaluates(folders):
    rebuilt = rebuild(folders["none"])

    state = _checkpoint(folders["none"])["state_dict"]
    for name, tensor in rebuilt.module.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not rebuilt.module.training
    rows = (folders["none"] / "split.csv").read_text().splitlines()[1:]
    val = [row.split(",")[0] for row in rows if row.endswith(",val")]
    assert rebuilt.data.val_bags.bag_ids == val


def test_rebuild__averages_were_evaluated__takes_the_trained_weights(folders, tmp_path):
    folder = tmp_path
    (folder / "config.yaml").write_bytes((folders["none"] / "config.yaml").read_bytes())
    checkpoint = _checkpoint(folders["none"])
    trained = {name: tensor + 1 for name, tensor in checkpoint["state_dict"].items()}
    (folder / "checkpoints").mkdir()
    torch.save({**checkpoint, "current_model_state": trained}, folder / "checkpoints/best.ckpt")

    state = rebuild(folder).module.state_dict()

    for name, tensor in trained.items():
        assert torch.equal(state[name], tensor)


def test_validation_scores__no_anchor__are_those_that_the_model_returns(folders):
    rebuilt = rebuild(folders["none"])

    scores = validation_scores(rebuilt)

    assert scores.source == "online"
    assert len(scores.of_bags) == len(rebuilt.data.val_bags)
    for bag, own in zip(rebuilt.data.val_bags, scores.of_bags, strict=True):
        expected = rebuilt.module.model(bag.features[None]).scores[0]
        assert own.shape == (1, len(bag.features))
        assert torch.allclose(own, expected, atol=1e-6)
    assert not any(part._forward_hooks for part in rebuilt.module.modules())


@pytest.mark.parametrize("name", ["anchor", "dsmil"])
def test_validation_scores__anchor__are_those_of_a_model_with_its_block(folders, name):
    rebuilt = rebuild(folders[name])
    online = [rebuilt.module.model(bag.features[None]).scores[0] for bag in rebuilt.data.val_bags]

    scores = validation_scores(rebuilt)

    assert scores.source == "anchor"
    (state,) = [own for own in _checkpoint(folders[name])["callbacks"].values() if "anchor" in own]
    # DSMIL's critical instances come from another part of the model: they stay the online ones.
    rebuilt.module.model.attention.load_state_dict(state["anchor"])
    for bag, own, other in zip(rebuilt.data.val_bags, scores.of_bags, online, strict=True):
        expected = rebuilt.module.model(bag.features[None]).scores[0]
        assert torch.allclose(own, expected, atol=1e-5)
        assert not torch.allclose(own, other, atol=1e-5)


def test_validation_scores__anchor_of_the_encoder__are_those_of_the_whole_mirror(tmp_path):
    _train(
        tmp_path,
        "model=abmil",
        "hidden=16",
        "plugin=anchor",
        "plugin.decay=0.9",
        "plugin.scope=encoder",
    )
    rebuilt = rebuild(tmp_path)

    scores = validation_scores(rebuilt)

    (state,) = [own for own in _checkpoint(tmp_path)["callbacks"].values() if "anchor" in own]
    rebuilt.module.model.load_state_dict(state["anchor"])
    for bag, own in zip(rebuilt.data.val_bags, scores.of_bags, strict=True):
        expected = rebuilt.module.model(bag.features[None]).scores[0]
        assert torch.allclose(own, expected, atol=1e-5)


def test_validation_scores__padded_batches__are_those_of_single_bags(folders):
    alone = validation_scores(rebuild(folders["anchor"]))
    rebuilt = rebuild(folders["anchor"])
    rebuilt.data.batch_size = 3

    together = validation_scores(rebuilt)

    for one, other in zip(alone.of_bags, together.of_bags, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_holds_anchor__runs__tells_which(folders, tmp_path):
    assert holds_anchor(folders["anchor"])
    assert not holds_anchor(folders["none"])
    assert not holds_anchor(tmp_path)


def test_rebuild__folder_of_no_run__says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"lacks \['config\.yaml', 'checkpoints/best\.ckpt'\]"):
        rebuild(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: ucsb_breast", "name: lost", "'lost' came"),
        ("hidden: 16", "hidden: 8", "size mismatch"),
        ("mil_anchor.module.MILModule", "mil_anchor.module.Gone", "Gone"),
    ],
)
def test_rebuild__data_or_model_gone__says_so(folders, tmp_path, old, new, message):
    for name in ("config.yaml", "checkpoints/best.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folders["none"] / name).read_bytes())
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace(old, new))

    with pytest.raises(ValueError, match=f"(?s)must be built anew .*{message}.* Bring back"):
        rebuild(tmp_path)
