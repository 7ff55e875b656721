"""What a plug-in sees of the attention block: masks, padding, layouts, several calls."""

import pytest
import torch
from torch import nn

from mil_anchor import AnchorCallback, AttentionRegularizer, AttentionSite
from mil_anchor.attention import softmax
from mil_anchor.callbacks.recorder import AttentionRecorder
from tests.callbacks.tiny import (
    TinyModule,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

BLOCK = "net.attention"


def test_regularizer__scores_masked_in_place_by_the_model__are_kept_as_they_were(tmp_path):
    class InPlace(TinyModule):
        def loss(self, batch):
            hidden = self.net.encoder(batch["features"])
            scores = self.net.attention(hidden)
            scores[:, 0] = -1e9
            return self.net.head(torch.softmax(scores, 1).transpose(1, 2) @ hidden).square().mean()

    seen = []

    class Looking(AttentionRegularizer):
        def penalty(self, attention):
            seen.append(attention.scores.min().item())
            return softmax(attention.scores, attention.mask).amax(dim=-1)

        def log_values(self, penalty):
            return {}

    batches = make_batches()
    for batch in batches:
        batch["mask"] = torch.ones(2, 5, dtype=torch.bool)
        batch["mask"][:, 0] = False
    trainer = make_trainer(tmp_path, Looking(BLOCK, weight=0.1))
    trainer.fit(seeded_module(InPlace), make_loader(batches))

    assert min(seen) > -1e8


def test_regularizer__input_changed_in_place_after_the_block__is_refused(tmp_path):
    class Changing(TinyModule):
        def loss(self, batch):
            features = batch["features"].clone()
            scores = self.net.attention(self.net.encoder(features).detach().mul_(1))
            hidden = self.net.encoder(features)
            self.net.attention(hidden.detach_())
            hidden.add_(1)
            return scores.sum()

    with pytest.raises(RuntimeError, match="has changed them in place"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(seeded_module(Changing), make_loader())


class Padded(TinyModule):
    """Sees padded batches and masks its softmax; the mask does not reach the block."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        scores = self.net.attention(hidden).masked_fill(~batch["mask"][..., None], -torch.inf)
        pooled = torch.softmax(scores, dim=1).transpose(1, 2) @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


def _padded_batches(n_padding):
    batches = make_batches()
    for batch in batches:
        n_bags, n_instances, width = batch["features"].shape
        padding = torch.full((n_bags, n_padding, width), 9.0)
        batch["features"] = torch.cat([batch["features"], padding], dim=1)
        batch["mask"] = (torch.arange(n_instances + n_padding) < n_instances).expand(n_bags, -1)
    return batches


def test_regularizer__padding_in_the_batch__changes_nothing(tmp_path):
    trained = []
    for n_padding in (0, 7):
        module = seeded_module(Padded, dropout=0.0)
        callback = AnchorCallback(BLOCK, weight=2.0, decay=0.9)
        make_trainer(tmp_path, callback, precision="64-true").fit(
            module, make_loader(_padded_batches(n_padding))
        )
        trained.append(parameters_of(module))

    for name, tensor in trained[0].items():
        assert torch.allclose(tensor, trained[1][name], atol=1e-12), name


def test_regularizer__mask_with_a_trailing_axis__is_read_and_any_other_is_refused(tmp_path):
    divergences = []
    for reshape in (lambda mask: mask, lambda mask: mask[..., None], lambda mask: mask.float()):
        batches = _padded_batches(4)
        plugin = AnchorCallback(BLOCK, weight=0.0)

        class Module(Padded):
            def loss(self, batch):
                return super().loss({**batch, "mask": batch["mask"].reshape(2, -1) > 0})

        loader = make_loader([{**batch, "mask": reshape(batch["mask"])} for batch in batches])
        trainer = make_trainer(tmp_path, plugin, max_epochs=1)
        trainer.fit(seeded_module(Module, dropout=0.0), loader)
        divergences.append(trainer.callback_metrics["anchor/kl"].item())
    assert divergences[0] == divergences[1] == divergences[2]

    flat = make_loader([{**batch, "mask": batch["mask"].flatten()} for batch in batches])
    with pytest.raises(ValueError, match=r"mask must have the shape \(bag, instance\)"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(seeded_module(Module), flat)


class Flattening(TinyModule):
    """Calls its block on the instances of all bags as one list."""

    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        scores = self.net.attention(hidden.flatten(0, 1)).reshape(*hidden.shape[:2], 2)
        pooled = torch.softmax(scores, dim=1).transpose(1, 2) @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


class NotFlattening(Flattening):
    def loss(self, batch):
        hidden = self.net.encoder(batch["features"])
        pooled = torch.softmax(self.net.attention(hidden), dim=1).transpose(1, 2) @ hidden
        return nn.functional.cross_entropy(self.net.head(pooled.mean(1)), batch["label"])


def test_regularizer__flattened_bags__need_a_layout_and_then_give_the_same(tmp_path):
    with pytest.raises(ValueError, match="gives 1 bags for a batch of 2"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(seeded_module(Flattening), make_loader())

    # Nor does a first batch of one bag, which is no list of several, let the next ones pass.
    batches = [*make_batches(1, n_bags=1), *make_batches(1)]
    with pytest.raises(ValueError, match="gives 1 bags for a batch of 2"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(
            seeded_module(Flattening), make_loader(batches)
        )

    divergences = []
    for cls, layout in ((Flattening, "(b n) r"), (NotFlattening, "b n r")):
        plugin = AnchorCallback(AttentionSite(BLOCK, layout=layout), weight=0.0)
        trainer = make_trainer(tmp_path, plugin, max_epochs=1)
        trainer.fit(seeded_module(cls, dropout=0.0), make_loader())
        divergences.append(trainer.callback_metrics["anchor/kl"].item())
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-5)


def test_regularizer__block_called_twice__averages_over_both_calls(tmp_path):
    class Twice(NotFlattening):
        def loss(self, batch):
            return (super().loss(batch) + super().loss(batch)) / 2

    divergences = []
    for cls in (NotFlattening, Twice):
        trainer = make_trainer(tmp_path, AnchorCallback(BLOCK, weight=0.5), max_epochs=1)
        trainer.fit(seeded_module(cls, dropout=0.0), make_loader())
        divergences.append(trainer.callback_metrics["anchor/kl"].item())

    assert divergences[0] == pytest.approx(divergences[1], rel=1e-4)


def test_regularizer__bag_as_large_as_the_number_of_rows__is_read_like_the_others(tmp_path):
    batches = [*make_batches(2), *make_batches(2, n_instances=2)]
    trainer = make_trainer(tmp_path, AnchorCallback(BLOCK, weight=0.1), max_epochs=1)

    trainer.fit(seeded_module(), make_loader(batches))

    assert trainer.callback_metrics["anchor/kl"] >= 0


def test_regularizer__bad_score__is_reported_with_the_bags_of_the_batch(tmp_path):
    batches = make_batches(1)
    batches[0]["features"][1, 0, 0] = torch.nan

    with pytest.raises(ValueError, match=r"of bags \['bag0_0', 'bag0_1'\]: Raw scores"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(seeded_module(), make_loader(batches))


def test_regularizer__model_that_takes_bags_one_by_one__is_measured_without_padding(tmp_path):
    class OneByOne(Padded):
        def loss(self, batch):
            return sum(
                super(OneByOne, self).loss(
                    {
                        "features": features[None, real],
                        "mask": torch.ones(1, int(real.sum()), dtype=torch.bool),
                        "label": label[None],
                    }
                )
                for features, real, label in zip(
                    batch["features"], batch["mask"], batch["label"], strict=True
                )
            ) / len(batch["label"])

    trained = []
    for cls in (Padded, OneByOne):
        module = seeded_module(cls, dropout=0.0)
        callback = AnchorCallback(BLOCK, weight=2.0, decay=0.9)
        make_trainer(tmp_path, callback, precision="64-true").fit(
            module, make_loader(_padded_batches(3))
        )
        trained.append(parameters_of(module))

    for name, tensor in trained[0].items():
        assert torch.allclose(tensor, trained[1][name], atol=1e-12), name


def test_regularizer__scores_that_do_not_cover_the_padded_batch__are_refused(tmp_path):
    class Cropping(Padded):
        def loss(self, batch):
            crop = {"features": batch["features"][:, 1:], "mask": batch["mask"][:, 1:]}
            return super().loss({**batch, **crop})

    with pytest.raises(ValueError, match=r"mask is \(2, 8\) and the calls have .* \[\(2, 7\)\]"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(
            seeded_module(Cropping), make_loader(_padded_batches(3))
        )


def test_regularizer__probabilities_of_a_tuple_output__can_be_picked(tmp_path):
    class Tuple(nn.Linear):
        def forward(self, features):
            return {"scores": super().forward(features), "features": features}

    class Module(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.block = Tuple(4, 1)

        def loss(self, batch):
            return (torch.softmax(self.block(batch["features"])["scores"], 1) ** 2).sum()

    site = AttentionSite("block", layout="b n r", output="scores")
    make_trainer(tmp_path, AnchorCallback(site)).fit(seeded_module(Module), make_loader())
    with pytest.raises(ValueError, match="a mapping with keys"):
        make_trainer(tmp_path, AnchorCallback("block")).fit(seeded_module(Module), make_loader())


class PassesThrough(nn.Module):
    """Scores beside the features that it got, as CLAM's block returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1)

    def forward(self, features):
        return self.score(features), features.view_as(features)


def test_recorder__features_that_the_block_hands_through__are_not_copied():
    block, features = PassesThrough(), torch.randn(1, 5, 4)
    recorder = AttentionRecorder(
        block, AttentionSite("", layout="b n r", output=0), only_with_grad=True
    )
    recorder.start()
    scores, _ = block(features)
    (call,) = recorder.calls
    recorder.remove()

    assert call.returned[1].data_ptr() == features.data_ptr()
    assert call.returned[0] is not scores
    assert torch.equal(call.returned[0], scores)


def test_recorder__block_with_a_sparse_input__is_recorded():
    class Graph(PassesThrough):
        def forward(self, features, adjacency):
            scores, _ = super().forward(features)
            return scores, adjacency

    block, adjacency = Graph(), torch.eye(5).to_sparse()
    recorder = AttentionRecorder(
        block, AttentionSite("", layout="b n r", output=0), only_with_grad=True
    )
    recorder.start()
    block(torch.randn(1, 5, 4), adjacency)
    (call,) = recorder.calls
    recorder.remove()

    assert call.returned[1] is adjacency


def test_recorder__block_around_a_tap__keeps_the_tap_alone():
    block = nn.Sequential(nn.Linear(4, 1), nn.Softmax(dim=1))
    recorder = AttentionRecorder(
        block, AttentionSite("", tap="0", layout="b n r"), only_with_grad=True
    )
    recorder.start()
    block(torch.randn(1, 5, 4))
    kept = [call.returned is not None for call in recorder.calls]
    recorder.remove()

    assert kept == [True, False]


def test_recorder__identity_as_a_tap__keeps_scores_that_are_masked_in_place_later():
    block = nn.Sequential(nn.Linear(4, 1), nn.Identity())
    recorder = AttentionRecorder(
        block, AttentionSite("", tap="1", layout="b n r"), only_with_grad=True
    )
    recorder.start()
    scores = block(torch.randn(1, 5, 4))
    scores[:, 0] = -1e9
    (attention,) = recorder.take(None)
    recorder.remove()

    assert attention.scores.isfinite().all()
