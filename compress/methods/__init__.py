"""Methods: one frozen dataclass a file. Its fields are its options; calling it turns (weight [out, in], Stats) into a Format."""

import dataclasses
import inspect
import re
import sys
from typing import Any, get_args, get_type_hints

from .admm import ADMM
from .awp import AWP
from .dense_sparse import DenseSparse
from .gptq import GPTQ
from .magnitude import Magnitude
from .rtn import RTN
from .slim import SLiM
from .sparsegpt import SparseGPT
from .svd import SVD
from .trellis import TrellisCoding
from .wanda import Wanda

METHODS = {
    "rtn": RTN,
    "gptq": GPTQ, "trellis": TrellisCoding,
    "magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "awp": AWP, "admm": ADMM,
    "svd": SVD, "slim": SLiM, "dense-sparse": DenseSparse,
}  # fmt: skip


def describe() -> list[dict[str, Any]]:
    """[{"name", "about", "options": [{"name", "values", "default", "help"}]}]: what `inspect --methods` and docs/methods.md show."""
    return [describe_options(name, method) for name, method in METHODS.items()]


def describe_options(name: str, cls: type) -> dict[str, Any]:
    """One dataclass of options. Nothing is written twice: `about` opens its file, `help` is the comment beside the field, `values` its type."""
    about = " ".join((sys.modules[cls.__module__].__doc__ or "").split("\n\n")[0].split())
    comments: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):  # a field that a subclass repeats has its comment there
        comments |= re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(base), re.M)
    types = get_type_hints(cls)
    values = {f.name: ", ".join(map(str, get_args(types[f.name]))) or types[f.name].__name__ for f in dataclasses.fields(cls)}
    options = [{"name": f.name, "values": values[f.name], "default": f.default, "help": comments.get(f.name, "")} for f in dataclasses.fields(cls)]
    return {"name": name, "about": about, "options": options}
