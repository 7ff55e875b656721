"""What numbers an anchor computes with."""

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("float32", "bf16")


def running_in(precision: str, device_type: str) -> AbstractContextManager[object]:
    """The context in which a block of float32 runs in one of ``PRECISIONS``, whatever is around."""
    if precision == "bf16":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    # Leaving autocast costs as much as a small kernel: only where it is on.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def check_bf16(device: torch.device) -> None:
    """Raise a RuntimeError unless the device computes in bfloat16 itself.

    Elsewhere it is emulated: right, and slower than float32.
    """
    if not _has_bf16(device):
        raise RuntimeError(
            "precision='bf16' needs a device that computes in bfloat16 itself (a processor with "
            "AVX512-BF16 or AMX, a GPU from NVIDIA's Ampere on), but this "
            f"{torch.device(device).type} does not. Use 'float32'."
        )


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
