"""The first training step shows no attention, or another one than was named."""

import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mil_anchor import AnchorCallback, AttentionMonitor, AttentionSite
from mil_anchor.callbacks.monitor import read_attention
from tests.callbacks.searching import (
    BLOCK,
    SITE,
    anchor_plugin,
    assert_same,
    found_lines,
    run_pasted,
    train,
)
from tests.callbacks.tiny import (
    TinyModule,
    assert_clean,
    make_loader,
    make_trainer,
    seeded_module,
)


class Several(TinyModule):
    """Two attentions, neither inside the other."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.second = nn.Linear(4, 1)

    def loss(self, batch):
        weights = torch.softmax(self.second(batch["features"]), dim=1)
        return super().loss(batch) + (weights * batch["features"]).sum(dim=1).square().mean()


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
def test_search__several_attentions__lists_lines_and_each_of_them_pasted_works(tmp_path, callback):
    module = seeded_module(Several)
    with pytest.raises(MisconfigurationException, match="One attention block must be") as error:
        make_trainer(tmp_path, callback()).fit(module, make_loader())
    assert_clean(module)

    lines = re.search(r"Name one: (.*)\.$", str(error.value))[1].split(" or ")

    name = callback.__name__
    assert sorted(lines) == [
        f"{name}({AttentionSite('net.attention', layout='b n r')})",
        f"{name}({AttentionSite('second', layout='b n r')})",
    ]
    for line in lines:
        trainer = make_trainer(tmp_path, run_pasted(line))
        trainer.fit(seeded_module(Several), make_loader(), make_loader())
        assert trainer.callback_metrics.keys() & {"anchor/kl", "attention/jsd"}


class NoAttention(TinyModule):
    """Averages its instances."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        small = hidden[..., :1] + self.net.attention(hidden).mean() * 0
        logits = self.net.head((hidden * small.sigmoid()).mean(dim=1))
        return nn.functional.cross_entropy(logits, batch["label"])


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
def test_search__model_without_attention__names_kinds_and_candidates(tmp_path, callback):
    module = seeded_module(NoAttention)

    with pytest.raises(MisconfigurationException, match="of NoAttention must be found") as error:
        make_trainer(tmp_path, callback()).fit(module, make_loader())

    message = str(error.value)
    kinds = ("AttentionSite", "GatedSite", "ClassTokenSite", "MultiheadSite")
    assert all(f"{kind}(" in message for kind in (*kinds, "CriticalInstanceSite"))
    assert "net.attention (2, 5, 8) -> (2, 5, 2)" in message
    assert_clean(module)
    assert not _get_current_dispatch_mode_stack()


class Probabilities(TinyModule):
    """Normalises inside the block that a user might name."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.net.attention.append(nn.Softmax(dim=1))

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        pooled = self.net.attention(hidden).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


class Tempered(TinyModule):
    """Divides its scores by a temperature."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        pooled = torch.softmax(self.net.attention(hidden) / 4, dim=1).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


class MaskedLater(TinyModule):
    """Hides an instance that the batch does not call padding."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        scores = self.net.attention(hidden).index_fill(1, torch.tensor([0]), -torch.inf)
        pooled = torch.softmax(scores, dim=1).mT @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


WRONG = [
    (Probabilities, "they are probabilities"),
    (Tempered, r"multiplies them by 0\.25 .* AttentionSite\(scale=0\.25\)"),
    (MaskedLater, "masks 1 of 5 of them afterwards"),
]


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
@pytest.mark.parametrize(("cls", "why"), WRONG)
def test_proof__wrong_site__is_an_error_in_the_callbacks_own_name(tmp_path, cls, why, callback):
    module = seeded_module(cls)

    with pytest.raises(
        MisconfigurationException,
        match=rf"attention block 'net\.attention' must .*{why}.* {callback.__name__}\(\.\.\., str",
    ):
        make_trainer(tmp_path, callback(SITE)).fit(module, make_loader(), make_loader())
    assert_clean(module)


@pytest.mark.parametrize("callback", [AnchorCallback, AttentionMonitor])
@pytest.mark.parametrize(("cls", "why"), WRONG)
def test_proof__wrong_site_not_strict__warns_once_and_trains_on(tmp_path, cls, why, callback):
    with pytest.warns(UserWarning, match=f"attention block 'net.attention' must .*{why}") as caught:
        run = train(tmp_path, seeded_module(cls), [callback(SITE, strict=False)], validate=True)

    assert sum("attention block" in str(warning.message) for warning in caught) == 1
    assert len(run) == 13
    assert ("kl" in run[-1]) == (callback is AnchorCallback)


def test_search__temperature__is_found(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run = train(tmp_path, seeded_module(Tempered), [anchor_plugin()])

    (line,) = found_lines(caplog)
    assert line == f"AnchorCallback({AttentionSite(BLOCK, layout='b n r', scale=0.25)})"
    again = train(tmp_path, seeded_module(Tempered), [run_pasted(line, weight=0.5, decay=0.9)])
    assert_same(run, again)


def test_monitor__model_without_attention_not_strict__warns_once_and_trains_as_without(tmp_path):
    bare = train(tmp_path, seeded_module(NoAttention), validate=True)

    with pytest.warns(
        UserWarning, match="The attention of evaluated bags is not recorded"
    ) as caught:
        run = train(
            tmp_path, seeded_module(NoAttention), [AttentionMonitor(strict=False)], validate=True
        )

    assert sum("attention" in str(warning.message).lower() for warning in caught) == 1
    assert_same(bare, run)
    assert read_attention(tmp_path / "attention.csv") == []
