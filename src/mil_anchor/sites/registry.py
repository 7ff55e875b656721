"""The registry: which model classes keep their attention where; names only, nothing is imported."""

from operator import attrgetter

from torch import nn

from mil_anchor.sites.base import Site
from mil_anchor.sites.known import KNOWN_MODELS
from mil_anchor.sites.score import AttentionSite

_REGISTRY: dict[str, list[tuple[Site, str]]] = {}


def register_site(name: str, site: Site | str, *, when: str = "") -> None:
    """Make the attention of a model class known; nothing is imported.

    Args:
        name: The class as ``"package.module.Class"``; subclasses inherit the site. A bare
            ``"Class"`` means every class of that name that has the submodules which the site names,
            for code that is copied from project to project.
        site: Its attention, with paths seen from the model; a string is a path.
        when: ``"attribute=value"`` of the model for which the site holds; empty: always. Of several
            sites of one name the one registered last is asked first.

    Raises:
        TypeError: The site is neither a site nor a path.
        ValueError: The name is empty.
    """
    if not name:
        raise ValueError("A class must have a name, such as 'package.module.Class', but got ''.")
    site = as_site(site)
    _REGISTRY.setdefault(name, []).insert(0, (site, when))


def known_site(model: nn.Module) -> tuple[Site | None, bool]:
    """The site of a registered model, which may sit anywhere inside this module.

    Returns:
        The site, None if it is unknown, and whether it is certain: a class that is registered with
        its package is, and goes before one that only has a known name. Several of the latter tell
        nothing.

    Raises:
        ValueError: Several submodules are of classes that are registered with their package.
    """
    certain: dict[str, Site] = {}
    guessed: dict[str, Site] = {}
    for prefix, module in model.named_modules():
        # A part of a model that is found itself is no second model.
        if any(prefix.startswith(f"{outer}.") or outer == "" for outer in (*certain, *guessed)):
            continue
        name, site = _lookup(module)
        if site is not None:
            (certain if "." in name else guessed)[prefix] = site.within(prefix)
    if len(certain) > 1:
        lines = [f"AnchorCallback({site})" for site in certain.values()]
        raise ValueError(
            f"One attention block must be meant, but {type(model).__name__} holds several known "
            f"models. Name one: {' or '.join(lines)}."
        )
    sites = list((certain or guessed).values())
    return sites[0] if len(sites) == 1 else None, bool(certain)


def find_site(model: nn.Module) -> Site:
    """The attention site of a registered model, which may sit anywhere inside this module.

    Returns:
        The site with paths seen from ``model``.

    Raises:
        ValueError: No submodule is of a registered class, or several are.
    """
    site, _ = known_site(model)
    if site is None:
        raise ValueError(
            f"The attention block of {type(model).__name__} must be known, but no part of it is of "
            "a registered class. Name the submodule that returns the raw scores, as in "
            "AnchorCallback('attention'), or register_site(...); a fit or `python -m mil_anchor "
            f"inspect` can look for it. Submodules: {likely_blocks(model)}."
        )
    return site


def as_site(site: object) -> Site:
    """A user's site: a string is a path.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(site, str):
        return AttentionSite(site)
    if not isinstance(site, Site):
        raise TypeError(
            "A site must be a path, such as 'net.attention', or a Site, such as "
            f"AttentionSite('net.attention', layout='b n r'), but got {site!r}."
        )
    return site


def likely_blocks(model: nn.Module) -> str:
    """Submodules with parameters, those first whose names speak of attention."""
    paths = [
        path
        for path, module in model.named_modules()
        if path and any(True for _ in module.parameters())
    ]
    likely = [
        path
        for path in paths
        if any(hint in path.lower() for hint in ("att", "pool", "score", "gate"))
    ]
    return ", ".join((likely or paths)[:20]) or "none with parameters"


def _lookup(module: nn.Module) -> tuple[str, Site | None]:
    """The name under which a module's class is registered, and its site."""
    for cls in type(module).__mro__:
        for name in (f"{cls.__module__}.{cls.__qualname__}", cls.__name__):
            for site, when in _REGISTRY.get(name, []):
                copied = "." not in name
                if _holds(module, when) and (not copied or site.exists_in(module)):
                    return name, site
    return "", None


def _holds(module: nn.Module, when: str) -> bool:
    attribute, _, value = when.partition("=")
    try:
        return not when or str(attrgetter(attribute)(module)) == value
    except AttributeError:
        return False


for _known in reversed(KNOWN_MODELS):
    register_site(_known.name, _known.site, when=_known.when)
