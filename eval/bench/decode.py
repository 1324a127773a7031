"""python -m compress.eval.bench.decode [--folder DIR] [--blocks 22] [--new-tokens 16]: tokens/s of a 1.1B model, in bf16 and compressed, in one run.

A random Llama of TinyLlama-1.1B's shape (eval/bench/memory.py) is rounded to nearest twice, int4 in groups of 128 and int8 per channel, and each reads a
prompt of 128 tokens and decodes greedily at batch 1 in a process of its own (eval/speed.py), the original first and last: what lies between its two
figures is noise. Random weights: speed does not depend on them. Kernels are measured before, into a table of this run's own. Everything is kept in DIR
and found again.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

import compress
from compress.eval import speed
from compress.eval.bench.memory import build

INT4, INT8 = {"bits": 4, "group_size": 128}, {"bits": 8, "group_size": -1, "sym": True}
MADE = {"int4 g128": (INT4, {}), "int4 g128, dense copies": (INT4, {"memory": "keep"}), "W4A8 g128": (INT4, {"activations": "int8"}),
        "W8A8": (INT8, {"activations": "int8"})}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()
    model, rows = build(args.folder, args.blocks), {}
    os.environ["COMPRESS_CACHE"] = str(args.folder)
    for name, (options, how) in [("bf16", ({}, {})), *MADE.items(), ("bf16 again", ({}, {}))]:
        path = model
        if options:
            path = args.folder / f"{model.name}-w{options['bits']}"
            compress.run(str(model), {"name": f"w{options['bits']}", "steps": [{"method": "rtn", **options}]}, output=path, show=False)
        rows[name] = speed.measure(str(path), new_tokens=args.new_tokens, prompt_tokens=128, **how)
        decode, prefill = (rows[name][f"{phase}_tokens_per_second"] for phase in ("decode", "prefill"))
        base = rows["bf16"]
        print(f"{name:<23} {decode:6.2f} tokens/s, {decode / base['decode_tokens_per_second']:.2f}×; prompt {prefill:.0f} tokens/s, "
              f"{prefill / base['prefill_tokens_per_second']:.2f}×; peak {rows[name]['peak_bytes'] / 1e9:.2f} GB", flush=True)  # fmt: skip
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
