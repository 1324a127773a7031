"""python -m compress.eval.bench.plan [--models llama opt gpt2] [--recipes …]: is what `compress plan` says what a run then takes?

Random checkpoints of three architectures go through five recipes, each run in a process of its own. Reported beside the plan: bytes of the artifact,
VmHWM of the process above that of one that imports torch and transformers, and seconds.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import compress
from compress.artifact import read_manifest

from .memory import IMPORTS, RUN, add_text, peak

WIDE = dict(vocab_size=8192, bos_token_id=0, eos_token_id=0)
MODELS = {
    "llama": ("llama", dict(WIDE, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=4)),
    "opt": ("opt", dict(WIDE, hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_hidden_layers=3, num_attention_heads=12)),
    "gpt2": ("gpt2", dict(WIDE, n_embd=768, n_layer=3, n_head=12)),
    "mixtral": ("mixtral", dict(WIDE, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
                                num_local_experts=8, num_experts_per_tok=2)),
}  # fmt: skip
RECIPES = ["w4-rtn", "w4-gptq", "w3-balanced", "sparse-2of4", "svd-20"]


def build(name: str, folder: Path) -> Path:
    """A random bf16 checkpoint; made once."""
    made = folder / name
    if not made.is_dir():
        kind, fields = MODELS[name]
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**fields), dtype=torch.bfloat16).save_pretrained(made)
        add_text(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "compress-plan")
    parser.add_argument("--models", nargs="+", default=["llama", "opt", "mixtral"], choices=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--trace", action="store_true", help="print where the most was resident")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    imports, _ = peak(IMPORTS)
    print(f"{a.samples}×{a.seqlen} tokens, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, torch {torch.__version__}; imports: {imports / 1e6:.0f} MB\n")
    print("| model | recipe | bytes: planned, made | MB above the imports: planned, measured | ratio | seconds: planned, measured |\n" + "|---" * 6 + "|")
    for name in a.models:
        model = build(name, a.folder)
        for recipe in a.recipes:
            out = a.folder / f"out-{os.getpid()}"
            planned = compress.plan(str(model), recipe, samples=a.samples, seqlen=a.seqlen)
            used, stages = peak(RUN, "run", str(model), "-r", recipe, "-c", f"file:{model / 'calibration.txt'}", "-o", str(out), "--samples", str(a.samples),
                                "--seqlen", str(a.seqlen))  # fmt: skip
            line, _, anonymous, mapped = max(stages, key=lambda s: s[2] + s[3])
            made = int(read_manifest(out).totals["bytes"])
            print(f"| {name} | {recipe} | {planned.bytes_after}, {made} | {planned.peak_ram / 1e6:.0f}, {(used - imports) / 1e6:.0f} | "
                  f"{planned.peak_ram / (used - imports):.2f} | {planned.seconds:.0f}, {stages[-1][1]:.0f} |", flush=True)  # fmt: skip
            shutil.rmtree(out)
            if a.trace:
                print(f"largest before `{line[:70]}`: {anonymous / 1e6:.0f} MB anonymous, {mapped / 1e6:.0f} MB mapped")


if __name__ == "__main__":
    main()
