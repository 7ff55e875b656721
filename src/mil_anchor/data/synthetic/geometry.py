"""Where tissue, its types and its lesions lie on the grid of a synthetic slide."""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int

# Share of the slide's box that is tissue.
_FILL = 0.4


def smooth_fields(
    generator: np.random.Generator, shape: tuple[int, int], *, n_fields: int, length: float
) -> Float32[np.ndarray, "height width field"]:
    """Independent Gaussian random fields on a grid.

    Every value is standard normal, and two values of a field at distance d have the correlation
    exp(-d^2 / (2 length^2)): white noise on a coarse lattice, blurred by a Gaussian along x and y.

    Args:
        generator: Source of randomness.
        shape: Height and width of the grid, cells.
        n_fields: Number of fields.
        length: Correlation length, cells.

    Returns:
        The fields.
    """
    # The blur meets each noise twice in a correlation, which widens its square by two.
    rows, columns = (_blur(n_cells, length / 2**0.5) for n_cells in shape)
    lattice = (rows.shape[1], columns.shape[1], n_fields)
    noise = generator.standard_normal(lattice, dtype=np.float32)
    blurred = rows @ noise.reshape(len(noise), -1)
    return columns @ blurred.reshape(shape[0], *lattice[1:])


def draw_tissue(generator: np.random.Generator, n_cells: int) -> Bool[np.ndarray, "height width"]:
    """Tissue of a given number of cells: the highest values of one smooth field on a square.

    Args:
        generator: Source of randomness.
        n_cells: Number of tissue cells, at least one.

    Returns:
        True where there is tissue.
    """
    side = int(np.ceil((n_cells / _FILL) ** 0.5))
    field = smooth_fields(generator, (side, side), n_fields=1, length=side / 6).ravel()
    tissue = np.zeros(side * side, dtype=bool)
    tissue[np.argpartition(field, -n_cells)[-n_cells:]] = True
    return tissue.reshape(side, side)


def draw_types(
    generator: np.random.Generator, shape: tuple[int, int], *, n_types: int
) -> Int[np.ndarray, "height width"]:
    """Tissue types in patches, in shares drawn anew from a Dirichlet distribution.

    A cell has the type of the largest log share + Gumbel noise, where the noise of each type is a
    smooth field: so the expected shares are exactly those drawn.

    Args:
        generator: Source of randomness.
        shape: Height and width of the grid, cells.
        n_types: Number of types.

    Returns:
        The type of every cell, from 0.
    """
    shares = np.maximum(generator.dirichlet(np.ones(n_types)), np.finfo(np.float64).tiny)
    fields = smooth_fields(generator, shape, n_fields=n_types, length=shape[0] / 10)
    probability = torch.special.ndtr(torch.from_numpy(fields).double()).numpy()
    types: Int[np.ndarray, "height width"] = np.argmax(
        np.log(shares) - np.log(-np.log(probability)), axis=-1
    )
    return types


def draw_clusters(
    generator: np.random.Generator,
    allowed: Bool[np.ndarray, "height width"],
    *,
    n_cells: int,
    n_foci: int,
) -> Bool[np.ndarray, "height width"]:
    """Clusters of cells, grown around random foci with uneven borders.

    Args:
        generator: Source of randomness.
        allowed: Where cells may lie.
        n_cells: Number of cells in all clusters, at least one; fewer if there is no more room.
        n_foci: Number of foci; clusters that meet become one.

    Returns:
        True in the clusters.
    """
    shape = allowed.shape[0], allowed.shape[1]
    places = np.flatnonzero(allowed)
    foci = generator.choice(places, size=min(n_foci, n_cells, len(places)), replace=False)
    cells = np.indices(shape)
    distance = [
        np.hypot(cells[0] - focus // shape[1], cells[1] - focus % shape[1])
        / generator.lognormal(sigma=0.5)
        for focus in foci
    ]
    uneven = smooth_fields(generator, shape, n_fields=1, length=2.0)[..., 0]
    cost = np.min(distance, axis=0, initial=np.inf) * np.exp(0.3 * uneven)
    return _flood(allowed, cost, foci.tolist(), n_cells=min(n_cells, len(places))) > 0


def number_regions(
    mask: Bool[np.ndarray, "height width"],
) -> Int[np.ndarray, "height width"]:
    """Number the 8-connected regions of a mask from 1, in the order of their first cells.

    Example:
        >>> number_regions(np.array([[True, False, False, True], [False, True, False, True]]))
        array([[1, 0, 0, 2],
               [0, 1, 0, 2]])
    """
    return _flood(mask, np.zeros(mask.shape), (), n_cells=int(mask.sum()))


def draw_coverage(
    generator: np.random.Generator, mask: Bool[np.ndarray, "height width"]
) -> Float[np.ndarray, "height width"]:
    """Share of every cell that a region covers: 1 inside, from 0.3 to 1 at the rim, 0 outside.

    Args:
        generator: Source of randomness.
        mask: True where a region covers some of the cell.

    Returns:
        The shares.
    """
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    rim = generator.uniform(0.3, 1.0, mask.shape)
    return np.where(mask, np.where(inside, 1.0, rim), 0.0)


def _blur(n_cells: int, spread: float) -> Float32[np.ndarray, "cell node"]:
    # Nodes one standard deviation apart: the correlation is exact up to 1e-4 there. Rows of unit
    # length give unit variance, and nodes beyond the border keep it from being rougher.
    nodes = np.arange(-4 * spread, n_cells + 4 * spread, spread)
    weights = np.exp(-0.5 * ((np.arange(n_cells)[:, None] - nodes) / spread) ** 2)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    return weights.astype(np.float32)


def _flood(
    allowed: Bool[np.ndarray, "height width"],
    cost: Float[np.ndarray, "height width"],
    seeds: Sequence[int],
    *,
    n_cells: int,
) -> Int[np.ndarray, "height width"]:
    # Always takes the cheapest neighbour of what it has; a new seed where there is none left. Cells
    # are positions in the flat grid with a border, where every cell has eight neighbours.
    width = allowed.shape[1] + 2
    steps = [-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1]
    free = np.pad(allowed, 1).ravel()
    price = np.pad(cost, 1, constant_values=np.inf).ravel()
    number = np.zeros(len(free), dtype=np.int64)
    heap: list[tuple[float, int, int]] = []

    def push(cell: int, own: int) -> None:
        free[cell] = False
        heapq.heappush(heap, (float(price[cell]), cell, own))

    for own, seed in enumerate(seeds, start=1):
        row, column = divmod(seed, allowed.shape[1])
        push((row + 1) * width + column + 1, own)
    n_regions = len(seeds)
    for _ in range(n_cells):
        if not heap:
            n_regions += 1
            push(int(np.where(free, price, np.inf).argmin()), n_regions)
        _, cell, own = heapq.heappop(heap)
        number[cell] = own
        for step in steps:
            if free[cell + step]:
                push(cell + step, own)
    return number.reshape(-1, width)[1:-1, 1:-1]
