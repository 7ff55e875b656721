"""A class of a known name may be another model."""

import copy

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import mil_anchor
from mil_anchor import AttentionSite
from tests.callbacks.searching import (
    BLOCK,
    anchor_plugin,
    assert_same,
    found_lines,
    run_pasted,
    train,
    whole_and_resumed,
)
from tests.callbacks.tiny import (
    TinyMIL,
    TinyModule,
    assert_clean,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    seeded_module,
)


class ABMIL(TinyMIL):
    """Of a registered name: several published models of it have their scores in `attention`."""


class WithProbabilities(ABMIL):
    """Its block puts out probabilities."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention.append(nn.Softmax(dim=1))

    def forward(self, features):
        hidden = self.encoder(features)
        return self.head((self.attention(hidden).mT @ hidden).mean(dim=1))


class Paired(nn.Sequential):
    def forward(self, hidden):
        return super().forward(hidden), hidden


class WithTuple(ABMIL):
    """Its block puts out scores and features."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention = Paired(*self.attention)

    def forward(self, features):
        scores, hidden = self.attention(self.encoder(features))
        return self.head((scores.softmax(dim=1).mT @ hidden).mean(dim=1))


class Moved(TinyMIL):
    """Its scores come from another submodule; what is called attention does not run."""

    def __init__(self, dropout=0.3) -> None:
        super().__init__(dropout)
        self.scorer = copy.deepcopy(self.attention)

    def forward(self, features):
        hidden = self.encoder(features)
        return self.head((self.scorer(hidden).softmax(dim=1).mT @ hidden).mean(dim=1))


class Elsewhere(Moved, ABMIL):
    """The same, of a registered name."""


class Mixing(ABMIL):
    """What is called attention runs, and mixes the features before they are scored."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention, self.scorer = nn.Linear(8, 8), self.attention

    def forward(self, features):
        hidden = self.attention(self.encoder(features))
        return self.head((self.scorer(hidden).softmax(dim=1).mT @ hidden).mean(dim=1))


class WithoutParameters(ABMIL):
    """What is called attention is only the softmax."""

    def __init__(self, dropout) -> None:
        super().__init__(dropout)
        self.attention, self.scorer = nn.Softmax(dim=1), self.attention

    def forward(self, features):
        hidden = self.encoder(features)
        return self.head((self.attention(self.scorer(hidden)).mT @ hidden).mean(dim=1))


MISNAMED = {
    WithProbabilities: AttentionSite(BLOCK, tap="3", layout="b n r"),
    WithTuple: AttentionSite(BLOCK, layout="b n r", output=0),
    Elsewhere: AttentionSite("net.scorer", layout="b n r"),
    Mixing: AttentionSite("net.scorer", layout="b n r"),
    WithoutParameters: AttentionSite("net.scorer", layout="b n r"),
}


class Misnamed(TinyModule):
    def __init__(self, net, *, dropout=0.3) -> None:
        super().__init__(dropout=dropout)
        self.net = net(dropout)


@pytest.mark.parametrize("net", MISNAMED)
def test_search__registered_name_that_does_not_fit__falls_back_to_what_the_model_runs(
    tmp_path, net, caplog
):
    assert mil_anchor.find_site(seeded_module(Misnamed, net=net)) == AttentionSite(BLOCK)

    with caplog.at_level("INFO"):
        found = train(tmp_path, seeded_module(Misnamed, net=net), [anchor_plugin()])

    (line,) = found_lines(caplog)
    pasted = run_pasted(line, weight=0.5, decay=0.9)
    assert_same(found, train(tmp_path, seeded_module(Misnamed, net=net), [pasted]))
    again = train(tmp_path, seeded_module(Misnamed, net=net), [anchor_plugin(MISNAMED[net])])
    assert_same(found, again)
    assert found[-1]["kl"] > 0


def test_search__registered_name_that_does_not_fit_and_nothing_else__tells_the_difference(tmp_path):
    class Unnormalized(ABMIL):
        def forward(self, features):
            hidden = self.encoder(features)
            return self.head((self.attention(hidden).mT @ hidden).mean(dim=1))

    module = seeded_module(Misnamed, net=Unnormalized)
    with pytest.raises(MisconfigurationException, match="it ran no softmax over 5 instances"):
        make_trainer(tmp_path, anchor_plugin()).fit(module, make_loader())
    assert_clean(module)


def test_search__second_model_with_its_attention_elsewhere__is_searched_anew(tmp_path, caplog):
    plugin = anchor_plugin()
    with caplog.at_level("INFO"):
        train(tmp_path, seeded_module(), [plugin])
        second = train(tmp_path, seeded_module(Misnamed, net=Moved), [plugin])
        named = train(tmp_path, seeded_module(Misnamed, net=Moved), [anchor_plugin("net.scorer")])

    assert ["net.scorer" in line for line in found_lines(caplog)] == [False, True]
    assert_same(second, named)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("net", MISNAMED)
def test_search__stop_and_resume_under_a_name_that_does_not_fit__equals_the_uninterrupted_run(
    tmp_path, net
):
    whole, resumed = whole_and_resumed(
        tmp_path, lambda: seeded_module(Misnamed, net=net), anchor_plugin, make_batches()
    )

    assert_equal_states(whole, resumed)
