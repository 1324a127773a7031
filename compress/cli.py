"""The command line: each command calls one function of api.py and prints what it returns. Bad input is one line on stderr and exit code 1."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import api, demo, recipe
from .allocate import CONSUMERS, MENUS
from .artifact import PARTIAL
from .calibration.data import SPECS
from .errors import CompressError
from .export import EXPORTS
from .methods import METHODS, describe
from .scaling import BLOCKS
from .structure import STRUCTURE
from .structure.scratch import brief
from .version import __version__
from .views import VIEWS

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Post-training compression of Hugging Face transformers.\n\n"
                       "compress demo                                     [dim]the whole job on a small model, without network[/dim]\n"
                       "compress recipes                                  [dim]what there is to choose from[/dim]\n"
                       "compress run MODEL --recipe w4-gptq -o out        [dim]a folder or a hub id in, a folder out[/dim]\n"
                       "compress report out                               [dim]what it cost, on one page[/dim]",
                  epilog="Exit codes: 0 done, 1 bad input or a failed check (one line on stderr), 2 wrong usage, 130 interrupted. "
                         "Completion in your shell: compress --install-completion")  # fmt: skip
out = Console(width=None if sys.stdout.isatty() else 160)  # piped tables are not squeezed into 80 columns
UsageError: Any = typer.BadParameter.__base__  # click's own, which newer versions of typer bring along under another name

Model = Annotated[str, typer.Argument(help="A local model folder or a hub id, e.g. Qwen/Qwen3-0.6B")]
Artifact = Annotated[str, typer.Argument(help="An artifact folder made by `compress run`")]
names = lambda found: lambda incomplete: [name for name in found() if name.startswith(incomplete)]  # what the shell completes
RecipeName = Annotated[str, typer.Option("--recipe", "-r", autocompletion=names(recipe.names), help=f"A name ({', '.join(recipe.names())}) or a YAML file")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override an option of the recipe: gptq.bits=3 (repeatable)")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows")]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens of a window")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: what the blocks compute in")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON")]
Uniform = Annotated[bool, typer.Option("--uniform", help="Structural steps leave a plain Hugging Face model: every layer loses the same share")]
Speed = Annotated[bool, typer.Option("--speed/--no-speed", help="Also decode with each model in a fresh process: tokens/s, peak memory")]
Streamed = Annotated[bool, typer.Option("--stream", help="Block by block: for models that do not fit in memory")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what OUT.eval.json beside the artifact already says")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval's tasks, names or .yaml files: hellaswag,arc_easy")]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each task; default all")]
Lengths = Annotated[str | None, typer.Option(help="Perplexity and KL by the length of the context: 512,1024,2048")]
Activations = Annotated[str | None, typer.Option(help="Round what compressed weights multiply, one scale a token: int8, int4 or fp8")]
Remote = Annotated[bool, typer.Option(help="Run model code that comes with the checkpoint")]


def save(path: Path | None, value: Any) -> None:
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=1) + "\n")
        except OSError as error:
            raise CompressError(f"{path}: cannot be written: {error.strerror}") from error


def size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@app.command()
def plan(model: Model, recipe: RecipeName = "w4-gptq", set_: Settings = None, samples: Samples = 128, seqlen: Seqlen = 512, dtype: DType = "auto",
         probe: Annotated[bool, typer.Option("--probe", help="Solve one real layer with each method, for a better estimate of the time")] = False,
         uniform: Uniform = False, trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """What a run would make and cost, before an hour is spent: bytes, RAM, disk, time, layer by layer.

    compress plan Qwen/Qwen3-0.6B --recipe w4-gptq
    compress plan Qwen/Qwen3-0.6B --recipe w3-balanced --set gptq.group_size=64 --json plan.json
    """
    p = api.plan(model, recipe, settings=set_, samples=samples, seqlen=seqlen, dtype=dtype, uniform=uniform, probe=probe,
                 trust_remote_code=trust_remote_code)
    table = Table("layer", "shape", "method", "format", "before", "after", "bits")
    for r in p.layers:
        table.add_row(r.name, f"{r.shape[0]}×{r.shape[1]}", r.method or "kept", r.describe, size(r.bytes_before), size(r.bytes_after), f"{r.bits:.3f}")
    out.print(table)
    out.print(f"{p.model} with {p.recipe}: {size(p.bytes_before)} → {size(p.bytes_after)}, {p.linear_bits:.2f} bits per compressed weight, "
              f"{p.model_bits:.2f} over all {p.parameters / 1e6:.1f} M parameters", highlight=False)  # fmt: skip
    out.print(f"peak RAM about {size(p.peak_ram)} above what importing torch and transformers takes, disk {size(p.disk)}, time about "
              f"{duration(p.seconds)} on this machine; evaluating beside the original about {size(p.evaluation_ram)}, or a block of each with --stream",
              highlight=False, soft_wrap=True)  # fmt: skip
    if not any(r.method for r in p.layers):
        out.print("nothing is stored in a format of ours: no export is needed")
    for to, reason in p.consumers.items() if any(r.method for r in p.layers) else ():
        floats = f", but {p.as_floats[to]}: it has no layout for them" if p.as_floats.get(to) and to != "dense" else ""
        out.print(f"{to}: {'loads it' + floats if not reason else 'no: ' + reason}", highlight=False, markup=False, soft_wrap=True)
    for warning in p.warnings:
        out.print(f"warning: {warning}", style="yellow", highlight=False)
    save(json_, p.to_json())


@app.command()
def run(model: Model, output: Annotated[str, typer.Option("--output", "-o", help="Folder of the artifact")], recipe: RecipeName = "w4-gptq",
        calibration: Annotated[str, typer.Option("--calibration", "-c", help=f"SPEC: {', '.join(SPECS)}")] = "stdlib",
        set_: Settings = None, samples: Samples = 128, seqlen: Seqlen = 512, seed: Seed = 0,
        pack: Annotated[bool, typer.Option("--pack/--documents", help="Fill windows across documents, or one document a window")] = True,
        chat_template: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template to `messages`")] = False,
        device: Device = "auto", dtype: DType = "auto",
        strict: Annotated[bool, typer.Option("--strict", help="Fail on any fallback")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in the output folder")] = False,
        uniform: Uniform = False, trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Compress a checkpoint into an artifact folder. Interrupted? Give the same command again: finished blocks are kept.

    compress run Qwen/Qwen3-0.6B --recipe w4-gptq --calibration wikitext2 -o out --set gptq.bits=3
    compress run Qwen/Qwen3-0.6B --recipe w4-rtn -o out
    compress run ./my-model --recipe my-recipe.yaml --calibration file:texts.jsonl:body --samples 256 --strict -o out
    """
    report = api.run(model, recipe, calibration, output, settings=set_, samples=samples, seqlen=seqlen, seed=seed, pack=pack,
                     chat_template=chat_template, device=device, dtype=dtype, strict=strict, overwrite=overwrite, uniform=uniform,
                     trust_remote_code=trust_remote_code)  # fmt: skip
    _healed(report)
    out.print(f"next: compress verify {output} && compress report {output}", highlight=False, soft_wrap=True)
    save(json_, report.to_json())


@app.command()
def auto(model: Model, output: Annotated[str, typer.Option("--output", "-o", help="Folder of the artifact")],
         size_: Annotated[str | None, typer.Option("--size", help="Budget: bytes of the whole artifact, e.g. 4GB")] = None,
         bits: Annotated[float | None, typer.Option(help="Budget: bits per weight of the linears, scales included, e.g. 3.5")] = None,
         latency: Annotated[str | None, typer.Option(help="Budget: time of a decoded token here, of the original's, e.g. 0.5x, or outright, 8ms")] = None,
         omit: Annotated[bool | None, typer.Option("--omit/--no-omit", help="May blocks, sublayers and neurons go? Default: with --latency")] = None,
         calibration: Annotated[str, typer.Option("--calibration", "-c", help=f"SPEC: {', '.join(SPECS)}")] = "stdlib",
         consumer: Annotated[str, typer.Option("--for", autocompletion=names(lambda: CONSUMERS), help=f"What is to load it: {', '.join(CONSUMERS)}")] = "ours",
         menu: Annotated[str | None, typer.Option(help=f"Other choices: {', '.join(MENUS)}, or a YAML file with a list of steps")] = None,
         plan_only: Annotated[bool, typer.Option("--plan-only", help="Stop before compressing: the plan, the recipe and the curve")] = False,
         samples: Samples = 128, seqlen: Seqlen = 512, seed: Seed = 0,
         windows: Annotated[int, typer.Option(min=1, help="Calibration windows on which divergences are measured")] = 8,
         rounds: Annotated[int, typer.Option(min=0, help="Times that every layer's next step is measured where it would be taken")] = 0,
         tries: Annotated[int, typer.Option(min=0, help="Pairs of layers that may trade bits, each judged by the true KL")] = 16,
         device: Device = "auto", dtype: DType = "auto", strict: Annotated[bool, typer.Option("--strict", help="Fail on any fallback")] = False,
         overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in the output folder")] = False,
         trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Spend a budget of bytes or of time on the layers that need it: measures what each choice does to each layer, then runs the best mixture.

    compress auto Qwen/Qwen3-0.6B --bits 3.5 -o out -c wikitext2
    compress auto Qwen/Qwen3-0.6B --size 400MB -o out --for vllm --plan-only
    compress auto Qwen/Qwen3-0.6B --latency 0.5x -o out -c wikitext2
    """
    a = api.auto(model, calibration, output, size=size_, bits=bits, latency=latency, omit=omit, consumer=consumer, menu=menu, samples=samples,
                 seqlen=seqlen, seed=seed, windows=windows, rounds=rounds, tries=tries, plan_only=plan_only, device=device, dtype=dtype, strict=strict,
                 overwrite=overwrite, trust_remote_code=trust_remote_code)  # fmt: skip
    table = Table("group", "linears", "format", "bits", "bytes", "KL alone")
    for g in a.groups:
        table.add_row(g["name"], str(g["linears"]), g["format"], f"{g['bits']:.3f}", str(g["bytes"]), f"{g['damage']:.2e}")
    out.print(table)
    for o in a.omitted:
        part = "" if o["what"] == "absent" else f", {o['share']:.0%} of its neurons"
        out.print(f"left out: {o['name']}{part}, KL alone {o['damage']:.2e}", highlight=False)
    of = f" of {size(a.budget)}" if a.latency is None else f", {a.latency:.3f} of the original's time a token (asked {a.budget * a.latency / a.cost:.3f})"
    out.print(f"{a.bits:.3f} bits a weight, {size(a.nbytes)} for the linears{of}; KL on {windows} calibration windows: predicted "
              f"{a.predicted:.5f}, measured {a.before:.5f}, after the search {a.kl:.5f} ({a.trials} trials)"
              + (f", of the artifact {a.artifact_kl:.5f}" if a.report else ""), highlight=False, soft_wrap=True)  # fmt: skip
    if a.speed:
        out.print("decoding, measured: {original:.1f} → {artifact:.1f} tokens a second".format(**a.speed), highlight=False)
    if a.report:
        out.print(str(a.report), highlight=False, soft_wrap=True)
        _fallbacks(a.report.fallbacks)
    out.print(f"written: {output}.plan.json, {output}.recipe.yaml (compress run -r takes it), {output}.pareto.png", highlight=False, soft_wrap=True)
    save(json_, a.to_json())


@app.command()
def diagnose(model: Model, calibration: Annotated[str, typer.Option("--calibration", "-c", help=f"SPEC: {', '.join(SPECS)}")] = "stdlib",
             samples: Samples = 32, seqlen: Seqlen = 512, seed: Seed = 0,
             windows: Annotated[int, typer.Option(min=1, help="Windows on which divergences are measured")] = 4,
             device: Device = "auto", dtype: DType = "auto", trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Which layers are sensitive at 4, 3 and 2 bits, which have outliers, and what to try, with figures.

    compress diagnose Qwen/Qwen3-0.6B
    compress diagnose Qwen/Qwen3-0.6B -c wikitext2 --json diagnosis.json
    """
    d = api.diagnose(model, calibration, samples=samples, seqlen=seqlen, seed=seed, windows=windows, device=device, dtype=dtype,
                     trust_remote_code=trust_remote_code)  # fmt: skip
    table = Table("inputs of", "kurtosis", "max-norm", "loudest/median", "dead", "weights' kurtosis", title="what the linears read")
    for s in d.sites:
        table.add_row(s.name, f"{s.kurtosis:.1f}", f"{s.max_norm:.2f}", f"{s.loudest:.1f}", str(s.dead), f"{s.weight_kurtosis:.1f}")
    out.print(table)
    table = Table("behind", "excess kurtosis", "max-norm", "massive tokens", "influence", title="the residual stream")
    for b in d.blocks:
        table.add_row(b.name, f"{b.excess:.2f}", f"{b.max_norm:.2f}", str(b.massive), f"{b.influence:.3f}")
    out.print(table)
    table = Table("group", "weights", "4 bits", "3 bits", "2 bits", "share at 3 bits", title="KL of the whole model with this alone compressed, nats a token")
    for r in d.sensitivity:
        cells = [f"{r['damage'][k]:.2e}" if k in r["damage"] else "–" for k in (4, 3, 2)]
        table.add_row(r["name"], f"{r['parameters'] / 1e6:.2f} M", *cells, f"{r['damage'].get(3, 0) / d.total[3]:.1%}")
    table.add_row("all (sum)", "", *(f"{d.total[k]:.2e}" for k in (4, 3, 2)), "")
    out.print(table)
    for n, line in enumerate(d.advice, 1):
        out.print(f"{n}. {line}", highlight=False, soft_wrap=True)
    save(json_, d.to_json())


def _fallbacks(fallbacks) -> None:
    for f in fallbacks:
        out.print(f"fallback: {f.what} at {f.where} ×{f.count}: {f.detail}", style="yellow", highlight=False, soft_wrap=True)


@app.command()
def heal(path: Annotated[str, typer.Argument(help="An artifact, or a checkpoint with blocks or channels removed")],
         teacher: Annotated[str, typer.Option(help="The original model")],
         output: Annotated[str, typer.Option("--output", "-o", help="Folder of the healed artifact")],
         data: Annotated[str, typer.Option("--data", help=f"Text to train on, a SPEC: {', '.join(SPECS)}")] = "stdlib",
         steps: Annotated[int, typer.Option(min=0, help="Optimizer steps")] = 300,
         samples: Annotated[int, typer.Option(min=2, help="Windows of the text")] = 512,
         seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window")] = 512,
         train: Annotated[str, typer.Option(help="lora: adapters; weights: all that is stored; scales: of integer groups; norms with each")] = "lora",
         set_: Annotated[list[str] | None, typer.Option("--set", help="Any other option of docs/methods.md, heal: rank=32 (repeatable)")] = None,
         cache: Annotated[str | None, typer.Option(help="Keep the teacher's answers in this folder; default OUT.teacher, removed at the end")] = None,
         seed: Seed = 0, pack: Annotated[bool, typer.Option("--pack/--documents", help="Fill windows across documents, or one document a window")] = True,
         chat_template: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template to `messages`")] = False,
         device: Device = "auto", dtype: DType = "auto",
         strict: Annotated[bool, typer.Option("--strict", help="Fail on any fallback")] = False,
         overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in the output folder")] = False,
         trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Train adapters or scales of a compressed model towards the original: quality back. Interrupted? Give the same command again.

    compress heal out --teacher Qwen/Qwen3-0.6B --data wikitext2 --steps 1000 -o healed
    compress heal out --teacher Qwen/Qwen3-0.6B --data wikitext2 --train scales --set scale_lr=0.0005 -o healed
    """
    options = [f"steps={steps}", f"samples={samples}", f"seqlen={seqlen}", f"train={train}", *(set_ or [])]
    report = api.heal(path, teacher, data, output, options=options, cache=cache, seed=seed, pack=pack, chat_template=chat_template, device=device, dtype=dtype,
                      strict=strict, overwrite=overwrite, trust_remote_code=trust_remote_code)  # fmt: skip
    if api.PartialState().is_main_process:
        _healed(report)
        out.print(f"next: compress verify {output} && compress eval {output} --reference {teacher}", highlight=False, soft_wrap=True)
        save(json_, report.to_json())


def _healed(report: api.Report) -> None:
    out.print(str(report), highlight=False, soft_wrap=True)
    if "healing" in report.manifest.training:
        before, after = report.manifest.training["healing"]
        out.print(f"healed: held-out KL to the original {before:.5f} → {after:.5f} nats a token, {1 - after / before:.0%} won back", highlight=False)
    _fallbacks(report.fallbacks)


@app.command(name="eval")
def evaluate(path: Annotated[str, typer.Argument(help="An artifact, or any model folder or hub id")],
             reference: Annotated[str | None, typer.Option(help="The original model: adds KL, top-1 agreement and its own figures")] = None,
             data: Annotated[str, typer.Option(help="SPEC of the text, as for `run --calibration`; its evaluation split")] = "stdlib",
             samples: Annotated[int | None, typer.Option(min=1, help="Windows; default all")] = None,
             seqlen: Annotated[int | None, typer.Option(min=2, help="Tokens of a window")] = 512,
             seed: Seed = 0, device: Device = "auto", dtype: DType = "float32", speed: Speed = True,
             tasks: Tasks = None, limit: Limit = None,
             drift: Annotated[int, typer.Option(min=0, help="Texts to continue greedily with both models: how many tokens until they part")] = 0,
             lengths: Lengths = None, activations: Activations = None, stream: Streamed = False, fresh: Fresh = False,
             trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Perplexity, KL to the original, top-1 agreement with standard errors; bits, bytes, speed and memory, both models in one run.

    compress eval out --reference Qwen/Qwen3-0.6B --data wikitext2 --json eval.json
    compress eval out --reference Qwen/Qwen3-0.6B --data wikitext2 --lengths 512,1024,2048 --drift 32 --no-speed
    compress eval out --reference Qwen/Qwen3-0.6B --tasks hellaswag,arc_easy --limit 200 --samples 16
    """
    result = api.evaluate(path, reference, data, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype, speed=speed,
                          tasks=_list(tasks), limit=limit, drift=drift, lengths=_lengths(lengths), activations=activations, stream=stream, fresh=fresh,
                          trust_remote_code=trust_remote_code)  # fmt: skip
    ref = result["reference"] or {}
    table = Table("", Path(path).name, *([Path(reference).name] if reference else []))
    rows = [("perplexity (token)", lambda r: _pm(r["perplexity"]["token"], r["perplexity"]["token_stderr"], 3)),
            ("perplexity (word)", lambda r: _pm(r["perplexity"]["word"], None, 2)),
            ("bits per weight, linears", lambda r: f"{r['bits_per_weight']['linear']:.3f}"),
            ("bits per weight, model", lambda r: f"{r['bits_per_weight']['model']:.3f}"),
            ("weights", lambda r: size(r["bytes"]))]  # fmt: skip
    if speed:
        rows += [("decode tokens/s", lambda r: f"{r['speed']['decode_tokens_per_second']:.1f}"),
                 ("peak memory of generate()", lambda r: size(r["speed"]["peak_bytes"]))]  # fmt: skip
    for label, cell in rows:
        table.add_row(label, cell(result), *([cell(ref)] if reference else []))
    out.print(table)
    if reference:
        out.print(f"KL(original ‖ compressed) {_pm(result['kl']['mean'], result['kl']['stderr'], 5)} nats a token, "
                  f"top-1 agreement {_pm(result['top1']['agreement'], result['top1']['stderr'], 4)}", highlight=False)  # fmt: skip
    _more(result, ref)
    arithmetic = f"{dtype} arithmetic{f', {activations} activations' if activations else ''}"
    out.print(f"{result['windows']} windows of {seqlen} from {data}, {result['tokens']} targets, {arithmetic}; {result['data'].get('bos', '')}",
              highlight=False, soft_wrap=True)  # fmt: skip
    for f in result["fallbacks"]:
        out.print(f"fallback: {f['what']} at {f['where']}: {f['detail']}", style="yellow", highlight=False, soft_wrap=True)
    save(json_, result)


def _more(result: dict, ref: dict) -> None:
    """What was asked for besides: context lengths, drift, tasks."""
    if rows := result.get("context"):
        table = Table("context, tokens", "perplexity", *(["original", "KL"] if ref else []))
        for r in rows:
            table.add_row(str(r["length"]), _pm(r["perplexity"]["token"], r["perplexity"]["token_stderr"], 3),
                          *([f"{r['reference']['perplexity']['token']:.3f}", _pm(r["kl"]["mean"], r["kl"]["stderr"], 5)] if ref else []))  # fmt: skip
        out.print(table)
    if d := result.get("drift"):
        out.print(f"written greedily, the same for {d['median']:.0f} of {d['new_tokens']} tokens in the median of {d['prompts']} texts, "
                  f"{d['mean']:.1f} on average; {100 * d['identical']:.0f} % never part", highlight=False)  # fmt: skip
    if tasks := result.get("tasks"):
        table = Table("task", "metric", "compressed", *(["original"] if ref else []))
        for task, metrics in tasks.items():
            for name, m in metrics.items():
                cells = [m, *([ref["tasks"][task][name]] if ref else [])]
                table.add_row(task, name, *("–" if c["value"] is None else _pm(c["value"], c["stderr"], 4) for c in cells))
        out.print(table)


def _list(text: str | None) -> list[str]:
    return [t.strip() for t in text.split(",") if t.strip()] if text else []


def _lengths(text: str | None) -> list[int]:
    return _numbers(text, "--lengths", "tokens, e.g. 512,1024,2048")


def _numbers(text: str | None, option: str, of: str) -> list[int]:
    try:
        return [int(t) for t in _list(text)]
    except ValueError as error:
        raise CompressError(f"{option} {text}: expected numbers of {of}") from error


@app.command()
def compare(paths: Annotated[list[str], typer.Argument(help="Artifacts, or model folders, of the same original")],
            reference: Annotated[str, typer.Option(help="The original model")],
            data: Annotated[str, typer.Option(help="SPEC of the text to evaluate on")] = "stdlib",
            samples: Annotated[int | None, typer.Option(min=1, help="Windows; default all")] = None, seqlen: Seqlen = 512, seed: Seed = 0,
            device: Device = "auto", dtype: DType = "float32",
            output: Annotated[Path | None, typer.Option("--output", "-o", help="Size against KL as a picture, .svg or .png")] = None,
            stream: Streamed = False, fresh: Fresh = False, trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Several artifacts of one original side by side: a table, best KL first, and a picture of size against KL.

    compress compare out/w4 out/w3 out/w2 --reference Qwen/Qwen3-0.6B --data wikitext2
    compress compare out/w4 out/w3 --reference Qwen/Qwen3-0.6B --data wikitext2 --samples 64 -o compare.svg --json compare.json
    """
    result = api.compare(paths, reference, data, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype, picture=output, stream=stream,
                         fresh=fresh, trust_remote_code=trust_remote_code)  # fmt: skip
    table = Table("", "recipe", "weights", "bits/weight", "over the model", "KL to original", "top-1", "perplexity")
    for r in result["rows"]:
        table.add_row(r["name"], r["recipe"] or "–", size(r["bytes"]), *(f"{r['bits_per_weight'][k]:.2f}" for k in ("linear", "model")),
                      _pm(r["kl"]["mean"], r["kl"]["stderr"], 5), _pm(r["top1"]["agreement"], r["top1"]["stderr"], 4),
                      _pm(r["perplexity"]["token"], None, 3))  # fmt: skip
    ref = result["rows"][0]["reference"]
    table.add_row("original", "", size(ref["bytes"]), "", f"{ref['bits_per_weight']['model']:.2f}", "0", "1", f"{ref['perplexity']['token']:.3f}")
    out.print(table)
    out.print(f"{result['rows'][0]['windows']} windows of {seqlen} from {data}" + (f"; {output}" if output else ""), highlight=False, soft_wrap=True)
    save(json_, result)


def _pm(value: float | None, stderr: float | None, digits: int) -> str:
    return "too large" if value is None else f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


@app.command()
def report(path: Artifact,
           reference: Annotated[str | None, typer.Option(help="The original; default: the one the run's log names, if it is there")] = None,
           data: Annotated[str, typer.Option(help="SPEC of the text to evaluate on")] = "stdlib",
           output: Annotated[Path, typer.Option("--output", "-o", help="The page; the same figures go into a .json beside it")] = Path("report.html"),
           samples: Annotated[int, typer.Option(min=1, help="Windows to evaluate on")] = 32, seqlen: Seqlen = 512, seed: Seed = 0,
           device: Device = "auto", dtype: DType = "float32",
           prompts: Annotated[int, typer.Option(min=0, help="Texts that both models continue")] = 6,
           tasks: Tasks = None, limit: Limit = None, lengths: Lengths = None, speed: Speed = True, stream: Streamed = False, fresh: Fresh = False,
           trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """One self-contained page about an artifact: quality, where the damage is, outliers, calibration, fallbacks, texts side by side, speed.

    compress report out
    compress report out --reference Qwen/Qwen3-0.6B --data wikitext2 --samples 64 -o out.html
    compress report out --data wikitext2 --lengths 512,1024,2048 --tasks arc_easy --limit 200
    """
    page = api.report(path, reference, data, output, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype, prompts=prompts,
                      speed=speed, tasks=_list(tasks), limit=limit, lengths=_lengths(lengths),
                      stream=stream, fresh=fresh, trust_remote_code=trust_remote_code)  # fmt: skip
    e = page.data["evaluation"]
    out.print(f"{output}: {size(output.stat().st_size)}, and {output.with_suffix('.json').name}; KL {_pm(e['kl']['mean'], e['kl']['stderr'], 5)}, "
              f"top-1 {_pm(e['top1']['agreement'], e['top1']['stderr'], 4)} on {e['windows']} windows of {data}", highlight=False, soft_wrap=True)  # fmt: skip
    save(json_, page.data)


@app.command()
def inspect(path: Artifact, json_: Json = None) -> None:
    """The layers of an artifact: format, bits, bytes, error, time, fallbacks.

    compress inspect out
    compress inspect out --json layers.json
    """
    manifest = api.inspect(path)
    seconds = api.seconds_by_layer(Path(path))
    table = Table("layer", "method", "format", "bits", "bytes", "error", "tokens", "seconds")
    for name, r in manifest.layers.items():
        table.add_row(name, r.method, r.describe, f"{r.bits:.3f}", f"{r.bytes}", f"{r.error:.3e}", f"{r.tokens}",
                      f"{seconds[name]:.2f}" if name in seconds else "–")  # fmt: skip
    out.print(table)
    t = manifest.totals
    out.print(f"{size(t['source_bytes'])} → {size(t['bytes'])}, {t['linear_bits']:.3f} bits per compressed weight, {t['model_bits']:.3f} over the model; "
              f"recipe {manifest.run['recipe']['name']}, compress {manifest.compress}", highlight=False)  # fmt: skip
    for step, found in zip(manifest.run["recipe"].get("structure", []), manifest.structure, strict=False):
        out.print(f"structure: {brief(step['structure'], found)}", highlight=False, markup=False, soft_wrap=True)
    _fallbacks(manifest.fallbacks)
    if not manifest.fallbacks:
        out.print("no fallbacks")
    try:
        loads, floats = api.loads_in(path), api.held_as_floats(path)
        told = (to + (f" ({floats[to]})" if floats[to] and to != "dense" else "") for to, reasons in loads.items() if not reasons)
        out.print(f"loads in: {', '.join(told)}", highlight=False, markup=False, soft_wrap=True)
    except CompressError as error:  # a model of remote code: its layers can be listed all the same
        loads, floats = {}, {}
        out.print(f"loads in: not known, {error}", style="yellow", highlight=False, soft_wrap=True)
    save(json_, manifest.model_dump() | {"seconds": seconds, "loads_in": loads, "as_floats": floats})


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method, view or block step; default: all")] = None, json_: Json = None) -> None:
    """Every method, view and block step with its options, defaults and what they do; set one with --set METHOD.OPTION=VALUE.

    compress methods
    compress methods gptq
    """
    described = [*describe(), *describe(STRUCTURE), *describe(VIEWS), *describe(BLOCKS)]
    if name is not None and not (described := [m for m in described if m["name"] == name]):
        raise CompressError(f"unknown method {name!r}{recipe.nearest(name, [*METHODS, *STRUCTURE, *VIEWS, *BLOCKS])}")
    for method in described:
        out.print(f"{method['name']}: {method['about']}", highlight=False, markup=False)
        table = Table("option", "default", "values", "what it does")
        for o in method["options"]:
            table.add_row(*(escape(str(o[key])) for key in ("name", "default", "values", "help")))
        out.print(table)
    save(json_, {m["name"]: {"about": m["about"], "options": {o["name"]: o["default"] for o in m["options"]},
                             "help": {o["name"]: o["help"] for o in m["options"]}} for m in described})  # fmt: skip


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(autocompletion=names(recipe.names), help="A recipe or its file, shown as is; default: all")] = None,
            json_: Json = None) -> None:  # fmt: skip
    """The recipes that come with the package: what each is for, bits a weight on disk, what it costs.

    compress recipes
    compress recipes w4-gptq
    """
    listed = {n: recipe.about(recipe.load(n)) for n in ([name] if name else recipe.names())}
    if name:
        file = recipe.RECIPES / f"{name}.yaml" if name in recipe.names() else Path(name)
        out.print(file.read_text().strip(), highlight=False, markup=False)
    table = Table("recipe", "bits", "what it is for", "needs")
    for n, about in listed.items():
        table.add_row(n, " / ".join(f"{b:.2f}" for b in about["bits"]), escape(about["description"]), about["needs"])
    out.print(table)
    out.print("bits: of a 4096 × 4096 layer in the file, scales included; compress plan MODEL -r RECIPE says it of yours", highlight=False)
    save(json_, listed)


@app.command()
def verify(path: Artifact, trust_remote_code: Remote = False, json_: Json = None) -> None:
    """Check an artifact from disk: hashes, shapes, NaN, planned bits, and the logits it had in memory. Exit code 1 on any problem.

    compress verify out
    compress verify out --json problems.json
    """
    result = api.verify(path, trust_remote_code=trust_remote_code)
    for problem in result.problems:
        Console(stderr=True).print(f"problem: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
    save(json_, dataclasses.asdict(result))
    if not result.ok:
        raise typer.Exit(1)
    out.print(f"{path}: {result.tensors} tensors, {size(result.bytes)}, all as written; KL to the model in memory {result.kl:.1e} nats", highlight=False)


@app.command()
def tune(path: Artifact, rows: Annotated[str, typer.Option(help="Numbers of rows (tokens of one forward) to measure at")] = "1,4,16,64,256",
         memory: Annotated[str, typer.Option(help="Dense copies: auto (where there is room), keep (where fastest), bounded (none)")] = "auto",
         activations: Activations = None, device: Device = "auto", dtype: DType = "auto", trust_remote_code: Remote = False,
         json_: Json = None) -> None:  # fmt: skip
    """Measure the kernels for every layer shape of an artifact now, instead of when generate() first meets it. The fastest are remembered.

    compress tune out
    compress tune out --rows 1,16 --activations int8 --json tune.json
    """
    if memory not in ("auto", "keep", "bounded"):
        raise CompressError(f"--memory {memory}: auto, keep or bounded")
    found = api.tune_kernels(path, _numbers(rows, "--rows", "rows, e.g. 1,16"), dtype=dtype, device=device, memory=memory, activations=activations,
                             trust_remote_code=trust_remote_code)  # fmt: skip
    table = Table("format", "shape", "layers", "rows", "kernel", "µs", "others")
    for r in found:
        others = ", ".join(f"{name} {us:.0f}" for name, us in r["us"].items() if name != r["route"])
        table.add_row(r["format"], "×".join(map(str, r["shape"])), str(r["layers"]), str(r["rows"]), r["route"],
                      f"{r['us'][r['route']]:.0f}" if r["us"] else "–", others or "–")  # fmt: skip
    out.print(table)
    out.print("– where there is nothing to choose; kernels that refuse a format say why in --json", highlight=False)
    save(json_, {"layers": found})


@app.command()
def export(path: Artifact, to: Annotated[str, typer.Option(autocompletion=names(lambda: EXPORTS), help=", ".join(EXPORTS))],
           output: Annotated[str, typer.Option("--output", "-o", help="A new folder")],
           base_model: Annotated[str | None, typer.Option(help="The original's hub id, for the model card")] = None,
           evaluation: Annotated[str | None, typer.Option(help="What `eval --json` wrote, for the model card")] = None,
           push_to_hub: Annotated[str | None, typer.Option(help="Upload the folder to this repository, USER/NAME")] = None,
           trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Write an artifact as another program reads it: exact codes and scales, or a refusal that names the layers.

    compress export out --to compressed-tensors -o served --base-model Qwen/Qwen3-0.6B
    compress export out --to gguf -o out-gguf
    compress export out --to dense -o bf16
    """
    result = api.export(path, to, output, base_model=base_model, evaluation=evaluation, push_to_hub=push_to_hub, trust_remote_code=trust_remote_code)
    out.print(str(result), highlight=False, soft_wrap=True)
    for n in result.notes:
        out.print(f"note: {n.what}, {n.where}: {n.detail}", style="yellow", highlight=False, soft_wrap=True)
    save(json_, result.to_json())


@app.command()
def extract(model: Model, output: Annotated[str, typer.Option("--output", "-o", help="Folder of the submodel")],
            width: Annotated[float, typer.Option(help="Share of the neurons of every MLP that stays: the first ones")] = 0.5, dtype: DType = "auto",
            overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in the output folder")] = False,
            trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Cut a narrower model out of one whose neurons were put in order (recipe step `nest`).

    compress extract out --width 0.5 -o half
    compress extract out --width 0.75 -o three-quarters --dtype bfloat16
    """
    report = api.extract(model, output, width=width, dtype=dtype, overwrite=overwrite, trust_remote_code=trust_remote_code)
    out.print(str(report), highlight=False, soft_wrap=True)
    save(json_, report.to_json())


@app.command()
def decompress(path: Artifact, output: Annotated[str, typer.Option("--output", "-o", help="A new folder")], trust_remote_code: Remote = False,
               json_: Json = None) -> None:  # fmt: skip
    """Multiply an artifact out into a plain model of the original's dtype, for any program that reads one: `export --to dense`.

    compress decompress out -o dense
    compress decompress out -o dense --json decompressed.json
    """
    export(path, "dense", output, trust_remote_code=trust_remote_code, json_=json_)


@app.command(name="import")
def import_(model: Annotated[str, typer.Argument(help="A checkpoint quantized by GPTQ, AWQ, compressed-tensors or bitsandbytes")],
            output: Annotated[str, typer.Option("--output", "-o", help="Folder of the artifact")], dtype: DType = "auto",
            overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in the output folder")] = False,
            trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Make an artifact of a checkpoint that another program quantized: exact codes, nothing rounded again.

    compress import TheBloke/Llama-2-7B-GPTQ -o imported
    compress import ./quantized-by-awq -o imported --dtype bfloat16
    """
    report = api.import_checkpoint(model, output, dtype=dtype, overwrite=overwrite, trust_remote_code=trust_remote_code)
    out.print(str(report), highlight=False, soft_wrap=True)
    save(json_, report.to_json())


@app.command(name="demo")
def demo_(output: Annotated[str, typer.Option("--output", "-o", help="Where the artifact goes")] = "out/demo", recipe: RecipeName = "w4-gptq",
          json_: Json = None) -> None:  # fmt: skip
    """Compress the small model that comes with the package, verify it and print what it cost and gained. Needs no network.

    compress demo
    compress demo --recipe w3-balanced -o /tmp/demo
    """
    save(json_, demo.demo(Path(output), recipe, out))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 bad input or a failed check, 2 wrong usage, 130 interrupted; each but 0 with one line on stderr."""
    transformers.utils.logging.disable_progress_bar()  # its bars would mix with ours
    try:
        code = app(prog_name="compress", standalone_mode=False)
    except CompressError as error:
        _fail(str(error), 1)
    except UsageError as error:
        if not error.format_message():  # no arguments at all: the help has been printed
            sys.exit(error.exit_code)
        _fail(f"{error.format_message().rstrip('.')}; see {error.ctx.command_path if error.ctx else 'compress'} --help", error.exit_code)
    if code == 130:  # how typer tells of Ctrl-C
        _fail(f"interrupted; a folder with {PARTIAL} is continued by the same command", code)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"error: {' '.join(message.split())}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
