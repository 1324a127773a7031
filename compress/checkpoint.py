"""Checkpoint: a Hugging Face folder (or hub id) read lazily, one block at a time, never as a whole.

The skeleton of the model is built on the meta device (parameters without memory, real buffers). Tensors are read from safetensors by name,
copied out of the file and put where transformers would put them: its own renaming and fusing rules (Mixtral's per-expert matrices become one
3-D tensor in transformers 5) are applied here to the few tensors of one block at a time. Pickles are refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .arch import find_blocks, table_entry
from .artifact import companions
from .errors import CompressError
from .experts import unfuse_experts
from .skeleton import reshape

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
                      "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
                      "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One stored tensor, as its file's header tells it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Stored tensors that become model tensors together: usually one to one; a list of experts to one fused tensor."""

    target: str  # the (first) model tensor
    sources: tuple[tuple[str, str], ...]  # (stored name, pattern of the converter that it matched)
    converter: WeightConverter | None


def resolve(model: str, *, weights: bool = True) -> Path:
    """A local folder as it is, a hub id downloaded into the Hugging Face cache (safetensors, configuration and tokenizer files only)."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CompressError(f"{model}: no such model folder; give a folder with config.json and *.safetensors, or a hub id like Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "*.py"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises a dozen kinds; a user needs the first line of any of them
        raise CompressError(f"{model}: neither a local folder nor reachable on the hub ({type(error).__name__}: {str(error).splitlines()[0]}); "
                            "check the name, the network, or HF_HOME") from error  # fmt: skip


def hub_headers(model: str) -> dict[str, Entry]:
    """The stored tensors of a hub id, from the first bytes of each of its safetensors files."""
    try:
        files = get_safetensors_metadata(model).files_metadata
        return {name: Entry(file, SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for file, f in files.items() for name, t in f.tensors.items()}
    except Exception as error:  # as above; and NotASafetensorsRepoError
        raise CompressError(f"{model}: its safetensors headers cannot be read from the hub ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False, name: str = "") -> nn.Module:
    """The model that a configuration describes, on meta with real buffers. Raises CompressError where transformers has no class for it."""
    with init_empty_weights(include_buffers=False):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError) as error:
            raise CompressError(f"{name or config.model_type}: not a causal language model that can be built ({str(error).splitlines()[0]})") from error
    model.tie_weights()
    return reshape(model).eval()


class Checkpoint:
    """Lazy view of a causal language model on disk. `dtype` is the dtype blocks compute in; stored tensors are read as they are."""

    def __init__(self, model: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False, headers_only: bool = False):
        """headers_only: of a hub id download no weights, only the headers of its safetensors files: enough to plan with."""
        remote = headers_only and not Path(model).is_dir()
        self.name, self.path, self.trust_remote_code = model, resolve(model, weights=not remote), trust_remote_code
        if not (self.path / "config.json").is_file():
            raise CompressError(f"{model}: not a model folder: config.json is missing; download it next to the weights")
        self.entries = hub_headers(model) if remote else read_headers(self.path)
        try:
            self.config = AutoConfig.from_pretrained(self.path, trust_remote_code=trust_remote_code)
        except (ValueError, OSError, KeyError, StrictDataclassError) as error:
            raise CompressError(f"{model}: config.json cannot be used: {' '.join(str(error).split())}") from error
        self._check_config()
        self.stored_dtype = dominant_dtype(self.entries)
        self.dtype = dtype or self.stored_dtype
        self.edits: dict[str, Callable[[Tensor], Tensor]] = {}  # what a view makes of a model tensor when it is read (views.py)
        self.changes: dict[str, Any] = {}  # configuration values that a view changed
        self.notes: list[dict] = []  # what a view could not do, for the manifest

    def _check_config(self) -> None:
        if quantized := getattr(self.config, "quantization_config", None):
            raise CompressError(f"{self.name}: already quantized ({quantized.get('quant_method', 'unknown method')}); start from the original checkpoint")

    # ---- structure

    @cached_property
    def model(self) -> nn.Module:
        """The model on meta with real buffers; blocks and outer modules are copied from it and filled."""
        return skeleton(self.config, self.dtype, self.trust_remote_code, self.name)

    @cached_property
    def blocks_path(self) -> str:
        entry = table_entry(self.model)
        return entry.blocks if entry else find_blocks(self.model)

    @property
    def num_blocks(self) -> int:
        return len(self.model.get_submodule(self.blocks_path))

    def block_name(self, i: int) -> str:
        return f"{self.blocks_path}.{i}"

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Which stored tensors make which model tensors, by transformers' own rules, keyed by the first model tensor."""
        rules = get_model_conversion_mapping(self.model)
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state = self.model.state_dict()
        found: dict[str, Group] = {}
        self.unknown: list[str] = []
        prefix, made = self.model.base_model_prefix, {name.rpartition(".")[2] for name, _ in self.model.named_buffers()} - {n.rpartition(".")[2] for n in state}
        for key in sorted(self.entries, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = key, None
            if target not in state and key.rpartition(".")[2] in made:
                continue  # the model makes this buffer itself: the rotary inv_freq that old checkpoints keep a block
            if target not in state:
                self.unknown.append(key)  # e.g. multi-token-prediction layers: kept in the artifact under their own names
                continue
            group = found.get(target) or Group(target, (), by_pattern.get(pattern))
            found[target] = Group(target, (*group.sources, (key, pattern or key)), group.converter)
        return self._headed(found)

    def _headed(self, found: dict[str, Group]) -> dict[str, Group]:
        """Groups with one for a head that was untied: one tensor on disk, two in the model."""
        if self.changes.get("tie_word_embeddings") is False:
            names = [f"{name}.weight" for name, m in self.model.named_modules()
                     if m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())]  # fmt: skip
            sources = next(found[n].sources for n in names if n in found)
            found |= {n: Group(n, sources, None) for n in names if n not in found}
        return found

    def block_groups(self, i: int) -> list[Group]:
        prefix = self.block_name(i) + "."
        return [g for name, g in self.groups.items() if name.startswith(prefix)]

    def outer_groups(self) -> list[Group]:
        """Everything outside the blocks: embeddings, final norm, head."""
        return [g for name, g in self.groups.items() if not name.startswith(self.blocks_path + ".")]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor of a block is stored, experts by their unfused names."""
        group = self.groups.get(name) or self.groups.get(_fused(name))
        return self.stored(group) if group else self.stored_dtype

    def stored(self, group: Group) -> torch.dtype:
        """The dtype of a group's tensors on disk, here and in an artifact."""
        return self.entries[group.sources[0][0]].dtype

    def ignorable(self, key: str) -> bool:
        """Is this one of the tensors that the model class tells transformers to pass over (multi-token prediction, mostly)?"""
        return any(re.search(pattern, key) for pattern in self.model._keys_to_ignore_on_load_unexpected or ())

    def parameters(self) -> int:
        return sum(torch.Size(e.shape).numel() for e in self.entries.values())

    def nbytes(self, groups: list[Group]) -> int:
        return sum(self.entries[key].nbytes for g in groups for key, _ in g.sources)

    # ---- tensors

    def read_stored(self, key: str) -> Tensor:
        """One stored tensor, in its stored dtype."""
        return self.read_from(self.entries[key].file, key)

    def read_from(self, name: str, key: str) -> Tensor:
        """One tensor copied out of a file (so that no mapping stays open)."""
        file = self.path / name
        try:
            with safe_open(file, framework="pt") as f:
                return f.get_tensor(key).clone()
        except (SafetensorError, OSError) as error:
            raise CompressError(f"{file}: cannot read {key}: {error}; download the file again") from error

    def read(self, group: Group) -> dict[str, Tensor]:
        """The model tensors that a group makes, in the stored dtype; those that a view edits wider, not yet rounded to it."""
        tensors = {key: self.read_stored(key) for key, _ in group.sources}
        if group.converter is None:
            made = {group.target: tensors[group.sources[0][0]]}
        else:
            converter = copy.deepcopy(group.converter)
            for key, pattern in group.sources:
                converter.add_tensor(group.target, key, pattern, tensors.pop(key))
            made = converter.convert(group.target, model=self.model, config=self.model.config)
        made = {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
        return {name: self.edits[name](t) if name in self.edits else t for name, t in made.items()}

    def tensor(self, name: str) -> Tensor:
        """One model tensor by its name, as `read` gives it."""
        return self.read(self.groups[name])[name]

    def untied(self) -> Checkpoint:
        """The same model with a head of its own, read from where the embedding is read."""
        view = copy.copy(self)
        view.changes = self.changes | {"tie_word_embeddings": False}
        view.config = copy.deepcopy(self.config)
        view.config.tie_word_embeddings = False
        for cached in ("model", "groups"):
            view.__dict__.pop(cached, None)
        return view

    def _fill(self, module: nn.Module, prefix: str, groups: list[Group], device: torch.device | str) -> tuple[dict, dict]:
        """Put tensors into a meta module as an artifact would hold them, cast to the dtype its parameters were declared in.

        Returns, by local name, the stored dtypes, and the original of every tensor that either cast made coarser.
        """
        expected, loaded, stored, originals = module.state_dict(), {}, {}, {}
        for group in groups:
            for name, tensor in self.read(group).items():
                local = name.removeprefix(prefix)
                if local not in expected:
                    raise CompressError(f"{self.name}: unexpected tensor {name}")
                if tensor.shape != expected[local].shape:
                    raise CompressError(f"{self.name}: {name} is {list(tensor.shape)}, the configuration says {list(expected[local].shape)}")
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CompressError(f"{self.name}: {name} holds {(~torch.isfinite(tensor)).sum()} NaN or Inf values; the checkpoint is damaged")
                stored[local], declared = self.stored(group), expected[local].dtype
                loaded[local] = tensor.to(stored[local]).to(device=device, dtype=declared)
                if tensor.dtype != stored[local] or torch.promote_types(tensor.dtype, declared) != declared:
                    originals[local] = tensor
        module.load_state_dict(loaded, strict=False, assign=True)
        module.requires_grad_(False)
        return stored, originals

    def load_block(self, i: int, device: torch.device | str = "cpu") -> nn.Module:
        """Block i with its weights on `device`, experts unfused to one nn.Linear each.

        `block.stored` maps its tensors to their stored dtypes, `block.originals` holds those that the compute dtype cannot hold exactly.
        """
        name = self.block_name(i)
        block = copy.deepcopy(self.model.get_submodule(name))
        stored, originals = self._fill(block, name + ".", self.block_groups(i), device)
        missing = [n for n, p in block.named_parameters() if p.is_meta]
        if missing:
            raise CompressError(f"{self.name}: {name} lacks {', '.join(missing)} (not in any safetensors file)")
        if unfuse_experts(block):
            for path, _, leaf in [n.rpartition(".") for n in originals if n.endswith((".gate_up_proj", ".down_proj"))]:
                originals |= {f"{path}.{e}.{leaf}.weight": t for e, t in enumerate(originals.pop(f"{path}.{leaf}"))}
        for buffer_name, buffer in block.named_buffers():
            parent, _, leaf = buffer_name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, buffer.to(device))
        block.stored = {n: stored.get(n) or stored.get(_fused(n), self.stored_dtype) for n in block.state_dict()}
        block.originals = originals
        return block.eval()

    def load_outer(self, device: torch.device | str = "cpu", *, embeddings: bool = True, head: bool = True) -> nn.Module:
        """The model with its outer tensors real and its blocks on meta; the input embedding or the head can be left out."""
        model = copy.deepcopy(self.model)
        tied = _tied(model)
        drop = set() if tied else {name for wanted, module in ((embeddings, model.get_input_embeddings()), (head, model.get_output_embeddings()))
                                   if not wanted and module is not None for name, m in model.named_modules() if m is module}  # fmt: skip
        groups = [g for g in self.outer_groups() if not any(g.target.startswith(d + ".") for d in drop)]
        self._fill(model, "", groups, device)
        if tied:
            model.tie_weights()
        known = {g.target for g in self.outer_groups()}
        lacking = [n for n, p in model.named_parameters() if p.is_meta and n not in known and not n.startswith(self.blocks_path + ".")]
        if lacking:  # torch multiplies by a meta tensor without a word and returns whatever lay in memory
            raise CompressError(f"{self.name}: the checkpoint lacks {', '.join(lacking)} (not in any safetensors file)")
        for buffer_name, buffer in model.named_buffers():
            if not buffer_name.startswith(self.blocks_path + "."):
                parent, _, leaf = buffer_name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, buffer.to(device))
        return model

    def tokenizer(self):
        """The tokenizer of the folder, or None where there is none."""
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def digest(self) -> dict[str, str]:
        """SHA-256 of every file that is read or carried over: weights, configuration, tokenizer. The identity of the source."""
        files = sorted({e.file for e in self.entries.values()} | {"config.json"} | {f.name for f in companions(self.path)})
        digests = {}
        for name in files:
            with open(self.path / name, "rb") as f:
                digests[name] = hashlib.file_digest(f, "sha256").hexdigest()
        return digests


def dominant_dtype(entries: dict[str, Entry]) -> torch.dtype:
    """The float type that most weights are stored in; a model may keep a few (router biases, norms) wider. 8-bit floats are codes, not weights."""
    counts: dict[torch.dtype, int] = {}
    for e in entries.values():
        if e.dtype.is_floating_point and e.dtype.itemsize > 1:
            counts[e.dtype] = counts.get(e.dtype, 0) + torch.Size(e.shape).numel()
    if not counts:
        raise CompressError("the weight files hold no floating-point tensor: not a model that can be compressed")
    return max(counts, key=lambda d: counts[d])


def _fused(name: str) -> str:
    """experts.3.down_proj.weight → experts.down_proj"""
    return re.sub(r"\.\d+\.(gate_up_proj|down_proj)\.weight$", r".\1", name)


def _tied(model: nn.Module) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def read_headers(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of every tensor of a folder, from safetensors headers only."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CompressError(f"{index}: not a safetensors index ({error})") from error
        for name in listed:
            if Path(name).name != name:
                raise CompressError(f"{index}: names {name!r}, a path outside the folder")
        files = [path / name for name in listed]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [f.name for pattern in PICKLES for f in path.glob(pattern)]
        if pickles:
            raise CompressError(f"{path}: only pickled weights ({', '.join(sorted(pickles)[:3])}); pickles can run code and are refused: convert "
                                "with transformers (model.save_pretrained(folder)) or download the safetensors version")  # fmt: skip
        raise CompressError(f"{path}: not a model folder: no *.safetensors file; give a folder with config.json and *.safetensors, or a hub id")
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                    piece = f.get_slice(key)
                    entries[key] = Entry(file.name, SAFETENSORS_DTYPES[piece.get_dtype()], tuple(piece.get_shape()))
        except FileNotFoundError as error:
            raise CompressError(f"{file}: missing, though the index names it; download it again") from error
        except (SafetensorError, OSError) as error:
            raise CompressError(f"{file}: corrupt or truncated ({error}); download it again") from error
        except KeyError as error:
            raise CompressError(f"{file}: holds tensors of type {error}, which this version cannot read") from error
    return entries

