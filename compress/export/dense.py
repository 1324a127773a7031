"""Dense: every weight multiplied out, a plain Hugging Face model. The universal way out, for any method and any format.

Ŵ is computed in fp32 and cast once to the model's own dtype, exactly as `compress.load(policy="dense")` multiplies; nothing smaller comes out.
"""

from __future__ import annotations

from torch import Tensor

from ..formats import Format
from .base import Layers, Refusal, SafetensorsExport, Source


class Dense(SafetensorsExport):
    def refusals(self, source: Layers) -> list[Refusal]:
        return []

    def widened(self, source: Layers) -> list[str]:
        return list(source.layers)

    def tensors(self, source: Source, layer: str, weight: Format) -> dict[str, Tensor]:
        W = weight.dequantize(source.model_dtype)
        return {"weight": W.T if layer in source.transposed else W}

    def config(self, source: Source) -> None:
        return None

    def load_line(self, name: str) -> str:
        return f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")'
