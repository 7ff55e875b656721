"""The modules that every setting of Lightning is tested on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mil_anchor import AttentionSite
from tests.callbacks.tiny import Recipe, TinyMIL, TinyModule, make_batches
from tests.callbacks.torchmil_module import TorchmilModule, make_abmil, make_padded_batches


class Subject(NamedTuple):
    """A LightningModule around an attention MIL model.

    Args:
        module: The class; it takes ``dropout``.
        model: Makes the bare model; the module has it under `path`.
        path: Where the module keeps the model.
        site: Its attention as a user names it.
        block: The path of the attention block.
        hidden: What a module feeds into its block for a batch.
        scores: Raw scores (bag, row, instance) of a block without dropout, from the formulas.
        batches: Makes batches for it.
    """

    module: type[Recipe]
    model: Callable[..., torch.nn.Module]
    path: str
    site: AttentionSite | str
    block: str
    hidden: Callable[[Any, Any], torch.Tensor]
    scores: Callable[[Any, torch.Tensor], torch.Tensor]
    batches: Callable[..., list[dict[str, Any]]]

    def variant(self, how: type) -> type[Recipe]:
        """The module with some of its methods taken from another class."""
        return type(how.__name__, (how, self.module), {})

    def block_of(self, module):
        return module.get_submodule(self.block)


def _tiny_scores(block, hidden):
    first, last = block[0], block[3]
    inner = torch.tanh(hidden @ first.weight.T + first.bias)
    return (inner @ last.weight.T + last.bias).transpose(1, 2)


def _gated_scores(block, hidden):
    value, gate = block.fc1.module, block.fc_gated.module
    content = torch.tanh(hidden @ value.weight.T + value.bias)
    opening = 1 / (1 + torch.exp(-(hidden @ gate.weight.T + gate.bias)))
    return ((content * opening) @ block.fc2.weight.T).transpose(1, 2)


SUBJECTS = {
    "tiny": Subject(
        TinyModule,
        TinyMIL,
        "net",
        "net.attention",
        "net.attention",
        lambda module, batch: module.net.encoder(batch["features"]),
        _tiny_scores,
        make_batches,
    ),
    "torchmil": Subject(
        TorchmilModule,
        make_abmil,
        "model",
        AttentionSite("model.pool", tap="fc2", layout="b n r"),
        "model.pool",
        lambda module, batch: module.model.feat_ext(batch["features"]),
        _gated_scores,
        make_padded_batches,
    ),
}
