"""Post-training compression of Hugging Face transformers: a checkpoint and a budget in, a verified smaller model out.

    import compress
    report = compress.run("Qwen/Qwen3-0.6B", recipe="w4-gptq", calibration="wikitext2", output="out")
    model = compress.load("out")
"""

from pathlib import Path

# In a bare checkout or an editable install kernels/, calibration/, eval/ and recipes/ lie beside this folder, not in it (see pyproject.toml).
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from . import hf as _hf  # noqa: F401  registers the quantizer, so that AutoModelForCausalLM.from_pretrained(artifact) works
from .api import (
    Page,
    Report,
    auto,
    compare,
    diagnose,
    evaluate,
    export,
    extract,
    heal,
    import_checkpoint,
    inspect,
    load,
    loads_in,
    plan,
    report,
    run,
    tune_kernels,
    verify,
)
from .errors import CompressError
from .export import can_export
from .recipe import Recipe, Step
from .version import __version__

# Some verbs share their names with modules, which are imported by now: `from compress.eval.compare import compare` still works.
eval = evaluate

__all__ = [
    "CompressError", "Page", "Recipe", "Report", "Step", "__version__", "auto", "can_export", "compare", "diagnose", "eval", "evaluate", "export", "extract",
    "heal", "import_checkpoint", "inspect", "load", "loads_in", "plan", "report", "run", "tune_kernels", "verify",
]  # fmt: skip
