"""The plug-in in mixed and low precision."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from mil_anchor import AnchorCallback
from tests.callbacks.by_hand import assert_same_training, hand_written_fit
from tests.callbacks.tiny import make_loader, make_trainer, parameters_of, seeded_module


def test_anchor_callback__bf16_mixed__anchors_in_float32_and_moves(tmp_path, subject):
    module, batches = seeded_module(subject.module, dropout=0.0), subject.batches()
    before = parameters_of(subject.block_of(module))
    anchor, kl, _ = hand_written_fit(subject, module, batches, weight=0.5, decay=0.99)
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.99)
    trainer = make_trainer(tmp_path, callback, precision="bf16-mixed")

    trainer.fit(module, make_loader(batches))

    state = callback.state_dict()["anchor"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert trainer.callback_metrics["anchor/kl"].dtype == torch.float32
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(kl, rel=0.1)
    for name, tensor in anchor.state_dict().items():
        assert torch.allclose(state[name].double(), tensor, atol=0.02)
        assert not torch.equal(state[name], before[name])


def test_anchor_callback__bf16_true__anchor_still_moves(tmp_path, subject):
    module = seeded_module(subject.module)
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.999)
    trainer = make_trainer(tmp_path, callback, precision="bf16-true")

    trainer.fit(module, make_loader(subject.batches()))

    state = callback.state_dict()["anchor"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in state.values())


class Descent:
    """Steps in proportion to the gradient, so that half precision stays a small difference."""

    fused = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)


class Overflowing(Descent):
    """The fifth loss is infinite: the scaler must skip that step."""

    n_losses = 0

    def loss(self, batch):
        self.n_losses += 1
        return super().loss(batch) * (torch.inf if self.n_losses == 5 else 1)


class FusedOverflowing(Overflowing):
    """The optimizer looks for overflow itself: its step is called all the same."""

    fused = True


@pytest.mark.parametrize("how", [Descent, Overflowing, FusedOverflowing])
def test_anchor_callback__16_mixed_with_a_scaler__equals_the_method_written_by_hand(
    tmp_path, subject, how
):
    module = seeded_module(subject.variant(how), dropout=0.0)
    batches, weight = subject.batches(12), 2.0
    done = [batch for index, batch in enumerate(batches) if how is Descent or index != 4]
    same_start = seeded_module(subject.variant(Descent), dropout=0.0)
    expected, without = (
        hand_written_fit(subject, same_start, done, weight=w, decay=0.8, epochs=1)
        for w in (weight, 0.0)
    )
    callback = AnchorCallback(subject.site, weight=weight, decay=0.8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    mixed = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    trainer = make_trainer(tmp_path, callback, plugins=[mixed], max_epochs=1)

    trainer.fit(module, make_loader(batches))

    assert scaler.get_scale() == (1024.0 if how is Descent else 512.0)
    anchor, _, reference = expected
    assert_same_training(module, callback, reference, anchor, tolerance=2e-3)
    # A term that the scaler did not see would be 1/1024 of itself.
    with pytest.raises(AssertionError):
        assert_same_training(module, callback, without[2], without[0], tolerance=2e-2)
