"""Methods: one frozen dataclass a file. Its fields are its options; calling it turns (weight [out, in], Stats) into a Format."""

from .gptq import GPTQ
from .rtn import RTN

METHODS = {"rtn": RTN, "gptq": GPTQ}
