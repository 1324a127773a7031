"""Results by content: what was measured of an artifact on a text is not measured again, `OUT.eval.json` beside the folder says what and shows the figures.

The key is what decides the figures: the manifest's SHA-256 (which has that of every tensor), a stamp of the reference, the SHA-256 of the tokens, dtype,
device kind, versions. It is a plain file to read or delete; seconds and memory are never in it, for they belong to the moment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.artifact import MANIFEST, file_sha256, head_sha256, write_json
from compress.errors import CompressError


def path(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.parent / f"{folder.name}.eval.json"


def stamp(folder: Path) -> str:
    """SHA-256 of what a model is: an artifact by its manifest and its files' sizes, another by its configuration and each file's header, size and time."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / MANIFEST).is_file():
        parts = [file_sha256(folder / MANIFEST), *(f"{f.name} {f.stat().st_size}" for f in files)]
    else:  # its gigabytes are not read for this
        parts = [file_sha256(folder / "config.json"), *(f"{f.name} {head_sha256(f)} {(s := f.stat()).st_size} {s.st_mtime_ns}" for f in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cached(folder: Path, key: dict[str, Any], make: Callable[[], dict], *, fresh: bool = False,
           tell: Callable[[str], None] = lambda line: None) -> dict:  # fmt: skip
    """`make()`, or what it gave before for the same key, and `tell` hears of it.

    Only artifacts have a file; one that cannot be read or written costs time, not the result.
    """
    if not (folder / MANIFEST).is_file():
        return make()
    digest, held = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest(), {}
    with suppress(OSError, ValueError):
        held = json.loads(path(folder).read_text())
    if not fresh and isinstance(held, dict) and (entry := held.get(digest)) and isinstance(entry.get("result"), dict):
        tell(f"[{key.get('what', 'figures')}] measured before, from {path(folder).name} (--fresh measures again)")
        return entry["result"]
    result = make()
    with suppress(OSError, CompressError):
        write_json(path(folder), (held if isinstance(held, dict) else {}) | {digest: {"key": key, "result": result}})
    return result
