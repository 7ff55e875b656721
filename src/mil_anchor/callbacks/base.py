"""What all our callbacks share: they watch one attention block while a fit runs."""

from abc import ABC

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.site import AttentionSite, resolve_site


class AttentionCallback(Callback, ABC):
    """Attaches a recorder to the attention block of the module that is fitted.

    It is taken off again on every way out of a fit: its end, an exception, Ctrl-C.

    Args:
        site: The attention block: None (a known model), a path, or an `AttentionSite`.
    """

    _only_with_grad: bool

    def __init__(self, site: AttentionSite | str | None) -> None:
        self.site = site
        self._recorder: AttentionRecorder | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(site=str(self.site))

    @property
    def online(self) -> AttentionRecorder:
        """The recorder on the model's own attention block; there is one while a fit runs."""
        if self._recorder is None:
            raise RuntimeError(
                f"{type(self).__name__} is attached to a model only while trainer.fit runs."
            )
        return self._recorder

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        site = resolve_site(pl_module, self.site)
        self._recorder = AttentionRecorder(pl_module, site, only_with_grad=self._only_with_grad)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
