"""Methods: one frozen dataclass a file. Its fields are its options; calling it turns (weight [out, in], Stats) into a Format."""

import dataclasses
import inspect
import re
import sys
from typing import Any, get_args, get_origin, get_type_hints

from .admm import ADMM
from .awp import AWP
from .binary import Binary
from .dense_sparse import DenseSparse
from .fp import FP
from .gptq import GPTQ
from .hqq import HQQ
from .lnq import LNQ
from .magnitude import Magnitude
from .nf import NF
from .quant_lowrank import QuantLowRank
from .rtn import RTN
from .sinq import SINQ
from .slim import SLiM
from .sparsegpt import SparseGPT
from .svd import SVD
from .ternary import Ternary
from .trellis import TrellisCoding
from .wanda import Wanda

METHODS = {
    "rtn": RTN, "nf": NF, "fp": FP, "hqq": HQQ, "sinq": SINQ,
    "gptq": GPTQ, "lnq": LNQ, "trellis": TrellisCoding, "ternary": Ternary, "binary": Binary,
    "magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "awp": AWP, "admm": ADMM,
    "svd": SVD, "slim": SLiM, "quant-lowrank": QuantLowRank, "dense-sparse": DenseSparse,
}  # fmt: skip


def describe(table: dict[str, type] | None = None) -> list[dict[str, Any]]:
    """[{"name", "about", "options": [{"name", "values", "default", "help"}]}]: what `compress methods` and docs/methods.md show; by default of METHODS.

    Nothing is written twice: `about` opens the file (or the class, where several share one), `help` is the comment beside the field, `values` its type.
    """
    described = []
    table = METHODS if table is None else table
    for name, method in table.items():
        shared = sum(other.__module__ == method.__module__ for other in table.values()) > 1
        about = " ".join(((method if shared else sys.modules[method.__module__]).__doc__ or "").split("\n\n")[0].split())
        comments: dict[str, str] = {}
        for cls in filter(dataclasses.is_dataclass, reversed(method.__mro__)):  # a field that a subclass repeats has its comment there
            comments |= re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(cls), re.M)
        types = get_type_hints(method)
        say = lambda t: f"list of {get_args(t)[0].__name__}" if get_origin(t) is tuple else ", ".join(map(str, get_args(t))) or t.__name__
        values = {f.name: say(types[f.name]) for f in dataclasses.fields(method)}
        options = [{"name": f.name, "values": values[f.name], "default": f.default, "help": comments.get(f.name, "")} for f in dataclasses.fields(method)]
        described.append({"name": name, "about": about, "options": options})
    return described
