"""ONNX: the dense model as one graph for onnxruntime and what is built on it, through torch.onnx (pip install compress[onnx]).

Weights are multiplied out as for --to dense and stored as fp32, which every operator of onnxruntime takes; the graph takes input_ids int64
[batch, tokens] and gives logits, no cache of keys and values, so it scores and evaluates; it is not what generates fastest. The whole model is in
memory while torch traces it, the one export for which that is so.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..errors import CompressError
from .base import Layers, Refusal, Source
from .dense import Dense


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class ONNX(Dense):
    def refusals(self, source: Layers) -> list[Refusal]:
        return []

    def write(self, source: Source, folder: Path) -> None:
        super().write(source, folder)
        try:
            import onnxscript  # noqa: F401  what torch.onnx writes through
        except ImportError as error:
            raise CompressError("onnx: onnxscript is not installed; pip install onnx onnxscript") from error
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                     trust_remote_code=source.trust_remote_code).eval()  # fmt: skip
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        axes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=model.config.get_text_config().max_position_embeddings)}}
        try:
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                program = torch.onnx.export(Logits(model).eval(), (tokens,), dynamo=True, dynamic_shapes=axes, input_names=["input_ids"],
                                            output_names=["logits"])  # fmt: skip
            program.save(folder / "model.onnx", external_data=True)
        except Exception as error:  # torch.onnx raises a dozen kinds; a user needs the first line of any of them
            raise CompressError(f"onnx: torch.onnx cannot carry a {source.config.model_type} model ({' '.join(str(error).split())[:200]}); "
                                "use --to dense") from error  # fmt: skip
        for file in folder.glob("*.safetensors*"):
            file.unlink()

    def load_line(self, name: str) -> str:
        return f'onnxruntime.InferenceSession("{name}/model.onnx").run(["logits"], {{"input_ids": tokens}})'
