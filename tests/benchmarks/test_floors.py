import pytest
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floors import PRODUCTS, floor_of
from benchmarks.models import OURS, bag_for
from mil_anchor.anchor import Anchor

N = 50


def counted(run):
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PRODUCTS)
def test_floor__products__are_nearly_all_flops_of_a_step_with_an_anchor(name):
    # In the plain layers, as they run under autocast: a function of autograd hides its products.
    model, batch = OURS[name].make(), bag_for(name, N)
    anchored = []
    model.attention.register_forward_hook(lambda _, inputs, __: anchored.append(inputs))
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)

    def step():
        output = model(batch["features"], label=batch["label"])
        (F.cross_entropy(output.logits, batch["label"]) + output.scores.sum()).backward()
        Anchor(model.attention)(*anchored[0])

    floor, whole = counted(floor_of(name, N)), counted(step)
    # One row of scores, the head, pooling by one row, the query of the critical instances.
    assert floor <= whole <= 1.06 * floor
