"""One slide of a synthetic cohort: its plan, its map and its tiles."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from mil_anchor.data.synthetic.geometry import (
    draw_clusters,
    draw_coverage,
    draw_tissue,
    draw_types,
    number_regions,
    smooth_fields,
)
from mil_anchor.data.synthetic.presets import Preset, Size
from mil_anchor.data.synthetic.world import N_TYPES, N_VARIANTS, World

# Lengths of what a tile adds to the mean of its type, per component.
_SLIDE, _LOCAL, _NOISE = 0.2, 0.5, 0.7
_LOCAL_LENGTH = 4.0  # cells
_LEAST_TILES = 20


@dataclass(frozen=True)
class SlidePlan:
    """What is decided about a slide before its tiles are drawn.

    Args:
        label: The class it is given, which label noise may have changed.
        true_label: The highest grade of lesion on it.
        centre: Where it comes from.
        n_tiles: Its number of tiles.
        artefact: Whether an artefact lies on it.
    """

    label: int
    true_label: int
    centre: int
    n_tiles: int
    artefact: bool


@dataclass(frozen=True, eq=False)
class SlideMap:
    """What every tile of a slide is, in raster order.

    Args:
        cell: Column and row on the grid.
        tissue: Tissue type; the last one is the artefact.
        grade: Grade of the lesion it holds; 0 for none.
        lesion: Which connected lesion it belongs to, from 1; 0 for none.
        coverage: Share that is lesion.
        mimic: Whether it looks half-way to a lesion.
    """

    cell: Int[np.ndarray, "tile 2"]
    tissue: Int[np.ndarray, " tile"]
    grade: Int[np.ndarray, " tile"]
    lesion: Int[np.ndarray, " tile"]
    coverage: Float[np.ndarray, " tile"]
    mimic: Bool[np.ndarray, " tile"]


def plan_slide(
    index: int, preset: Preset, size: Size, *, generator: np.random.Generator
) -> SlidePlan:
    """Decide what a slide is.

    Classes and centres take turns, so that each meets each equally often.

    Args:
        index: The slide, from 0.
        preset: What the slides are like.
        size: How large they are.
        generator: The slide's source of randomness.

    Returns:
        The plan.
    """
    n_classes = len(preset.class_names)
    true_label, centre = index % n_classes, index // n_classes % preset.n_centres
    held_out = centre == preset.n_centres - 1

    n_tiles = size.n_tiles * generator.lognormal(sigma=preset.size_spread)
    link = 0.0 if held_out else preset.artefact_link
    artefact = generator.random() < 0.5 + link * (true_label / (n_classes - 1) - 0.5)
    flipped = generator.random() < preset.label_noise and not held_out
    step = generator.integers(1, n_classes)
    return SlidePlan(
        label=int((true_label + step) % n_classes) if flipped else true_label,
        true_label=true_label,
        centre=centre,
        n_tiles=max(round(n_tiles), _LEAST_TILES),
        artefact=bool(artefact),
    )


def draw_map(plan: SlidePlan, preset: Preset, *, generator: np.random.Generator) -> SlideMap:
    """Draw tissue, lesions, mimics and artefact.

    Args:
        plan: What the slide is.
        preset: What the slides are like.
        generator: The slide's source of randomness.

    Returns:
        The map. A slide of grade g has at least one tile of that grade.
    """
    tissue = draw_tissue(generator, plan.n_tiles)
    types = draw_types(generator, tissue.shape, n_types=N_TYPES)
    free = tissue.copy()

    def take(share: float, more_foci: float) -> Bool[np.ndarray, "height width"]:
        n_cells = max(1, round(share * plan.n_tiles))
        foci = 1 + int(generator.poisson(more_foci))
        taken = draw_clusters(generator, free, n_cells=n_cells, n_foci=foci)
        free[taken] = False
        return taken

    grade = np.zeros(tissue.shape, dtype=np.int64)
    for own in range(plan.true_label, 0, -1):
        if own == plan.true_label or generator.random() < preset.lower_grades:
            grade[take(_witness_rate(generator, preset), preset.more_foci)] = own
    coverage = draw_coverage(generator, grade > 0)
    mimic = np.zeros_like(tissue)
    if generator.random() < preset.mimics:
        mimic = take(_log_uniform(generator, *preset.mimic_share), preset.more_foci)
    if plan.artefact:
        types[take(_log_uniform(generator, *preset.artefact_share), 0.0)] = N_TYPES
    return SlideMap(
        cell=np.argwhere(tissue)[:, ::-1],
        tissue=types[tissue],
        grade=grade[tissue],
        lesion=number_regions(grade > 0)[tissue],
        coverage=coverage[tissue],
        mimic=mimic[tissue],
    )


def draw_features(
    tiles: SlideMap,
    plan: SlidePlan,
    preset: Preset,
    *,
    world: World,
    generator: np.random.Generator,
) -> Float32[np.ndarray, "tile width"]:
    """Draw the features of a slide's tiles.

    A tile's whitened components are the mean of its tissue type + the slide's effect + a smooth
    local field + noise, and coverage x strength along the direction of its lesion's grade and
    variant. All lesions of a grade on one slide are of one variant.

    Args:
        tiles: What every tile is.
        plan: What the slide is.
        preset: What the slides are like.
        world: The feature space.
        generator: The slide's source of randomness.

    Returns:
        The features.
    """
    n_tiles, width = len(tiles.cell), world.type_mean.shape[1]
    n_grades = len(world.lesion)
    components = generator.standard_normal((n_tiles, width), dtype=np.float32)
    components *= np.float32(_NOISE)

    column, row = tiles.cell.T
    shape = int(row.max()) + 1, int(column.max()) + 1
    local = smooth_fields(generator, shape, n_fields=width, length=_LOCAL_LENGTH)
    local *= np.float32(_LOCAL)
    components += local[row, column]

    slide = np.float32(_SLIDE) * generator.standard_normal(width, dtype=np.float32)
    components += (world.type_mean + slide)[tiles.tissue]

    strength = preset.strength * generator.lognormal(sigma=preset.strength_spread)
    variant = generator.integers(N_VARIANTS, size=n_grades)
    for own in range(1, n_grades + 1):
        held = np.flatnonzero(tiles.grade == own)
        shift = (strength * tiles.coverage[held]).astype(np.float32)
        components[held] += shift[:, None] * world.lesion[own - 1, variant[own - 1]]
    looks_like = generator.integers(n_grades), generator.integers(N_VARIANTS)
    components[tiles.mimic] += (
        np.float32(preset.mimic_strength * strength) * world.mimic[looks_like]
    )
    return world.features(components, centre=plan.centre)


def _witness_rate(generator: np.random.Generator, preset: Preset) -> float:
    kinds = [kind.probability for kind in preset.witness]
    kind = preset.witness[generator.choice(len(kinds), p=kinds)]
    return _log_uniform(generator, kind.low, kind.high)


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))
