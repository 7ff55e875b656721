import threading
from contextlib import ExitStack

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from benchmarks.fitting import SteppedFit
from mil_anchor import AnchorCallback, AttentionSite

N_FEATURES = 4


class Tiny(LightningModule):
    """Attention pooling that tells when it steps."""

    def __init__(self, name="tiny", seen=None, fails_at=None):
        super().__init__()
        self.name = name
        self.seen = [] if seen is None else seen
        self.fails_at = fails_at
        self.scorer = nn.Linear(N_FEATURES, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fails_at:
            raise OSError(f"{self.name} has failed")
        self.seen.append(self.name)
        return (self.scorer(batch).softmax(dim=1) * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def bag():
    return torch.randn(1, 5, N_FEATURES)


def test_stepped_fit__two_fits__step_in_turn(bag):
    seen = []
    with SteppedFit(Tiny("A", seen), bag) as one, SteppedFit(Tiny("B", seen), bag) as other:
        assert seen == []
        for _ in range(3):
            one.step()
            other.step()
    assert seen == ["A", "B"] * 3


def test_stepped_fit__steps__train_as_a_fit_does(bag):
    torch.manual_seed(0)
    module = Tiny()
    weight = module.scorer.weight.detach().clone().requires_grad_()
    loss = ((bag @ weight.T + module.scorer.bias.detach()).softmax(dim=1) * bag).sum()
    loss.backward()
    with SteppedFit(module, bag) as fit:
        fit.step()
        torch.testing.assert_close(module.scorer.weight, weight - 0.1 * weight.grad)


def test_stepped_fit__left__has_ended_and_the_plugin_is_gone(bag):
    module, n_threads = Tiny(), threading.active_count()
    plugin = AnchorCallback(AttentionSite("scorer", layout="b n r"))
    with SteppedFit(module, bag, callbacks=[plugin]) as fit:
        fit.step()
        assert "training_step" in vars(module)
    assert threading.active_count() == n_threads
    assert "training_step" not in vars(module)


def test_stepped_fit__error_in_one_fit__is_raised_here_and_ends_all(bag):
    n_threads = threading.active_count()
    with ExitStack() as fits, pytest.raises(OSError, match="B has failed"):  # noqa: PT012
        one = fits.enter_context(SteppedFit(Tiny("A"), bag))
        other = fits.enter_context(SteppedFit(Tiny("B", fails_at=1), bag))
        for _ in range(2):
            one.step()
            other.step()
    assert threading.active_count() == n_threads


def test_stepped_fit__error_before_the_first_step__is_raised_on_entering(bag):
    n_threads = threading.active_count()
    module = Tiny()
    module.configure_optimizers = lambda: 3
    with pytest.raises(Exception, match="configure_optimizers"), SteppedFit(module, bag):
        pass
    assert threading.active_count() == n_threads


def test_stepped_fit__interrupted__ends_all(bag):
    n_threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ExitStack() as fits:  # noqa: PT012
        for name in "AB":
            fits.enter_context(SteppedFit(Tiny(name), bag)).step()
        raise KeyboardInterrupt
    assert threading.active_count() == n_threads


def test_stepped_fit__ended_by_itself__refuses_a_step(bag):
    module = Tiny()
    with SteppedFit(module, bag) as fit:
        module.trainer.should_stop = True
        with pytest.raises(RuntimeError, match="must stay in its loop"):
            fit.step()
