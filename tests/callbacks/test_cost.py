import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from mil_anchor import AEMCallback, AnchorCallback, SlowWeights
from mil_anchor.callbacks.cost import StepCost
from tests.callbacks.tiny import (
    Recipe,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)
from tests.composing import ROOT


class Linear(Recipe):
    """One product: (bags * instances, 4) x (4, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def loss(self, batch):
        # The features need gradients as well: the backward pass is two products.
        features = batch["features"].clone().requires_grad_()
        return self.layer(features).mean()


class Attending(Recipe):
    """torch's attention kernel, on two heads of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, batch):
        features = (self.scale * batch["features"])[:, None].expand(-1, 2, -1, -1)
        return F.scaled_dot_product_attention(features, features, features).mean()


def _costs(module, *callbacks, batches=None, **options):
    cost = StepCost()
    trainer = make_trainer(".", cost, *callbacks, **options)
    batches = make_batches() if batches is None else batches
    loaders = [make_loader(batches)] * 2
    trainer.fit(module, *loaders)
    return cost.costs


def _with_masks(batches):
    for index, batch in enumerate(batches):
        batch["mask"] = torch.ones(2, 5, dtype=torch.bool)
        batch["mask"][0, index:] = False
    return batches


def test_step_cost__linear_model__is_the_count_by_hand():
    costs = _costs(seeded_module(Linear))

    product = 2 * (2 * 5) * 4 * 3
    assert costs["cost/flops_step"] == 3 * product
    assert costs["cost/flops_inference"] == product
    assert "cost/instances_step" not in costs  # there is no mask


def test_step_cost__attention_kernel__is_counted_on_the_cpu():
    costs = _costs(seeded_module(Attending))

    product = 2 * 2 * 2 * 5 * 5 * 4  # two operations, 2 bags, 2 heads
    assert costs["cost/flops_inference"] == 2 * product
    # Backward runs one product of the forward pass again.
    assert costs["cost/flops_step"] == (2 + 5) * product


def test_step_cost__any_model__is_what_torchs_counter_says():
    costs = _costs(seeded_module(dropout=0.0))

    module, batch = seeded_module(dropout=0.0), make_batches()[5]
    with FlopCounterMode(display=False) as counter:
        module.loss(batch).backward()
    assert costs["cost/flops_step"] == counter.get_total_flops()


def test_step_cost__last_batch_of_a_short_epoch__is_the_one_counted():
    costs = _costs(seeded_module(), batches=_with_masks(make_batches()))

    assert costs["cost/instances_step"] == 5 + 5
    assert costs["cost/instances_inference"] == 0 + 5  # of the first batch


def test_step_cost__epoch_of_one_batch__is_counted_in_the_second():
    batches = make_batches(n_batches=1)

    assert "cost/flops_step" not in _costs(seeded_module(), batches=batches, max_epochs=1)
    assert _costs(seeded_module(), batches=batches, max_epochs=2)["cost/flops_step"] > 0


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_step_cost__anchor__adds_one_forward_pass_of_the_block(weight):
    bare = _costs(seeded_module())
    anchored = _costs(seeded_module(), AnchorCallback("net.attention", weight=weight))

    block = 2 * (2 * 5) * (8 * 6 + 6 * 2)
    assert anchored["cost/flops_step"] - bare["cost/flops_step"] == block
    assert anchored["cost/flops_inference"] == bare["cost/flops_inference"]
    assert anchored["cost/peak_memory_mb"] > bare["cost/peak_memory_mb"]


def test_step_cost__penalty_without_products__adds_none():
    assert (
        _costs(seeded_module(), AEMCallback("net.attention"))["cost/flops_step"]
        == _costs(seeded_module())["cost/flops_step"]
    )


def test_step_cost__found_and_slow__costs_what_the_named_block_does():
    found = _costs(seeded_module(), AnchorCallback(), SlowWeights())

    assert (
        found["cost/flops_step"]
        == (_costs(seeded_module(), AnchorCallback("net.attention"))["cost/flops_step"])
    )


def test_step_cost__accumulated_gradients__cost_the_same_products():
    costs = [_costs(seeded_module(), accumulate_grad_batches=n) for n in (1, 3)]

    assert costs[0]["cost/flops_step"] == costs[1]["cost/flops_step"]


def test_step_cost__memory__is_weights_state_and_what_the_step_keeps():
    n_instances = 1000
    costs = _costs(seeded_module(Linear), batches=make_batches(n_instances=n_instances))

    features, outputs = 2 * n_instances * 4 * 4, 2 * n_instances * 3 * 4
    fixed = 12 * 4 * 3  # the weights and Adam's averages
    peak = costs["cost/peak_memory_mb"] * 1e6
    # The features, their copy and its gradient, the outputs or their gradient.
    assert 3 * features + outputs <= peak <= 3 * features + 2 * outputs + 3 * fixed


@pytest.mark.parametrize("plugin", [(), (AnchorCallback, SlowWeights)], ids=["none", "anchor"])
def test_step_cost__training__is_bit_for_bit_as_without(plugin):
    states, logged = [], []
    for cost in ([], [StepCost()]):
        module = seeded_module()
        trainer = make_trainer(".", *cost, *(make() for make in plugin))
        trainer.fit(module, make_loader(), make_loader())
        states.append(parameters_of(module))
        logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    assert_equal_states(*states)
    assert logged[0] == logged[1]


def test_step_cost__resumed_after_the_counted_step__keeps_the_costs(tmp_path):
    cost, again = StepCost(), StepCost()
    batches = make_loader()
    trainer = make_trainer(".", cost)
    trainer.fit(seeded_module(), batches, batches)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = dict(cost.costs)

    make_trainer(".", again).fit(
        seeded_module(), batches, batches, ckpt_path=tmp_path / "last.ckpt"
    )

    assert again.costs == before


def test_step_cost__older_checkpoint_evaluated__keeps_what_was_counted(tmp_path):
    cost = StepCost()
    batches = make_loader(make_batches(n_batches=1))
    trainer = make_trainer(".", cost, max_epochs=1)
    trainer.fit(seeded_module(), batches, batches)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(seeded_module(), batches, batches)
    before = dict(cost.costs)

    trainer.validate(seeded_module(), batches, ckpt_path=tmp_path / "early.ckpt", verbose=False)

    assert cost.costs == before
    assert "cost/flops_step" in before


def test_step_cost__second_fit__is_counted_anew():
    cost = StepCost()
    for n_instances, factor in ((5, 1), (10, 2)):
        batches = make_loader(make_batches(n_instances=n_instances))
        make_trainer(".", cost).fit(seeded_module(Linear), batches, batches)
        assert cost.costs["cost/flops_inference"] == factor * 240


class Skipping(Linear):
    """Ends an epoch before its sixth step, as Lightning lets modules do."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 5 else None


class Crashing(Linear):
    def loss(self, batch):
        if self.trainer.training and batch["bag_id"] == ["bag5_0", "bag5_1"]:
            raise RuntimeError("crash")
        return super().loss(batch)


def test_step_cost__counted_step_skipped__counts_nothing_afterwards():
    costs = _costs(seeded_module(Skipping))

    assert "cost/flops_step" not in costs
    assert _get_current_dispatch_mode() is None


def test_step_cost__crash_in_the_counted_step__counts_nothing_afterwards():
    with pytest.raises(RuntimeError, match="crash"):
        _costs(seeded_module(Crashing))

    assert _get_current_dispatch_mode() is None


@pytest.mark.slow
def test_step_cost__compiled_model__costs_what_the_plain_one_does():
    torch._dynamo.reset()
    module = seeded_module(dropout=0.0)
    module.net = torch.compile(module.net, backend="aot_eager")

    compiled = _costs(module)

    plain = _costs(seeded_module(dropout=0.0))
    assert compiled["cost/flops_step"] == plain["cost/flops_step"]
    assert compiled["cost/flops_inference"] == plain["cost/flops_inference"]


@pytest.mark.slow
def test_step_cost__other_processes__count_the_same():
    script = (
        "from tests.callbacks.test_cost import _costs; "
        "from tests.callbacks.tiny import seeded_module; "
        "from mil_anchor import AnchorCallback; "
        "print(sorted(_costs(seeded_module(), AnchorCallback()).items()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    outputs = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    assert "cost/peak_memory_mb" in outputs[0]
