"""The embedded default model: a 3.8M-parameter Llama, so every command has something to compress offline.

`corpus.py` is the text (the standard library), `train.py` made the weights from it, `model/` is the result with its
card. It exists to be compressed, not to be good.
"""
from pathlib import Path


def model_path() -> Path:
    """The folder AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load, no network needed."""
    return Path(__file__).parent / "model"
