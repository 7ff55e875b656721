"""What the attention maps of a complete run show: localisation on the test slides, heat maps."""

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from mil_anchor.localization import (
    LocalizationReport,
    LocalizationRow,
    SlideScores,
    localize,
    rescale,
)
from mil_anchor.maps.file import MAPS_FILE, KeptBag, read_map, read_maps
from mil_anchor.predictions import PREDICTIONS_FILE, read_predictions

log = logging.getLogger(__name__)


def write_evidence(
    folder: Path, *, mpp: float | int | None, n_drawn: int
) -> dict[str, float | str]:
    """Measure how well the attention finds lesions, and draw it on some slides.

    The score of a tile is the attention (mean over rows), rescaled to [0, 1] on its slide. FROC,
    which compares slides, multiplies it by the probability that the slide is not of class 0. What
    cannot be measured or drawn (a wrong ``mpp``, an extra that is not installed) is a warning: it
    must not cost the run, which is complete but for this.

    Args:
        folder: The run folder, with ``predictions.csv`` and ``attention.h5``; without maps there is
            nothing to do.
        mpp: Micrometres per level-0 pixel, which FROC needs; None if it is unknown.
        n_drawn: Number of test slides to draw into ``heatmaps/``, those of high classes first.

    Returns:
        Metrics of the localisation on the test slides, and in ``localization/detections`` how FROC
        made detections; empty where no tile is annotated.
    """
    file = folder / MAPS_FILE
    if not file.exists():
        return {}
    tested = [bag for bag in read_maps(file) if bag.part == "test" and bag.has_best]
    _draw(folder, tested, n_drawn, mpp=mpp)
    report = _measure(folder, tested, mpp)
    if report.rows:
        _write_rows(folder / "localization.csv", report.rows)
        _log_report(report)
    how = {} if report.froc is None else {"localization/detections": report.froc.detections}
    return {**report.metrics, **how}


def _measure(
    folder: Path, tested: Sequence[KeptBag], mpp: float | int | None
) -> LocalizationReport:
    try:
        report = localize(_scores(folder, tested, mpp=mpp))
    except (ValueError, ModuleNotFoundError) as error:
        log.warning("No FROC: %s", error)
        return localize(_scores(folder, tested, mpp=mpp, placed=False))
    positive = [row for row in report.rows if row.n_lesion_tiles]
    if sum(row.label == 0 for row in positive) > len(positive) / 2:
        log.warning(
            "Most slides with a lesion have class 0, which the localisation takes for the class "
            "without. Name the classes in another order: data.classes=[normal, ...]"
        )
    if report.froc is None and any(row.n_lesions for row in report.rows):
        log.warning(
            "No FROC: no lesion counts. Either the place of its tiles in micrometres is not known "
            "(data.mpp says the micrometres per level-0 pixel), or it is of isolated tumour cells."
        )
    return report


def _scores(
    folder: Path, tested: Sequence[KeptBag], *, mpp: float | int | None, placed: bool = True
) -> Iterator[SlideScores]:
    """Scores and annotation of the slides; not ``placed``: for the figures of tiles only."""
    confidence = {}
    if placed:  # only FROC compares slides
        predicted = read_predictions(folder / PREDICTIONS_FILE).of_part("test")
        not_class_0 = (1 - predicted.probabilities[:, 0]).tolist()
        confidence = dict(zip(predicted.bag_ids, not_class_0, strict=True))
    for bag in tested:
        slide = read_map(folder / MAPS_FILE, bag.bag_id)
        yield SlideScores(
            slide.bag_id,
            slide.label,
            rescale(slide.attention(None)),
            instance_label=slide.instance_label,
            lesion=slide.lesion,
            coords=slide.coords if placed else None,
            mpp=mpp,
            confidence=confidence[bag.bag_id] if placed else 1.0,
        )


def _write_rows(file: Path, rows: Sequence[LocalizationRow]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(LocalizationRow._fields)
        writer.writerows(rows)


def _log_report(report: LocalizationReport) -> None:
    shown = {key.removeprefix("localization/"): value for key, value in report.metrics.items()}
    log.info(
        "localisation on %d test slides: %s%s",
        len(report.rows),
        ", ".join(f"{name} {value:.3f}" for name, value in shown.items() if name != "froc"),
        f"; {report.froc}" if report.froc is not None else "",
    )


def _draw(
    folder: Path, tested: Sequence[KeptBag], n_drawn: int, *, mpp: float | int | None
) -> None:
    ranked = sorted(tested, key=lambda bag: -bag.label)[:n_drawn]
    if not ranked:
        return
    try:
        from mil_anchor.maps.heatmap import heatmap
    except ModuleNotFoundError as error:
        log.warning("No heat maps: %s", error)
        return
    n_done = 0
    for bag in ranked:
        try:
            heatmap([folder], bag.bag_id, mpp=mpp)
            n_done += 1
        except ValueError as error:
            log.warning("No heat map: %s", error)
    log.info("Drew heat maps of %d test slides into %s", n_done, folder / "heatmaps")
