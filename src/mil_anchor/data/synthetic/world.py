"""The feature space that all slides of a synthetic cohort share."""

import numpy as np
from jaxtyping import Float, Float32

from mil_anchor.data.synthetic.presets import Preset

N_TYPES = 6  # normal tissue types; one more type is the artefact
N_VARIANTS = 3  # of every grade of lesion

_SPECTRUM = 1.0  # variance of component k ~ k^-1
_BAND = (0.015, 0.12)  # where in the spectrum lesions differ from normal tissue
_COSINE_GRADES = 0.6
_COSINE_MIMIC = 0.75


class World:
    r"""Means and directions in whitened components, and how they become features.

    In components every direction has the same meaning: lengths are Mahalanobis lengths. A centre c
    turns the components z of a tile into the features

    .. math:: x = gain_c \odot (Q \Lambda^{1/2} z) + Q \Lambda^{1/2} offset_c

    with a rotation Q, and variances that fall as 1 / k and are 1 on average.

    Args:
        preset: What the slides are like.
        width: Number of features.
        generator: Source of randomness.
    """

    type_mean: Float32[np.ndarray, "type width"]
    lesion: Float32[np.ndarray, "grade variant width"]
    mimic: Float32[np.ndarray, "grade variant width"]

    def __init__(self, preset: Preset, width: int, *, generator: np.random.Generator) -> None:
        variance = np.arange(1, width + 1) ** -_SPECTRUM
        deviation = (variance / variance.mean()) ** 0.5
        rotation = np.linalg.qr(generator.standard_normal((width, width)))[0]
        mixing = deviation[:, None] * rotation

        n_grades = len(preset.class_names) - 1
        lesion = _lesions(generator, n_grades, width)
        self.type_mean = _float32(generator.standard_normal((N_TYPES + 1, width)))
        self.lesion = _float32(lesion)
        self.mimic = _float32(_at_cosine(generator, lesion, cosine=_COSINE_MIMIC))

        shape = (preset.n_centres, width)
        gain = np.exp(preset.centre_gain * generator.standard_normal(shape))
        self._mixing = _float32(mixing * gain[:, None])
        self._offset = _float32(preset.centre_offset * generator.standard_normal(shape) @ mixing)

    def features(
        self, components: Float32[np.ndarray, "tile width"], *, centre: int
    ) -> Float32[np.ndarray, "tile width"]:
        """The features that a centre gives tiles.

        Args:
            components: Whitened components of the tiles.
            centre: The centre, from 0.

        Returns:
            The features.
        """
        features: Float32[np.ndarray, "tile width"] = components @ self._mixing[centre]
        features += self._offset[centre]
        return features


def _lesions(
    generator: np.random.Generator, n_grades: int, width: int
) -> Float[np.ndarray, "grade variant width"]:
    grades = [_unit(_in_band(generator.standard_normal((N_VARIANTS, width))))]
    while len(grades) < n_grades:
        grades.append(_at_cosine(generator, grades[-1], cosine=_COSINE_GRADES))
    return np.stack(grades)


def _at_cosine(
    generator: np.random.Generator, direction: Float[np.ndarray, "*rows width"], *, cosine: float
) -> Float[np.ndarray, "*rows width"]:
    other = _in_band(generator.standard_normal(direction.shape))
    other -= (other * direction).sum(axis=-1, keepdims=True) * direction
    turned: Float[np.ndarray, "*rows width"] = cosine * direction + (1 - cosine**2) ** 0.5 * _unit(
        other
    )
    return turned


def _in_band(directions: Float[np.ndarray, "*rows width"]) -> Float[np.ndarray, "*rows width"]:
    width = directions.shape[-1]
    start = int(_BAND[0] * width)
    # Three variants and a mimic of each need a few components to be different things.
    stop = max(round(_BAND[1] * width), start + 6)
    inside = np.zeros(width, dtype=bool)
    inside[start:stop] = True
    banded: Float[np.ndarray, "*rows width"] = np.where(inside, directions, 0.0)
    return banded


def _unit(directions: Float[np.ndarray, "*rows width"]) -> Float[np.ndarray, "*rows width"]:
    unit: Float[np.ndarray, "*rows width"] = directions / np.linalg.norm(
        directions, axis=-1, keepdims=True
    )
    return unit


def _float32(values: Float[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    return values.astype(np.float32)
