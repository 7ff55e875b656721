"""The numbers of the papers that could be recovered, and what of our runs corresponds to them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

_ASMIL = "ASMIL (arXiv 2603.06658)"
_AEM = "AEM (arXiv 2406.15303)"
_ABMIL = "baselines.abmil.ABMIL"
_ASMIL_MODEL = "baselines.asmil.ASMIL"
_TRANSMIL = "baselines.transmil.TransMIL"
_SLIDES = ("camelyon16", "camelyon17", "bracs")
_GPU = "RTX 5000"
_WIDTH = 384


class Counterpart(NamedTuple):
    """What of our runs corresponds to a published number.

    Args:
        model: Class that the runs train.
        plugin: Their plug-in.
        key: Of ``metrics.json``.
        base: Plug-in whose ratio to the number is meant; None: the number itself.
        settings: What the paper's protocol says, by keys of the configuration.
        width: Width of the paper's features; None where they come with the data.
    """

    model: str
    plugin: str
    key: str
    base: str | None = None
    settings: Mapping[str, float | int] = {}
    width: int | None = None


class Published(NamedTuple):
    """A number of a paper.

    Args:
        source: Paper, and the part of it.
        data: Data set, as we call it.
        method: What was measured, in the paper's words.
        quantity: In what.
        value: The number.
        ours: What corresponds to it here, or why nothing does.
        gpu: GPU that it was measured on, for a cost.
    """

    source: str
    data: str
    method: str
    quantity: str
    value: float
    ours: Counterpart | str
    gpu: str | None = None


def published() -> list[Published]:
    """All recoverable numbers of the ASMIL and AEM papers; a number that is lost is not here."""
    return [*_accuracy(), *_ablation(), *_classic(), *_costs(), *_others()]


def _slide_metric(
    model: str, plugin: str, key: str, *, data: str, drop_rate: float | None = None
) -> Counterpart:
    settings = _protocol(data, plugin, drop_rate=drop_rate)
    return Counterpart(model, plugin, key, settings=settings, width=_WIDTH)


def _accuracy() -> Iterator[Published]:
    """F1 with ViT-S features, and the AUC that the AEM paper has besides."""
    of_method = {
        "ABMIL": (0.914, 0.522, 0.680),
        "TransMIL": (0.922, 0.554, 0.631),
        "ACMIL": (0.954, 0.562, 0.722),
        "AEM": (0.947, 0.647, 0.742),
        "ASMIL": (0.965, 0.689, 0.781),
    }
    ours = {
        "ABMIL": (_ABMIL, "none", None),
        "TransMIL": (_TRANSMIL, "none", None),
        "AEM": (_ABMIL, "aem", None),
        "ASMIL": (_ASMIL_MODEL, "anchor_nsf", 0.5),
    }
    source = f"{_ASMIL}, ViT-S features"
    for method, values in of_method.items():
        for data, value in zip(_SLIDES, values, strict=True):
            own: Counterpart | str = f"there is no {method} here"
            if method in ours:
                model, plugin, drop_rate = ours[method]
                own = _slide_metric(model, plugin, "test/f1", data=data, drop_rate=drop_rate)
            yield Published(source, data, method, "F1", value, own)
    own = _slide_metric(_ABMIL, "anchor_nsf", "test/f1", data="bracs")
    source = f"{_ASMIL}, plug-ins (its gain of 10.73 % over .680 is a relative one)"
    yield Published(source, "bracs", "ABMIL +Anchor+NSF", "F1", 0.753, own)
    of_aem = {"ABMIL": ("none", (0.945, 0.853)), "AEM": ("aem", (0.974, 0.887))}
    for method, (plugin, areas) in of_aem.items():
        for data, value in zip(("camelyon16", "camelyon17"), areas, strict=True):
            own = _slide_metric(_ABMIL, plugin, "test/auroc", data=data)
            yield Published(f"{_AEM}, ViT-S features", data, method, "AUC", value, own)


def _ablation() -> Iterator[Published]:
    of_method = {
        "ASMIL": ("anchor_nsf", 0.5, 0.781, 0.914),
        "ASMIL without dropping": ("anchor_nsf", 0.0, 0.765, 0.903),
        "ASMIL without NSF": ("anchor", 0.5, 0.759, 0.895),
        "anchor only": ("anchor", 0.0, 0.747, 0.887),
        "dropping only": ("none", 0.5, 0.728, 0.868),
        "none of them": ("none", 0.0, 0.712, 0.860),
    }
    for method, (plugin, drop_rate, f1, auroc) in of_method.items():
        for title, key, value in (("F1", "test/f1", f1), ("AUC", "test/auroc", auroc)):
            own = _slide_metric(_ASMIL_MODEL, plugin, key, data="bracs", drop_rate=drop_rate)
            yield Published(f"{_ASMIL}, ablation", "bracs", method, title, value, own)


def _classic() -> Iterator[Published]:
    settings = {"trainer.max_epochs": 40, "module.lr": 5e-4, "plugin.decay": 0.999}
    for data, value in (("musk1", 0.971), ("musk2", 0.968)):
        own = Counterpart(_ASMIL_MODEL, "anchor_nsf", "test/accuracy", settings=settings)
        yield Published(f"{_ASMIL}, MUSK", data, "ASMIL", "accuracy", value, own)


def _costs() -> Iterator[Published]:
    """Seconds of an epoch and MB, bare and with the anchor."""
    of_method = {
        "CLAM-SB": ("baselines.clam.CLAMSB", (2.26, 2.69), (94, 120)),
        "TransMIL": (_TRANSMIL, (5.99, 7.27), (340, 443)),
        "DSMIL": ("baselines.dsmil.DSMIL", (0.57, 0.58), (60, 145)),
        "ABMIL": (_ABMIL, (0.95, 1.17), (90, 162)),
    }
    source = f"{_ASMIL}, Tables 14-15"
    for method, (model, seconds, megabytes) in of_method.items():
        for title, key, values in (
            ("s/epoch", "time/epoch_s", seconds),
            ("MB", "cost/peak_memory_mb", megabytes),
        ):
            for plugin, words, value in zip(
                ("none", "anchor_nsf"), ("", " with anchor"), values, strict=True
            ):
                own = Counterpart(model, plugin, key)
                yield Published(source, "bracs", f"{method}{words}", title, value, own, _GPU)
            own = Counterpart(model, "anchor_nsf", key, base="none")
            ratio = round(values[1] / values[0], 2)
            yield Published(
                source, "bracs", f"{method} with anchor", f"{title}, ratio", ratio, own, _GPU
            )
        own = Counterpart(model, "anchor_nsf", "cost/flops_inference", base="none")
        words = f"{method} with anchor"
        yield Published(source, "bracs", words, "inference, ratio", 1.0, own, _GPU)
    own = Counterpart(_ASMIL_MODEL, "anchor_entmax", "time/epoch_s", base="anchor_nsf")
    words = "ASMIL, entmax for NSF"
    yield Published(_ASMIL, "bracs", words, "s/epoch, ratio", 1.33, own, _GPU)


def _others() -> Iterator[Published]:
    dependent = "a property of the features, which no run measures"
    for data, value in zip(_SLIDES, (0.992, 0.998, 0.961), strict=True):
        words = "bags with affinely dependent rows"
        yield Published(_ASMIL, data, words, "share", value, dependent)
    of_cohort = {"BLCA": 0.6133, "BRCA": 0.6396, "GBMLGG": 0.8036, "LUAD": 0.6001, "UCEC": 0.7243}
    for cohort, value in of_cohort.items():
        why = "there is no survival analysis here"
        yield Published(f"{_ASMIL}, survival", cohort, "ASMIL", "C-index", value, why)


def _protocol(data: str, plugin: str, *, drop_rate: float | None = None) -> dict[str, float | int]:
    """The protocol for slides (ASMIL, App. B) with the width of the model that goes with ViT-S.

    Args:
        data: Data set.
        plugin: Plug-in.
        drop_rate: Of the ASMIL model; None for another one.
    """
    settings: dict[str, float | int] = {
        "trainer.max_epochs": 50,
        "module.lr": 1e-4,
        "module.weight_decay": 1e-5,
        "hidden": 128,
    }
    if plugin.startswith("anchor"):
        settings["plugin.decay"] = 0.999
    if plugin == "aem" and data != "bracs":
        settings["plugin.weight"] = {"camelyon16": 0.001, "camelyon17": 0.1}[data]
    if drop_rate is not None:
        settings["model.drop_rate"] = drop_rate
        settings["model.n_tokens"] = 16 if data == "camelyon17" else 8
    return settings
