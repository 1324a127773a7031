"""Other people's kernels for the same codes, for the benchmark alone: what is not installed is left out, what fails at a shape is a note.

    tinygemm      torch's int4 kernel for CUDA                         int4 g128 asym: w = (q − 8)·s + t
    _scaled_mm    cuBLAS fp8, rowwise scales, input rounded here       fp8 A8
    _int_mm       cuBLAS int8, more than 16 rows, input rounded here   W8A8
    cuSPARSELt    2:4 in bf16                                          2:4 bf16
    gemlite       Triton, 1 and 16 rows of the smallest shape          int4 g128 asym, int2 g64 asym, int8 channel
    bitsandbytes  NF4 in blocks of 64; it quantizes the matrix itself  nf4 g64
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ..formats import Format, IntGroup
from .activations import quantize

Run = Callable[[Tensor], Tensor]


def _tinygemm(format: IntGroup) -> Run:
    q, s = format.unpack(), format.scales
    w = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    pairs = torch.stack([s, ((8 - format.zero_points()) * s).to(s.dtype)], -1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, w, format.group_size, pairs)


def _scaled_mm(format) -> Run:
    w, scales = format.codes.view(torch.float8_e4m3fn).t(), format.scales.float().view(1, -1)

    def run(x: Tensor) -> Tensor:
        codes, s = quantize(x, "fp8")
        return torch._scaled_mm(codes, w, s, scales, out_dtype=x.dtype)

    return run


def _int_mm(format: IntGroup) -> Run:
    w, scales = (format.unpack().short() - 128).to(torch.int8).t(), format.scales.float().view(1, -1)

    def run(x: Tensor) -> Tensor:
        codes, s = quantize(x, "int8")
        return (torch._int_mm(codes, w) * s * scales).to(x.dtype)

    return run


def _cusparselt(format: Format) -> Run:
    w = torch._cslt_compress(format.dequantize(torch.bfloat16))
    return lambda x: torch._cslt_sparse_mm(w, x.t()).t()


def _gemlite(format: IntGroup) -> Run:
    from gemlite import DType, GemLiteLinear

    (out, n), one = format.shape, DType.BF16
    layer = GemLiteLinear(format.bits_per_code, group_size=format.group_size, in_features=n, out_features=out, input_dtype=one, output_dtype=one)
    layer.pack(format.unpack(), format.scales, format.zero_points().to(format.scales.dtype), None)

    def run(x: Tensor) -> Tensor:
        if len(x) not in (1, 16) or out * n > 2**24:
            raise LookupError("its tuner takes half a minute a shape and number of rows: it is asked for 1 and 16 rows of 16M weights")
        return layer(x)

    return run


def _bitsandbytes(format: Format) -> Run:
    import bitsandbytes as bnb

    w, state = bnb.functional.quantize_4bit(format.dequantize(torch.bfloat16), blocksize=64, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, w.t(), quant_state=state)


PEERS: dict[str, dict[str, Callable]] = {
    "int4 g128 asym": {"tinygemm": _tinygemm, "gemlite": _gemlite}, "int2 g64 asym": {"gemlite": _gemlite}, "int8 channel": {"gemlite": _gemlite},
    "fp8 A8": {"_scaled_mm": _scaled_mm}, "W8A8": {"_int_mm": _int_mm}, "2:4 bf16": {"cuSPARSELt": _cusparselt}, "nf4 g64": {"bitsandbytes": _bitsandbytes},
}  # fmt: skip


def installed(name: str, format: Format, copies: int, notes: list[str]) -> dict[str, list[Run]]:
    """The peers of a format that are here, each on that many copies of the weight; why others are not goes to `notes`."""
    found = {}
    for peer, make in PEERS.get(name, {}).items():
        try:
            found[peer] = [make(format) for _ in range(copies)]
        except Exception as error:  # other people's code: whatever it raises is a note
            notes.append(f"{name} {peer}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in ("triton", "gemlite", "bitsandbytes", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
