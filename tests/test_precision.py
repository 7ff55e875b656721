import pytest
import torch

from mil_anchor.precision import check_bf16, running_in


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize(("precision", "dtype"), [("float32", "float32"), ("bf16", "bfloat16")])
def test_running_in__any_autocast_around__has_its_own_precision(around, precision, dtype):
    values = torch.randn(3, 3)

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=around),
        running_in(precision, "cpu"),
    ):
        product = values @ values

    assert product.dtype == getattr(torch, dtype)


def test_check_bf16__device_that_has_none__is_named():
    with pytest.raises(RuntimeError, match=r"computes in bfloat16 itself.*but this meta does not"):
        check_bf16(torch.device("meta"))


@pytest.mark.parametrize("instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_check_bf16__processor_with_either_set_of_instructions__is_accepted(
    monkeypatch, instructions
):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)

    check_bf16(torch.device("cpu"))

    monkeypatch.setattr(torch.cpu, instructions, lambda: False)
    with pytest.raises(RuntimeError, match="this cpu does not"):
        check_bf16(torch.device("cpu"))
