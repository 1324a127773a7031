"""The running Python's own standard library as a corpus: offline, deterministic, with a held-out split.

A module goes to "heldout" when a SHA-256 of its relative path says so (8 in 100), so the split does not move when
another Python version adds or removes modules; only the text inside the modules follows the version. Tests, generated
tables and build settings are left out.
"""
import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

from compress.errors import CompressError

HELDOUT_PERCENT = 8
SKIP = {"site-packages", "dist-packages", "__pycache__",
        "test", "tests", "idle_test", "turtledemo",     # 3.12 moved ctypes/test etc. under test/: by name, 3.11 agrees
        "encodings", "pydoc_data"}                      # generated: predictable tables would flatter a perplexity


def is_heldout(path: str) -> bool:
    """Whether the module at this relative posix path is held out: a stable function of the path alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100 < HELDOUT_PERCENT


def stdlib_documents(split: Literal["train", "heldout"]) -> dict[str, str]:
    """Relative path -> source of every module in the split, sorted by path. Files that are not UTF-8 are not in it."""
    if split not in ("train", "heldout"):
        raise CompressError(f'split {split!r} does not exist: use "train" or "heldout"')
    root, documents = Path(sysconfig.get_path("stdlib")), {}
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        path = file.relative_to(root)
        # _sysconfigdata_*.py and config-*/ hold the paths and compiler flags of the machine that built this Python
        if SKIP & set(path.parts) or path.name.startswith("_sysconfigdata") or path.parts[0].startswith("config-"):
            continue
        if is_heldout(path.as_posix()) != (split == "heldout"):
            continue
        try:
            documents[path.as_posix()] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:      # a source with a coding cookie (latin-1, ...): left out by contract, see above
            continue
    if not documents:
        raise CompressError(f"0 standard library modules under {root}: this Python ships without sources; "
                            "give a text of your own")
    return documents


def stdlib_text(split: Literal["train", "heldout"]) -> str:
    """The split as one string, modules in path order."""
    return "\n".join(stdlib_documents(split).values())
