"""TorchMIL: a model of the library torchmil, trained as torchmil trains it."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

# What a ``compute_loss`` needs, and MILModule has.
_GIVEN = {"self", "Y", "X"}


class TorchMILOutput(NamedTuple):
    """The result of one forward pass, as `MILModule` takes it.

    Args:
        logits: The logit of the positive class.
        auxiliary_loss: The sum of what the model's ``compute_loss`` returns, or None without a
            label.
        bag_loss_weight: 0, since that sum holds the bag loss.
    """

    logits: Float[Tensor, " bag"]
    auxiliary_loss: Float[Tensor, ""] | None
    bag_loss_weight: float = 0.0


class TorchMIL(nn.Module):
    """A model of torchmil with the library's own loss, mask and single logit.

    A training loss is the sum of the model's ``compute_loss``: the bag loss, and the instance loss
    of CLAM, the critical instance's of DSMIL, the first tier's of DTFD.

    Args:
        in_features: Width of the instance features.
        n_classes: 2: the library's models are binary.
        name: Class in ``torchmil.models``.
        options: Arguments of that class, other than ``in_shape``.

    Raises:
        ModuleNotFoundError: torchmil is not installed.
        ValueError: There are other than two classes, the library has no such model, the model does
            not take these options, or it needs more than features and a mask (a graph).

    Example:
        >>> model = TorchMIL(6, 2, name="DSMIL", options={"att_dim": 4})
        >>> model(torch.randn(3, 5, 6)).logits.shape
        torch.Size([3])

    Source: torchmil 1.0.2, https://torchmil.readthedocs.io. One difference: the smooth SVM of its
    CLAM is written from the paper (Berrada et al., ICLR 2018), since the library's mixes instances,
    and stops with an error once an instance classifier is sure of its answer.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        name: str,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if n_classes != 2:
            raise ValueError(
                f"torchmil's models tell 2 classes apart, but the data has {n_classes}. "
                "Choose another model, such as model=abmil."
            )
        cls = _find_class(name)
        options = options or {}
        try:
            inspect.signature(cls).bind(in_shape=(in_features,), **options)
        except TypeError as error:
            raise ValueError(
                f"The options must be arguments of torchmil's {name}, but {error}. "
                f"It takes: {', '.join(inspect.signature(cls).parameters)}."
            ) from error
        self.name = name
        # A copy: the modules that its arguments have as defaults belong to all its models.
        self.model = copy.deepcopy(cls(in_shape=(in_features,), **options))
        if type(getattr(self.model, "inst_loss_fn", None)).__name__ == "SmoothTop1SVM":
            self.model.inst_loss_fn = _SmoothTop1SVM()
        self._takes_mask = "mask" in inspect.signature(cls.forward).parameters

    def forward(
        self,
        features: Float[Tensor, "bag instance width"],
        mask: Bool[Tensor, "bag instance"] | None = None,
        label: Int[Tensor, " bag"] | None = None,
    ) -> TorchMILOutput:
        """Classifies a batch of bags; with a label, it computes their training loss as well.

        Raises:
            ValueError: The batch is padded, but the model takes no mask.
        """
        if mask is None:  # some of the models demand one
            mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        if not self._takes_mask and not mask.all():
            raise ValueError(
                f"torchmil's {self.name} takes no mask, but the batch is padded. "
                "Set data.batch_size=1."
            )
        keywords = {"mask": mask} if self._takes_mask else {}
        if label is None:
            return TorchMILOutput(self.model(features, **keywords), None)
        logits, losses = self.model.compute_loss(label, features, **keywords)
        return TorchMILOutput(logits, sum(losses.values()))


class _SmoothTop1SVM(nn.Module):
    """The mean over instances of ``log sum_c exp(x_c + [c != y] - x_y)``: margin, temperature 1."""

    def forward(
        self, logits: Float[Tensor, "instance cls"], label: Num[Tensor, "instance 1"]
    ) -> Float[Tensor, ""]:
        answer = label.squeeze(1).long()
        margin = 1 - F.one_hot(answer, logits.shape[1])
        return F.cross_entropy(logits + margin, answer)


def _find_class(name: str) -> Any:
    try:
        from torchmil import models  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Model {name!r} is torchmil's, which is not installed. "
            "Run: pip install 'mil_anchor[torchmil]'"
        ) from error
    known = {
        key: value
        for key, value in vars(models).items()
        if inspect.isclass(value) and "in_shape" in inspect.signature(value).parameters
    }
    if name not in known:
        raise ValueError(
            f"torchmil must have the model, but it has no {name!r}. It has: {', '.join(known)}."
        )
    cls: Any = known[name]
    parameters = inspect.signature(cls.compute_loss).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in _GIVEN]
    if needed:
        raise ValueError(
            f"A model of torchmil must learn from features and a mask, but {name} needs {needed}. "
            "Train it in a LightningModule of your own: the plug-in works there as well."
        )
    return cls
