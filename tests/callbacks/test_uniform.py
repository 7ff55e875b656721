import warnings

import pytest
import torch

from mil_anchor.attention import log_softmax, normalized_entropy
from mil_anchor.callbacks.uniform import UNIFORM, UniformWatch
from tests.callbacks.tiny import make_trainer


@pytest.fixture
def trainer(tmp_path):
    return make_trainer(tmp_path, max_epochs=10)


def _end_epoch(watch, trainer, epoch, mean=None):
    trainer.fit_loop.epoch_progress.current.completed = epoch
    watch.end_epoch(trainer, mean)


def _run(watch, trainer, means):
    """Which epochs of a fit with these means warn."""
    watch.start(trainer)
    warned = []
    for epoch, mean in enumerate(means):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _end_epoch(watch, trainer, epoch, mean)
        warned += [epoch] * len(caught)
    return warned


def test_uniform_watch__attention_that_has_become_uniform__says_how_much_when_and_what_to_do(
    trainer,
):
    watch = UniformWatch("training")
    watch.start(trainer)
    _end_epoch(watch, trainer, 0, 0.9)
    _end_epoch(watch, trainer, 1, 0.95)

    with pytest.warns(
        UserWarning,
        match=r"training attention has become uniform: .* was 0\.988 in epoch 2, above 0\.97.*"
        r"smaller weight \(plugin\.weight\), another target .* schedule",
    ):
        _end_epoch(watch, trainer, 2, 0.988)


@pytest.mark.parametrize(
    ("means", "epochs"),
    [
        ([0.9, 0.9, 0.98, 0.99, 0.9, 0.99], [2]),  # once
        ([0.9, 0.98, 0.96], []),  # in its third epoch it is not
        ([0.9, 0.98, 0.98], [2]),
        ([0.99] * 10, [4]),  # never below: not before half of the training is over
        ([0.99] * 3 + [0.97] * 7, []),
        ([0.97, 0.97, 0.9701], [2]),  # above, not at
        ([0.9, None, 0.99], [2]),
        ([None] * 10, []),
    ],
)
def test_uniform_watch__a_fit_with_these_epochs__warns_in(trainer, means, epochs):
    assert UNIFORM == 0.97
    watch = UniformWatch("training")

    assert _run(watch, trainer, means) == epochs
    # The next fit is another one.
    assert _run(watch, trainer, means) == epochs


@pytest.mark.parametrize("max_epochs", [1, 2])
def test_uniform_watch__short_fit__is_not_judged(tmp_path, max_epochs):
    trainer = make_trainer(tmp_path, max_epochs=max_epochs)

    assert _run(UniformWatch("training"), trainer, [0.5, 0.99][:max_epochs]) == []
    assert _run(UniformWatch("training"), trainer, [0.99, 0.99][:max_epochs]) == []


def test_uniform_watch__fit_bounded_by_steps__is_half_over_by_steps(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=10)
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    watch = UniformWatch("training")
    watch.start(trainer)
    steps.completed = 4
    _end_epoch(watch, trainer, 5, 0.99)
    steps.completed = 5

    with pytest.warns(UserWarning, match="in epoch 6"):
        _end_epoch(watch, trainer, 6, 0.99)


def test_uniform_watch__fit_without_an_end__warns_only_after_an_epoch_below(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=-1)

    assert _run(UniformWatch("training"), trainer, [0.99] * 20) == []
    assert _run(UniformWatch("training"), trainer, [0.9] + [0.99] * 20) == [2]


def test_uniform_watch__several_in_one_fit__warn_once_together(trainer):
    training, validation = UniformWatch("training"), UniformWatch("validation")
    training.start(trainer)
    validation.start(trainer)
    for epoch in range(2):
        _end_epoch(training, trainer, epoch, 0.9)
        _end_epoch(validation, trainer, epoch, 0.9)

    with pytest.warns(UserWarning, match="validation attention has become uniform"):
        _end_epoch(validation, trainer, 2, 0.99)
    _end_epoch(training, trainer, 2, 0.99)  # warnings are errors here


def test_uniform_watch__scores_of_many_steps__have_the_mean_entropy_of_their_rows(trainer):
    torch.manual_seed(0)
    batches = [0.4 * torch.randn(bags, 2, 30, dtype=torch.float64) for bags in (1, 3)]
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[0, 2:] = False  # a bag of two instances does not count
    mask[1, 20:] = False
    expected = torch.cat(
        [
            normalized_entropy(log_softmax(batches[0])),
            normalized_entropy(log_softmax(batches[1][1:2, :, :20])),
            normalized_entropy(log_softmax(batches[1][2:])),
        ]
    ).mean()
    assert expected > UNIFORM
    watch = UniformWatch("training")
    watch.start(trainer)
    _end_epoch(watch, trainer, 1, 0.5)
    watch.add(batches[0].requires_grad_(), None)
    watch.add(batches[1], mask)
    for small in (torch.zeros(1, 2, 1), torch.zeros(1, 2, 2)):
        watch.add(small, None)

    with pytest.warns(UserWarning, match=f"was {expected.item():.3f} in epoch 2"):
        _end_epoch(watch, trainer, 2)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, False, False]])])
def test_uniform_watch__bags_of_two_instances_alone__are_not_judged(trainer, mask):
    watch = UniformWatch("training")
    watch.start(trainer)
    _end_epoch(watch, trainer, 8, 0.5)
    watch.add(torch.zeros(1, 1, 2 if mask is None else 4), mask)

    _end_epoch(watch, trainer, 9)


def test_uniform_watch__each_epoch__is_judged_alone(trainer):
    watch = UniformWatch("training")
    watch.start(trainer)
    watch.add(torch.zeros(5, 1, 9), None)
    _end_epoch(watch, trainer, 0)
    watch.add(torch.tensor([[[9.0, 0.0, 0.0]]]), None)
    _end_epoch(watch, trainer, 1)
    watch.add(torch.tensor([[[9.0, 0.0, 0.0]]]), None)
    _end_epoch(watch, trainer, 8)
    watch.add(torch.zeros(1, 1, 9), None)
    with pytest.warns(UserWarning, match=r"was 1\.000 in epoch 9"):
        _end_epoch(watch, trainer, 9)
    watch.add(torch.zeros(1, 1, 9), None)
    watch.start(trainer)  # what a fit that broke off has left behind is forgotten
    _end_epoch(watch, trainer, 9)
