"""python -m compress.eval.bench.layers: methods side by side, layer by layer, on the same weights and the same H of the original model.

    python -m compress.eval.bench.layers --model ../shared/yardstick/llama-16m --calibration ../shared/yardstick/wikitext2-valid.txt \\
        --methods svd:ratio=0.2 dense-sparse:ratio=0.2

Rows are layers, cells tr[(Ŵ−W) H (Ŵ−W)ᵀ] / tr[W H Wᵀ]: what a method does to a layer on its own, whatever earlier layers have become.
"""

from __future__ import annotations

import argparse
import re

import torch
from transformers import AutoTokenizer

from compress.calibration.data import load_calibration
from compress.checkpoint import Checkpoint
from compress.linear import get_weight
from compress.recipe import load
from compress.stream import Stream
from compress.walk import sites_of, stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--methods", required=True, nargs="+", help="NAME[:OPTION=VALUE…]")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    a = parser.parse_args()
    methods = {}
    for text in a.methods:
        name, *options = re.split(r":(?=\w+=)", text)
        methods[text] = load({"name": name, "steps": [{"method": name}]}).with_options([f"{name}.{o}" for o in options]).steps[0].build()
    source = Checkpoint(a.model, dtype=torch.float32)
    data = load_calibration(f"file:{a.calibration}", AutoTokenizer.from_pretrained(a.model), samples=a.samples, seqlen=a.seqlen)
    stream, rows = Stream(source, data.tokens), []
    print("| layer | bits | " + " | ".join(f"`{name}`" for name in methods) + " |", "|---" * (len(methods) + 2) + "|", sep="\n")
    for i in range(source.num_blocks):
        block = source.load_block(i)
        for stage in stages(block, list(sites_of(source, block, stream)), False):
            stats = stream.collect(block, {site.name: site.linears[0] for site in stage})
            for site in stage:
                for path in site.linears:
                    W, where, seen = get_weight(block.get_submodule(path)), f"{source.block_name(i)}.{path}", stats[site.name]
                    made = [m(W, seen, stored=block.stored[f"{path}.weight"], where=where) for m in methods.values()]
                    rows.append([seen.error(W, f.dequantize()) for f in made])
                    print(f"| {where} | {' '.join(f'{f.bits():.2f}' for f in made)} | {' | '.join(f'{e:.5f}' for e in rows[-1])} |", flush=True)
        stream.advance(block)
    for k, name in enumerate(list(methods)[1:], 1):
        ratios = [row[k] / row[0] for row in rows]
        print(f"\n{name}: {min(ratios):.3f} to {max(ratios):.3f} of {a.methods[0]}, below it in {sum(r < 1 for r in ratios)} of {len(ratios)} layers")


if __name__ == "__main__":
    main()
