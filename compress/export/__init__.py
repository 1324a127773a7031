"""Exports: an artifact in the layout of another program, exact codes and scales, or a refusal that names every layer.

    compress export OUT --to compressed-tensors -o SERVED

One file a format. All layers are judged before anything is written; the result is written beside its place and renamed there at the end.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig

from ..artifact import Fallback, companions
from ..errors import CompressError
from ..formats import Format
from ..recipe import nearest
from ..skeleton import KEY
from .awq import AWQ
from .base import Export, Layers, Refusal, Source
from .bitsandbytes import BitsAndBytes
from .card import card
from .compressed_tensors import CompressedTensors
from .dense import Dense
from .gguf import GGUF
from .gptq import GPTQ
from .mlx import MLX
from .onnx import ONNX

EXPORTS: dict[str, Export] = {
    "dense": Dense(), "compressed-tensors": CompressedTensors(), "compressed-tensors-w8a8": CompressedTensors(activations=True),
    "gptq": GPTQ(1), "gptq-v2": GPTQ(2), "awq": AWQ(), "bitsandbytes": BitsAndBytes(), "mlx": MLX(), "gguf": GGUF(), "onnx": ONNX(),
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written, and what does not carry over (`notes`)."""

    path: str
    to: str
    layers: int
    bytes: int
    notes: list[Fallback]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": [n.model_dump() for n in self.notes]}

    def __str__(self) -> str:
        return f"{self.path}: {self.layers} compressed layers as {self.to}, {self.bytes / 1e6:.1f} MB, {len(self.notes)} notes"


def find(to: str) -> Export:
    if to not in EXPORTS:
        raise CompressError(f"unknown export format {to!r}{nearest(to, EXPORTS)}")
    return EXPORTS[to]


def can_export(layers: Mapping[str, Format], config: PreTrainedConfig, model: nn.Module | None = None) -> dict[str, list[str]]:
    """Consumer → what it cannot express, a phrase for all layers of one reason; empty: it will hold them all. Reads no tensor.

    layers: path → Format on meta, of a plan (`method.planned`) or a manifest (`hf.empty`); config: the model's; model: its skeleton, where one is at hand.
    What depends on values, whether fp16 holds the scales, is taken for granted here and checked by `export`.
    """
    described, found = Layers(layers, config, model), {}
    for to, consumer in EXPORTS.items():
        try:
            found[to] = _grouped(consumer.refusals(described))
        except CompressError as error:  # the model as a whole
            found[to] = [str(error)]
    return found


def as_floats(layers: Mapping[str, Format], config: PreTrainedConfig, model: nn.Module | None = None) -> dict[str, str]:
    """Consumer → which layers it would get multiplied out, in words, "" for none; of those alone that `can_export` has no objection against."""
    described = Layers(layers, config, model)
    out = {to: EXPORTS[to].widened(described) for to, why in can_export(layers, config, model).items() if not why}
    return {to: f"{len(names)} of {len(layers)} layers as {str(described.model_dtype)[6:]}, {names[0]} first" if names else "" for to, names in out.items()}


def write(folder: Path, to: str, output: Path, *, base_model: str | None = None, evaluation: dict | None = None,
          push_to_hub: str | None = None, trust_remote_code: bool = False) -> Exported:  # fmt: skip
    """Export the artifact in `folder`. Raises CompressError naming every refused layer before `output` is touched."""
    chosen = find(to)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CompressError(f"{output}: exists and is not an empty folder; choose another -o or remove it")
    try:
        validate_repo_id(push_to_hub or "user/name")
    except HFValidationError as error:
        raise CompressError(f"--push-to-hub {push_to_hub}: a repository is USER/NAME ({error})") from error
    source = Source(folder, trust_remote_code)
    if any(getattr(source.config, KEY, None) or ()):
        raise CompressError(f"{folder}: its blocks differ in shape, which no configuration of {source.config.model_type} can say; make it again with --uniform")
    if refused := chosen.refusals(source):
        raise CompressError(f"{len({r.layer for r in refused})} of {len(source.layers)} layers cannot be exported as {to}: {'; '.join(_grouped(refused))}")
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
        try:
            for file in companions(folder):
                shutil.copyfile(file, temporary / file.name)
            chosen.write(source, temporary)
            size = sum(f.stat().st_size for f in temporary.iterdir())
            (temporary / "README.md").write_text(card(source, to, chosen.load_line(output.name), base_model, evaluation), encoding="utf-8")
            for file in temporary.iterdir():
                file.chmod(0o644)
            temporary.chmod(0o755)
            temporary.replace(output)  # over an empty folder, too
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CompressError(f"{output}: cannot be written: {error}; nothing is left there") from error
    if push_to_hub:
        _push(output, push_to_hub)
    return Exported(str(output), to, len(source.layers), size, source.notes)


def _push(folder: Path, repository: str) -> None:
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=f"Upload {folder.name}")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CompressError(f"{repository}: cannot be pushed ({' '.join(str(error).split())[:300]}); {folder} is complete: try again with "
                            f"`hf upload {repository} {folder}`") from error  # fmt: skip


def _grouped(refused: list[Refusal]) -> list[str]:
    """One phrase for layers with the same reason, their numbers folded: model.layers.*.mlp.down_proj (22)."""
    reasons: dict[tuple[str, str], dict[str, int]] = {}
    for r in refused:
        names = reasons.setdefault((r.reason, r.recipe), {})
        folded = re.sub(r"\.\d+(?=\.)", ".*", r.layer)
        names[folded] = names.get(folded, 0) + 1
    return [f"{', '.join(f'{name} ({count})' for name, count in names.items())}: {reason}; nearest recipe {recipe}"
            for (reason, recipe), names in reasons.items()]  # fmt: skip
