"""Writers of small feature stores, byte for byte in the layouts of the programs that make them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

WIDTH = 8
TILE = 256


def features_of(slide_id: str, n_instances: int = 5, *, width: int = WIDTH) -> np.ndarray:
    """Features that depend on the slide's id, exact in float16."""
    generator = np.random.default_rng(list(slide_id.encode()))
    return generator.integers(-1000, 1000, (n_instances, width)).astype(np.float32) / 64


def grid(n_instances: int, *, step: float = TILE, columns: int = 3) -> np.ndarray:
    """Corners of tiles on a grid, row by row."""
    index = np.arange(n_instances)
    return np.stack([1000 + step * (index % columns), 2000 + step * (index // columns)], axis=1)


def write_hdf5(
    path: Path,
    entries: dict[str, Any],
    *,
    chunk_rows: int | None = None,
    coords_attributes: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
) -> Path:
    """An HDF5 file; ``None`` among the attributes is stored as the string, as TRIDENT does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in entries.items():
            array = np.asarray(value)
            chunks = (chunk_rows, *array.shape[1:]) if chunk_rows and array.ndim > 1 else None
            if chunks is not None and len(array) == 0:
                chunks = None
            maximum = (None, *array.shape[1:]) if chunks else None
            file.create_dataset(name, data=array, chunks=chunks, maxshape=maximum)
        for name, value in (coords_attributes or {}).items():
            file["coords"].attrs[name] = "None" if value is None else value
        for name, value in (attributes or {}).items():
            file.attrs[name] = value
    return path


def write_clam_h5(root: Path, slide_id: str, n_instances: int = 5) -> Path:
    """``h5_files`` of CLAM: float32 features in chunks of 32 rows, int32 corners."""
    entries = {
        "features": features_of(slide_id, n_instances),
        "coords": grid(n_instances).astype(np.int32),
    }
    return write_hdf5(root / "h5_files" / f"{slide_id}.h5", entries, chunk_rows=32)


def write_clam_pt(root: Path, slide_id: str, n_instances: int = 5) -> Path:
    """``pt_files`` of CLAM: a bare tensor."""
    path = root / "pt_files" / f"{slide_id}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(features_of(slide_id, n_instances)), path)
    return path


def write_clam_patches(root: Path, slide_id: str, n_instances: int = 5) -> Path:
    """``patches`` of CLAM: coordinates whose attributes hold a pair of downsample factors."""
    return write_hdf5(
        root / "patches" / f"{slide_id}.h5",
        {"coords": grid(n_instances, step=512)},
        coords_attributes={
            "patch_size": 256,
            "patch_level": 1,
            "downsample": np.array([2.0, 2.0]),
            "name": slide_id,
        },
    )


def write_trident(
    job: Path,
    slide_id: str,
    n_instances: int = 5,
    *,
    encoder: str = "uni_v1",
    dtype: type = np.float32,
    **attributes: Any,
) -> Path:
    """``features_<encoder>`` of TRIDENT: chunks of one row, attributes on the coordinates."""
    entries = {
        "features": features_of(slide_id, n_instances).astype(dtype),
        "coords": grid(n_instances, step=512).astype(np.int64),
    }
    said = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": slide_id,
        "savetodir": None,
    }
    return write_hdf5(
        job / f"features_{encoder}" / f"{slide_id}.h5",
        entries,
        chunk_rows=1,
        coords_attributes=said | attributes,
    )


def write_trident_patches(job: Path, slide_id: str, n_instances: int = 5) -> Path:
    """``patches`` of TRIDENT."""
    return write_hdf5(
        job / "patches" / f"{slide_id}_patches.h5",
        {"coords": grid(n_instances, step=512).astype(np.int64)},
        coords_attributes={"patch_size": 256, "patch_size_level0": 512, "overlap": 0},
    )


def write_trident_slide_embedding(job: Path, slide_id: str) -> Path:
    """``slide_features_<encoder>`` of TRIDENT: one vector per slide."""
    return write_hdf5(
        job / "slide_features_titan" / f"{slide_id}.h5", {"features": features_of(slide_id)[0]}
    )


def write_uni2(root: Path, slide_id: str, n_instances: int = 5) -> Path:
    """The published UNI2-h features: a leading axis of length 1."""
    entries = {
        "features": features_of(slide_id, n_instances)[None],
        "coords": grid(n_instances)[None],
    }
    return write_hdf5(root / f"{slide_id}.h5", entries)


def write_acmil(path: Path, slides: dict[str, int], *, label: int = 3) -> Path:
    """The single file of ACMIL, AEM and ASMIL: contiguous float16, one group per slide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for slide_id, n_instances in slides.items():
            group = file.create_group(slide_id)
            group["feat"] = features_of(slide_id, n_instances).astype(np.float16)
            group["coords"] = grid(n_instances).astype(np.int32)
            group.attrs["label"] = label
    return path


def write_stamp(
    root: Path, slide_id: str, n_instances: int = 5, *, unit: str | None = "um"
) -> Path:
    """STAMP: float16 ``feats``, coordinates in micrometres, the unit on the file."""
    entries = {
        "feats": features_of(slide_id, n_instances).astype(np.float16),
        "coords": grid(n_instances, step=256.0),
    }
    attributes = {"tile_size_um": 256.0, "tile_size_px": 224, "extractor": "uni"}
    return write_hdf5(
        root / f"{slide_id}.h5",
        entries,
        attributes=attributes | ({} if unit is None else {"unit": unit}),
    )


def write_torchmil(root: Path, slide_id: str, n_instances: int = 5, *, label: int = 1) -> Path:
    """The parallel folders of torchmil; returns the file of features."""
    arrays = {
        "features": features_of(slide_id, n_instances),
        "labels": np.array([label]),
        "coords": grid(n_instances),
        "inst_labels": np.arange(n_instances)[:, None] % 2,
    }
    for name, array in arrays.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        np.save(root / name / f"{slide_id}.npy", array)
    (root / "splits.csv").write_text("bag_name,split\n")
    return root / "features" / f"{slide_id}.npy"


def write_torchmil_h5(root: Path, slide_id: str, n_instances: int = 5, *, label: int = 1) -> Path:
    """The HDF5 variant of torchmil with all arrays in one file."""
    entries = {
        "features": features_of(slide_id, n_instances),
        "labels": np.array([label]),
        "inst_labels": np.arange(n_instances) % 2,
        "coords": grid(n_instances),
    }
    return write_hdf5(root / f"{slide_id}.h5", entries)


def write_torchmil_h5_folders(root: Path, slide_id: str, n_instances: int = 5) -> Path:
    """The HDF5 variant of torchmil with one file per array; returns the file of features."""
    write_hdf5(root / "labels" / f"{slide_id}.h5", {"labels": np.array([1])})
    write_hdf5(root / "coords" / f"{slide_id}.h5", {"coords": grid(n_instances)})
    write_hdf5(root / "inst_labels" / f"{slide_id}.h5", {"inst_labels": np.arange(n_instances) % 2})
    features = {"features": features_of(slide_id, n_instances)}
    return write_hdf5(root / "features" / f"{slide_id}.h5", features)


def write_slideflow(root: Path, slide_id: str, n_instances: int = 5) -> Path:
    """Bags of slideflow: a tensor, and beside it the centres of its tiles."""
    root.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(features_of(slide_id, n_instances)), root / f"{slide_id}.pt")
    np.savez(root / f"{slide_id}.index.npz", grid(n_instances) + TILE // 2)
    return root / f"{slide_id}.pt"


# Writers that put slides into a folder which `open_store` takes as it is.
WRITERS: dict[str, Callable[[Path, str, int], Path]] = {
    "clam_h5": write_clam_h5,
    "clam_pt": write_clam_pt,
    "trident": write_trident,
    "trident_f16": lambda root, slide, n: write_trident(root, slide, n, dtype=np.float16),
    "uni2": write_uni2,
    "stamp": write_stamp,
    "torchmil": write_torchmil,
    "torchmil_h5": write_torchmil_h5,
    "torchmil_h5_folders": write_torchmil_h5_folders,
    "slideflow": write_slideflow,
}
