"""Scratch: OUT.structure/, beside OUT while a run is under way. Plans and refitted tensors, so that a killed run need not find them again."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..artifact import write_json, writing
from ..errors import CompressError


class Scratch:
    """Belongs to one run; what another run left there is removed. Every file is renamed into its place when it is whole."""

    def __init__(self, output: Path, run: dict[str, Any]):
        self.folder = output.resolve().with_name(f"{output.resolve().name}.structure")
        mark, run_id = self.folder / "run", hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        with writing(self.folder.parent):
            if self.folder.is_dir() and not (mark.is_file() and mark.read_text() == run_id):
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(run_id)

    def of(self, k: int) -> Scratch:
        """The part of the k-th step: two of a kind keep their files apart."""
        part = copy.copy(self)
        part.folder = self.folder / f"step-{k}"
        with writing(self.folder):
            part.folder.mkdir(exist_ok=True)
        return part

    def plan(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave before."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            write_json(file, make())
        return json.loads(file.read_text())

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            made = {n: t.contiguous().cpu() for n, t in make().items()}
            with writing(self.folder):
                save_file(made, file.with_suffix(".tmp"))
                file.with_suffix(".tmp").replace(file)
        with safe_open(file, framework="pt") as f:
            return {n: f.get_tensor(n).clone() for n in f.keys()}  # noqa: SIM118

    def read(self, name: str, tensor: str) -> Tensor:
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as f:
                return f.get_tensor(tensor).clone()
        except (OSError, SafetensorError) as error:
            raise CompressError(f"{self.folder}: {name} cannot be read ({error}); remove the folder and run again") from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def note(what: str, where: str, detail: str) -> dict[str, Any]:
    """An entry of a plan's "notes", what did not go as asked: the manifest has them under `fallbacks`."""
    return {"what": what, "where": where, "count": 1, "detail": detail}


def brief(name: str, plan: dict[str, Any]) -> str:
    """A plan in a line, for the screen."""
    say = lambda v: f"{len(v)} entries" if isinstance(v, dict) else [round(x, 5) if isinstance(x, float) else x for x in v] if isinstance(v, list) else v
    return f"{name}  " + "  ".join(f"{key} {say(value)}" for key, value in plan.items() if key != "notes" and value not in ({}, []))
