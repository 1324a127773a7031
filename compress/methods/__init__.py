"""Methods: one frozen dataclass a file. Its fields are its options; calling it turns (weight [out, in], Stats) into a Format."""

import dataclasses
import inspect
import re
import sys
from typing import Any, get_args, get_type_hints

from .gptq import GPTQ
from .hqq import HQQ
from .lnq import LNQ
from .nf import NF
from .rtn import RTN
from .sinq import SINQ

METHODS = {"rtn": RTN, "gptq": GPTQ, "nf": NF, "hqq": HQQ, "sinq": SINQ, "lnq": LNQ}


def describe() -> list[dict[str, Any]]:
    """[{"name", "about", "options": [{"name", "values", "default", "help"}]}]: what `inspect --methods` and docs/methods.md show.

    Nothing is written twice: `about` opens the method's file, `help` is the comment beside the field, `values` its type.
    """
    described = []
    for name, method in METHODS.items():
        about = " ".join((sys.modules[method.__module__].__doc__ or "").split("\n\n")[0].split())
        comments: dict[str, str] = {}
        for cls in filter(dataclasses.is_dataclass, reversed(method.__mro__)):  # a field that a subclass repeats has its comment there
            comments |= re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(cls), re.M)
        types = get_type_hints(method)
        values = {f.name: ", ".join(map(str, get_args(types[f.name]))) or types[f.name].__name__ for f in dataclasses.fields(method)}
        options = [{"name": f.name, "values": values[f.name], "default": f.default, "help": comments.get(f.name, "")} for f in dataclasses.fields(method)]
        described.append({"name": name, "about": about, "options": options})
    return described
