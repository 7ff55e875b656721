"""What of a run's configuration bears on its result, and what tells runs of one name apart."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# A run's result is the same without them, or they are said beside it.
_INCIDENTAL = re.compile(
    r"seed|data\.fold|out|resume|threads|maps|test|bag_features|data\.keep_in_memory"
    r"|data\.num_workers|trainer\.enable_progress_bar|trainer\.log_every_n_steps"
    r"|(names|logger)(\..*)?"
)


def flat_config(config: Any) -> dict[str, str]:
    """The leaves of a configuration by dotted keys, as text.

    Example:
        >>> flat_config({"seed": 0, "plugin": {"weight": 0.1, "site": None}})
        {'seed': '0', 'plugin.weight': '0.1', 'plugin.site': 'null'}
    """
    return _leaves(config, "")


def bearing(config: Mapping[str, str]) -> dict[str, str]:
    """What bears on the result, besides seed and fold."""
    return {key: value for key, value in config.items() if not _INCIDENTAL.fullmatch(key)}


def telling_keys(
    configs: Sequence[Mapping[str, str]], draws: Sequence[tuple[int, int]]
) -> list[str]:
    """Keys by which runs of the same data, model and plug-in differ, besides seed and fold.

    A key that takes its value from another one (``model.hidden`` from ``hidden``) or from the seed
    or fold (``data.seed``) is left out, and so are all but the first of those with one value each
    that the same runs lack. Where two runs of the same seed and fold still do not
    differ, ``out`` tells them apart.

    Args:
        configs: The `flat_config` of each run.
        draws: Seed and fold of each.

    Returns:
        The keys, those of the fewest dots first.

    Example:
        >>> swept = [{"plugin.weight": "0.1", "seed": "0"}, {"plugin.weight": "0.3", "seed": "0"}]
        >>> telling_keys(swept, [(0, 0), (0, 0)])
        ['plugin.weight']
    """
    own = [bearing(config) for config in configs]
    from_draw = {tuple(str(draw[place]) for draw in draws) for place in (0, 1)}
    kept: dict[str, tuple[str | None, ...]] = {}
    present: set[tuple[str | None, ...]] = set()
    for key in sorted({key for config in own for key in config}, key=lambda k: (k.count("."), k)):
        values = tuple(config.get(key) for config in own)
        # Arguments that a later version of a class has besides come all at once.
        presence = tuple(None if value is None else "" for value in values)
        is_one = len({*values} - {None}) == 1
        if len({*values}) == 1 or values in from_draw or _is_echo(key, values, kept):
            continue
        if not (is_one and presence in present):
            kept[key] = values
        if is_one:
            present.add(presence)
    told = {
        (draw, *(config.get(key) for key in kept)) for config, draw in zip(own, draws, strict=True)
    }
    return list(kept) if len(told) == len(own) else [*kept, "out"]


def _leaves(node: Any, path: str) -> dict[str, str]:
    if path == "trainer.devices" and isinstance(node, list):
        node = len(node)  # which of them does not matter
    if not isinstance(node, dict):
        return {path: node if isinstance(node, str) else json.dumps(node)}
    children = (_leaves(child, f"{path}.{name}".lstrip(".")) for name, child in node.items())
    return {key: value for child in children for key, value in child.items()}


def _is_echo(
    key: str, values: tuple[str | None, ...], kept: Mapping[str, tuple[str | None, ...]]
) -> bool:
    last = key.rpartition(".")[2]
    return any(values == other and name.rpartition(".")[2] == last for name, other in kept.items())
