"""Structure: fewer blocks, heads, neurons or channels; what is left is a smaller dense model, fast everywhere without a kernel.

A step of a recipe's `structure:` is a frozen dataclass of two parts:

    measure(source, enter, scratch) → plan     a small JSON value: what stays. enter(checkpoint, windows) sends calibration text into a model (0: all of it)
    apply(source, plan, scratch) → smaller     the checkpoint of the smaller model, read lazily through the larger one (smaller.py)

and `guess(source)`, a plan of the same size found without any text, for `compress plan`. Steps follow one another; the recipe's views and methods see
what the last one left. Plans go into the manifest, what a plan has under "notes" among its fallbacks.
"""

from .drop import Drop
from .fuse import Fuse
from .loraprune import LoRAPrune
from .nest import Nest
from .program import Program
from .refit import Refit
from .slice import Slice
from .width import Width

STRUCTURE = {"drop": Drop, "fuse": Fuse, "program": Program, "width": Width, "loraprune": LoRAPrune,
             "slice": Slice, "nest": Nest, "refit": Refit}
