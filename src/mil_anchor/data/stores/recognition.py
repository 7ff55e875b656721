"""Which layout a folder or file of features has."""

from collections.abc import Iterable
from pathlib import Path

import h5py  # type: ignore[import-untyped]

from mil_anchor.data.stores.base import Store
from mil_anchor.data.stores.grouped import GroupedStore
from mil_anchor.data.stores.hdf5 import Hdf5Store, contents
from mil_anchor.data.stores.packed import PackedStore, is_packed
from mil_anchor.data.stores.tensors import TensorStore
from mil_anchor.data.stores.torchmil import TorchmilStore

_HDF5 = (".h5", ".hdf5")
_TORCH = (".pt", ".pth")
_NUMPY = (".npy",)


def open_store(path: str | Path) -> Store:
    """Open the features of a cohort, whatever program extracted them.

    It knows, by what the files hold: CLAM (``h5_files`` and ``pt_files``), TRIDENT
    (``features_<encoder>``, or the folder above it), UNI2-h, STAMP, slideflow, torchmil, the single
    file of ACMIL, AEM and ASMIL, and our repacked file. Sub-folders are searched, as the official
    folders of BRACS need. A slide's id is the stem of its file.

    Args:
        path: The folder or file.

    Returns:
        The store. Nothing but the names and the kind of the files has been read.

    Raises:
        ValueError: If there is nothing at the path, several stores, or something else than features
            of tiles, or if a slide has several files.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(
            f"A store must be a folder or file, but {path} does not exist. Check the path."
        )
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> Store:
    if not h5py.is_hdf5(path):
        raise ValueError(
            f"A store in one file must be HDF5, but {path} is not, or is cut off. Give the HDF5 "
            "file, or the folder of a store with one file per slide."
        )
    kind = contents(path)
    if is_packed(path):
        return PackedStore(path)
    if kind == "groups":
        return GroupedStore(path)
    if kind == "bag":
        raise ValueError(
            f"A store must hold many slides, but {path} holds one. Give its folder, {path.parent}."
        )
    raise _no_features(path, kind)


def _open_folder(path: Path) -> Store:
    hdf5, torch_files = path / "h5_files", path / "pt_files"
    if hdf5.is_dir() or torch_files.is_dir():
        return _open_clam(hdf5, torch_files)
    # The parallel folders of torchmil, given by their parent or as the features alone.
    for folder in (path / "features", path):
        arrays = _direct(folder, _NUMPY) or (
            _direct(folder, _HDF5) if _has_parallel_folders(folder) else []
        )
        if arrays:
            return TorchmilStore(path, _by_slide(arrays, path))
    if not _direct(path, _HDF5 + _TORCH):
        encoders = sorted(found for found in path.rglob("features_*") if found.is_dir())
        if len(encoders) > 1:
            raise ValueError(
                f"A store must hold the features of one encoder, but {path} holds "
                f"{[str(found.relative_to(path)) for found in encoders]}. Give one of them."
            )
        if encoders:
            return _open_folder(encoders[0])
    return _open_files(path)


def _open_clam(hdf5: Path, torch_files: Path) -> Store:
    """Prefer HDF5, which has coordinates, unless it lacks slides."""
    slides = _by_slide(_below(hdf5, _HDF5), hdf5)
    tensors = _by_slide(_below(torch_files, _TORCH), torch_files)
    if not slides and not tensors:
        raise ValueError(
            f"A CLAM store must hold features, but {hdf5} and {torch_files} hold none. "
            "Extract the features first."
        )
    if len(slides) >= len(tensors):
        return Hdf5Store(hdf5, slides)
    return TensorStore(torch_files, tensors)


def _open_files(path: Path) -> Store:
    hdf5, tensors, arrays = (_below(path, suffixes) for suffixes in (_HDF5, _TORCH, _NUMPY))
    if not hdf5 and not tensors and not arrays:
        found = sorted({file.suffix for file in path.rglob("*") if file.is_file()})
        raise ValueError(
            f"A store must hold .h5, .pt or .npy files, but {path} holds "
            f"{f'files of kind {found[:10]}' if found else 'no files'}. "
            "Give the folder that the features were extracted to."
        )
    if not hdf5:
        if not tensors:
            return TorchmilStore(path, _by_slide(arrays, path))
        return TensorStore(path, _by_slide(tensors, path))
    # Patches are coordinates only, under the names of the slides.
    hdf5 = [file for file in hdf5 if "patches" not in file.relative_to(path).parts[:-1]] or hdf5
    known, kind = _first_known(hdf5)
    if kind == "groups":
        if len(hdf5) == 1:
            return _open_file(known)
        raise ValueError(
            f"A store must be one file of many slides or many files of one slide, but {path} holds "
            f"{known.name}, a file of many slides, and {len(hdf5) - 1} other HDF5 files. "
            "Give the file itself."
        )
    if kind == "bag" and not known.parent.name.startswith("slide_features_"):
        return Hdf5Store(path, _by_slide(hdf5, path))
    if kind == "coords" and tensors:
        return TensorStore(path, _by_slide(tensors, path))
    raise _no_features(known, "slide embedding" if kind == "bag" else kind)


def _first_known(files: list[Path]) -> tuple[Path, str]:
    """The first file that says what the folder is: a broken one does not."""
    failure: ValueError | None = None
    for file in files:
        try:
            kind = contents(file)
            if is_packed(file):
                kind = "groups"
        except ValueError as error:
            failure = failure or error
        else:
            if kind != "unknown":
                return file, kind
    if failure is not None:
        raise failure
    return files[0], "unknown"


def _has_parallel_folders(features: Path) -> bool:
    siblings = (features.parent / name for name in ("labels", "inst_labels", "coords"))
    return features.name == "features" and any(sibling.is_dir() for sibling in siblings)


def _direct(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return _of_kind(folder.glob("*"), suffixes)


def _below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return _of_kind(folder.rglob("*"), suffixes)


def _of_kind(files: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    # Names that start with a dot are the system's own: macOS leaves a ._<slide>.h5 on shares.
    return sorted(
        file for file in files if file.suffix.lower() in suffixes and not file.name.startswith(".")
    )


def _by_slide(files: list[Path], root: Path) -> dict[str, Path]:
    """File of every slide; ids contain dots, so only one suffix is cut."""
    files_of: dict[str, list[Path]] = {}
    for file in files:
        files_of.setdefault(file.stem, []).append(file)
    several = {slide: found for slide, found in files_of.items() if len(found) > 1}
    if several:
        shown = "; ".join(
            f"{slide!r}: {[str(file.relative_to(root)) for file in found]}"
            for slide, found in list(several.items())[:10]
        )
        raise ValueError(
            f"Every slide must have one file, but {len(several)} in {root} have several: {shown}. "
            "Give the folder of one encoder and magnification, or remove copies."
        )
    return {slide: found[0] for slide, found in files_of.items()}


def _no_features(path: Path, kind: str) -> ValueError:
    found, advice = {
        "coords": ("the coordinates of tiles without features", "Give the features' folder"),
        "slide embedding": ("one embedding per slide", "Give the features of tiles instead"),
    }.get(kind, ("no features that we know", "Extract features first"))
    return ValueError(
        f"A store must hold features of tiles, but {path} holds {found}. {advice}, such as "
        "h5_files of CLAM or features_<encoder> of TRIDENT."
    )
