"""Side by side with llm-compressor's GPTQ, SparseGPT and Wanda, and with AutoRound (200 iterations): the same model, tokens, bytes and machine, one after
the other, in fresh processes.

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install llmcompressor auto-round
    python -m compress.eval.bench.peer --peer peer/bin/python --model ../shared/yardstick/llama-16m \\
        --calibration ../shared/yardstick/wikitext2-valid.txt --evaluation ../shared/yardstick/wikitext2-test.txt \\
        --grids 4:128 3:128 --presets gptq best --peers gptq autoround --sparse 0.5 2:4

Seconds are given three times: of the whole process (imports, tokenising, writing), the processor's for it, which other jobs change little, and of the
compression call alone. All results are evaluated by the same code in this process: fp32 arithmetic, the peer's weights as its own dequantization left
them in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import compress

from .table import timed

PEER = """
import json, sys, time
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model_path, tokens_path, out, method, asked = sys.argv[1:6]
tokens = load_file(tokens_path)["tokens"]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
names = set(model.state_dict())
n, _, m = asked.partition(":")
if method == "autoround":
    from auto_round import AutoRound
    started = time.perf_counter()
    tuner = AutoRound(model, AutoTokenizer.from_pretrained(model_path), scheme="W4A16", bits=int(n), group_size=int(m), sym=False, iters=200,
                      dataset=[{"input_ids": t[None]} for t in tokens], nsamples=len(tokens), seqlen=tokens.shape[1], device_map="cpu")
    model, _ = tuner.quantize()
else:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    if method == "gptq":
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
            num_bits=int(n), type="int", symmetric=False, strategy="group", group_size=int(m)))
        modifier = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    else:
        modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method](
            sparsity=1 - int(n) / int(m) if m else float(n), mask_structure=asked if m else "0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    started = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=modifier, num_calibration_samples=len(tokens), max_seq_length=tokens.shape[1])
call = time.perf_counter() - started
state = {k: v.contiguous().clone() for k, v in model.state_dict().items() if k in names and not (k == "lm_head.weight" and model.config.tie_word_embeddings)}
assert len(state) >= len(names) - 1, sorted(names - set(state))
save_file(state, out + "/model.safetensors", metadata={"format": "pt"})
print(json.dumps({"call_seconds": call}))
"""


def ours(a: argparse.Namespace, recipe: str, settings: list[str], out: Path) -> dict:
    """`compress run` as a user would type it, timed from outside."""
    command = [sys.executable, "-m", "compress", "run", a.model, "-o", str(out), "--recipe", recipe, "--calibration", f"file:{a.calibration}",
               "--samples", str(a.samples), "--seqlen", str(a.seqlen), "--overwrite", "--json", str(out.with_suffix(".json")),
               *(f"--set={s}" for s in settings)]  # fmt: skip
    _, took = timed(command, check=True)
    return took | {"call_seconds": json.loads(out.with_suffix(".json").read_text())["seconds"]}


def theirs(a: argparse.Namespace, method: str, asked: str, out: Path) -> dict:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from compress.calibration.data import load_calibration

    data = load_calibration(f"file:{a.calibration}", AutoTokenizer.from_pretrained(a.model), samples=a.samples, seqlen=a.seqlen)
    out.mkdir(parents=True)
    save_file({"tokens": data.tokens}, out / "tokens.safetensors")
    child, took = timed([a.peer, "-c", PEER, a.model, str(out / "tokens.safetensors"), str(out), method, asked], text=True, cwd="/")
    if child.returncode:
        raise SystemExit(f"the peer failed:\n{child.stderr[-3000:]}")
    for file in Path(a.model).iterdir():
        if file.suffix in (".json", ".model", ".txt") and not file.name.endswith(".index.json"):
            (out / file.name).write_bytes(file.read_bytes())
    (out / "tokens.safetensors").unlink()
    return json.loads(child.stdout.strip().splitlines()[-1]) | took


def tasks(a: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[Path], dict]]]:
    """(who, what, how): a row of the table each."""
    for grid in a.grids:
        bits, _, group = grid.partition(":")
        for preset in a.presets:
            yield f"compress {preset}", f"int{bits} g{group}", partial(ours, a, f"w{bits}-{preset}", [f"gptq.group_size={group}", *a.set])
        for peer in a.peers if a.peer else ():
            yield {"gptq": "llm-compressor GPTQ", "autoround": "AutoRound"}[peer], f"int{bits} g{group}", partial(theirs, a, peer, grid)
    for asked in a.sparse:
        recipe = ("sparse-2of4", [f"admm.pattern={asked}"]) if ":" in asked else ("sparse-50", [f"admm.sparsity={asked}"])
        yield "compress", f"sparse {asked}", partial(ours, a, recipe[0], [*recipe[1], *a.set])
        for method in ("SparseGPT", "Wanda") if a.peer else ():
            yield f"llm-compressor {method}", f"sparse {asked}", partial(theirs, a, method.lower(), asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True, nargs="+")
    parser.add_argument("--peer", help="python of an environment with llm-compressor; without it only ours is measured")
    parser.add_argument("--grids", nargs="*", default=["4:128", "3:128", "2:64"], help="bits:group_size")
    parser.add_argument("--presets", nargs="*", default=["gptq"], help="of ours for each grid: gptq, balanced, best")
    parser.add_argument("--peers", nargs="*", default=["gptq"], choices=["gptq", "autoround"], help="of theirs for each grid")
    parser.add_argument("--sparse", nargs="*", default=[], help="shares of zeros or N:M patterns, e.g. 0.5 2:4")
    parser.add_argument("--set", nargs="*", default=[], help="options of ours, e.g. gptq.sweeps=2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="+", default=[192, 64], help="evaluation windows, one number a text")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, what, make in tasks(a):
            out = Path(folder) / f"{name}-{what}".replace(" ", "-").replace(":", "of")
            timing = make(out)
            row = {"name": name, "what": what, **timing}
            for text, windows in zip(a.evaluation, a.windows, strict=False):
                e = compress.evaluate(str(out), a.model, f"file:{text}", samples=windows, seqlen=a.seqlen, show=False)
                row[Path(text).stem] = {"perplexity": e["perplexity"]["token"], "kl": e["kl"], "top1": e["top1"],
                                        "original": e["reference"]["perplexity"]["token"]}  # fmt: skip
            rows.append(row)
            texts = "  ".join(f"{Path(t).stem}: ppl {row[Path(t).stem]['perplexity']:.3f} KL {row[Path(t).stem]['kl']['mean']:.5f} "
                              f"top-1 {row[Path(t).stem]['top1']['agreement']:.4f}" for t in a.evaluation)  # fmt: skip
            print(f"{name:24} {what:11} {timing['seconds']:6.1f} s "
                  f"({timing['processor_seconds']:.0f} s of processor, call {timing['call_seconds']:6.1f} s)  {texts}", flush=True)
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
