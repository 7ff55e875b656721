"""A cohort of synthetic slides, as bags and as a store."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from typing_extensions import override

from mil_anchor.data.bags import Bag, BagSequence, PixelCoords
from mil_anchor.data.labels import LabelTable
from mil_anchor.data.splits import Split
from mil_anchor.data.stores.base import BagShape, Store, StoredBag
from mil_anchor.data.synthetic.presets import PRESETS, SIZES, Preset, Size
from mil_anchor.data.synthetic.slide import SlidePlan, draw_features, draw_map, plan_slide
from mil_anchor.data.synthetic.world import World

PITCH_PX = 256.0  # level-0 pixels per tile
MPP = 0.5  # micrometres per level-0 pixel

_VAL_EVERY = 4
_WORLD, _PLAN, _TILES = range(3)  # what a stream of random numbers is for

_Choice = TypeVar("_Choice")


class SyntheticCohort(BagSequence):
    """Slides that behave like real ones, drawn when they are read.

    One seed fixes the feature space of all slides, and a slide depends on the seed and its index
    alone: it is the same in every process, order of reading and length of the cohort. What the
    slides match is written at `Preset`. Tiles lie on a grid of 256 level-0 pixels of 0.5 um.

    Args:
        preset: A key of ``PRESETS``, or one of your own.
        size: A key of ``SIZES``, or one of your own.
        seed: The world.
        n_slides: Number of slides, if not that of the size.

    Raises:
        ValueError: If the preset or size is unknown, or the seed is negative.

    Example:
        >>> cohort = SyntheticCohort("camelyon_like", "tiny", seed=0)
        >>> bag = cohort[1]
        >>> bag.bag_id, bag.label, bag.features.shape[1], bag.coords.unit
        ('slide_0001', 1, 32, 'px')
        >>> len(cohort.parts.train), len(cohort.parts.val), len(cohort.parts.test)
        (34, 12, 14)

    Source:
        Our own generator. Sizes, witness rates and centres as published of CAMELYON16 (Bejnordi et
        al. 2017, doi 10.1001/jama.2017.14585), CAMELYON17 (Bandi et al. 2019, doi
        10.1109/TMI.2018.2867350) and BRACS (Brancati et al. 2022, doi 10.1093/database/baac093).
    """

    def __init__(
        self,
        preset: str | Preset = "camelyon_like",
        size: str | Size = "tiny",
        *,
        seed: int = 0,
        n_slides: int | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"The seed must be at least 0, but {seed} came. Use 0.")
        self.preset = _choose(preset, PRESETS, "preset")
        self.size = _choose(size, SIZES, "size")
        if n_slides is not None:
            self.size = replace(self.size, n_slides=n_slides)
        self.seed = seed

    @cached_property
    def plans(self) -> list[SlidePlan]:
        """What every slide is, without drawing its tiles."""
        return [
            plan_slide(index, self.preset, self.size, generator=self._generator(_PLAN, index))
            for index in range(self.size.n_slides)
        ]

    @property
    @override
    def bag_ids(self) -> list[str]:
        return [f"slide_{index:04}" for index in range(self.size.n_slides)]

    @property
    @override
    def labels(self) -> list[int]:
        """Class index that every slide is given: in the training centres, some are wrong."""
        return [plan.label for plan in self.plans]

    @property
    def true_labels(self) -> list[int]:
        """Class index that every slide should have."""
        return [plan.true_label for plan in self.plans]

    @property
    def centres(self) -> list[int]:
        """Where every slide comes from, from 0; the last centre is held out."""
        return [plan.centre for plan in self.plans]

    @property
    def classes(self) -> list[str]:
        """Name of every class."""
        return list(self.preset.class_names)

    @property
    def parts(self) -> Split:
        """The held-out centre tests; a quarter of every other centre's slides validates."""
        n_centres = self.preset.n_centres
        split = Split(train=[], val=[], test=[])
        for index, centre in enumerate(self.centres):
            turn = index // (n_centres * len(self.classes))
            validates = turn % _VAL_EVERY == _VAL_EVERY // 2
            trained = split.val if validates else split.train
            (split.test if centre == n_centres - 1 else trained).append(index)
        return split

    @property
    def table(self) -> LabelTable:
        """The slides with the labels that they are given; every slide is a case of its own."""
        part_of = {index: part for part, own in self.parts.parts.items() for index in own}
        return LabelTable(
            slide_ids=self.bag_ids,
            labels=self.labels,
            classes=self.classes,
            cases=[slide_id.replace("slide", "case") for slide_id in self.bag_ids],
            parts=[part_of[index] for index in range(len(self))],
        )

    @property
    @override
    def width(self) -> int:
        return self.size.width

    @property
    def recipe(self) -> dict[str, Any]:
        """All that the cohort depends on, as plain values."""
        return {"preset": asdict(self.preset), "size": asdict(self.size), "seed": self.seed}

    @override
    def read(self, index: int) -> Bag:
        stored = self.read_stored(index)
        return Bag(
            stored.features,
            label=self.plans[index].label,
            bag_id=stored.slide_id,
            coords=stored.coords,
            instance_label=stored.instance_label,
            lesion=stored.lesion,
        )

    def read_stored(self, index: int) -> StoredBag:
        """The slide at an index from 0, with the share of every tile that is lesion.

        Tiles have the grade of their lesion as label, connected lesions are numbered from 1, and
        a tile has a label and a number exactly where its coverage is above 0.
        """
        plan = self.plans[index]
        generator = self._generator(_TILES, index)
        tiles = draw_map(plan, self.preset, generator=generator)
        features = draw_features(tiles, plan, self.preset, world=self._world, generator=generator)
        return StoredBag(
            slide_id=self.bag_ids[index],
            features=torch.from_numpy(features),
            coords=PixelCoords(torch.from_numpy(tiles.cell * int(PITCH_PX)).int(), PITCH_PX),
            instance_label=torch.from_numpy(tiles.grade),
            lesion=torch.from_numpy(tiles.lesion),
            coverage=torch.from_numpy(tiles.coverage).float(),
        )

    @cached_property
    def _world(self) -> World:
        return World(self.preset, self.width, generator=self._generator(_WORLD, 0))

    def _generator(self, purpose: int, index: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(purpose, index))
        return np.random.default_rng(sequence)


class SyntheticStore(Store):
    """A synthetic cohort as a store, for all that works on stores.

    Its path is a name and no place: equal for equal cohorts only.

    Args:
        cohort: The cohort.

    Example:
        >>> store = SyntheticStore(SyntheticCohort(n_slides=4))
        >>> store.slide_ids[-1], store.label("slide_0003")
        ('slide_0003', 'positive')
    """

    layout = "synthetic"

    def __init__(self, cohort: SyntheticCohort) -> None:
        digest = hashlib.sha256(json.dumps(cohort.recipe).encode()).hexdigest()
        super().__init__(Path("/synthetic") / digest[:16])
        self.cohort = cohort
        self._index = {slide_id: index for index, slide_id in enumerate(cohort.bag_ids)}

    @property
    @override
    def slide_ids(self) -> list[str]:
        return sorted(self._index)

    @override
    def shape(self, slide_id: str) -> BagShape:
        return BagShape(self.cohort.plans[self._position(slide_id)].n_tiles, self.cohort.width)

    @override
    def read_stored(self, slide_id: str) -> StoredBag:
        return self.cohort.read_stored(self._position(slide_id))

    @override
    def label(self, slide_id: str) -> str:
        return self.cohort.classes[self.cohort.plans[self._position(slide_id)].label]

    def _position(self, slide_id: str) -> int:
        if slide_id not in self._index:
            raise ValueError(
                f"The cohort must hold the slide, but {slide_id!r} is none of its "
                f"{len(self._index)}. Ids run from 'slide_0000'."
            )
        return self._index[slide_id]


def _choose(choice: str | _Choice, known: Mapping[str, _Choice], kind: str) -> _Choice:
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(
            f"The {kind} must be one of {sorted(known)}, but {choice!r} came. Choose one of them, "
            f"or give a {kind.capitalize()}."
        )
    return known[choice]
