"""compressed-tensors: what vLLM, SGLang and transformers read (github.com/vllm-project/compressed-tensors).

    pack-quantized         weight_packed int32 [out, ceil(in·b/32)], weight_scale [out, groups], weight_shape int64 [2] and, asymmetric,
                           weight_zero_point int32 [ceil(out·b/32), groups], packed along out
    int-quantized          weight int8 [out, in], weight_scale [out, 1]
    float-quantized        weight E4M3 [out, in], weight_scale [out, 1], [1] or a value for every 128×128
    mxfp4-pack-quantized   weight_packed uint8 [out, in/2], weight_scale uint8 [out, in/32], exponents plus 127
    nvfp4-pack-quantized   weight_packed, weight_scale E4M3 [out, in/16], weight_global_scale fp32 [1] that the scales are divided by

Their signed integer is ours minus 2^(b−1), and they store it plus 2^(b−1): the packed words are ours, bit for bit. Widths of 3, 5, 6 and 7 bits are
dense streams in compressed-tensors 0.19; 0.17 and earlier left bits of each word unused and cannot read these. The sparse bitmask layouts
have no decompressor there any more: zeros go out with --to dense.
With `activations` (--to compressed-tensors-w8a8) the server rounds its activations to 8 bits a token and multiplies integers or FP8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressError
from ..formats import FloatBlock, Format, IntGroup, packing
from .base import Layers, Refusal, SafetensorsExport, Scheme, Source, fused_refusals, integer_refusal, integers, scheme, schemes, wide_scales

FLOATS: dict[str, dict[str, Any]] = {  # what their QuantizationArgs say of ours, by description
    "fp8 channel": {}, "fp8 tensor": {"strategy": "tensor"}, "fp8 128×128": {"strategy": "block", "block_structure": [128, 128]},
    "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
    "nvfp4": {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"},
}  # fmt: skip
WEIGHT_ONLY = "--to compressed-tensors, or w8-fp8, or {method: gptq, bits: 8, group_size: -1, sym: true}"


@dataclass(frozen=True)
class Floats:
    """What Scheme is for integers: all that a server must know of a layer, the divisor of nvfp4 included, for fused parts are multiplied by one."""

    kind: str  # as described: "fp8 channel", "fp8 tensor", "fp8 128×128", "mxfp4", "nvfp4"
    divisor: float = 0.0

    @property
    def bits(self) -> int:
        return 8 if self.kind.startswith("fp8") else 4

    @property
    def recipe(self) -> str:
        return f"{{method: fp, type: {self.kind.split()[0]}}}"

    def __str__(self) -> str:
        return f"{self.kind} divided by {self.divisor:g}" if self.divisor else self.kind


def kinds(source: Layers) -> dict[str, Scheme | Floats]:
    weights = {name: w for name in source.layers if isinstance(w := source.peek(name), FloatBlock)}
    return schemes(source) | {name: Floats(w.describe(), 0.0 if w.divisor is None or w.divisor.is_meta else float(w.divisor)) for name, w in weights.items()}


@dataclass(frozen=True)
class CompressedTensors(SafetensorsExport):
    activations: bool = False  # rounded as well, by the server as they come

    def refusals(self, source: Layers) -> list[Refusal]:
        return [r for name in source.layers if (r := self._refusal(name, source))] or fused_refusals(source, kinds(source))

    def _refusal(self, layer: str, source: Layers) -> Refusal | None:
        weight = source.peek(layer)
        if layer in source.transposed:
            return Refusal(layer, "a Conv1D, which no loader of compressed-tensors replaces", "--to dense")
        if isinstance(weight, FloatBlock):
            if weight.block == (128, 128) and (weight.shape[0] % 128 or weight.shape[1] % 128):
                return Refusal(layer, f"{weight.shape[0]}×{weight.shape[1]} is not made of whole 128×128 blocks", "{method: fp, scale: channel}")
            if layer in source.experts and weight.describe() != "fp8 channel":
                return Refusal(layer, f"an expert in {weight.describe()}, which transformers 5 leaves random", "{method: fp, scale: channel}")
        elif refused := integer_refusal(layer, weight, "compressed-tensors", tuple(range(1, 9))):
            return refused
        elif layer in source.experts and isinstance(weight, IntGroup) and weight.zeros is not None:
            return Refusal(layer, "an expert with zero points, which transformers cannot unpack (huggingface/transformers#47430)",
                           replace(scheme(weight), sym=True).recipe)  # fmt: skip
        if self.activations and layer in source.experts and isinstance(weight, IntGroup):
            return Refusal(layer, "an expert, whose int-quantized tensors transformers 5 cannot convert", "w8-fp8, or --to compressed-tensors")
        if self.activations and not (weight.describe().startswith("fp8") or (isinstance(weight, IntGroup) and scheme(weight) == Scheme(8, -1, True))):
            return Refusal(layer, f"{weight.describe()}: 8-bit activations are multiplied by fp8, or by 8 bits with one symmetric group a row", WEIGHT_ONLY)
        return None

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        if isinstance(weight, FloatBlock):
            if weight.name == "fp8":
                scales = weight.scales.to(torch.promote_types(weight.scales.dtype, source.model_dtype))
                return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": scales.flatten() if weight.block == weight.shape else scales}
            stored = {"weight_packed": weight.codes}
            return stored | ({"weight_scale": weight.scales} if weight.divisor is None else
                             {"weight_scale": weight.scales.view(torch.float8_e4m3fn), "weight_global_scale": weight.divisor})  # fmt: skip
        assert isinstance(weight, IntGroup)
        if self.activations:
            return {"weight": (weight.unpack() ^ 128).view(torch.int8), "weight_scale": wide_scales(source, weight)}
        codes, zeros = integers(weight)
        stored = {"weight_packed": packing.pack_rows(codes, weight.bits_per_code), "weight_scale": wide_scales(source, weight),
                  "weight_shape": torch.tensor(weight.shape)}  # fmt: skip
        if weight.zeros is not None:
            stored["weight_zero_point"] = packing.pack_rows(zeros.T, weight.bits_per_code).T
        return stored

    def config(self, source: Source) -> dict:
        groups: dict[Scheme | Floats, list[str]] = {}
        for layer, s in kinds(source).items():
            groups.setdefault(s, []).extend(source.modules(layer))
        for s in groups:
            if isinstance(s, Scheme) and s.bits not in (4, 8):
                source.note("vLLM has no kernel", str(s), "its weight-only kernels take 4 and 8 bits; transformers with compressed-tensors 0.19 reads all")
        if not all(s.sym for s in groups if isinstance(s, Scheme)):
            source.note("transformers 5.23 with compressed-tensors 0.20 expects zero points unpacked", "asymmetric layers",
                        "load with quantization_config=CompressedTensorsConfig(dequantize=True)" if len(groups) == 1 else
                        "with more than one scheme it cannot; transformers 5.17 with compressed-tensors 0.19 can")  # fmt: skip
        if any(isinstance(s, Floats) and s.bits == 4 for s in groups) and source.model_dtype != torch.bfloat16:
            source.note("transformers with compressed-tensors 0.20 unpacks 4-bit floats to bf16", f"a model of {str(source.model_dtype)[6:]}",
                        "load with dtype=torch.bfloat16: their values fit it exactly")  # fmt: skip
        if self.activations:
            source.note("activations are rounded to 8 bits when it runs", "every layer", "one scale a token; `eval` here does not")
            if Floats("fp8 tensor") in groups:
                source.note("vLLM rounds fused parts again", "fp8 tensor", "q, k and v get the largest of their scales; {scale: channel} is carried exactly")
        made = {f"group_{i}": self._group(s, ["Linear"] if len(groups) == 1 else names) for i, (s, names) in enumerate(groups.items())}
        layouts = {g["format"] for g in made.values()}
        return {"quant_method": "compressed-tensors", "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
                "quantization_status": "compressed", "ignore": source.kept, "config_groups": made}  # fmt: skip

    def _group(self, s: Scheme | Floats, targets: list[str]) -> dict:
        weights: dict[str, Any] = {"num_bits": s.bits, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False,
                                   "actorder": None}  # fmt: skip
        if isinstance(s, Scheme):
            layout = "int-quantized" if self.activations else "pack-quantized"
            weights |= {"symmetric": s.sym, **({} if s.group_size == -1 else {"strategy": "group", "group_size": s.group_size})}
        else:
            layout = "float-quantized" if s.bits == 8 else f"{s.kind}-pack-quantized"
            weights |= {"type": "float", **FLOATS[s.kind]}
        inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "dynamic": True,
                  **({"strategy": "group", "group_size": 128} if weights["strategy"] == "block" else {"strategy": "token"})}  # fmt: skip
        return {"targets": targets, "weights": weights, "input_activations": inputs if self.activations else None, "output_activations": None,
                "format": layout}  # fmt: skip

    def load_line(self, name: str) -> str:
        return f'vllm serve {name}\nmodel = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # pip install compressed-tensors'


# ---- and back

MARKS = ("weight_packed", "weight_scale")
SUFFIXES = (*MARKS, "weight", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")


def read(tensors: dict[str, Tensor], config: dict, where: str) -> IntGroup | FloatBlock:
    """A stored linear as our integer grid or our floats: the same codes, scales and zero points."""
    groups, scales = config.get("config_groups", {}).values(), tensors["weight_scale"]
    inputs = [g["input_activations"] for g in groups if g.get("input_activations")]
    if config.get("transform_config") or not all(i.get("dynamic") is True and i["num_bits"] == 8 for i in inputs):
        raise CompressError(f"{where}: its activations are transformed, or quantized to other than 8 bits as they come, which an artifact does not hold")
    if "weight_packed" not in tensors:
        W = tensors["weight"]
        if W.dtype == torch.float8_e4m3fn:
            return FloatBlock(W.view(torch.uint8), scales if scales.dim() == 2 else scales.view(1, -1), None, "fp8")
        if W.dtype == torch.int8 and scales.numel() in (1, len(W)) and "weight_zero_point" not in tensors:
            return IntGroup.pack(W.view(torch.uint8) ^ 128, scales.view(-1, 1).expand(len(W), 1).contiguous(), None, 8)
        raise CompressError(f"{where}: weight {str(W.dtype)[6:]} with scales {list(scales.shape)} is neither FP8 nor 8 bits with one symmetric group a row")
    words = tensors["weight_packed"]
    if words.dtype == torch.uint8:
        divisor = tensors.get("weight_global_scale")
        return FloatBlock(words, scales.view(torch.uint8), None if divisor is None else divisor.view(1), "mxfp4" if divisor is None else "nvfp4")
    out, n = tensors["weight_shape"].tolist()
    b = next((b for b in range(1, 9) if packing.packed_words(n, b) == words.shape[1]), 0) if words.dtype == torch.int32 else 0
    if b not in {g["weights"]["num_bits"] for g in groups}:
        raise CompressError(f"{where}: {str(words.dtype)[6:]} {list(words.shape)} for {out}×{n} weights is no dense pack of 1 to 8 bits")
    if "weight_g_idx" in tensors and not torch.equal(tensors["weight_g_idx"].long(), torch.arange(n) // (n // scales.shape[1])):
        raise CompressError(f"{where}: act-order with a group index that is not contiguous; our groups are, and its codes cannot be carried over")
    zeros = packing.unpack_rows(tensors["weight_zero_point"].T, out, b).T if "weight_zero_point" in tensors else None
    return IntGroup.pack(packing.unpack_rows(words, n, b), scales, zeros, b)
