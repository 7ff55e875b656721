import sys
import weakref
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.localization.detections import AllTiles, Components, NonMaximumSuppression
from mil_anchor.localization.lesions import froc, lesions_from_tiles, match_detections
from mil_anchor.localization.tiles import SlideScores, localize, localize_slide, rescale

FIELDS = ("dice", "specificity", "auroc", "average_precision")


def _slide(scores, *, bag_id="s", label=1, **entries):
    tensors = {
        name: torch.tensor(entry) if isinstance(entry, list) else entry
        for name, entry in entries.items()
    }
    return SlideScores(bag_id, label, torch.as_tensor(scores).double(), **tensors)


@st.composite
def _slides(draw):
    n_tiles = draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    # Multiples of 1/8, so that scores tie and a rescaled one may be exactly 0.5.
    scores = torch.randint(-4, 5, (n_tiles,), generator=generator).double() / 8
    labels = torch.randint(-1, 3, (n_tiles,), generator=generator)
    lesion = torch.randint(0, 4, (n_tiles,), generator=generator)
    if draw(st.booleans()):
        labels, lesion = labels.clamp(max=0), lesion * 0
    return SlideScores("s", draw(st.integers(0, 2)), scores, instance_label=labels, lesion=lesion)


def _grid_slide(seed, *, tumour, bag_id="s", width=24, pitch=128.0):
    """A slide of width x width tiles; scores are noise and, in two lesions, a weak signal."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(torch.arange(width), torch.arange(width))
    lesion = torch.zeros(len(grid), dtype=torch.int64)
    if tumour:
        for number in (1, 2):
            centre = torch.randint(0, width, (2,), generator=generator)
            lesion[((grid - centre) ** 2).sum(dim=1) <= 2 + 4 * number] = number
    scores = torch.rand(len(grid), generator=generator) + 0.02 * (lesion > 0)
    coords = MicrometreCoords(grid * pitch, pitch)
    return SlideScores(bag_id, int(tumour), scores, lesion=lesion, coords=coords)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(_slides())
def test_localize_slide__any_slide__agrees_with_loops_and_scikit_learn(slide):
    low, high = float(slide.scores.min()), float(slide.scores.max())
    scores = [(s - low) / (high - low) if high > low else 0.0 for s in slide.scores.tolist()]
    tiles = [
        (score, int(label > 0))
        for score, label in zip(scores, slide.instance_label.tolist(), strict=True)
        if label >= 0
    ]
    truth, predicted = [t for _, t in tiles], [int(s > 0.5) for s, _ in tiles]
    expected = dict.fromkeys(FIELDS)
    if any(truth):
        expected["dice"] = f1_score(truth, predicted, zero_division=0.0)
    elif truth and slide.label == 0:
        expected["specificity"] = 1 - fmean(predicted)
    if 0 < sum(truth) < len(truth):
        expected["auroc"] = roc_auc_score(truth, [s for s, _ in tiles])
        expected["average_precision"] = average_precision_score(truth, [s for s, _ in tiles])
    lesions = {}
    for score, own in zip(scores, slide.lesion.tolist(), strict=True):
        lesions.setdefault(own, []).append(score)
    lesions.pop(0, None)
    expected |= {
        "n_lesions": len(lesions),
        "found_any": sum(any(s > 0.5 for s in own) for own in lesions.values()),
        "found_mean": sum(sum(own) / len(own) > 0.5 + 1e-12 for own in lesions.values()),
        "found_all": sum(all(s > 0.5 for s in own) for own in lesions.values()),
        "n_tiles": len(scores),
        "n_lesion_tiles": sum(truth),
    }
    row = localize_slide(slide)._asdict()
    assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-6)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(_slides(), st.randoms(use_true_random=False))
def test_localize_slide__tiles_in_another_order__is_the_same(slide, random):
    order = random.sample(range(len(slide.scores)), len(slide.scores))
    shuffled = SlideScores(
        "s",
        slide.label,
        slide.scores[order],
        instance_label=slide.instance_label[order],
        lesion=slide.lesion[order],
    )
    assert localize_slide(shuffled) == pytest.approx(localize_slide(slide))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(_slides(), st.sampled_from([2.0**-30, 0.5, 1024.0]), st.sampled_from([-8.0, 0.0, 1.0]))
def test_localize_slide__scores_scaled_and_shifted__is_the_same(slide, factor, offset):
    # Powers of two: nothing is rounded. All scores lie outside [0, 1], or all inside, or some do.
    moved = _slide(
        factor * slide.scores + factor * offset,
        label=slide.label,
        instance_label=slide.instance_label,
        lesion=slide.lesion,
    )
    assert localize_slide(moved) == localize_slide(slide)


def test_localize_slide__scores_of_large_logits__are_ranked_without_saturation():
    # A sigmoid is 1 for all of them in float64.
    row = localize_slide(_slide([50.0, 51.0, 52.0, 53.0], instance_label=[0, 0, 1, 1]))
    assert (row.auroc, row.average_precision) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "dice", "auroc", "found"),
    [
        ([1.0, 1.0, 0.0, 0.0, 0.0], 1.0, 1.0, (1, 1, 1)),
        ([0.0, 0.0, 1.0, 1.0, 1.0], 0.0, 0.0, (0, 0, 0)),
        ([0.2, 0.2, 0.2, 0.2, 0.2], 0.0, 0.5, (0, 0, 0)),
        ([1.0, 0.0, 0.0, 0.0, 0.0], 2 / 3, 0.75, (1, 0, 0)),
        ([1.0, 0.4, 0.0, 0.0, 0.0], 2 / 3, 1.0, (1, 1, 0)),
    ],
    ids=["perfect", "inverted", "constant", "spike", "soft"],
)
def test_localize_slide__simple_scores__have_known_results(scores, dice, auroc, found):
    row = localize_slide(_slide(scores, lesion=[1, 1, 0, 0, 0]))
    assert (row.dice, row.auroc) == (pytest.approx(dice), auroc)
    assert (row.found_any, row.found_mean, row.found_all) == found
    assert row.specificity is None


def test_localize_slide__equal_scores__average_precision_is_the_share_of_lesion():
    row = localize_slide(_slide([0.2] * 8, instance_label=[1, 1, 0, 0, 0, 0, 0, 0]))
    assert row.average_precision == pytest.approx(0.25)


@pytest.mark.parametrize(("n_tiles", "n_lesion"), [(100, 20), (1000, 2), (50, 49)])
def test_localize_slide__concentration__moves_dice_and_specificity_as_documented(n_tiles, n_lesion):
    labels = [1] * n_lesion + [0] * (n_tiles - n_lesion)
    spike, dip = torch.zeros(n_tiles), torch.ones(n_tiles)
    spike[0], dip[0] = 1.0, 0.0
    dice = [localize_slide(_slide(s, instance_label=labels)).dice for s in (spike, dip)]
    assert dice == pytest.approx(
        [2 / (1 + n_lesion), 2 * (n_lesion - 1) / (n_tiles + n_lesion - 1)]
    )
    specificity = [localize_slide(_slide(s, label=0)).specificity for s in (spike, dip)]
    assert specificity == pytest.approx([1 - 1 / n_tiles, 1 / n_tiles])
    assert localize_slide(_slide([0.3] * n_tiles, label=0)).specificity == 1.0


@pytest.mark.parametrize(
    ("entries", "n_lesion_tiles", "specificity"),
    [
        ({"label": 0}, 0, 0.75),
        ({"label": 0, "instance_label": [0, -1, 0, 0]}, 0, 2 / 3),
        ({"label": 0, "instance_label": [-1, -1, -1, -1]}, 0, None),
        ({"label": 0, "instance_label": [0, 2, 0, 0]}, 1, None),
        ({"label": 1, "instance_label": [0, 0, 0, 0]}, 0, None),
        ({"label": 1}, 0, None),
    ],
)
def test_localize_slide__without_lesions__specificity_where_it_is_negative(
    entries, n_lesion_tiles, specificity
):
    row = localize_slide(_slide([1.0, 0.0, 0.1, 0.2], **entries))
    assert (row.n_lesion_tiles, row.auroc is None) == (n_lesion_tiles, n_lesion_tiles == 0)
    assert row.specificity == pytest.approx(specificity)


def test_rescale__any_precision__is_float64_and_spans_zero_to_one():
    scores = torch.tensor([-3.0, 5.0, 1.0], dtype=torch.float16, requires_grad=True)
    assert torch.equal(rescale(scores), torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))


def test_localize__cohort__averages_over_the_slides_that_have_a_quantity():
    slides = [
        _slide([1.0, 0.0, 0.0, 0.0], bag_id="a", lesion=[1, 0, 2, 2]),
        _slide([1.0, 1.0, 0.0], bag_id="b", instance_label=[1, -1, 1], lesion=[3, 0, 3]),
        _slide([1.0, 0.0], bag_id="c", label=0),
        _slide([1.0, 0.2, 0.3, 0.0], bag_id="d", label=0),
        _slide([1.0, 0.0], bag_id="e", label=2),
    ]
    report = localize(iter(slides))
    assert report.metrics == pytest.approx(
        {
            "localization/dice": (2 / 4 + 2 / 3) / 2,
            "localization/specificity": (0.5 + 0.75) / 2,
            "localization/auroc": (0 * 2 / 3 + 1 + 0.5 * 2) / 3,
            "localization/average_precision": (1 / 3 * (1 + 2 * 3 / 4)),
            "localization/lesion_any": 2 / 3,
            "localization/lesion_mean": 1 / 3,
            "localization/lesion_all": 1 / 3,
        }
    )
    assert [row.bag_id for row in report.rows] == ["a", "b", "c", "d"]
    assert report.froc is None
    assert all(isinstance(value, float) for value in report.metrics.values())


def test_localize__nothing_annotated__is_empty():
    slides = [_slide([1.0, 0.0], label=label) for label in (0, 1)]
    slides.append(_slide([1.0, 0.0], label=0, instance_label=[-1, -1]))
    report = localize(slides)
    assert (report.metrics, report.rows, report.froc) == ({}, [], None)


def test_localize__no_slide__is_empty():
    assert localize([]).metrics == {}


@pytest.mark.parametrize("detector", [NonMaximumSuppression(500), Components(), AllTiles()])
@pytest.mark.parametrize("official", [False, True])
def test_localize__grids__froc_is_that_of_its_parts(detector, official):
    slides = [_grid_slide(seed, tumour=seed % 2 == 1) for seed in range(6)]
    report = localize(slides, detector=detector, official=official)
    hits = [
        match_detections(detector(s.scores, s.coords), lesions_from_tiles(s.lesion, s.coords))
        for s in slides
    ]
    expected = froc(hits, str(detector), official=official)
    assert report.metrics["localization/froc"] == expected.score == report.froc.score
    assert str(report.froc) == str(expected)
    assert (report.froc.n_slides, report.froc.n_lesions) == (6, expected.n_lesions)
    assert expected.n_lesions > 2
    assert 0 < expected.score < 1


def test_localize__perfect_and_blind_scores__froc_is_one_and_zero():
    slides = [_grid_slide(seed, tumour=seed % 2 == 1) for seed in range(4)]
    score = {}
    for name, sign in (("perfect", 1.0), ("blind", -1.0)):
        moved = [
            SlideScores(s.bag_id, s.label, sign * (s.lesion > 0), lesion=s.lesion, coords=s.coords)
            for s in slides
        ]
        report = localize(moved)
        score[name] = report.metrics["localization/froc"]
    assert score == {"perfect": 1.0, "blind": 0.0}


def test_localize__pixels_with_their_size__is_as_in_micrometres():
    slides = [_grid_slide(seed, tumour=seed > 0) for seed in range(3)]
    in_pixels = [
        SlideScores(
            s.bag_id,
            s.label,
            s.scores,
            lesion=s.lesion,
            coords=PixelCoords((s.coords.xy * 2).int(), s.coords.pitch * 2),
            mpp=0.5,
        )
        for s in slides
    ]
    assert localize(in_pixels).metrics == localize(slides).metrics


def test_localize__place_or_lesions_unknown__leaves_slides_out_of_froc():
    known = [_grid_slide(1, tumour=True), _grid_slide(2, tumour=False)]
    coords, n_tiles = known[0].coords, len(known[0].scores)
    scores, pixels = torch.rand(n_tiles), PixelCoords(coords.xy, 128.0)
    some_tumour = torch.arange(n_tiles) % 2
    left_out = [
        SlideScores("no coords", 0, scores),
        SlideScores("no size", 0, scores, coords=pixels),
        SlideScores("no lesions", 1, scores, coords=coords),
        SlideScores("no ids", 1, scores, instance_label=some_tumour, coords=coords),
        SlideScores("label wrong", 0, scores, instance_label=some_tumour, coords=coords),
    ]
    counted = [SlideScores("normal", 0, scores, coords=coords)]
    report = localize([*left_out, *counted, *known])
    assert report.froc.n_slides == 3
    assert report.metrics["localization/froc"] == localize([*known, *counted]).froc.score


def test_localize__normal_slides_first_or_last__is_the_same():
    slides = [_grid_slide(seed, tumour=seed >= 2) for seed in range(4)]
    assert localize(slides).metrics == pytest.approx(localize(slides[::-1]).metrics)


def test_localize__slides_after_a_lesion__are_not_kept():
    read = []

    def stream():
        for seed in range(6):
            slide = _grid_slide(seed, tumour=seed == 0)
            read.append(weakref.ref(slide))
            # This slide, and the one before that the loop still names.
            assert sum(reference() is not None for reference in read) <= 2
            yield slide

    assert localize(stream()).froc.n_slides == 6


def test_localize__no_lesion_on_a_grid__needs_no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    normal = _grid_slide(0, tumour=False)
    tiles = _slide([1.0, 0.0], instance_label=[1, 0])
    assert localize([normal, tiles]).metrics["localization/dice"] == 1.0
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[localization\]'"):
        localize([normal, _grid_slide(1, tumour=True)])


def test_localize__slide_larger_than_glass__is_refused_by_name():
    slide = _grid_slide(1, tumour=True, bag_id="s3", pitch=5000.0)
    with pytest.raises(ValueError, match=r"within 100 mm, but those of 's3' span 115 mm"):
        localize([slide])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_slide_scores__score_not_finite__is_refused_by_name(value):
    with pytest.raises(ValueError, match="finite score per tile, but slide 's3' has no tile or"):
        _slide([0.5, value], bag_id="s3")
    with pytest.raises(ValueError, match="finite score per tile, but slide 's3' has no tile or"):
        _slide([], bag_id="s3")


@pytest.mark.parametrize(
    "entry",
    [
        {"instance_label": [0, 1, 1]},
        {"lesion": [0, 1, 1]},
        {"coords": PixelCoords(torch.zeros(3, 2), 1.0)},
    ],
)
def test_slide_scores__entry_of_other_length__is_refused_by_name(entry):
    (name,) = entry
    with pytest.raises(ValueError, match=f"{name} must .* slide 's3' has 3 for 2 scores"):
        _slide([0.5, 0.1], bag_id="s3", **entry)


@pytest.mark.parametrize("mpp", [0, -0.5, float("nan"), float("inf")])
def test_slide_scores__mpp_not_above_zero__is_refused_by_name(mpp):
    with pytest.raises(ValueError, match=f"mpp must be .* slide 's3' has {mpp}"):
        _slide([0.5], bag_id="s3", mpp=mpp)


def test_rescale__differences_below_float32__are_kept():
    scores = 1 + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) * 2**-40
    assert rescale(scores).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("entries", "labels"),
    [
        ({"label": 0}, [0, 0, 0]),
        ({"label": 2}, [-1, -1, -1]),
        ({"label": 2, "lesion": [0, 3, 1]}, [0, 1, 1]),
        ({"label": 0, "instance_label": [2, -1, 0], "lesion": [0, 3, 1]}, [1, -1, 0]),
    ],
)
def test_slide_scores__tile_labels__come_from_the_best_source(entries, labels):
    assert _slide([0.1, 0.2, 0.3], **entries).tile_labels.tolist() == labels


def test_localize__confidence_of_slides__orders_detections_and_changes_no_tile_metric():
    grid = torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0))
    lesion = (grid < 3).all(dim=1).long()
    coords = MicrometreCoords(128 * grid, 128.0)
    peak = torch.zeros(81, dtype=torch.float64)
    peak[40] = 1.0

    def report(of_tumour, of_normal):
        tumour = SlideScores(
            "a", 1, lesion.double(), lesion=lesion, coords=coords, confidence=of_tumour
        )
        others = [
            SlideScores(f"b{index}", 0, peak, coords=coords, confidence=of_normal)
            for index in range(9)
        ]
        return localize([tumour, *others], detector=Components(threshold=0.05)).metrics

    sure, unsure = report(0.9, 0.1), report(0.1, 0.9)
    assert sure.pop("localization/froc") == 1.0
    # Nine false positives on ten slides stand before the lesion.
    assert unsure.pop("localization/froc") == pytest.approx((0.0 + 0.0 + 4 * 1.0) / 6)
    assert sure == unsure


@pytest.mark.parametrize("confidence", [-0.1, 1.5, float("nan")])
def test_slide_scores__confidence_that_is_no_probability__is_refused(confidence):
    with pytest.raises(ValueError, match=f"lie in .0, 1., but slide 'a' has {confidence}"):
        SlideScores("a", 1, torch.ones(2), confidence=confidence)
