"""Verify: is what lies on disk what was compressed? Reads the folder only, in a process that did not write it.

Every tensor and every shard's header is hashed and compared with the manifest (name, dtype, shape, SHA-256, so no byte of a shard can change
unseen), the manifest and the index with what the shards say of themselves; every format is rebuilt and checked for NaN, its bits against the
plan; then the probe tokens run through the model as it lies on disk, block by block, and the logits must be those of the model that was in
memory when the artifact was made.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .artifact import INDEX, MANIFEST, PROBE, Manifest, differences, file_sha256, fingerprint, head_sha256, read_manifest, sha256
from .checkpoint import Checkpoint, Group, read_headers
from .errors import CompressError
from .eval.compare import divergence
from .formats import build
from .hf import prepare
from .linear import CompressedLinear
from .stream import Stream

# Nats a token. On the machine that made it the figure is 0; another's rounding gave 2e-4 in bf16 on four blocks, 2e-6 in fp16. A wrong tensor gives more.
KL_LIMIT = {"bfloat16": 3e-3, "float16": 1e-3, "float32": 1e-3}


@dataclass
class Verification:
    path: str
    tensors: int = 0
    bytes: int = 0
    kl: float | None = None  # mean over the probe's tokens, KL(in memory ‖ from disk)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class ArtifactCheckpoint(Checkpoint):
    """An artifact read like a checkpoint: the same blocks, with CompressedLinear where the manifest says so."""

    def __init__(self, folder: Path, manifest: Manifest, trust_remote_code: bool = False, dtype: torch.dtype | None = None):
        self.manifest = manifest
        super().__init__(str(folder), dtype=dtype or getattr(torch, manifest.run["dtype"]), trust_remote_code=trust_remote_code)

    def _check_config(self) -> None:
        if not self.manifest.plain and getattr(self.config, "quantization_config", {}).get("quant_method") != "compress":
            raise CompressError(f"{self.name}: config.json has no quantization_config of method compress: transformers would not load this artifact")
        if not self.manifest.plain:
            del self.config.quantization_config  # the skeleton is the original's; the formats come from the manifest

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Names on disk are names in the model: nothing is renamed or fused again, but in a plain artifact, which is a checkpoint like any other. What the
        model class does not know is kept, not loaded."""
        if self.manifest.plain:
            return super().groups
        model = copy.deepcopy(self.model)
        prepare(model, self.manifest)
        known = model.state_dict()
        return {name: Group(name, ((name, name),), None) for name, t in self.manifest.tensors.items() if t.shard != PROBE and name in known}

    def load_block(self, i: int, device: torch.device | str = "cpu") -> nn.Module:
        if self.manifest.plain:
            return super().load_block(i, device)
        name = self.block_name(i) + "."
        block = copy.deepcopy(self.model.get_submodule(name[:-1]))
        prepare(block, self.manifest, name)
        self._fill(block, name, self.block_groups(i), device)
        if missing := [n for n, t in block.state_dict().items() if t.is_meta]:
            raise CompressError(f"{self.name}: {name[:-1]} lacks {', '.join(missing)}")
        for module in block.modules():
            if isinstance(module, CompressedLinear):
                module.how = module.how._replace(policy="dense")
        return block.to(device).eval()


def verify(path: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Check an artifact folder; the result lists every problem found. Raises CompressError where there is nothing to check."""
    folder = Path(path)
    manifest = read_manifest(folder)
    result = Verification(str(folder))
    _files(folder, manifest, result)
    if result.ok:
        _formats(folder, manifest, result)
    if result.ok:
        try:
            _probe(folder, manifest, result, trust_remote_code)
        except CompressError as error:
            result.problems.append(str(error))
    return result


def _files(folder: Path, manifest: Manifest, result: Verification) -> None:
    """Every byte of every shard: tensors and headers."""
    headers: dict[str, dict] = {}
    for shard in sorted({t.shard for t in manifest.tensors.values()}):
        expected = {name: t for name, t in manifest.tensors.items() if t.shard == shard}
        try:
            with safe_open(folder / shard, framework="pt") as f:
                found = set(f.keys())
                result.problems += [f"{shard}: {name} is missing" for name in sorted(expected.keys() - found)]
                result.problems += [f"{shard}: {name} is not in the manifest" for name in sorted(found - expected.keys())]
                for name in sorted(found & expected.keys()):
                    tensor, record = f.get_tensor(name), expected[name]
                    result.tensors, result.bytes = result.tensors + 1, result.bytes + tensor.numel() * tensor.element_size()
                    if (dtype := str(tensor.dtype)[6:]) != record.dtype or list(tensor.shape) != record.shape:
                        result.problems.append(f"{name}: {dtype} {list(tensor.shape)} on disk, {record.dtype} {record.shape} in the manifest")
                    elif sha256(tensor) != record.sha256:
                        result.problems.append(f"{name}: its bytes in {shard} are not those that were written (SHA-256 differs)")
                    elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        result.problems.append(f"{name}: holds NaN or Inf")
                if head_sha256(folder / shard) != manifest.shards.get(shard):
                    result.problems.append(f"{shard}: its header is not the one that was written (SHA-256 differs); it holds {_some(expected)}")
                else:
                    headers[shard] = json.loads(f.metadata()["compress"])
        except FileNotFoundError:
            result.problems.append(f"{shard}: missing; it holds {_some(expected)}")
        except (SafetensorError, OSError) as error:
            result.problems.append(f"{shard}: corrupt or truncated ({error}); it holds {_some(expected)}")
    for name, digest in manifest.files.items():
        if not (folder / name).is_file():
            result.problems.append(f"{name}: missing")
        elif file_sha256(folder / name) != digest:
            result.problems.append(f"{name}: not the file that was written (SHA-256 differs)")
    if result.ok:
        _records(folder, manifest, headers, result)


def _records(folder: Path, manifest: Manifest, headers: dict[str, dict], result: Verification) -> None:
    """The manifest and the index that transformers reads, against what the shards say of themselves."""
    weights = {name: t for name, t in manifest.tensors.items() if t.shard != PROBE}
    layers = {name: record for h in headers.values() for name, record in h["layers"].items()}
    stored = sum(torch.Size(t.shape).numel() * getattr(torch, t.dtype).itemsize for t in weights.values())
    found = {"layers": layers, "runs": sorted({h["fingerprint"] for h in headers.values()}),
             "totals": {"bytes": stored, "linear_bytes": sum(r["bytes"] for r in layers.values())}}  # fmt: skip
    listed = {"layers": {name: r.model_dump() for name, r in manifest.layers.items()}, "runs": [fingerprint(manifest.run)],
              "totals": {k: manifest.totals.get(k) for k in found["totals"]}}  # fmt: skip
    result.problems += [f"{MANIFEST} is not what the shards say: {d}" for d in differences(found, listed)]
    try:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        result.problems.append(f"{INDEX}: missing or damaged ({error}): transformers would not find the shards")
    else:
        result.problems += [f"{INDEX} is not what {MANIFEST} says: {d}" for d in differences({n: t.shard for n, t in weights.items()}, index)]


def _some(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more tensors"


def _formats(folder: Path, manifest: Manifest, result: Verification) -> None:
    entries = read_headers(folder)
    for name, record in manifest.layers.items():
        tensors = {}
        for t, place in record.places(name).items():
            if place not in entries:
                result.problems.append(f"{name}: its tensor {t} is on no shard")
                break
            with safe_open(folder / entries[place].file, framework="pt") as f:
                tensors[t] = f.get_tensor(place)
        else:
            weight = build(record.format, tensors)
            nbytes = weight.nbytes() - sum(tensors[t].nbytes for t in record.shared)
            if nbytes != record.bytes or record.bytes != record.planned_bytes:
                result.problems.append(f"{name}: {nbytes} bytes on disk, {record.bytes} in the manifest, {record.planned_bytes} planned")
            if not torch.isfinite(weight.dequantize()).all():
                result.problems.append(f"{name}: dequantizes to NaN or Inf")


def _probe(folder: Path, manifest: Manifest, result: Verification, trust_remote_code: bool) -> None:
    with safe_open(folder / PROBE, framework="pt") as f:
        tokens, expected = f.get_tensor("tokens"), f.get_tensor("logits").double()
    source = ArtifactCheckpoint(folder, manifest, trust_remote_code)
    stream = Stream(source, tokens)
    for i in range(source.num_blocks):
        stream.advance(source.load_block(i))
    logits = next(stream.logits())[:, -expected.shape[1] :].double()
    result.kl = float(divergence(expected.log_softmax(-1), logits.log_softmax(-1)).mean().clamp(min=0))
    if not result.kl <= (limit := KL_LIMIT[manifest.run["dtype"]]):
        result.problems.append(f"the model on disk does not give the logits of the model in memory: KL {result.kl:.3g} nats a token, allowed {limit:g}")

