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
from .artifact import PARTIAL
from .calibration.data import SPECS
from .errors import CompressError
from .export import EXPORTS
from .methods import describe
from .scaling import BLOCKS
from .version import __version__
from .views import VIEWS

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Post-training compression of Hugging Face transformers.\n\nStart with [bold]compress demo[/bold], "
                       "or: compress run MODEL --recipe w4-gptq -o OUT && compress eval OUT --reference MODEL")  # fmt: skip
out = Console(width=None if sys.stdout.isatty() else 160)  # piped tables are not squeezed into 80 columns
UsageError: Any = typer.BadParameter.__base__  # click's own, which newer versions of typer bring along under another name

Model = Annotated[str, typer.Argument(help="A local model folder or a hub id, e.g. Qwen/Qwen3-0.6B")]
Artifact = Annotated[str, typer.Argument(help="An artifact folder made by `compress run`")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help=f"A name ({', '.join(recipe.names())}) or a YAML file")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override an option of the recipe: gptq.bits=3 (repeatable)")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows")]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens of a window")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: what the blocks compute in")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON")]
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
         trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """What a run would make and cost, before an hour is spent: bytes, RAM, disk, time, layer by layer.

    compress plan Qwen/Qwen3-0.6B --recipe w4-gptq
    """
    p = api.plan(model, recipe, settings=set_, samples=samples, seqlen=seqlen, dtype=dtype, trust_remote_code=trust_remote_code)
    table = Table("layer", "shape", "method", "format", "before", "after", "bits")
    for r in p.layers:
        table.add_row(r.name, f"{r.shape[0]}×{r.shape[1]}", r.method or "kept", r.describe, size(r.bytes_before), size(r.bytes_after), f"{r.bits:.3f}")
    out.print(table)
    out.print(f"{p.model} with {p.recipe}: {size(p.bytes_before)} → {size(p.bytes_after)}, {p.linear_bits:.2f} bits per compressed weight, "
              f"{p.model_bits:.2f} over all {p.parameters / 1e6:.1f} M parameters", highlight=False)  # fmt: skip
    out.print(f"peak RAM about {size(p.peak_ram)} above the interpreter, disk {size(p.disk)}, time about {duration(p.seconds)} on this machine",
              highlight=False)  # fmt: skip
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
        trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Compress a checkpoint into an artifact folder. Interrupted? Give the same command again: finished blocks are kept.

    compress run Qwen/Qwen3-0.6B --recipe w4-gptq --calibration wikitext2 -o out --set gptq.bits=3
    """
    report = api.run(model, recipe, calibration, output, settings=set_, samples=samples, seqlen=seqlen, seed=seed, pack=pack,
                     chat_template=chat_template, device=device, dtype=dtype, strict=strict, overwrite=overwrite,
                     trust_remote_code=trust_remote_code)  # fmt: skip
    out.print(str(report), highlight=False, soft_wrap=True)
    _fallbacks(report.fallbacks)
    out.print(f"next: compress verify {output} && compress eval {output} --reference {model}", highlight=False, soft_wrap=True)
    save(json_, report.to_json())


def _fallbacks(fallbacks) -> None:
    for f in fallbacks:
        out.print(f"fallback: {f.what} at {f.where} ×{f.count}: {f.detail}", style="yellow", highlight=False, soft_wrap=True)


@app.command(name="eval")
def evaluate(path: Annotated[str, typer.Argument(help="An artifact, or any model folder or hub id")],
             reference: Annotated[str | None, typer.Option(help="The original model: adds KL, top-1 agreement and its own figures")] = None,
             data: Annotated[str, typer.Option(help="SPEC of the text, as for `run --calibration`; its evaluation split")] = "stdlib",
             samples: Annotated[int | None, typer.Option(min=1, help="Windows; default all")] = None,
             seqlen: Annotated[int | None, typer.Option(min=2, help="Tokens of a window")] = 512,
             seed: Seed = 0, device: Device = "auto", dtype: DType = "float32",
             speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also decode with each model in a fresh process: tokens/s, peak memory")] = True,
             trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Perplexity, KL to the original, top-1 agreement with standard errors; bits, bytes, speed and memory, both models in one run.

    compress eval out --reference Qwen/Qwen3-0.6B --data wikitext2 --json eval.json
    """
    result = api.evaluate(path, reference, data, samples=samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype, speed=speed,
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
    out.print(f"{result['windows']} windows of {seqlen} from {data}, {result['tokens']} targets, {dtype} arithmetic; {result['data'].get('bos', '')}",
              highlight=False, soft_wrap=True)  # fmt: skip
    for f in result["fallbacks"]:
        out.print(f"fallback: {f['what']} at {f['where']}: {f['detail']}", style="yellow", highlight=False, soft_wrap=True)
    save(json_, result)


def _pm(value: float | None, stderr: float | None, digits: int) -> str:
    return "too large" if value is None else f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


@app.command()
def inspect(path: Annotated[str | None, typer.Argument(help="An artifact folder")] = None,
            methods: Annotated[bool, typer.Option("--methods", help="List every method with its options")] = False, json_: Json = None) -> None:  # fmt: skip
    """The layers of an artifact: format, bits, bytes, error, time, fallbacks. With --methods: every method and its options."""
    if methods:
        _methods(json_)
        return
    if path is None:
        raise CompressError("inspect what? give an artifact folder, or --methods")
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
    _fallbacks(manifest.fallbacks)
    if not manifest.fallbacks:
        out.print("no fallbacks")
    try:
        loads = api.loads_in(path)
        out.print(f"loads in: {', '.join(to for to, reasons in loads.items() if not reasons)}", highlight=False, soft_wrap=True)
    except CompressError as error:  # a model of remote code: its layers can be listed all the same
        loads = {}
        out.print(f"loads in: not known, {error}", style="yellow", highlight=False, soft_wrap=True)
    save(json_, manifest.model_dump() | {"seconds": seconds, "loads_in": loads})


def _methods(json_: Path | None) -> None:
    described = [*describe(), *describe(VIEWS), *describe(BLOCKS)]
    for method in described:
        out.print(f"{method['name']}: {method['about']}", highlight=False, markup=False)
        table = Table("option", "default", "values", "what it does")
        for o in method["options"]:
            table.add_row(*(escape(str(o[key])) for key in ("name", "default", "values", "help")))
        out.print(table)
    save(json_, {m["name"]: {"about": m["about"], "options": {o["name"]: o["default"] for o in m["options"]},
                             "help": {o["name"]: o["help"] for o in m["options"]}} for m in described})  # fmt: skip


@app.command()
def verify(path: Artifact, trust_remote_code: Remote = False, json_: Json = None) -> None:
    """Check an artifact from disk: hashes, shapes, NaN, planned bits, and the logits it had in memory. Exit code 1 on any problem."""
    result = api.verify(path, trust_remote_code=trust_remote_code)
    for problem in result.problems:
        Console(stderr=True).print(f"problem: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
    save(json_, dataclasses.asdict(result))
    if not result.ok:
        raise typer.Exit(1)
    out.print(f"{path}: {result.tensors} tensors, {size(result.bytes)}, all as written; KL to the model in memory {result.kl:.1e} nats", highlight=False)


@app.command()
def export(path: Artifact, to: Annotated[str, typer.Option(help=", ".join(EXPORTS))],
           output: Annotated[str, typer.Option("--output", "-o", help="A new folder")],
           base_model: Annotated[str | None, typer.Option(help="The original's hub id, for the model card")] = None,
           evaluation: Annotated[str | None, typer.Option(help="What `eval --json` wrote, for the model card")] = None,
           push_to_hub: Annotated[str | None, typer.Option(help="Upload the folder to this repository, USER/NAME")] = None,
           trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Write an artifact as another program reads it: exact codes and scales, or a refusal that names the layers.

    compress export out --to compressed-tensors -o served --base-model Qwen/Qwen3-0.6B
    """
    result = api.export(path, to, output, base_model=base_model, evaluation=evaluation, push_to_hub=push_to_hub, trust_remote_code=trust_remote_code)
    out.print(str(result), highlight=False, soft_wrap=True)
    for n in result.notes:
        out.print(f"note: {n.what}, {n.where}: {n.detail}", style="yellow", highlight=False, soft_wrap=True)
    save(json_, result.to_json())


@app.command()
def decompress(path: Artifact, output: Annotated[str, typer.Option("--output", "-o", help="A new folder")], trust_remote_code: Remote = False,
               json_: Json = None) -> None:  # fmt: skip
    """Multiply an artifact out into a plain model of the original's dtype, for any program that reads one: `export --to dense`.

    compress decompress out -o dense
    """
    export(path, "dense", output, trust_remote_code=trust_remote_code, json_=json_)


@app.command(name="import")
def import_(model: Annotated[str, typer.Argument(help="A checkpoint quantized by GPTQ, AWQ, compressed-tensors or bitsandbytes")],
            output: Annotated[str, typer.Option("--output", "-o", help="Folder of the artifact")], dtype: DType = "auto",
            overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in the output folder")] = False,
            trust_remote_code: Remote = False, json_: Json = None) -> None:  # fmt: skip
    """Make an artifact of a checkpoint that another program quantized: exact codes, nothing rounded again.

    compress import TheBloke/Llama-2-7B-GPTQ -o imported
    """
    report = api.import_checkpoint(model, output, dtype=dtype, overwrite=overwrite, trust_remote_code=trust_remote_code)
    out.print(str(report), highlight=False, soft_wrap=True)
    save(json_, report.to_json())


@app.command(name="demo")
def demo_(output: Annotated[str, typer.Option("--output", "-o", help="Where the artifact goes")] = "out/demo", recipe: RecipeName = "w4-gptq",
          json_: Json = None) -> None:  # fmt: skip
    """Compress the small model that comes with the package, verify it and print what it cost and gained. Needs no network."""
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
