"""pytest -m gpu tests/test_gpu_kernels.py — the kernels of look-ups, bytes and 2:4 on a real GPU: fresh random inputs, poisoned memory, an fp64 reference."""

import time

import pytest
import torch

pytest.importorskip("triton")
from test_a8_kernels import random_fp8, random_int
from test_lut_kernels import random_lut, random_trellis
from test_sparse_kernels import gaussian, integers, mask
from tiny import save_tiny

import compress
from compress import hadamard
from compress.formats import Dense, Kronecker, Sparse24, Transformed
from compress.kernels import (
    activations,
    cublas_a8,
    cusparselt,
    dispatch,
    reference,
    triton_a8,
    triton_lut,
    triton_quantize,
    triton_rotated,
    triton_sparse24,
    triton_transform,
    triton_trellis,
    tune,
)
from compress.kernels.activations import Rounded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE, BF16 = "cuda", torch.bfloat16
PACKED = ("triton-fragment", "triton-a8")
ROWS = (1, 2, 3, 16, 17, 64, 65, 2048)


def sparse(N, K, int4):
    return Sparse24.pack(mask(N, K), integers(N, K // 2, 128) if int4 else Dense(gaussian(N, K // 2, dtype=BF16)), 2, 4)


CASES = {  # kernel, format; odd shapes where the format allows them
    **{f"lut{bits}": (triton_lut, lambda bits=bits: random_lut(1001, 3001, bits)) for bits in (1, 2, 3)},
    "trellis": (triton_trellis, lambda: random_trellis(4096, 999, 12, 128)), "2:4 bf16": (triton_sparse24, lambda: sparse(1001, 3004, False)),
    "2:4 int4": (triton_sparse24, lambda: sparse(1001, 4096, True)), "cusparselt": (cusparselt, lambda: sparse(1024, 4096, False)),
    "w8a8": (triton_a8, lambda: Rounded(random_int(1001, 3001, 8), "int8")), "w4a8": (triton_a8, lambda: Rounded(random_int(1001, 4096, 4, 128), "int8")),
    "fp8": (triton_a8, lambda: Rounded(random_fp8(1001, 3008), "fp8")), "cublas int8": (cublas_a8, lambda: Rounded(random_int(1024, 4096, 8), "int8")),
    "cublas fp8": (cublas_a8, lambda: Rounded(random_fp8(1024, 4096), "fp8")),
}  # fmt: skip


def poison():
    """What torch.empty gives next is NaN, in small blocks and large ones."""
    held = [torch.full((size,), float("nan"), device="cuda") for size in (2**10, 2**14, 2**18, 2**22) for _ in range(32)]
    del held


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_rows(name):
    kernel, make = CASES[name]
    format = make()
    prepared, seed = kernel.prepare(format, BF16), time.time_ns() % 2**31
    leaf = format.inner if isinstance(format, Rounded) else format
    W = leaf.dequantize().double()
    for M in ROWS:
        x, bias = gaussian(M, format.shape[1], seed=seed + M, dtype=BF16), gaussian(format.shape[0], seed=seed, dtype=BF16)
        if kernel.supports(format, x):
            assert M <= 16 and kernel is cublas_a8
            continue
        exact = activations.dequantize(*activations.quantize(x, format.grid), torch.float32).double() if isinstance(format, Rounded) else x.double()
        exact = exact @ W.T + bias.double()
        poison()
        y = kernel.matmul(x, prepared, bias)
        assert ((y.double() - exact).norm() / exact.norm()).item() < (2**-7 if name == "trellis" else 2**-8), (M, seed)
        assert all(torch.equal(y, kernel.matmul(x, prepared, bias)) for _ in range(100 if M < 65 else 3)), M


def test_in_a_cuda_graph():
    for name in ("lut3", "trellis", "2:4 int4", "w4a8"):
        kernel, make = CASES[name]
        format = make()
        prepared, x = kernel.prepare(format, BF16), gaussian(4, format.shape[1], dtype=BF16)
        eager, graph = kernel.matmul(x, prepared, None), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernel.matmul(x, prepared, None)
        poison()
        for _ in range(3):
            graph.replay()
            assert torch.equal(y, eager), name


def test_transform_of_real_widths():
    for n in (4096, 14336, 28672):
        T = triton_transform.prepared(Kronecker.hadamard(n, 1).to("cuda"), BF16)
        for M in ROWS:
            x = gaussian(M, n, seed=M, dtype=BF16)
            exact = hadamard.transform(x.double(), hadamard.signs(n, 1, "cuda").double())
            poison()
            assert ((triton_transform.matmul(x, T).double() - exact).norm() / exact.norm()).item() < 2**-6
            codes, scales = triton_transform.quantized(x, T, "int8")
            assert ((codes.double() * scales - exact).norm() / exact.norm()).item() < 0.03


@pytest.mark.parametrize("grid", ["int8", "fp8"])
def test_a_rotated_weight(grid):
    for n in (4096, 28672):
        T, weight = Kronecker.hadamard(n, 3).to("cuda"), random_int(1001, n, 8) if grid == "int8" else random_fp8(1001, n)
        format, bias = Rounded(Transformed(weight, T), grid), gaussian(1001, seed=1, dtype=BF16)
        prepared, W = triton_rotated.prepare(format, BF16), weight.dequantize().double()
        for M in ROWS:
            x = gaussian(M, n, seed=M, dtype=BF16)
            assert triton_rotated.supports(format, x) is None
            codes, scales = triton_transform.quantized(x, prepared.transform, grid)
            exact = codes.double() * scales.double() @ W.T + bias.double()
            poison()
            y = triton_rotated.matmul(x, prepared, bias)
            assert ((y.double() - exact).norm() / exact.norm()).item() < 2**-8, M
            assert ((exact - reference.matmul(x, format, bias, torch.float64)).norm() / exact.norm()).item() < 0.05, M


def test_activations_are_rounded_to_the_same_bits_as_on_a_cpu():
    for grid in ("int8", "int4", "fp8"):
        x = gaussian(300, 4096, dtype=BF16)
        here = triton_quantize.quantize(x, grid), activations.quantize(x, grid)
        there = activations.quantize(x.cpu(), grid)
        for codes, scales in here:
            assert torch.equal(scales.cpu(), there[1]) and torch.equal(codes.cpu().view(torch.uint8), there[0].view(torch.uint8)), grid


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"activations": "int8"}], ids=["plain", "fused", "int8"])
def test_compiled_decoding_replays_cuda_graphs_of_packed_routes(options, tmp_path, monkeypatch):
    """load(compile=True): a static cache, the decoding step by Inductor, mode reduce-overhead."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "SMALL", 0)
    monkeypatch.setattr(tune, "race", lambda runs, device, seconds=0.2, twins=None: {name: 1.0 if name in PACKED else 100.0 for name in runs})
    save_tiny("llama", tmp_path / "model")
    step = {"method": "rtn", "bits": 8, "group_size": -1, "sym": True} if options.get("activations") else {"method": "rtn", "bits": 4, "group_size": 32}
    compress.run(str(tmp_path / "model"), {"name": "w", "steps": [step]}, output=tmp_path / "w", show=False)
    ids, more = torch.arange(1, 9, device=DEVICE)[None], dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    load = lambda compile: compress.load(str(tmp_path / "w"), dtype=BF16, device=DEVICE, compile=compile, **options)
    eager, model = load(False).generate(ids, **more), load(True)
    routes = {held[0].name for m in model.modules() for key, held in getattr(m, "cache", {}).items() if len(key) == 4}
    assert options.get("fuse") or routes <= set(PACKED), routes
    first, again = model.generate(ids, **more), model.generate(ids, **more)
    assert torch.equal(first.sequences, again.sequences) and all(torch.equal(a, b) for a, b in zip(first.logits, again.logits))
    for a, b in list(zip(first.logits, eager.logits))[:2]:  # later a near tie may send them different ways
        assert ((a - b).norm() / b.norm()).item() < 0.05
