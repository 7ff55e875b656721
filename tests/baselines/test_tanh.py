"""Our tanh against torch's."""

import pytest
import torch

import baselines.tanh
from baselines.tanh import Tanh

VALUES = [0.0, -1e-6, 1e-3, 0.3, -1.7, 9.0, -88.0, 1e4, torch.inf, -torch.inf]


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(baselines.tanh, "_FEWEST", 0)


def test_tanh__few_entries__are_torchs(monkeypatch):
    values = torch.tensor(VALUES[:6]).requires_grad_()
    own = type(Tanh()(values).grad_fn)

    monkeypatch.setattr(baselines.tanh, "_FEWEST", 7)

    assert type(Tanh()(values).grad_fn) is type(values.tanh().grad_fn) is not own


def test_tanh__any_value__is_the_formula_with_its_gradient():
    values = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)

    found = Tanh()(values)

    (gradient,) = torch.autograd.grad(found.sum(), values)
    expected = torch.tanh(values.detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, 1 - expected**2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tanh__low_precision__is_as_near_as_torchs_own(dtype):
    values = torch.linspace(-4, 4, 999).to(dtype)
    exact = values.double().tanh()

    found = Tanh()(values)

    assert found.dtype == dtype
    errors = [(own.double() - exact).abs().max() for own in (found, torch.tanh(values))]
    assert errors[0] <= 1.01 * errors[1]


def test_tanh__value_that_others_read__is_not_overwritten():
    values = torch.tensor(VALUES)

    Tanh()(values)

    assert values.tolist() == torch.tensor(VALUES).tolist()


def test_tanh__without_gradients__takes_one_buffer_beside_its_input():
    values = torch.ones(2**10)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        result = Tanh()(values)

    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert result.nbytes <= taken < 2 * result.nbytes
