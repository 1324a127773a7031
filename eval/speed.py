"""Speed and memory of a saved model, measured in a fresh process: `python -m compress.eval.speed PATH`.

A process that has compressed something holds the allocator's leftovers and warm caches, so it measures itself. Two
phases, because they are bound by different things: prefill (the whole prompt at once) by arithmetic, decode (one token
at a time, against the cache) by the bytes of weights read, which is what compression saves.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import compress
from compress.errors import CompressError
from compress.kernels import dispatch


def measure(path: str, *, new_tokens: int = 64, prompt_tokens: int = 32, dtype: torch.dtype | str | None = None,
            device: str = "cpu", activations: str | None = None, fuse: bool = False, memory: str = "auto") -> dict:
    """{"decode_tokens_per_second", "prefill_tokens_per_second", "peak_bytes", "load_seconds"} of the model at `path`.

    Greedy, batch 1, one static prompt; the first run is discarded, the rest are the median of three. peak_bytes is what
    loading and running added to the process's memory after its imports, plus the device's peak when it is not the CPU.
    """
    command = [sys.executable, "-m", "compress.eval.speed", path, "--new-tokens", str(new_tokens),
               "--prompt-tokens", str(prompt_tokens), "--device", device,
               *(["--dtype", str(dtype).removeprefix("torch.")] if dtype else []),
               *(["--activations", activations] if activations else []), *(["--fuse"] if fuse else []), "--memory", memory]
    root = str(Path(compress.__file__).parent.parent)      # a bare checkout is importable from its root alone
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise CompressError(f"{path}: speed on {device} not measured ({reason}); {' '.join(command[1:])} tells more")
    return json.loads(child.stdout.splitlines()[-1])


@torch.inference_mode()
def _run(path: str, new_tokens: int, prompt_tokens: int, dtype: torch.dtype | None, device: str, activations: str | None,
         fuse: bool, memory: dispatch.Memory) -> dict:
    before, start = _resident("VmRSS"), time.perf_counter()
    model = compress.load(path, dtype=dtype, device=device, activations=activations, fuse=fuse, memory=memory)
    load_seconds = time.perf_counter() - start
    accelerator = None if torch.device(device).type == "cpu" else torch.get_device_module(device)
    prompt = torch.arange(prompt_tokens, device=device)[None] % model.config.get_text_config().vocab_size

    def now() -> float:
        if accelerator:
            accelerator.synchronize()
        return time.perf_counter()

    prefill, decode = [], []
    for _ in range(4):
        t0 = now()
        out = model(prompt, use_cache=True)
        t1 = now()
        for _ in range(new_tokens):     # no synchronisation inside: real decoding queues launches ahead too
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        prefill.append(prompt_tokens / (t1 - t0))
        decode.append(new_tokens / (now() - t1))
    peak = _resident("VmHWM") - before + (accelerator.max_memory_allocated() if accelerator else 0)
    return {"decode_tokens_per_second": statistics.median(decode[1:]),
            "prefill_tokens_per_second": statistics.median(prefill[1:]),
            "peak_bytes": peak, "load_seconds": load_seconds}


def _resident(field: str) -> int:
    """Bytes resident now (VmRSS) or at most (VmHWM); not Linux's ru_maxrss, which a child inherits from its parent."""
    if Path("/proc/self/status").exists():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
    import resource  # macOS: in bytes, and only ever the peak, so the difference is how far the model raised it
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--activations")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--memory", default="auto")
    print(json.dumps(_run(**vars(parser.parse_args()))))
