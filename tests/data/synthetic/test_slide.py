from dataclasses import replace

import numpy as np
import pytest

from mil_anchor.data.synthetic import PRESETS, SIZES
from mil_anchor.data.synthetic.slide import (
    SlideMap,
    SlidePlan,
    draw_features,
    draw_map,
    plan_slide,
)
from mil_anchor.data.synthetic.world import World

_PLAIN = replace(PRESETS["camelyon_like"], centre_gain=0.0, centre_offset=0.0, strength_spread=0.0)
_WIDTH = 16


def _plans(preset, n_slides):
    return [
        plan_slide(index, preset, SIZES["small"], generator=np.random.default_rng(index))
        for index in range(n_slides)
    ]


def _map_of_type(tissue, **entries):
    # Far apart, so that the local fields of any two tiles are independent.
    cell = 20 * np.argwhere(np.full((20, 20), True))
    nothing = {
        "grade": np.zeros(400, dtype=np.int64),
        "lesion": np.zeros(400, dtype=np.int64),
        "coverage": np.zeros(400),
        "mimic": np.full(400, False),
    }
    return SlideMap(cell=cell, tissue=np.full(400, tissue), **{**nothing, **entries})


def _components(tiles, seeds, preset=_PLAIN):
    world = World(preset, _WIDTH, generator=np.random.default_rng(0))
    mixing = world.features(np.eye(_WIDTH, dtype=np.float32), centre=0).astype(np.float64)
    plan = SlidePlan(label=1, true_label=1, centre=0, n_tiles=400, artefact=False)
    drawn = [
        draw_features(tiles, plan, preset, world=world, generator=np.random.default_rng(seed))
        for seed in seeds
    ]
    return world, np.stack(drawn).astype(np.float64) @ np.linalg.inv(mixing)


def test_plan_slide__many__are_log_normal_in_size():
    sizes = np.log([plan.n_tiles for plan in _plans(_PLAIN, 2000)]) - np.log(600)
    assert abs(sizes.mean()) < 0.04
    assert abs(sizes.std() - 0.5) < 0.03
    skewness, kurtosis = (np.mean((sizes / sizes.std()) ** power) for power in (3, 4))
    assert abs(skewness) < 0.25
    assert abs(kurtosis - 3) < 0.5


def test_plan_slide__smallest__has_room():
    preset = replace(_PLAIN, size_spread=4.0)
    assert min(plan.n_tiles for plan in _plans(preset, 200)) == 20


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_plan_slide__in_turn__crosses_classes_and_centres(name):
    preset = PRESETS[name]
    n_classes = len(preset.class_names)
    plans = _plans(preset, 5 * n_classes * preset.n_centres)
    count = np.zeros((n_classes, preset.n_centres))
    for plan in plans:
        count[plan.true_label, plan.centre] += 1
    assert (count == 5).all()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_plan_slide__artefact__follows_the_label_in_training_centres_only(name):
    preset = PRESETS[name]
    plans = _plans(preset, 4000)
    highest = len(preset.class_names) - 1

    def share(label, *, held_out):
        chosen = [
            plan.artefact
            for plan in plans
            if plan.true_label == label and (plan.centre == preset.n_centres - 1) is held_out
        ]
        return np.mean(chosen)

    assert abs(share(0, held_out=False) - 0.4) < 0.05
    assert abs(share(highest, held_out=False) - 0.6) < 0.05
    assert abs(share(0, held_out=True) - 0.5) < 0.08
    assert abs(share(highest, held_out=True) - 0.5) < 0.08


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_plan_slide__label_noise__flips_so_many_outside_the_held_out_centre(name):
    preset = PRESETS[name]
    flipped = {True: [], False: []}
    for plan in _plans(preset, 4000):
        flipped[plan.centre == preset.n_centres - 1].append(plan.label != plan.true_label)
    assert not any(flipped[True])
    assert abs(np.mean(flipped[False]) - 0.04) < 0.015


def test_plan_slide__only_label_noise__takes_every_other_class():
    plans = _plans(replace(PRESETS["bracs_like"], label_noise=1.0), 400)
    trained = {(plan.true_label, plan.label) for plan in plans if plan.centre != 3}
    assert trained == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_draw_map__mimics_and_artefact__are_clusters_beside_lesions():
    preset = replace(PRESETS["bracs_like"], mimics=1.0)
    plan = SlidePlan(label=2, true_label=2, centre=0, n_tiles=500, artefact=True)
    for seed in range(20):
        tiles = draw_map(plan, preset, generator=np.random.default_rng(seed))
        artefact = tiles.tissue == 6
        assert 0.02 <= artefact.mean() <= 0.1
        assert 0.004 <= tiles.mimic.mean() <= 0.08
        assert not (tiles.mimic & artefact).any()
        assert not ((tiles.mimic | artefact) & (tiles.grade > 0)).any()


def test_draw_map__switched_off__holds_neither_mimics_nor_artefact():
    plan = SlidePlan(label=0, true_label=0, centre=0, n_tiles=300, artefact=False)
    preset = replace(_PLAIN, mimics=0.0)
    tiles = draw_map(plan, preset, generator=np.random.default_rng(0))
    assert not tiles.mimic.any()
    assert not (tiles.tissue == 6).any()
    assert not tiles.grade.any()
    assert not tiles.lesion.any()


def test_draw_features__one_tissue_type__varies_as_stated_around_its_mean():
    world, components = _components(_map_of_type(2), range(40))
    slide = components.mean(axis=1)
    # 0.5 squared of the local field and 0.7 squared of noise within a slide, 0.2 squared between.
    within = components.var(axis=1).mean()
    assert abs(within - (0.5**2 + 0.7**2)) < 0.02
    assert abs(slide.var(axis=0).mean() - (0.2**2 + within / 400)) < 0.006
    np.testing.assert_allclose(slide.mean(axis=0), world.type_mean[2], atol=0.15)


def test_draw_features__neighbours__share_the_local_field():
    cell = np.argwhere(np.full((20, 20), True))
    tiles = replace(_map_of_type(0), cell=cell)
    _, components = _components(tiles, range(10))
    grid = components.reshape(10, 20, 20, _WIDTH)
    # Noise is independent; the field of correlation length 4 changes by d^2 / (2 length^2).
    between = ((grid[:, 1:] - grid[:, :-1]) ** 2).mean()
    assert abs(between - 2 * (0.7**2 + 0.25 * (1 - np.exp(-1 / 32)))) < 0.02


def test_draw_features__lesions__are_shifted_by_coverage_and_strength():
    grade = np.zeros(400, dtype=np.int64)
    grade[:300] = 1
    coverage = np.where(grade > 0, 0.5, 0.0)
    coverage[150:300] = 1.0
    world, components = _components(_map_of_type(0, grade=grade, coverage=coverage), range(30))
    normal = components[:, 300:].mean(axis=1)
    half = components[:, :150].mean(axis=1) - normal
    whole = components[:, 150:300].mean(axis=1) - normal
    # Every slide takes one variant, and over slides all are taken.
    along = whole @ world.lesion[0].T
    assert set(along.argmax(axis=1)) == {0, 1, 2}
    np.testing.assert_allclose(along.max(axis=1), 6.0, atol=0.4)
    own = world.lesion[0][along.argmax(axis=1)]
    np.testing.assert_allclose((half * own).sum(axis=1), 3.0, atol=0.4)


def test_draw_features__mimics__look_half_way_to_a_lesion():
    mimic = np.arange(400) < 200
    world, components = _components(_map_of_type(0, mimic=mimic), range(20))
    shift = components[:, :200].mean(axis=1) - components[:, 200:].mean(axis=1)
    np.testing.assert_allclose((shift @ world.mimic[0].T).max(axis=1), 0.7 * 6.0, atol=0.4)
    chosen = world.lesion[0][(shift @ world.mimic[0].T).argmax(axis=1)]
    np.testing.assert_allclose((shift * chosen).sum(axis=1), 0.7 * 0.75 * 6.0, atol=0.4)


def test_draw_features__strength_spread__makes_slides_differ():
    whole = {"grade": np.full(400, 1), "coverage": np.full(400, 1.0)}
    preset = replace(_PLAIN, strength_spread=0.25)
    world, components = _components(_map_of_type(0, **whole), range(60), preset)
    shift = components.mean(axis=1) - world.type_mean[0]
    strength = np.log((shift @ world.lesion[0].T).max(axis=1))
    assert 0.15 < strength.std() < 0.35
