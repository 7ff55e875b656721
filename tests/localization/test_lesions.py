import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps.pathology.utils import compute_isolated_tumor_cells, compute_multi_instance_mask
from monai.metrics import compute_fp_tp_probs, compute_froc_curve_data, compute_froc_score

from mil_anchor.data.bags import MicrometreCoords
from mil_anchor.localization.detections import AllTiles, Detections
from mil_anchor.localization.lesions import (
    FALSE_POSITIVES_PER_SLIDE,
    SlideHits,
    froc,
    lesions_from_mask,
    lesions_from_tiles,
    match_detections,
)

# Level 5 of a slide with 0.243 um per pixel: lesions grow by less than 4.82 pixels.
PIXEL_UM = 7.776
GRID = np.indices((200, 200))


def _disc(row, column, radius):
    return (GRID[0] - row) ** 2 + (GRID[1] - column) ** 2 <= radius**2


def _at(*cells, scores=None, pixel_um=PIXEL_UM):
    """Detections at the centres of pixels (row, column)."""
    xy = (np.array(cells, dtype=float).reshape(-1, 2)[:, ::-1] + 0.5) * pixel_um
    return Detections(np.ones(len(xy)) if scores is None else np.array(scores, dtype=float), xy)


def _hit(false=(), best=(), n_isolated=0):
    return SlideHits(np.array(false, dtype=float), np.array(best, dtype=float), n_isolated)


def _random_mask(rng):
    """Overlapping discs of all sizes, some with a hole; integers as in an annotation file."""
    mask = np.zeros(GRID.shape[1:], dtype=np.uint8)
    for _ in range(rng.integers(1, 9)):
        centre, radius = rng.integers(0, 200, 2), rng.integers(1, 30)
        mask[_disc(*centre, radius)] = 1
        mask[_disc(*centre, radius - rng.integers(2, 40))] = 0
    mask[tuple(rng.integers(0, 200, 2))] = 1
    return mask


def _random_slide(rng, *, tumour=True):
    mask = _random_mask(rng) if tumour else np.zeros(GRID.shape[1:], dtype=np.uint8)
    n_detections = rng.integers(0, 40)
    # Few distinct values, so that scores tie; float32, as MONAI rounds the hits.
    scores = (rng.integers(1, 30, n_detections) / 32).astype(np.float32)
    return mask, _at(*rng.integers(0, 200, (n_detections, 2)), scores=scores)


@pytest.mark.parametrize(("outside", "hit"), [(1, True), (4, True), (5, False)])
@pytest.mark.parametrize("step", [(0, 1), (0, -1), (1, 0), (-1, 0)])
def test_match_detections__point_outside_a_lesion__counts_up_to_four_pixels(outside, hit, step):
    lesions = lesions_from_mask(_disc(100, 100, 30), PIXEL_UM)
    point = (100 + step[0] * (30 + outside), 100 + step[1] * (30 + outside))
    hits = match_detections(_at(point, scores=[0.5]), lesions)
    assert hits.best.tolist() == [0.5 if hit else -np.inf]
    assert hits.false_positives.tolist() == ([] if hit else [0.5])


def test_lesions_from_mask__disc_with_a_hole__is_filled():
    ring = _disc(100, 100, 40) & ~_disc(100, 100, 25)
    hits = match_detections(_at((100, 100)), lesions_from_mask(ring, PIXEL_UM))
    assert hits.best.tolist() == [1.0]


def test_lesions_from_mask__open_ring__is_not_filled():
    ring = _disc(100, 100, 40) & ~_disc(100, 100, 25)
    ring[90:110, 100:] = False
    hits = match_detections(_at((100, 100)), lesions_from_mask(ring, PIXEL_UM))
    assert hits.best.tolist() == [-np.inf]


@pytest.mark.parametrize(("gap", "n_lesions"), [(8, 1), (9, 2)])
def test_lesions_from_mask__neighbours__merge_within_eight_pixels(gap, n_lesions):
    mask = np.zeros((80, 200), dtype=np.int32)
    mask[20:60, 20:60] = 1
    mask[20:60, 60 + gap : 100 + gap] = 2
    assert len(lesions_from_mask(mask, PIXEL_UM).isolated) == n_lesions


def test_lesions_from_mask__grown_lesions_touch_at_a_corner__are_one():
    mask = np.zeros((200, 200), dtype=bool)
    # Without growth, for pixels larger than it.
    mask[20:60, 20:60] = mask[60:100, 60:100] = True
    assert len(lesions_from_mask(mask, 100.0).isolated) == 1


@pytest.mark.parametrize(("radius", "isolated"), [(1, True), (12, True), (14, False)])
def test_lesions_from_mask__discs__are_isolated_cells_below_275_um(radius, isolated):
    # A disc of 12 (14) pixels has a diameter of 194 (225) um and grows to about 260 (292) um.
    lesions = lesions_from_mask(_disc(100, 100, radius), PIXEL_UM)
    assert lesions.isolated.tolist() == [isolated]


def test_match_detections__isolated_cells_hit__neither_hit_nor_false_positive():
    mask = _disc(50, 50, 5) | _disc(140, 140, 30)
    hits = match_detections(_at((50, 50), (140, 140)), lesions_from_mask(mask, PIXEL_UM))
    assert (hits.false_positives.tolist(), hits.best.tolist(), hits.n_isolated) == ([], [1.0], 1)


def test_match_detections__several_hits__count_once_with_the_highest():
    lesions = lesions_from_mask(_disc(100, 100, 30), PIXEL_UM)
    points = _at((100, 100), (90, 100), (110, 90), scores=[0.2, 0.9, 0.4])
    assert match_detections(points, lesions).best.tolist() == [0.9]


def test_match_detections__beyond_the_mask__is_a_false_positive():
    # Beyond the bottom, the right, the top and the left; a negative index would wrap into tumour.
    lesions = lesions_from_mask(np.ones((50, 60), dtype=bool), PIXEL_UM)
    points = _at((50, 10), (10, 60), (-1, 10), (10, -1), (49, 59), scores=[1, 2, 3, 4, 5])
    hits = match_detections(points, lesions)
    assert (hits.false_positives.tolist(), hits.best.tolist()) == ([1, 2, 3, 4], [5])


def test_match_detections__origin_moved__moves_with_it():
    mask, points = _disc(100, 100, 30), _at((100, 100), (10, 10))
    moved = Detections(points.scores, points.xy_um + np.array([500.0, 9000.0]))
    lesions = lesions_from_mask(mask, PIXEL_UM, origin_um=(500.0, 9000.0))
    expected = match_detections(points, lesions_from_mask(mask, PIXEL_UM))
    hits = match_detections(moved, lesions)
    assert hits.best.tolist() == expected.best.tolist() == [1.0]
    assert hits.false_positives.tolist() == expected.false_positives.tolist() == [1.0]


@pytest.mark.parametrize("lesions", [None, lesions_from_mask(np.zeros((9, 9), bool), PIXEL_UM)])
def test_match_detections__slide_without_lesions__has_false_positives_only(lesions):
    hits = match_detections(_at((1, 1), (2, 2), scores=[0.1, 0.2]), lesions)
    assert (hits.false_positives.tolist(), hits.best.tolist(), hits.n_isolated) == (
        [0.1, 0.2],
        [],
        0,
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:.*major_axis_length.*:FutureWarning")
def test_lesions_from_mask__random_discs__agrees_with_monai(seed):
    mask = _random_mask(np.random.default_rng(seed))
    expected = compute_multi_instance_mask(mask, 75 / (PIXEL_UM * 2))
    lesions = lesions_from_mask(mask, PIXEL_UM)
    assert np.array_equal(lesions.number, expected)
    isolated = compute_isolated_tumor_cells(expected, 275 / PIXEL_UM)
    assert (np.flatnonzero(lesions.isolated) + 1).tolist() == isolated


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:.*major_axis_length.*:FutureWarning")
def test_froc__official__agrees_with_monai(seed):
    rng = np.random.default_rng(seed)
    slides = [_random_slide(rng, tumour=bool(index % 2)) for index in range(1, 5)]
    false, best, n_lesions = [], [], 0
    for mask, points in slides:
        expected = np.zeros(mask.shape, dtype=int)
        isolated = []
        if mask.any():
            expected = compute_multi_instance_mask(mask, 75 / (PIXEL_UM * 2))
            isolated = compute_isolated_tumor_cells(expected, 275 / PIXEL_UM)
        x, y = points.xy_um.T / PIXEL_UM
        found = compute_fp_tp_probs(points.scores, y, x, expected, isolated)
        false, best = [*false, *found[0]], [*best, *found[1]]
        n_lesions += found[2]
    curve = compute_froc_curve_data(np.array(false), np.array(best), n_lesions, len(slides))
    hits = [match_detections(points, lesions_from_mask(mask, PIXEL_UM)) for mask, points in slides]
    result = froc(hits, "", official=True)
    assert (result.n_lesions, result.n_slides) == (n_lesions, len(slides))
    np.testing.assert_array_equal(result.false_positives, curve[0])
    np.testing.assert_array_equal(result.sensitivity, curve[1])
    assert result.score == pytest.approx(compute_froc_score(*curve), abs=1e-12)


@st.composite
def _cohorts(draw):
    score = st.integers(-8, 8).map(lambda number: number / 8)
    slide = st.tuples(
        st.lists(score, max_size=12),
        st.lists(st.one_of(score, st.just(-np.inf)), max_size=4),
        st.integers(0, 2),
    )
    slides = draw(st.lists(slide, max_size=4))
    return [_hit([0.5], [draw(score)]), *(_hit(*entries) for entries in slides)]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(_cohorts())
def test_froc__default__agrees_with_the_definition(slides):
    false = [score for slide in slides for score in slide.false_positives]
    best = [score for slide in slides for score in slide.best]
    points = [(0.0, 0.0)]
    for threshold in sorted({score for score in [*false, *best] if score > -np.inf}, reverse=True):
        n_false = sum(score >= threshold for score in false)
        n_found = sum(score >= threshold for score in best)
        points.append((n_false / len(slides), n_found / len(best)))
    expected = {}
    for rate in FALSE_POSITIVES_PER_SLIDE:
        left, right = max(p for p in points if p[0] <= rate), [p for p in points if p[0] > rate]
        expected[rate] = left[1]
        if right:
            share = (rate - left[0]) / (min(right)[0] - left[0])
            expected[rate] += share * (min(right)[1] - left[1])
    result = froc(slides, "")
    assert result.sensitivities == pytest.approx(expected)
    assert result.score == pytest.approx(sum(expected.values()) / 6)


def test_froc__official_and_all_found__drops_the_lowest_detection():
    slides = [_hit([0.5], [0.9, 0.3])]
    kept, dropped = froc(slides, ""), froc(slides, "", official=True)
    assert kept.sensitivity.tolist() == [1.0, 0.5, 0.5, 0.0]
    assert dropped.sensitivity.tolist() == [0.5, 0.5, 0.0]
    # Half of the lesions at no false positive; the other half only with the dropped threshold.
    assert (kept.score, dropped.score) == (pytest.approx((0.5 * 2 + 4) / 6), 0.5)


@pytest.mark.parametrize("slide", [([0.5, 0.3], [0.9, -np.inf]), ([0.5, 0.3], [0.9, 0.2], 1)])
def test_froc__official_and_a_lesion_without_score__drops_nothing(slide):
    kept, dropped = froc([_hit(*slide)], ""), froc([_hit(*slide)], "", official=True)
    assert dropped.sensitivity.tolist() == kept.sensitivity.tolist()
    assert dropped.false_positives.tolist() == kept.false_positives.tolist()


def test_froc__official_and_negative_scores__are_refused():
    with pytest.raises(ValueError, match=r"scores of at least 0.* but -0\.5 came"):
        froc([_hit([0.5], [-0.5])], "", official=True)


@pytest.mark.parametrize("official", [False, True])
def test_froc__perfect_detector__scores_one(official):
    # The official script drops the only threshold unless a lesion has none: here isolated cells.
    result = froc([_hit([], [0.7, 0.7], 1), _hit()], "", official=official)
    assert result.score == 1.0


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("false", [[], [0.9, 0.8, 0.7]])
def test_froc__blind_detector__scores_zero(false, official):
    assert froc([_hit(false, [-np.inf] * 3)], "", official=official).score == 0.0


def test_froc__false_positives__are_averaged_over_all_slides():
    tumour = _hit([0.9, 0.8], [0.5])
    one, four = froc([tumour], ""), froc([tumour, _hit(), _hit(), _hit()], "")
    assert one.false_positives.tolist() == [2.0, 2.0, 1.0, 0.0]
    assert four.false_positives.tolist() == [0.5, 0.5, 0.25, 0.0]
    # Interpolated from (1, 0) at the second threshold to (2, 1) at the lowest.
    assert list(one.sensitivities.values()) == [0, 0, 0, 1, 1, 1]
    assert list(four.sensitivities.values()) == [0, 1, 1, 1, 1, 1]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_cohorts(), st.randoms(use_true_random=False))
def test_froc__slides_and_detections_in_another_order__is_the_same(slides, random):
    shuffled = random.sample(
        [
            _hit(random.sample(list(s.false_positives), len(s.false_positives)), s.best[::-1])
            for s in slides
        ],
        len(slides),
    )
    assert froc(shuffled, "").sensitivities == froc(slides, "").sensitivities


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_cohorts())
def test_froc__scores_transformed_monotonically__is_the_same(slides):
    moved = [_hit(s.false_positives**3 - 9, s.best**3 - 9, s.n_isolated) for s in slides]
    assert froc(moved, "").sensitivities == froc(slides, "").sensitivities


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_match_detections__mask_and_detections_rotated__is_the_same(seed, turns):
    mask, points = _random_slide(np.random.default_rng(seed))
    image = np.zeros(mask.shape)
    cells = np.floor(points.xy_um / PIXEL_UM).astype(int)
    image[cells[:, 1], cells[:, 0]] = points.scores
    hits = []
    for k in (0, turns):
        turned = np.rot90(image, k)
        found = _at(*np.argwhere(turned), scores=turned[turned > 0])
        hits.append(match_detections(found, lesions_from_mask(np.rot90(mask, k), PIXEL_UM)))
    assert sorted(hits[0].best) == sorted(hits[1].best)
    assert sorted(hits[0].false_positives) == sorted(hits[1].false_positives)
    assert hits[0].n_isolated == hits[1].n_isolated


@pytest.mark.parametrize("seed", range(6))
def test_match_detections__hits_repeated_in_another_order__is_the_same(seed):
    rng = np.random.default_rng(seed)
    mask, points = _random_slide(rng)
    lesions = lesions_from_mask(mask, PIXEL_UM)
    column, row = np.floor(points.xy_um / PIXEL_UM).astype(int).T
    inside = np.flatnonzero(lesions.number[row, column] > 0)
    order = rng.permutation(np.concatenate([np.arange(len(points.scores)), inside, inside]))
    repeated = Detections(points.scores[order], points.xy_um[order])
    hits, again = match_detections(points, lesions), match_detections(repeated, lesions)
    assert again.best.tolist() == hits.best.tolist()
    assert sorted(again.false_positives) == sorted(hits.false_positives)


def test_froc__no_lesion_that_counts__is_refused():
    with pytest.raises(ValueError, match="needs a lesion that counts, but there is none in 2 sl"):
        froc([_hit([0.5], [], 3), _hit()], "")
    with pytest.raises(ValueError, match="none in 0 slides, and 0 of isolated"):
        froc([], "")


@pytest.mark.parametrize(("official", "lowest"), [(False, "kept"), (True, "dropped")])
def test_froc_result__as_text__says_how_it_was_got(official, lowest):
    result = froc([_hit([0.7], [0.9, 0.8, -np.inf])], "all tiles", official=official)
    assert str(result) == f"FROC .667 (all tiles; lowest threshold {lowest})"
    assert (result.detections, result.official, result.n_isolated) == ("all tiles", official, 0)


@pytest.mark.parametrize("pixel_um", [0, -1.0, float("nan"), float("inf")])
def test_lesions_from_mask__pixels_without_size__are_refused(pixel_um):
    with pytest.raises(ValueError, match=f"pixel_um must be a number above 0, but {pixel_um} came"):
        lesions_from_mask(np.ones((2, 2), dtype=bool), pixel_um)


@pytest.mark.parametrize("module", ["scipy.ndimage", "skimage.measure"])
def test_lesions_from_mask__library_missing__names_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"needs s.*'mil_anchor\[localization\]'"):
        lesions_from_mask(np.ones((2, 2), dtype=bool), PIXEL_UM)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pitch", [6.0, 38.0, 112.0])
def test_lesions_from_tiles__tiles_of_a_mask__are_the_lesions_of_the_mask(seed, pitch):
    rng = np.random.default_rng(seed)
    coarse = rng.random((9, 7)) < 0.3
    # The official pixel or a finer one, that is a whole part of the tile.
    side = {6.0: 1, 38.0: 5, 112.0: 15}[pitch]
    pixel_um, margin = pitch / side, 9
    mask = np.pad(coarse.repeat(side, axis=0).repeat(side, axis=1), margin)
    expected = lesions_from_mask(mask, pixel_um, origin_um=(-margin * pixel_um,) * 2)
    rows, columns = rng.permutation(np.argwhere(np.ones_like(coarse))).T
    coords = MicrometreCoords(torch.tensor(np.stack([columns, rows], axis=1) * pitch), pitch)
    lesions = lesions_from_tiles(torch.tensor(coarse[rows, columns].astype(int)), coords)
    assert lesions.isolated.tolist() == expected.isolated.tolist()
    cells = rng.integers(-margin, 9 * side + margin, (200, 2))
    points = _at(*cells, scores=rng.random(200), pixel_um=pixel_um)
    hits, again = match_detections(points, expected), match_detections(points, lesions)
    assert again.best.tolist() == hits.best.tolist()
    assert again.false_positives.tolist() == hits.false_positives.tolist()


@pytest.mark.parametrize(
    ("pitch", "n_tiles", "isolated"),
    [(128.0, 1, True), (128.0, 2, False), (256.0, 1, False), (62.0, 2, True), (62.0, 4, False)],
)
def test_lesions_from_tiles__row_of_tiles__counts_if_long_enough(pitch, n_tiles, isolated):
    xy = torch.stack([torch.arange(n_tiles) * pitch, torch.zeros(n_tiles)], dim=1) + 5000
    lesions = lesions_from_tiles(
        torch.ones(n_tiles, dtype=torch.int64), MicrometreCoords(xy, pitch)
    )
    assert lesions.isolated.tolist() == [isolated]


@pytest.mark.parametrize("shift", [0.0, -4321.5, 98765.4])
def test_lesions_from_tiles__tiles_off_the_grid__are_hit_at_their_centres(shift):
    generator = torch.Generator().manual_seed(0)
    xy = torch.rand(30, 2, generator=generator, dtype=torch.float64) * 20_000 + shift
    coords, lesion = MicrometreCoords(xy, 256.0), torch.arange(30) % 2
    lesions = lesions_from_tiles(lesion, coords)
    tiles = AllTiles()(torch.ones(30), coords)
    hit = Detections(tiles.scores[1::2], tiles.xy_um[1::2])
    hits = match_detections(hit, lesions)
    assert hits.false_positives.tolist() == []
    assert set(hits.best) == {1.0}


def test_lesions_from_tiles__no_lesion__has_none():
    coords = MicrometreCoords(torch.zeros(3, 2), 256.0)
    lesions = lesions_from_tiles(torch.zeros(3, dtype=torch.int64), coords)
    assert len(lesions.isolated) == 0
    assert len(match_detections(AllTiles()(torch.ones(3), coords), lesions).false_positives) == 3
