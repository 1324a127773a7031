"""pytest tests/test_floats.py — 8- and 4-bit floats in scaled blocks (FP8, MXFP4, NVFP4), algorithms.md §35-36."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_methods import weight

from compress.errors import CompressError
from compress.formats import FloatBlock, build
from compress.formats.float_block import E2M1
from compress.kernels import dispatch, reference
from compress.methods import FP, RTN
from compress.methods.fp import nearest

BF16 = torch.bfloat16
KINDS = [FP(), FP(scale="tensor"), FP(scale="block"), FP("mxfp4"), FP("mxfp4", search=False), FP("nvfp4"), FP("nvfp4", search=False)]


def slow(fmt: FloatBlock) -> torch.Tensor:
    """One weight after the other, from the bits of its code and its scale (fp64)."""
    def small(code: int, exponent: int, mantissa: int, bias: int) -> float:
        e, m = code >> mantissa & 2**exponent - 1, code & 2**mantissa - 1
        value = m / 2**mantissa * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**mantissa) * 2.0 ** (e - bias)
        return -value if code >> exponent + mantissa else value
    (out, n), (rows, columns), q = fmt.shape, fmt.block, fmt.unpack().tolist()
    s = [[2.0 ** (v - 127) if fmt.name == "mxfp4" else v if fmt.divisor is None else small(v, 4, 3, 7) / float(fmt.divisor) for v in row]
         for row in fmt.scales.tolist()]  # fmt: skip
    bits = (4, 3, 7) if fmt.name == "fp8" else (2, 1, 1)
    return torch.tensor([[small(q[i][j], *bits) * s[i // rows][j // columns] for j in range(n)] for i in range(out)], dtype=torch.float64)


@pytest.mark.parametrize("method", KINDS, ids=str)
def test_the_format_is_what_its_bits_say(method, tmp_path):
    W = weight(m=130, n=160)
    fmt = method(W, None, stored=BF16)
    torch.testing.assert_close(fmt.dequantize().double(), slow(fmt), rtol=1e-7, atol=0)
    planned = method.planned(tuple(W.shape), BF16, "w")
    assert planned.nbytes() == fmt.nbytes() and planned.describe() == fmt.describe() and planned.shape == fmt.shape == (130, 160)
    save_file(fmt.tensors(), tmp_path / "w.safetensors")
    again = build(json.loads(json.dumps(fmt.meta())), load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.dequantize(), fmt.dequantize()) and again.describe() == fmt.describe()
    x = torch.randn(3, 160)
    torch.testing.assert_close(dispatch.matmul(x, fmt, None, {}), reference.matmul(x, fmt), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", KINDS, ids=str)
def test_every_code_is_the_nearest_and_rounding_again_changes_nothing(method):
    W = weight(m=64, n=128)
    fmt = method(W, None, stored=torch.float32)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() if method.type == "fp8" else torch.tensor([*E2M1, *(-v for v in E2M1)])
    grid = grid[grid.isfinite()]
    rows, columns = fmt.block
    s = fmt.factors().repeat_interleave(rows, 0)[:64].repeat_interleave(columns, 1)[:, :128]
    best = (grid * s[..., None] - W[..., None]).abs().amin(-1)
    torch.testing.assert_close((fmt.dequantize() - W).abs(), best, rtol=1e-4, atol=1e-7)
    assert torch.equal(method(W, None, stored=torch.float32).codes, fmt.codes)


def test_ties_go_to_the_even_code_and_zero_blocks_stay_zero():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.75])
    assert nearest(x).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 10]
    for method in KINDS:
        assert not method(torch.zeros(4, 32), None, stored=BF16).dequantize().any()


def test_the_search_pays_and_the_divisor_is_shared():
    W = 0.02 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = lambda m: float((m(W, None, stored=BF16).dequantize() - W).square().sum() / W.square().sum())
    assert error(FP("nvfp4")) < 0.9 * error(FP("nvfp4", search=False)) and error(FP("mxfp4")) < error(FP("mxfp4", search=False))
    assert error(FP("nvfp4")) < error(RTN(group_size=64, sym=True)) and error(FP()) < 1e-3
    assert float(FP("nvfp4")(W, None, stored=BF16).divisor) == float(FP("nvfp4")(3 * W, None, stored=BF16).divisor) == 1024
    assert float(FP("nvfp4")(100 * W, None, stored=BF16).divisor) < 256


def test_widths_that_are_no_whole_blocks():
    with pytest.raises(CompressError, match="in_features 40 is not a multiple of group_size 32"):
        FP("mxfp4").planned((8, 40), BF16, "w")
