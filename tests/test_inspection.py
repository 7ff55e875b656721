"""python -m mil_anchor inspect: what it prints of a model, and what it says when it cannot."""

import importlib
import re
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import mil_anchor
from mil_anchor.__main__ import main
from mil_anchor.inspection import inspect_model, load_model
from tests.callbacks.tiny import TinyMIL, make_loader, make_trainer
from tests.composing import ROOT

WIDTH = 12


class Unknown(nn.Module):
    """Divides its scores by a temperature; returns a dict, as many models do."""

    def __init__(self, in_dim) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(in_dim, 8), nn.ReLU(), nn.Dropout(0.2))
        self.relevance = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
        self.head = nn.Linear(8, 2)

    def forward(self, features):
        hidden = self.encoder(features)
        attention = (self.relevance(hidden) / 4).softmax(dim=1)
        return {"logits": self.head((attention.mT @ hidden).mean(dim=1)), "name": "unknown"}


class NoAttention(nn.Module):
    def __init__(self, n_feats, num_classes) -> None:
        super().__init__()
        self.small = nn.Linear(n_feats, 3)
        self.head = nn.Linear(3, num_classes)

    def forward(self, features):
        return self.head(self.small(features).mean(dim=1))


class Several(Unknown):
    def __init__(self, in_dim) -> None:
        super().__init__(in_dim)
        self.second = nn.Linear(in_dim, 1)

    def forward(self, features):
        pooled = (self.second(features).softmax(dim=1) * features).sum(dim=1)
        return super().forward(features)["logits"].sum() + pooled.sum()


class Slides(nn.Module):
    """Takes one bag without a bag axis, as CLAM does."""

    def __init__(self, input_dim, n_classes) -> None:
        super().__init__()
        self.scorer = nn.Linear(input_dim, 1)
        self.head = nn.Linear(input_dim, n_classes)

    def forward(self, bag):
        n_instances, _ = bag.shape
        attention = self.scorer(bag).reshape(n_instances).softmax(dim=0)
        return self.head(attention @ bag), attention


class Batched(Slides):
    """Takes a mapping, and calls it data."""

    def forward(self, *, data):
        return super().forward(data["features"][0] if isinstance(data, dict) else data[0])


class MaskedWherePadded(Slides):
    """Its optional mask is True on padding."""

    def forward(self, bag, mask=None):
        scores = self.scorer(bag).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(mask, -1e9)
        return self.head((scores.softmax(dim=1)[..., None] * bag).sum(dim=1))


class NeedsMask(Slides):
    """Its mask is True on instances, and it cannot do without."""

    def forward(self, bag, mask):
        scores = self.scorer(bag).squeeze(-1).masked_fill(~mask, -1e9)
        return self.head((scores.softmax(dim=1)[..., None] * bag).sum(dim=1))


class ABMIL(Slides):
    """Of a name that several published models have, whose scores are in `attention`."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 2)
        self.attention = nn.Sequential(nn.Linear(WIDTH, 1), nn.Softmax(dim=1))

    def forward(self, bag):
        return self.head((self.attention(bag) * bag).sum(dim=1))


class Square(nn.Module):
    """Takes pictures."""

    def forward(self, picture):
        raise NotImplementedError("only pictures of 224 by 224 pixels")


class NoGradient(nn.Module):
    def forward(self, bag):
        return bag.mean(dim=1)


class Frozen(Slides):
    """Its forward runs, but without any gradient."""

    @torch.no_grad()
    def forward(self, bag):
        return super().forward(bag)


class Holder:
    """A name inside a class."""

    Model = Unknown


def make_unknown():
    return Unknown(WIDTH)


def make_wide(width):
    return Unknown(width)


def make_pair():
    return Unknown(WIDTH), Unknown(WIDTH)


MODEL = TinyMIL()
NUMBER = 3


def _inspect(target, *arguments):
    return main(["inspect", f"{__name__}:{target}", "--width", str(WIDTH), *arguments])


def _lines(text):
    """The printed lines by their names."""
    named = re.findall(r"^(\w[\w ]*?)  +(.*)$", text, flags=re.MULTILINE)
    return dict(named)


def _pasted(line):
    return eval(line.partition("  #")[0], dict(vars(mil_anchor)))


class Trained(LightningModule):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        output = self.model(batch["features"])
        return (output["logits"] if isinstance(output, dict) else output).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _batches(width):
    generator = torch.Generator().manual_seed(0)
    return [{"features": torch.randn(1, 6, width, generator=generator)} for _ in range(2)]


# What is printed ----------------------------------------------------------------------------------


def test_inspect__unknown_model__prints_what_was_found(capsys):
    assert _inspect("make_unknown", "--instances", "9") == 0

    site = "AttentionSite('relevance', layout='b n r', scale=0.25)"
    nested = "AttentionSite('model.relevance', layout='b n r', scale=0.25)"
    assert capsys.readouterr().out.splitlines() == [
        f"site        {site} (found in what the model ran)",
        "block       relevance (Sequential)",
        "scores      1 distribution(s) of 3 row(s)",
        "mirrored    63 parameters: 0.weight, 0.bias, 2.weight, 2.bias",
        "proof       the softmax of the scores is one that the model ran",
        f"to paste    AnchorCallback({site})",
        f"            AnchorCallback({nested})  # as self.model of a LightningModule",
    ]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("ABMIL", "pool (AttentionPool)"),
        ("DSMIL", "q_nn"),
        ("TransMIL", "layers.-1.att_module.qkv_nn"),
        ("DTFDMIL", "attention_pool"),
        ("CLAM_SB", "pool"),
    ],
)
def test_inspect__class_of_torchmil__is_known(capsys, name, block):
    assert main(["inspect", f"torchmil.models:{name}", "--width", "32", "--instances", "20"]) == 0

    lines = _lines(capsys.readouterr().out)
    assert lines["site"].endswith("(known by its class)")
    assert lines["block"].startswith(block)
    if name == "TransMIL":
        assert lines["proof"] == "not possible: the model runs no softmax over the instances"
    else:
        assert lines["proof"] == "the softmax of the scores is one that the model ran"
    assert _pasted(lines["to paste"]).site.path == lines["block"].partition(" ")[0]


@pytest.mark.parametrize("target", ["Unknown", "Holder.Model", "make_unknown"])
def test_inspect__printed_lines__work_when_pasted(capsys, tmp_path, target):
    assert _inspect(target) == 0
    bare, nested = re.findall(r"^(?:to paste)? +(AnchorCallback.*)$", capsys.readouterr().out, re.M)

    for line, wrap in ((nested, Trained), (bare, _as_itself)):
        trainer = make_trainer(tmp_path, _pasted(line), max_epochs=1)
        trainer.fit(wrap(Unknown(WIDTH)), make_loader(_batches(WIDTH)))
        assert trainer.callback_metrics["anchor/kl"] > 0


def _as_itself(model):
    """A module that is the model."""
    module = Trained(None)
    module.model = model.forward  # bound: the paths start at the model's own submodules
    for name, part in model.named_children():
        setattr(module, name, part)
    return module


@pytest.mark.parametrize(
    ("target", "layout"),
    [
        ("Slides", "n r"),
        ("Batched", "n r"),
        ("NeedsMask", "b n r"),
        ("MaskedWherePadded", "b n r"),
    ],
)
def test_inspect__every_form_of_bag__is_tried(capsys, target, layout):
    assert _inspect(target) == 0

    site = f"AttentionSite('scorer', layout='{layout}')"
    assert _lines(capsys.readouterr().out)["to paste"] == f"AnchorCallback({site})"


@pytest.mark.parametrize("target", ["Unknown", "Slides"])
def test_inspect__width__is_passed_to_the_model_and_is_that_of_the_bag(capsys, target):
    # Either one alone would not fit the other.
    assert main(["inspect", f"{__name__}:{target}", "--width", "40"]) == 0

    assert "to paste" in capsys.readouterr().out
    first = next(load_model(f"{__name__}:{target}", 40).parameters())
    assert first.shape[1] == 40


def test_inspect__registered_name_that_does_not_fit__is_searched(capsys):
    assert _inspect("ABMIL") == 0

    lines = _lines(capsys.readouterr().out)
    assert lines["site"] == (
        "AttentionSite('attention.0', layout='b n r') (found in what the model ran)"
    )
    assert lines["proof"] == "the softmax of the scores is one that the model ran"


# What cannot be done ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "NoAttention",
            r"attention of NoAttention must be found, but no .* AttentionSite\(block, tap=.*"
            r"MultiheadSite.* small \(1, 100, 12\) -> \(1, 100, 3\)",
        ),
        (
            "Several",
            r"Name one: AnchorCallback\(AttentionSite\('second'.* or AnchorCallback\(Attention"
            r"Site\('relevance', layout='b n r', scale=0\.25\)\)",
        ),
        ("make_wide", r"needs the arguments \['width'\], which inspect cannot know\. Write a"),
        ("make_pair", "must make a torch.nn.Module, but it made a tuple"),
        ("NUMBER", "must make a torch.nn.Module, but it made a int"),
        ("Missing", "'.*:Missing' cannot be imported: .* has no attribute 'Missing'"),
        ("Holder.Missing", "cannot be imported: .* has no attribute 'Missing'"),
        (
            "Square",
            r"Square must take a bag of features, but it failed on each form.*\(bag, instance, "
            r"width\): NotImplementedError: only pictures.*\(instance, width\): .*data=",
        ),
        ("NoGradient", r"\(bag, instance, width\): TypeError: the model returned no tensor with a"),
        ("Frozen", "the model returned no tensor with a gradient"),
    ],
)
def test_inspect__what_cannot_be_inspected__is_told_and_the_exit_code_is_1(capsys, target, message):
    assert _inspect(target) == 1

    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert not captured.out


@pytest.mark.parametrize(
    "target", ["no_such_package.models:Model", "torchmil.models", ":Model", "", ".models:Model"]
)
def test_inspect__no_such_module__is_told_and_the_exit_code_is_1(capsys, target):
    assert main(["inspect", target]) == 1

    error = capsys.readouterr().err
    assert f"must be named 'package.module:factory', but '{target}' cannot be imported" in error


def test_inspect__scores_that_the_model_does_not_softmax__prints_the_difference_and_fails(capsys):
    main(["inspect", "torchmil.models:ProbSmoothABMIL", "--width", "32", "--instances", "20"])

    captured = capsys.readouterr()
    assert "proof       the scores must be what the model's softmax gets, but " in captured.out
    assert "to paste" not in captured.out


# What is left -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 5])
def test_inspect__model__has_neither_hooks_nor_gradients_afterwards(width):
    before = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}

    code = main(["inspect", f"{__name__}:MODEL", "--width", str(width)])

    assert code == (0 if width == 4 else 1)
    for part in MODEL.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert all(parameter.grad is None for parameter in MODEL.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in MODEL.state_dict().items())


def test_inspect_model__found__tells_the_block_and_its_rows():
    model = Unknown(WIDTH)

    found = inspect_model(model, width=WIDTH, n_instances=5)

    assert found.block is model.relevance
    assert (found.known, found.provable, found.difference) == (False, True, None)
    assert (found.n_rows, found.n_distributions) == (3, 1)


@pytest.mark.slow
def test_inspect__from_the_command_line__prints_the_line_to_paste():
    done = subprocess.run(
        [*f"{sys.executable} -m mil_anchor inspect torchmil.models:ABMIL --width 64".split()],
        cwd=ROOT,
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    line = _lines(done.stdout)["to paste"]
    assert line == "AnchorCallback(AttentionSite('pool', tap='fc2', layout='b n r'))"
    model = importlib.import_module("torchmil.models").ABMIL(in_shape=(64,))
    assert _pasted(line).site.find_block(model) is model.pool
