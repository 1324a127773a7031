"""Artifact: a self-describing folder. Shards of safetensors, a Hugging Face config.json, and compress.json, the manifest.

    block-00000.safetensors …   one a block; outer-00000.safetensors … what lies outside the blocks
    model.safetensors.index.json, config.json, tokenizer and generation files, as transformers expects them
    probe.safetensors           a few tokens and the logits that the compressed model gave in memory: `verify` compares
    compress.json               formats, errors, fallbacks, provenance, SHA-256 of every tensor; written last: its presence means complete

Each shard carries its own record in its header, so ONE rename commits a block. While a run is under way compress.partial.json says which run
the folder belongs to. Nothing that depends on the clock or the machine's load is written here: two runs give identical bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CompressError

MANIFEST, PARTIAL, PROBE, INDEX = "compress.json", "compress.partial.json", "probe.safetensors", "model.safetensors.index.json"
PROBE_TOKENS, PROBE_KEPT = 32, 8  # tokens that the probe sends, and how many of them have their logits stored
FORMAT_VERSION = 1
COMPANIONS = ("tokenizer*", "*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja", "chat_template*", "generation_config.json",
              "*processor*.json", "*.py")  # fmt: skip


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LayerRecord(Record):
    """One compressed linear. `tensors` names its stored tensors without the module path; `format` rebuilds it from them."""

    method: str
    options: dict[str, Any]
    format: dict[str, Any]
    describe: str
    tensors: list[str]
    shared: dict[str, str] = {}  # tensors that another layer of the block stores for both, by the name they have there
    bits: float  # per weight, scales and padding included
    bytes: int
    planned_bytes: int
    parameters: int
    error: float  # tr[(Ŵ−W)H(Ŵ−W)ᵀ]/tr[WHWᵀ]; with no calibration H is the identity
    error_norm: str  # "hessian", "guided" (tokens weighed), "identity", or "healing": how far that moved the weight
    tokens: int  # calibration tokens that reached it

    def places(self, layer: str) -> dict[str, str]:
        """Every tensor of this layer's format by its full name on disk."""
        return {t: f"{layer}.{t}" for t in self.tensors} | self.shared


class TensorRecord(Record):
    shard: str
    dtype: str
    shape: list[int]
    sha256: str


class Fallback(Record):
    what: str
    where: str
    count: int = 1
    detail: str = ""


class Manifest(Record):
    format_version: int
    compress: str  # version of this package
    run: dict[str, Any]  # what identifies the run: source digests, recipe, calibration, dtype, seed
    blocks: str  # module path of the list of blocks
    layers: dict[str, LayerRecord]
    tensors: dict[str, TensorRecord]
    files: dict[str, str]  # SHA-256 of every other file: configuration, index, tokenizer
    shards: dict[str, str]  # SHA-256 of each shard's header: with those of the tensors, every byte is accounted for
    fallbacks: list[Fallback]
    totals: dict[str, float]
    structure: list[dict[str, Any]] = []  # what the structural steps of the recipe found, in their order
    plain: bool = False  # transformers loads it without this package
    training: dict[str, list[float]] = {}  # what was trained (a block, "model", "healing") → error on held-out windows before and after; curves


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes as they lie in a safetensors file."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest() if tensor.numel() else hashlib.sha256().hexdigest()


def fingerprint(run: dict[str, Any]) -> str:
    """What a shard's header says of the run that it belongs to."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def head_sha256(file: Path) -> str:
    """SHA-256 of a safetensors file's header: its length, the names, the places of the tensors and the record that we keep there."""
    with open(file, "rb") as f:
        return hashlib.sha256((length := f.read(8)) + f.read(int.from_bytes(length, "little"))).hexdigest()


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, as `recipe.steps.0.bits: 4 → 3`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [d for k in {**old, **new} for d in differences(old.get(k), new.get(k), f"{at}.{k}" if at else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{at}.{i}")]
    if old == new:
        return []
    return [f"{at}: " + " → ".join(s if len(s) <= 80 else s[:77] + "..." for s in (json.dumps(old), json.dumps(new)))]


def write_json(path: Path, value: Any) -> None:
    """Atomic and durable: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path.parent):
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def room_for(file: Path) -> None:
    """Make the folder of a file that long work will end in. Raises CompressError now, and not then, where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressError(f"{file}: cannot be written: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise CompressError(f"{file}: cannot be written: {'it is a folder' if file.is_dir() else 'no permission'}")


@contextmanager
def writing(folder: Path):
    """Writing errors as one line; finished shards stay where they are."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) or "No space" in str(error)
        if not full and isinstance(error, OSError) and error.errno is None:
            raise
        free = shutil.disk_usage(folder).free
        raise CompressError(f"{folder}: cannot write: {'the disk is full' if full else error} ({free / 1e9:.2f} GB free); "
                            "finished blocks are kept: make room and run the same command again") from error  # fmt: skip


class Writer:
    """The folder of a run under way. Refuses a folder that belongs to another run; knows which shards are complete."""

    def __init__(self, folder: Path, run: dict[str, Any], *, overwrite: bool = False):
        self.folder, self.run = folder, json.loads(json.dumps(run))
        self.fingerprint = fingerprint(self.run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompressError(f"{folder}: cannot be made: {error.strerror}") from error
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.complete = self._claim(overwrite)
        except BlockingIOError as error:
            self.close()
            raise CompressError(f"{folder}: another compress run is writing here; wait for it or choose another folder") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._lock)

    def _claim(self, overwrite: bool) -> bool:
        """Make the folder this run's; True where nothing is left to do. A kill at any point leaves a folder that can be claimed again."""
        manifest, partial = self.folder / MANIFEST, self.folder / PARTIAL
        found = next((f for f in (manifest, partial) if f.is_file()), None)
        if found is None and any(f.name != f"{PARTIAL}.tmp" for f in self.folder.iterdir()):
            raise CompressError(f"{self.folder}: holds files but no compress run; choose an empty or new folder")
        known: set[str] = set()
        if found is not None:
            old: Any = None
            try:
                old = json.loads(found.read_text())
                known = set(old.get("files", {}))
                changed = differences(old["run"], self.run)
                shards = sorted({Path(t["shard"]).stem for t in old["tensors"].values()}) if found == manifest else []
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not overwrite:
                    raise CompressError(f"{found}: damaged ({error}); start over with --overwrite") from error
                changed = [str(error)]
            if old_clearing := (old.get("clearing") if isinstance(old, dict) and not overwrite and not changed else None):
                self._clear(old_clearing)  # an --overwrite was killed while it removed the files of the run before
                return False
            if changed and not overwrite:
                raise CompressError(f"{self.folder}: holds another run, which differs in {'; '.join(changed[:4])}"
                                    f"{f' and {len(changed) - 4} more' if len(changed) > 4 else ''}; use --overwrite or another -o")  # fmt: skip
            if not changed and not (overwrite and found == manifest):  # --overwrite replaces other runs and finished ones, not this one half done
                for leftover in self.folder.glob("*.tmp"):
                    leftover.unlink()
                if found == manifest and all(self.header(shard) for shard in shards) and all(
                        (self.folder / name).is_file() and file_sha256(self.folder / name) == digest for name, digest in old["files"].items()):  # fmt: skip
                    partial.unlink(missing_ok=True)
                    return True
                os.replace(found, partial)  # a finished artifact with a damaged shard becomes unfinished: only that shard is made again
                return False
        self._clear(sorted(f.name for f in self.folder.iterdir() if f.is_file() and _ours(f.name, known)))
        return False

    def _clear(self, names: list[str]) -> None:
        """Remove the files of the run before, the manifest first; what is still to remove is on record, so that a kill in between loses nothing."""
        write_json(self.folder / PARTIAL, {"run": self.run, "clearing": names} if names else {"run": self.run})
        for name in (MANIFEST, *names):
            if name != PARTIAL:
                (self.folder / name).unlink(missing_ok=True)
        if names:
            write_json(self.folder / PARTIAL, {"run": self.run})

    def header(self, shard: str) -> dict[str, Any] | None:
        """The record of a complete shard of this run whose every tensor has the hash it was written with, else None."""
        file = self.folder / f"{shard}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as f:
                header = json.loads((f.metadata() or {}).get("compress", "{}"))
                if header.get("fingerprint") != self.fingerprint:
                    return None
                if set(header["tensors"]) != set(f.keys()) or any(sha256(f.get_tensor(n)) != t["sha256"] for n, t in header["tensors"].items()):
                    return None
        except (SafetensorError, ValueError, KeyError):
            return None
        return header | {"sha256": head_sha256(file)}

    def read(self, shard: str) -> dict[str, Tensor]:
        with safe_open(self.folder / f"{shard}.safetensors", framework="pt") as f:
            return {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118

    def commit(self, shard: str, tensors: dict[str, Tensor], layers: dict[str, LayerRecord], fallbacks: list[dict],
               training: dict[str, list[float]] | None = None) -> dict[str, Any]:  # fmt: skip
        """Write a shard under a temporary name, sync it, rename it: the one commit point. Returns its header."""
        file = f"{shard}.safetensors"
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        records = {name: TensorRecord(shard=file, dtype=str(t.dtype)[6:], shape=list(t.shape), sha256=sha256(t)).model_dump()
                   for name, t in sorted(tensors.items())}  # fmt: skip
        header = {"fingerprint": self.fingerprint, "layers": {n: r.model_dump() for n, r in layers.items()}, "tensors": records, "fallbacks": fallbacks,
                  "training": training or {}}
        temporary = self.folder / f"{file}.tmp"
        with writing(self.folder):
            # one metadata key only: safetensors writes several in no fixed order; ours keeps its order, so that a resumed run sees the same
            save_file(tensors, temporary, metadata={"compress": json.dumps(header)})
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
            _sync(temporary)
            os.replace(temporary, self.folder / file)
            _sync(self.folder)
        return header | {"sha256": head_sha256(self.folder / file)}

    def remove(self, shard: str) -> None:
        (self.folder / f"{shard}.safetensors").unlink(missing_ok=True)
        _sync(self.folder)

    def finish(self, headers: dict[str, dict], source: Path, changes: dict[str, Any], blocks: str, totals: dict[str, float], version: str, *,
               plain: bool = False, structure: list[dict[str, Any]] | None = None) -> Manifest:  # fmt: skip
        """Everything beside the shards, the manifest last; `changes` are the values of config.json that a view or a structural step changed.

        `plain`: the shards are what the class of the model stores, so that transformers loads them without this package.
        """
        config = {k: v for k, v in (json.loads((source / "config.json").read_text()) | changes).items() if v is not None or k not in changes}
        if not plain:
            config["quantization_config"] = {"quant_method": "compress", "format_version": FORMAT_VERSION, "manifest": MANIFEST}
        weights = {name: t for shard, h in headers.items() if f"{shard}.safetensors" != PROBE for name, t in h["tensors"].items()}
        stored = sum(torch.Size(t["shape"]).numel() * getattr(torch, t["dtype"]).itemsize for t in weights.values())
        for file in companions(source):
            with writing(self.folder):
                shutil.copyfile(file, self.folder / file.name)
                _sync(self.folder / file.name)
        write_json(self.folder / "config.json", config)
        write_json(self.folder / INDEX, {"metadata": {"total_size": stored}, "weight_map": {n: t["shard"] for n, t in sorted(weights.items())}})
        files = {name: file_sha256(self.folder / name) for name in ["config.json", INDEX, *(f.name for f in companions(source))]}
        fallbacks: dict[tuple, Fallback] = {}
        for entry in (f for h in headers.values() for f in h["fallbacks"]):
            entry = Fallback(**entry)
            merged = fallbacks.setdefault((entry.what, entry.where, entry.detail), entry.model_copy(update={"count": 0}))
            merged.count += entry.count
        manifest = Manifest(format_version=FORMAT_VERSION, compress=version, run=self.run, blocks=blocks,
                            layers={n: r for h in headers.values() for n, r in h["layers"].items()},
                            tensors={n: t for h in headers.values() for n, t in h["tensors"].items()},
                            files=files, shards={f"{shard}.safetensors": h["sha256"] for shard, h in headers.items()},
                            fallbacks=list(fallbacks.values()), totals=totals, structure=structure or [], plain=plain,
                            training={k: v for h in headers.values() for k, v in h["training"].items()})  # fmt: skip
        write_json(self.folder / MANIFEST, manifest.model_dump())
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return manifest


def totals(headers: dict[str, dict], parameters: int, source_bytes: int, planned_bytes: int | None = None) -> dict[str, float]:
    """The manifest's totals, from the shards' headers. parameters: of the whole model; planned_bytes None: there was no plan that could differ."""
    layers = [r for h in headers.values() for r in h["layers"].values()]
    stored = sum(torch.Size(t["shape"]).numel() * getattr(torch, t["dtype"]).itemsize
                 for h in headers.values() for t in h["tensors"].values() if t["shard"] != PROBE)  # fmt: skip
    linear_parameters, linear_bytes = sum(r["parameters"] for r in layers), sum(r["bytes"] for r in layers)
    return {"parameters": parameters, "linear_parameters": linear_parameters, "bytes": stored, "linear_bytes": linear_bytes,
            "source_bytes": source_bytes, "linear_bits": 8 * linear_bytes / linear_parameters if layers else 8 * stored / parameters,
            "model_bits": 8 * stored / parameters, "planned_bytes": stored if planned_bytes is None else planned_bytes}  # fmt: skip


def strictly(strict: bool, fallbacks: list[dict]) -> None:
    """Raises CompressError on any fallback, where that was asked for."""
    if strict and fallbacks:
        first = fallbacks[0]
        raise CompressError(f"--strict: {first['what']} at {first['where']} ({first['detail']})"
                            + (f" and {len(fallbacks) - 1} more" if len(fallbacks) > 1 else "") + "; finished blocks are kept: "
                            "run again without --strict to accept it")  # fmt: skip


def _ours(name: str, known: set[str]) -> bool:
    """Is a file in an output folder one that a run wrote? Notes and results that a user put beside them are not removed."""
    patterns = ("block-?????.safetensors", "outer-?????.safetensors", "teacher-?????.safetensors", "refit-?????.safetensors", "distilled.safetensors",
                "healing.safetensors", "*.tmp", *COMPANIONS)  # fmt: skip
    return name in known | {MANIFEST, INDEX, PROBE, "config.json"} or any(fnmatchcase(name, p) for p in patterns)


def companions(source: Path) -> list[Path]:
    """The files that travel with the weights: tokenizer, chat template, generation and processor configuration, model code (run only where asked)."""
    return sorted({f for pattern in COMPANIONS for f in source.glob(pattern) if f.is_file()})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished artifact, checked: known version, no path that leaves the folder."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise CompressError(f"{folder}: no such folder")
    if not file.is_file():
        if (folder / PARTIAL).is_file():
            raise CompressError(f"{folder}: an unfinished run: give the same command (compress run or compress heal) again to finish it")
        raise CompressError(f"{folder}: not an artifact: {MANIFEST} is missing")
    try:
        data = json.loads(file.read_text())
        if data.get("format_version", 0) > FORMAT_VERSION:
            raise CompressError(f"{file}: format version {data['format_version']}, this package reads up to {FORMAT_VERSION}: upgrade compress")
        manifest = Manifest.model_validate(data)
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, CompressError):
            raise
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CompressError(f"{file}: damaged manifest ({reason})") from error
    for name, tensor in manifest.tensors.items():
        if Path(tensor.shard).name != tensor.shard or tensor.shard in ("", ".", ".."):
            raise CompressError(f"{file}: tensor {name} points to {tensor.shard!r}, outside the folder; the manifest was tampered with")
    return manifest
