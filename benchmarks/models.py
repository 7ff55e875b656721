"""The models that are timed: ours, and their peers in other libraries and in textbooks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from monai.networks.nets import MILModel
from torch import Tensor, nn

from baselines.abmil import ABMIL
from baselines.asmil import ASMIL
from baselines.clam import CLAMSB
from baselines.dsmil import DSMIL
from baselines.transmil import TransMIL
from benchmarks.fitting import SteppedFit
from benchmarks.textbook import TextbookABMIL, TextbookDSMIL
from benchmarks.timing import Step
from benchmarks.upstream_transmil import UpstreamTransMIL
from mil_anchor.data.bags import Bag, Batch, collate_bags
from mil_anchor.module import MILModule
from mil_anchor.torchmil import TorchMIL


class Subject(NamedTuple):
    """A model to time: the width of its features, and how it is made."""

    width: int
    make: Callable[[], nn.Module]


class Monai(nn.Module):
    """MONAI's MILModel on features: its backbone is one linear layer on "images" of one pixel."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(width, hidden), nn.ReLU())
        self.model = MILModel(
            num_classes=2, mil_mode="att", backbone=backbone, backbone_num_features=hidden
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits of a batch of bags of one size."""
        logits: Tensor = self.model(features[..., None, None])
        return logits


def _torchmil(name: str, width: int, **options: Any) -> Subject:
    return Subject(width, lambda: TorchMIL(width, 2, name=name, options=options))


def _extractor(width: int, hidden: int, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), *more)


OURS: dict[str, Subject] = {
    "ABMIL 1024-512-128": Subject(1024, lambda: ABMIL(1024, 2, hidden=512)),
    "ABMIL 384-128-128": Subject(384, lambda: ABMIL(384, 2, hidden=128)),
    "CLAM-SB 1024": Subject(1024, lambda: CLAMSB(1024, 2)),
    "TransMIL 1024": Subject(1024, lambda: TransMIL(1024, 2)),
    "DSMIL 1024": Subject(1024, lambda: DSMIL(1024, 2)),
    "ASMIL 1024": Subject(1024, lambda: ASMIL(1024, 2)),
}
# Each library with its own loss, and the architecture of ours where it has one like it: torchmil's
# TransMIL has 4 heads and no residual convolution, MONAI's scorer is 2048 wide and not gated.
PEERS: dict[str, Subject] = {
    "torchmil ABMIL 1024-512-128": _torchmil(
        "ABMIL", 1024, gated=True, feat_ext=_extractor(1024, 512)
    ),
    "torchmil ABMIL 384-128-128": _torchmil(
        "ABMIL", 384, gated=True, feat_ext=_extractor(384, 128)
    ),
    "torchmil CLAM_SB 1024": _torchmil(
        "CLAM_SB",
        1024,
        gated=True,
        att_dim=256,
        k_sample=8,
        feat_ext=_extractor(1024, 512, nn.Dropout(0.25)),
    ),
    "torchmil TransMIL 1024": _torchmil("TransMIL", 1024),
    "torchmil DSMIL 1024": _torchmil("DSMIL", 1024, nonlinear_q=True),
    "MONAI MILModel 1024-512-2048": Subject(1024, lambda: Monai(1024, 512)),
    "textbook ABMIL 1024-512-128": Subject(1024, lambda: TextbookABMIL(1024, 2, hidden=512)),
    "textbook ABMIL 384-128-128": Subject(384, lambda: TextbookABMIL(384, 2, hidden=128)),
    "textbook DSMIL 1024": Subject(1024, lambda: TextbookDSMIL(1024, 2)),
    "upstream TransMIL 1024": Subject(1024, lambda: UpstreamTransMIL(1024, 2)),
}
SUBJECTS = OURS | PEERS
# Steps in which the plug-in proves that it reads the right scores, one where they are not scaled;
# then it is as fast as it gets.
N_PROVING = {"DSMIL 1024": 3}


def module_of(name: str) -> MILModule:
    """A model with fresh weights in the module that trains it: one loop, loss and Adam for all."""
    torch.manual_seed(0)
    return MILModule(SUBJECTS[name].make(), n_classes=2)


def bag_for(name: str, n_instances: int, *, device: str = "cpu") -> Batch:
    """A batch of one random bag as wide as a model reads it, on the device already."""
    return random_bag(n_instances, SUBJECTS[name].width, device=device)


def random_bag(n_instances: int, width: int, *, device: str) -> Batch:
    """A batch of one random bag of this size."""
    features = torch.randn(n_instances, width, generator=torch.Generator().manual_seed(0))
    batch = collate_bags([Bag(features, 1, "bag")])
    for key in ("features", "mask", "label"):
        batch[key] = batch[key].to(device)
    return batch


def enter_fit(
    fits: ExitStack,
    name: str,
    batch: Batch,
    *,
    plugin: Callback | None = None,
    device: str = "cpu",
    precision: str = "32-true",
    compiles: bool = False,
) -> Step:
    """Starts the fit of a model, which ends with the stack, and returns what runs its next step.

    With a plug-in the first steps, `N_PROVING`, are made here.
    """
    callbacks = [] if plugin is None else [plugin]
    fit = fit_of(
        name, batch, callbacks=callbacks, device=device, precision=precision, compiles=compiles
    )
    fits.enter_context(fit)
    for _ in range(N_PROVING.get(name, 1) if callbacks else 0):
        fit.step()
    return fit.step


def fit_of(
    name: str,
    batch: Batch,
    *,
    callbacks: Sequence[Callback] = (),
    device: str = "cpu",
    precision: str = "32-true",
    compiles: bool = False,
) -> SteppedFit:
    """The fit of a model on one bag, to be entered; its model is compiled, or runs as it is."""
    module = module_of(name)
    if compiles:
        module.model.compile()
    return SteppedFit(module, batch, callbacks=callbacks, device=device, precision=precision)
