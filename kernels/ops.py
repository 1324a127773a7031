"""Kernels as PyTorch ops: `torch.ops.compress.NAME`, which torch.compile keeps whole and CUDA graphs capture.

An op is three things: a schema, a `fake` that gives the outputs' shapes and dtypes and touches no data, and one function per device. A kernel
file defines its op at its bottom, once, at import,

    op = ops.define("frag_matmul", "(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int bits) -> Tensor", fake, CPU=matmul, CUDA=matmul)

and calls op(x, prepared.weight, …) in its `matmul`. Rules, which `torch.library.opcheck` tests: every tensor is an argument and every other
argument an int, float, bool or str; what is written to says so in the schema (`Tensor(a!) workspace`); the result shares no memory with an
argument; no .item(), no Python state that changes the result. There is no backward: dispatch sends tensors that need one another way. A call
costs some 3 µs more than the Python function, a third of what torch.library.custom_op asks.
"""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("compress", "FRAGMENT")  # its ops live as long as this object


def define(name: str, schema: str, fake: Callable, **devices: Callable) -> Callable:
    """The op `compress::name`. devices: dispatch key (CPU, CUDA, or CompositeExplicitAutograd for every device without its own) → implementation."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"compress::{name}", fake, lib=LIBRARY)
    for key, function in devices.items():
        LIBRARY.impl(name, function, key)
    return getattr(torch.ops.compress, name).default
