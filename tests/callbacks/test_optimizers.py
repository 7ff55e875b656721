"""The plug-in with manual optimisation, several optimizers and LBFGS."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from mil_anchor import AnchorCallback
from tests.callbacks.by_hand import assert_same_training, hand_written_fit, hand_written_penalty
from tests.callbacks.tiny import (
    TinyModule,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

BLOCK = "net.attention"


class Manual:
    how = "manual_backward"

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        if self.how == "manual_backward":
            self.manual_backward(loss)
        else:
            loss.backward()
        optimizer.step()


class Raw(Manual):
    how = "raw"


def test_anchor_callback__manual_optimization__equals_the_method_written_by_hand(tmp_path, subject):
    module, batches = seeded_module(subject.variant(Manual), dropout=0.0), subject.batches()
    anchor, kl, reference = hand_written_fit(subject, module, batches, weight=0.5, decay=0.8)
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.8)
    trainer = make_trainer(tmp_path, callback, precision="64-true")

    trainer.fit(module, make_loader(batches))

    assert_same_training(module, callback, reference, anchor)
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(kl, rel=1e-6)
    assert "manual_backward" not in vars(module)


def test_anchor_callback__raw_backward_in_manual_optimization__is_refused_with_advice(
    tmp_path, subject
):
    module, trainer = subject.variant(Raw)(), make_trainer(tmp_path, AnchorCallback(subject.site))

    with pytest.raises(MisconfigurationException, match=r"self\.manual_backward\(loss\)"):
        trainer.fit(module, make_loader(subject.batches()))


def test_anchor_callback__manual_block_that_never_runs__says_what_to_check(tmp_path):
    class Unused(Raw, TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 1)

    with pytest.raises(MisconfigurationException, match="'unused' run with gradients in every"):
        make_trainer(tmp_path, AnchorCallback("unused")).fit(Unused(), make_loader())


class TwoOptimizers(Manual):
    """Two optimizers share the attention block; each steps once a batch."""

    def configure_optimizers(self):
        parameters = list(self.parameters())
        return [torch.optim.SGD(parameters[start::2], lr=0.1) for start in (0, 1)]

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        one.zero_grad()
        two.zero_grad()
        self.manual_backward(self.loss(batch))
        one.step()
        two.step()


def test_anchor_callback__two_optimizers__moves_each_parameter_once_per_own_step(tmp_path, subject):
    module = seeded_module(subject.variant(TwoOptimizers))
    callback = AnchorCallback(subject.site, weight=0.0, decay=0.5)
    block = subject.block_of(module)
    start = parameters_of(block)

    make_trainer(tmp_path, callback, max_steps=2).fit(module, make_loader(subject.batches(1)))

    end, state = parameters_of(block), callback.state_dict()["anchor"]
    for name, tensor in state.items():
        assert torch.allclose(tensor, (start[name] + end[name]) / 2), name


class LBFGS:
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def test_anchor_callback__lbfgs_that_calls_its_closure_many_times__equals_the_method_by_hand(
    tmp_path, subject
):
    module, batches = seeded_module(subject.variant(LBFGS), dropout=0.0), subject.batches(3)
    reference = copy.deepcopy(module).double()
    block = subject.block_of(reference)
    anchor, optimizer = copy.deepcopy(block), reference.configure_optimizers()
    n_closures = 0

    def closure(batch):
        nonlocal n_closures
        n_closures += 1
        optimizer.zero_grad()
        penalty = hand_written_penalty(subject, reference, anchor, batch, "nsf")
        loss = reference.loss(batch) + 0.5 * penalty
        loss.backward()
        return loss

    for batch in batches:
        doubled = {**batch, "features": batch["features"].double()}
        optimizer.step(lambda doubled=doubled: closure(doubled))
        with torch.no_grad():
            for mirrored, online in zip(anchor.parameters(), block.parameters(), strict=True):
                mirrored.lerp_(online, 0.2)
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.8)
    trainer = make_trainer(tmp_path, callback, precision="64-true", max_epochs=1)

    trainer.fit(module, make_loader(batches))

    assert n_closures > 2 * len(batches)
    assert_same_training(module, callback, reference, anchor)


def test_anchor_callback__block_that_no_optimizer_owns__is_refused(tmp_path):
    class HeadOnly(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="or the anchor never moves"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(seeded_module(HeadOnly), make_loader())
