"""What an export reads and what it promises: an artifact opened for reading, refusals, and the one way to write a Hugging Face folder.

An export never rounds: codes and scales are carried over, or the layer is refused before a byte is written. It sees one shard of the artifact
at a time, checks every tensor against the manifest's SHA-256 as it is read, and spells tensors as checkpoints do (transformers 5 fuses and
renames some when it loads; servers read the names on disk).
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..artifact import INDEX, PROBE, Fallback, read_manifest, sha256, write_json
from ..checkpoint import skeleton
from ..errors import CompressError
from ..experts import fused_experts, spelling, unfuse_experts
from ..formats import Format, IntGroup, build, split_rows
from ..verification import ArtifactCheckpoint

# Linears that servers (vLLM, SGLang) multiply as one matrix, by the name of that matrix: one scheme for all, or they refuse to load.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Refusal:
    """A layer that the other format cannot express, and the nearest recipe that it could."""

    layer: str
    reason: str
    recipe: str


class Layers:
    """The layers of a model and their formats: enough to judge a plan or a manifest before any tensor exists. `Source` adds what lies on disk.

    layers: path → Format on meta, experts by their unfused names; config: the model's, from which its skeleton is built where none is given.
    Raises CompressError where transformers has no class for it.
    """

    model: nn.Module

    def __init__(self, layers: Mapping[str, Format], config: PreTrainedConfig, model: nn.Module | None = None):
        self.layers: Mapping[str, Any] = layers
        self.config, self.name = config, config.model_type
        self.model = skeleton(config, config.dtype or torch.float32) if model is None else model

    def peek(self, layer: str) -> Format:
        """The format of a layer, its codes on meta; of an artifact with its scales and zero points."""
        return self.layers[layer]

    @cached_property
    def model_dtype(self) -> torch.dtype:
        """What config.json says the model computes in; scales are never stored narrower."""
        return self.config.dtype or torch.float32

    @cached_property
    def spelled(self) -> dict[str, tuple[str, ...]]:
        """Tensor of the artifact → tensors of a checkpoint: one, or two where gate and up of an expert are stored apart."""
        return spelling(self.model)

    def spell(self, tensor: str) -> tuple[str, ...]:
        return self.spelled.get(tensor, (tensor,))  # what the model class does not know keeps its name

    def modules(self, layer: str) -> tuple[str, ...]:
        """The linears of a checkpoint that a layer of the artifact is."""
        return tuple(name.removesuffix(".weight") for name in self.spell(f"{layer}.weight"))

    @cached_property
    def transposed(self) -> set[str]:
        """Layers that the model keeps as [in, out]: GPT-2's Conv1D."""
        return {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}

    @cached_property
    def experts(self) -> set[str]:
        """Layers that transformers 5 keeps inside 3-D parameters, one matrix an expert."""
        fused = tuple(f"{name}." for name in fused_experts(self.model))
        return {layer for layer in self.layers if fused and layer.startswith(fused)}

    @cached_property
    def kept(self) -> list[str]:
        """Linears that were not compressed, the head among them, by every name that a loader may use."""
        unfused = copy.deepcopy(self.model)
        unfuse_experts(unfused)
        found = {name for name, m in unfused.named_modules() if isinstance(m, nn.Linear) and name not in self.layers}
        return sorted(found | {m for name in found for m in self.modules(name)})


class Source(Layers, ArtifactCheckpoint):
    """A finished artifact, read for an export."""

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        ArtifactCheckpoint.__init__(self, folder, read_manifest(folder), trust_remote_code)
        self.layers = self.manifest.layers
        # what the result does not carry as asked, for the screen and the model card
        self.notes: list[Fallback] = []  # type: ignore[assignment]

    @cached_property
    def model_dtype(self) -> torch.dtype:
        raw = self.config_json()  # not self.config: building a skeleton in another dtype writes that one there
        return getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or str(self.stored_dtype)[6:])

    def config_json(self) -> dict:
        return {k: v for k, v in json.loads((self.path / "config.json").read_text()).items() if k != "quantization_config"}

    def note(self, what: str, where: str, detail: str) -> None:
        self.notes.append(Fallback(what=what, where=where, detail=detail))

    @cached_property
    def kept(self) -> list[str]:
        """What the model class does not know (multi-token prediction) among them."""
        embeddings = {name for name, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        found = {name.removesuffix(".weight") for name, t in self.manifest.tensors.items()
                 if name.endswith(".weight") and len(t.shape) == 2 and name.removesuffix(".weight") not in embeddings}  # fmt: skip
        return sorted({*super().kept, *found, *(m for name in found for m in self.modules(name))})

    # ---- tensors

    def peek(self, layer: str) -> Format:
        """The format of a layer with its scales and zero points, its codes on meta: enough to judge it."""
        record = self.layers[layer]
        tensors = {}
        for t, name in record.places(layer).items():
            described = self.manifest.tensors[name]
            read = t in ("scales", "zeros", "divisor")
            tensors[t] = self.read_stored(name) if read else torch.empty(described.shape, dtype=getattr(torch, described.dtype), device="meta")
        return build(record.format, tensors)

    def shards(self) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """(tensors, layers) of one shard after the other, every tensor compared with the manifest."""
        for shard in dict.fromkeys(t.shard for t in self.manifest.tensors.values() if t.shard != PROBE):
            try:
                with safe_open(self.path / shard, framework="pt") as f:
                    tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise CompressError(f"{self.path / shard}: cannot be read ({error}); `compress verify` tells more") from error
            for name, tensor in tensors.items():
                if name not in self.manifest.tensors or sha256(tensor) != self.manifest.tensors[name].sha256:
                    raise CompressError(f"{self.path / shard}: {name} is not what was written; `compress verify` tells more")
            yield tensors, [layer for layer, r in self.layers.items() if f"{layer}.{r.tensors[0]}" in tensors]


class Export:
    """One consumer's format: which layers it can hold, and the folder it is served from."""

    def refusals(self, source: Layers) -> list[Refusal]:
        """Every layer that cannot be expressed; empty: `write` will succeed. Raises CompressError where the whole model cannot."""
        raise NotImplementedError

    def widened(self, source: Layers) -> list[str]:
        """Layers that the consumer gets multiplied out, as floats: none where it has a layout for all."""
        return []

    def write(self, source: Source, folder: Path) -> None:
        """Write the weights and what describes them into an empty folder; companions and the model card are not its business."""
        raise NotImplementedError

    def load_line(self, name: str) -> str:
        """How to load the result, as a code block of the model card."""
        raise NotImplementedError


class SafetensorsExport(Export):
    """An export that is a Hugging Face folder: shards, an index, config.json."""

    key = "quantization_config"  # where in config.json the consumer looks

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        """What the consumer stores for one linear, by suffix: {"qweight": ..., "scales": ...}."""
        raise NotImplementedError

    def config(self, source: Source) -> dict | None:
        """The consumer's quantization_config; None: a plain model."""
        raise NotImplementedError

    def settings(self, source: Source) -> dict:
        """What else the consumer looks for in config.json, where transformers writes it elsewhere."""
        return {}

    def write(self, source: Source, folder: Path) -> None:
        count = len({t.shard for t in source.manifest.tensors.values()} - {PROBE})
        weight_map: dict[str, str] = {}
        total = 0
        for i, (tensors, layers) in enumerate(source.shards(), 1):
            made: dict[str, Tensor] = {}
            for layer in layers:
                record = source.layers[layer]
                weight = build(record.format, {t: tensors[name] for t, name in record.places(layer).items()})
                modules = source.modules(layer)
                parts = [weight] if len(modules) == 1 else split_rows(weight, [weight.shape[0] // len(modules)] * len(modules))
                for module, part in zip(modules, parts, strict=True):
                    made |= {f"{module}.{suffix}": t for suffix, t in self.tensors(source, layer, part).items()}
            stored = {f"{layer}.{t}" for layer in layers for t in source.layers[layer].tensors}
            for name, tensor in tensors.items():
                if name in stored:
                    continue
                made |= dict(zip(spelled := source.spell(name), tensor.chunk(len(spelled)), strict=True))
            shard = f"model-{i:05d}-of-{count:05d}.safetensors"
            save_file({name: t.contiguous() for name, t in made.items()}, folder / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(made, shard)
            total += sum(t.numel() * t.element_size() for t in made.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        quantization = self.config(source)
        write_json(folder / "config.json", source.config_json() | self.settings(source) | ({self.key: quantization} if quantization else {}))


# ---- the uniform integer grids that every consumer of integers shares


@dataclass(frozen=True)
class Scheme:
    """What a server must know of a layer before it reads its tensors."""

    bits: int
    group_size: int  # -1: one group a row
    sym: bool

    def __str__(self) -> str:
        return f"{self.bits} bits {'channel' if self.group_size == -1 else f'g{self.group_size}'} {'sym' if self.sym else 'asym'}"

    @property
    def recipe(self) -> str:
        return f"{{bits: {self.bits}, group_size: {self.group_size}, sym: {str(self.sym).lower()}}}"


def scheme(weight: IntGroup) -> Scheme:
    return Scheme(weight.bits_per_code, -1 if weight.groups == 1 else weight.group_size, weight.zeros is None)


def schemes(source: Layers) -> dict[str, Scheme]:
    """The scheme of every integer layer. A layer with one group a row takes the group size of the others where that is its width."""
    found = {name: scheme(w) for name in source.layers if isinstance(w := source.peek(name), IntGroup)}
    for name, s in found.items():
        width = source.peek(name).shape[1]
        if s.group_size == -1 and any(o.group_size == width and (o.bits, o.sym) == (s.bits, s.sym) for o in found.values()):
            found[name] = replace(s, group_size=width)
    return found


def integer_refusal(layer: str, weight: Format, to: str, bits: tuple[int, ...]) -> Refusal | None:
    """Is it a uniform grid of a width that the format has, with a zero point that is an integer?"""
    if not isinstance(weight, IntGroup):
        return Refusal(layer, f"{weight.describe()} is not a uniform integer grid", "{method: gptq, bits: 4}, or --to dense")
    s = scheme(weight)
    if weight.zeros is not None and weight.zeros.is_floating_point():
        return Refusal(layer, "zero points that are fractions of a step", f"{{method: gptq, {s.recipe[1:]}, or --to dense")
    if weight.bits_per_code not in bits:
        nearest = min((b for b in bits if b >= s.bits), default=max(bits))
        return Refusal(layer, f"{s.bits} bits, {to} has {', '.join(map(str, bits))}", replace(s, bits=nearest).recipe)
    if s.bits == 1:
        return Refusal(layer, "one symmetric bit stands for ±½ and has no integer zero point", replace(s, bits=2).recipe)
    return None


def linear_refusal(layer: str, source: Layers, to: str) -> Refusal | None:
    """Is it a linear that transformers replaces by the consumer's own? Others it leaves random, with a warning at most (5.23, gptqmodel 7.7)."""
    if layer in source.transposed:
        return Refusal(layer, f"a Conv1D, which no loader of {to} replaces", "--to dense")
    if layer in source.experts:
        return Refusal(layer, f"an expert: transformers 5 leaves the experts of a {to} checkpoint random", "--to compressed-tensors")
    return None


def integers(weight: IntGroup) -> tuple[Tensor, Tensor]:
    """Unsigned codes [out, in] and zero points [out, groups], both uint8, with Ŵ = (q − z)·s. Ternary digits move up to two bits' middle."""
    shift = 1 if weight.levels == 3 else 0
    return weight.unpack() + shift, (weight.zero_points() + shift).to(torch.uint8)


def wide_scales(source: Source, weight: IntGroup) -> Tensor:
    """Scales [out, groups] in a dtype that holds them and is no narrower than the model's: servers compute (q − z)·s in the scale's own."""
    return weight.scales.to(torch.promote_types(weight.scales.dtype, source.model_dtype))


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Does the dtype hold every value exactly? Of values that are only planned it is taken for granted."""
    return values.is_meta or torch.equal(values.to(dtype).float(), values.float())


def fits_half(values: Tensor) -> bool:
    """fp16 holds bf16 values from 2⁻¹⁷ to 65504."""
    return fits(values, torch.float16)


def uniform_refusals(found: dict[str, Scheme], to: str) -> list[Refusal]:
    """Layers whose scheme is not that of most: for formats whose configuration names one for the whole model."""
    usual = Counter(found.values()).most_common(1)[0][0] if found else None
    return [Refusal(name, f"{s}, most layers are {usual}, and loaders of {to} take one scheme", f"{usual.recipe} for all, or --to compressed-tensors")
            for name, s in found.items() if usual and s != usual]  # fmt: skip


def fused_refusals(source: Layers, found: Mapping[str, Any]) -> list[Refusal]:
    """Layers that a server multiplies as one matrix (q, k and v; gate and up; all experts of a block) but that differ in scheme."""
    groups: dict[str, set[str]] = {}
    names = {m: layer for layer in source.layers for m in source.modules(layer)} | {m: m for m in source.kept}
    for module, layer in names.items():
        parent, _, leaf = module.rpartition(".")
        fused = next((whole for whole, parts in FUSED.items() if leaf in parts), None)
        if expert := re.match(r"(.*\.experts)\.\d+\.", module):
            groups.setdefault(expert[1], set()).add(layer)
        elif fused:
            groups.setdefault(f"{parent}.{fused}", set()).add(layer)
    refused = []
    for whole, layers in groups.items():
        kinds = Counter(str(found.get(layer, "kept as it is")) for layer in sorted(layers))
        if len(kinds) > 1:
            best = max((found[layer] for layer in layers if layer in found), key=lambda s: s.bits)
            refused += [Refusal(layer, f"served inside {whole.rpartition('.')[2]}, whose parts must have one scheme and have {' and '.join(kinds)}",
                                f"{best.recipe} for all of them") for layer in sorted(layers & source.layers.keys())]  # fmt: skip
    return refused
