"""A cohort that behaves like slides, because no slide can be redistributed."""

from mil_anchor.data.synthetic.cohort import MPP, PITCH_PX, SyntheticCohort, SyntheticStore
from mil_anchor.data.synthetic.presets import PRESETS, SIZES, Preset, Size, WitnessRange
from mil_anchor.data.synthetic.write import write_cohort

__all__ = [
    "MPP",
    "PITCH_PX",
    "PRESETS",
    "SIZES",
    "Preset",
    "Size",
    "SyntheticCohort",
    "SyntheticStore",
    "WitnessRange",
    "write_cohort",
]
