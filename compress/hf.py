"""What transformers needs to load an artifact: a quantization config and a quantizer, registered when compress is imported.

`AutoModelForCausalLM.from_pretrained("out")` reads `quantization_config` in config.json, finds the quantizer by its `quant_method` and lets it
put CompressedLinear modules into the meta model before transformers fills in the weights. Which modules, and of what format, the manifest says.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .artifact import MANIFEST, Manifest, read_manifest
from .experts import fused_experts, unfuse_experts
from .formats import Format, build
from .linear import CompressedLinear, install
from .skeleton import reshape


@register_quantization_config("compress")
class CompressConfig(QuantizationConfigMixin):
    def __init__(self, quant_method: str = "compress", format_version: int = 1, manifest: str = MANIFEST, **kwargs):
        self.quant_method, self.format_version, self.manifest = quant_method, format_version, manifest


@register_quantizer("compress")
class CompressQuantizer(HfQuantizer):
    requires_calibration = True  # an artifact is made by `compress run`, not on the fly

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        folder = Path(checkpoint_files[0]).parent
        if not (folder / MANIFEST).is_file():  # a hub repository: only what transformers asks for has been downloaded
            cached_file(model.config._name_or_path, MANIFEST)
        prepare(reshape(model), read_manifest(folder))
        for module in model.modules():  # transformers would initialise what it takes for new (GPT-2 reads its children's .weight to do so)
            if any(isinstance(child, CompressedLinear) for child in module.children()):
                module._is_hf_initialized = True
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return False  # copy the artifact folder instead: save_pretrained would lose the manifest

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def empty(record_name: str, manifest: Manifest) -> Format:
    """The Format of a layer with its tensors on meta, as the manifest describes it."""
    record = manifest.layers[record_name]
    described = {t: manifest.tensors[name] for t, name in record.places(record_name).items()}
    return build(record.format, {t: torch.empty(d.shape, dtype=getattr(torch, d.dtype), device="meta") for t, d in described.items()})


def prepare(model: torch.nn.Module, manifest: Manifest, prefix: str = "") -> None:
    """Give a meta model (or the block under `prefix`) the modules that the manifest describes, still without weights. In place."""
    if fused_experts(model):
        unfuse_experts(model)  # artifacts hold experts one by one, compressed or not
    with torch.device("meta"):
        install(model, {name.removeprefix(prefix): empty(name, manifest) for name in manifest.layers if name.startswith(prefix)})
    for name, record in manifest.layers.items():
        for t, place in record.shared.items() if name.startswith(prefix) else ():
            owner, _, key = place.rpartition(".")
            model.get_submodule(name.removeprefix(prefix)).borrow(t, model.get_submodule(owner.removeprefix(prefix)), key)
