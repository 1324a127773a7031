"""Run: pytest tests/test_cli.py. The command line: every verb with --json, and every bad input as one line with a way out."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from compress import cli
from compress.artifact import INDEX, MANIFEST

FAST = ("--samples", 4, "--seqlen", 32, "--set", "gptq.group_size=32")
SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model, a text and a finished artifact of it, shared by all tests; none may change them."""
    root = tmp_path_factory.mktemp("cli")
    save_tiny("llama", root / "model")
    (root / "text.txt").write_text(Path(os.__file__).read_text())
    text = f"file:{root / 'text.txt'}"
    main("run", root / "model", "-c", text, "-o", root / "done", *FAST)
    return SimpleNamespace(root=root, model=root / "model", text=text, done=root / "done")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def main(*args) -> int:
    """The entry point with these arguments; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compress", *map(str, args)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def contents(*folders: Path) -> dict[Path, bytes]:
    return {f: f.read_bytes() for folder in folders for f in sorted(folder.rglob("*")) if f.is_file()}


# ---- what works


def test_plan(work, tmp_path, capsys):
    assert main("plan", work.model, *FAST, "--json", tmp_path / "p.json") == 0
    plan, manifest = json.loads((tmp_path / "p.json").read_text()), json.loads((work.done / MANIFEST).read_text())
    assert plan["bytes_after"] == manifest["totals"]["bytes"] == manifest["totals"]["planned_bytes"]
    assert {r["name"]: r["bytes_after"] for r in plan["layers"]} == {n: r["bytes"] for n, r in manifest["layers"].items()}
    assert plan["peak_ram"] > 0 and plan["disk"] > plan["bytes_after"] and plan["seconds"] > 0 and plan["warnings"] == []
    assert "bits per compressed weight" in capsys.readouterr().out


def test_run(work, tmp_path, capsys):
    args = ("run", work.model, "-c", work.text, "-o", tmp_path / "out", *FAST, "--json", tmp_path / "r.json")
    assert main(*args) == 0
    report, shown = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr()
    assert report["fallbacks"] == [] and report["resumed_layers"] == 0 and report["totals"]["linear_bits"] < 4.7
    assert shown.err.count("bits  error") == 14 and f"compress verify {tmp_path / 'out'}" in shown.out
    before = contents(tmp_path / "out")
    assert main(*args) == 0 and contents(tmp_path / "out") == before       # finished: nothing to do, nothing touched


def test_run_with_settings(work, tmp_path):
    three = ("--set", "gptq.bits=3", "--set", "gptq.sym=full", "--set", "true_sequential=false")
    assert main("run", work.model, "-c", work.text, "-o", tmp_path / "out", *FAST, *three, "--documents") == 0
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert {r["describe"] for r in manifest["layers"].values()} == {"int3 g32 sym"}
    assert not manifest["run"]["recipe"]["true_sequential"] and not manifest["run"]["calibration"]["pack"]


PERPLEXITY = {"token", "token_stderr", "word"}


def test_eval_with_reference(work, tmp_path, capsys):
    args = ("--data", work.text, "--samples", 3, "--seqlen", 32, "--no-speed")
    assert main("eval", work.done, "--reference", work.model, *args, "--json", tmp_path / "e.json") == 0
    e = json.loads((tmp_path / "e.json").read_text())
    assert set(e["perplexity"]) == set(e["reference"]["perplexity"]) == PERPLEXITY
    assert set(e["kl"]) == {"mean", "stderr"} and set(e["top1"]) == {"agreement", "stderr"}
    assert set(e["bits_per_weight"]) == {"linear", "model"} and isinstance(e["bytes"], int)
    assert 0 < e["kl"]["mean"] < 1 and 0 < e["top1"]["agreement"] <= 1 and e["bytes"] < e["reference"]["bytes"]
    assert e["bits_per_weight"]["linear"] == 4 + 20 / 32 < e["bits_per_weight"]["model"]
    assert e["windows"] == 3 and e["tokens"] == 3 * 31
    assert main("eval", work.model, "--reference", work.model, *args, "--json", tmp_path / "same.json") == 0
    same = json.loads((tmp_path / "same.json").read_text())
    assert same["kl"]["mean"] == 0 and same["top1"]["agreement"] == 1 and same["perplexity"] == e["reference"]["perplexity"]
    assert "KL(original ‖ compressed)" in capsys.readouterr().out


def test_eval_without_reference(work, tmp_path):
    args = ("--data", work.text, "--samples", 2, "--seqlen", 32, "--no-speed")
    assert main("eval", work.done, *args, "--json", tmp_path / "e.json") == 0
    e = json.loads((tmp_path / "e.json").read_text())
    assert set(e["perplexity"]) == PERPLEXITY and e["kl"] is e["top1"] is e["reference"] is None


@pytest.mark.slow
def test_eval_with_speed(work, tmp_path):
    args = ("--data", work.text, "--samples", 2, "--seqlen", 32)
    assert main("eval", work.done, *args, "--json", tmp_path / "e.json") == 0
    speed = json.loads((tmp_path / "e.json").read_text())["speed"]
    assert speed["decode_tokens_per_second"] > 0 and speed["peak_bytes"] > 0


def test_inspect(work, tmp_path, capsys):
    assert main("inspect", work.done, "--json", tmp_path / "i.json") == 0
    shown, manifest = json.loads((tmp_path / "i.json").read_text()), json.loads((work.done / MANIFEST).read_text())
    seconds, loads, floats = shown.pop("seconds"), shown.pop("loads_in"), shown.pop("as_floats")
    assert floats["awq"] == "" and "gptq" not in floats
    assert loads["awq"] == [] and "zero points: version 1 stores z − 1" in loads["gptq"][0]
    assert shown == manifest and set(seconds) == set(manifest["layers"]) and "no fallbacks" in capsys.readouterr().out


def test_inspect_with_a_damaged_log(work, tmp_path):
    """A full disk cuts a line short, the next run appends to it."""
    out, log = Path(shutil.copytree(work.done, tmp_path / "out")), tmp_path / "out.log.jsonl"
    log.write_text('{"event": "layer", "name": "x", "se{"event": "start"}\n\nnoise}\n' + (work.root / "done.log.jsonl").read_text() + '{"event": "la')
    assert main("inspect", out, "--json", tmp_path / "i.json") == 0
    shown = json.loads((tmp_path / "i.json").read_text())
    assert shown["seconds"].keys() == shown["layers"].keys()


def test_methods(tmp_path, capsys):
    assert main("methods", "--json", tmp_path / "m.json") == 0
    methods = json.loads((tmp_path / "m.json").read_text())
    assert methods["gptq"]["options"]["bits"] == 4 and methods["rtn"]["options"]["clip"] == "none"
    assert "GPTQ: quantize a weight column by column" in methods["gptq"]["about"]


def test_verify(work, tmp_path, capsys):
    assert main("verify", work.done, "--json", tmp_path / "v.json") == 0
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["problems"] == [] and result["kl"] == 0 and result["tensors"] == 51
    assert "all as written" in capsys.readouterr().out


def test_version_and_help(capsys):
    assert main("--version") == 0 and main("--help") == 0 and main("run", "--help") == 0
    shown = capsys.readouterr()
    assert "w4-gptq" in shown.out and not shown.err


# ---- what does not: one line on stderr, with numbers or names and a way out; exit code 1 (2: wrong usage); nothing lost


def clone(work, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work.model, tmp_path / "copy"))


def without(work, tmp_path: Path, pattern: str) -> Path:
    folder = clone(work, tmp_path)
    for file in folder.glob(pattern):
        file.unlink()
    return folder


def pickled(work, tmp_path: Path) -> Path:
    folder = without(work, tmp_path, SHARD)
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    return folder


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def with_config(work, tmp_path: Path, **change) -> Path:
    folder = clone(work, tmp_path)
    written(folder / "config.json", json.dumps(json.loads((folder / "config.json").read_text()) | change))
    return folder


def damaged(work, tmp_path: Path, change) -> Path:
    """A copy of the model with `change` done to its tensors, in place."""
    folder = clone(work, tmp_path)
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    return folder


def cut(work, tmp_path: Path, size: int) -> Path:
    folder = clone(work, tmp_path)
    os.truncate(folder / SHARD, size)
    return folder


def index_naming(work, tmp_path: Path, file: str) -> Path:
    folder = clone(work, tmp_path)
    written(folder / INDEX, json.dumps({"weight_map": {"lm_head.weight": file}}))
    return folder


def poison(name: str, value: float):
    def change(tensors):
        tensors[name].view(-1)[7] = value
    return change


def run(model, work, tmp_path: Path, *args, text: str | None = None) -> tuple:
    return ("run", model, "-c", text or work.text, "-o", tmp_path / "out", *FAST, *args)


def recipe(tmp_path: Path, text: str) -> Path:
    return written(tmp_path / "r.yaml", text)


BLOCK1 = "model.layers.1.mlp.down_proj.weight"
MODELS = {      # what is wrong with MODEL: (how it is made, what the line says)
    "missing": (lambda w, t: t / "absent", ["absent", "no such model folder", "config.json"]),
    "a file": (lambda w, t: written(t / "file", "x"), ["no such model folder"]),
    "hub id offline": (lambda w, t: "no-such-org/no-such-model", ["neither a local folder nor reachable on the hub"]),
    "empty folder": (lambda w, t: empty(t / "empty"), ["no *.safetensors file", "config.json"]),
    "no weights": (lambda w, t: without(w, t, SHARD), ["no *.safetensors file"]),
    "pickles only": (pickled, ["pytorch_model.bin", "pickle", "save_pretrained"]),
    "config not JSON": (lambda w, t: written(clone(w, t) / "config.json", "{not json").parent, ["config.json"]),
    "unknown model type": (lambda w, t: with_config(w, t, model_type="lama"), ["config.json", "lama"]),
    "not a language model": (lambda w, t: with_config(w, t, model_type="vit"), ["not a causal language model"]),
    "already compressed": (lambda w, t: w.done, ["already quantized (compress)"]),
    "config of another size": (lambda w, t: with_config(w, t, intermediate_size=96), ["[64, 128]", "[64, 96]"]),
    "truncated header": (lambda w, t: cut(w, t, 100), ["corrupt or truncated", SHARD, "download"]),
    "truncated data": (lambda w, t: cut(w, t, 99_999), ["corrupt or truncated", SHARD, "download"]),
    "zero bytes": (lambda w, t: cut(w, t, 0), ["corrupt or truncated", SHARD]),
    "garbage": (lambda w, t: written(clone(w, t) / SHARD, b"\xff" * 9999).parent, ["corrupt or truncated", SHARD]),
    "shard missing": (lambda w, t: index_naming(w, t, "model-2.safetensors"), ["model-2.safetensors", "missing"]),
    "index leaves the folder": (lambda w, t: index_naming(w, t, "../x.safetensors"), ["'../x.safetensors'", "outside"]),
    "index not JSON": (lambda w, t: written(clone(w, t) / INDEX, "[]").parent, [INDEX, "not a safetensors index"]),
    "tensor missing": (lambda w, t: damaged(w, t, lambda x: x.pop(BLOCK1)), ["model.layers.1 lacks mlp.down_proj.weight"]),
    "no config": (lambda w, t: without(w, t, "config.json"), ["config.json is missing"]),
    "head missing": (lambda w, t: damaged(w, t, lambda x: x.pop("lm_head.weight")), ["lacks lm_head.weight"]),
    "NaN weight": (lambda w, t: damaged(w, t, poison(BLOCK1, float("nan"))), [BLOCK1, "1 NaN or Inf"]),
    "Inf weight": (lambda w, t: damaged(w, t, poison(BLOCK1, float("inf"))), [BLOCK1, "1 NaN or Inf"]),
    "NaN embedding": (lambda w, t: damaged(w, t, poison("model.embed_tokens.weight", float("nan"))),
                      ["model.embed_tokens.weight", "1 NaN or Inf"]),
    "no tokenizer": (lambda w, t: without(w, t, "tokenizer*"), ["tokenizer missing", "tokenizer.json"]),
}

TEXTS = {       # what is wrong with the calibration text: (SPEC, or name and content of a file; what the line says)
    "missing": ("file:/no/such.txt", ["no file /no/such.txt"]),
    "empty": (("c.txt", b""), ["c.txt", "0 bytes"]),
    "blank": (("c.txt", b" \n\n"), ["c.txt", "3 tokens", "32"]),
    "too short": (("c.txt", b"one line"), ["8 tokens", "32"]),
    "binary": (("c.txt", bytes(range(256)) * 99), ["binary", "NUL at byte 0"]),
    "not UTF-8": (("c.txt", b"caf\xe9 " * 99), ["byte 3 of 495", "UTF-8"]),
    "broken jsonl": (("c.jsonl", b"{"), ["line 1 is not JSON"]),
    "not parquet": (("c.parquet", b"PAR1"), ["not a parquet file"]),
    "a folder": ("file:/tmp", ["is a folder"]),
    "unknown": ("wikitext-2", ["'wikitext-2'", "did you mean 'wikitext2'?", "stdlib"]),
}

ARGUMENTS = {   # what is wrong with the recipe and the options
    "unknown recipe": (lambda t: ["-r", "w4-gtpq"], ["'w4-gtpq'", "did you mean w4-gptq?", "w8-rtn"]),
    "unknown method": (lambda t: ["-r", recipe(t, "steps: [{method: gpqt}]")], ["'gpqt'", "did you mean gptq?", "rtn"]),
    "unknown option": (lambda t: ["--set", "gptq.group_sise=64"], ["gptq.group_sise", "did you mean group_size?", "act_order"]),
    "option in recipe": (lambda t: ["-r", recipe(t, "steps: [{method: gptq, bit: 4}]")], ["gptq.bit", "did you mean bits?"]),
    "key in recipe": (lambda t: ["-r", recipe(t, "steps: []\nignored: [x]")], ["ignored", "did you mean ignore?"]),
    "no such step": (lambda t: ["--set", "rtn.bits=3"], ["rtn.bits", "no 'rtn' step", "gptq"]),
    "group size": (lambda t: ["--set", "gptq.group_size=48"], ["model.layers.0", "64 is not a multiple of group_size 48", "16, 32, 64"]),
    "group size 0": (lambda t: ["--set", "gptq.group_size=0"], ["group_size 0", "16, 32, 64"]),
    "bits 9": (lambda t: ["--set", "gptq.bits=9"], ["gptq.bits = 9", "1, 2, 3, 4, 5, 6, 7, 8"]),
    "bits 0": (lambda t: ["--set", "gptq.bits=0"], ["gptq.bits = 0"]),
    "bits as text": (lambda t: ["--set", "gptq.bits=four"], ["gptq.bits = 'four'"]),
    "bits empty": (lambda t: ["--set", "gptq.bits="], ["gptq.bits"]),
    "1 bit asymmetric": (lambda t: ["--set", "gptq.bits=1"], ["bits 1", "set sym to true"]),
    "damp": (lambda t: ["--set", "gptq.damp=-1"], ["damp -1"]),
    "set without =": (lambda t: ["--set", "gptq.bits"], ["gptq.bits", "METHOD.OPTION=VALUE"]),
    "set without method": (lambda t: ["--set", "bits=3"], ["bits", "METHOD.OPTION"]),
    "set not YAML": (lambda t: ["--set", "gptq.bits=[3"], ["gptq.bits=[3"]),
    "set an object": (lambda t: ["--set", "gptq.bits=!!python/name:os.system"], ["gptq.bits"]),
    "recipe not YAML": (lambda t: ["-r", recipe(t, "steps: [\n}")], ["r.yaml", "not a plain YAML recipe"]),
    "recipe a list": (lambda t: ["-r", recipe(t, "- gptq")], ["r.yaml", "expected a mapping"]),
    "recipe empty": (lambda t: ["-r", recipe(t, "")], ["r.yaml", "expected a mapping"]),
    "recipe binary": (lambda t: ["-r", written(t / "r.yaml", b"\xff\xfe\x00")], ["r.yaml", "not a plain YAML recipe"]),
    "recipe without steps": (lambda t: ["-r", recipe(t, "name: x")], ["r.yaml", "steps", "required"]),
    "recipe object": (lambda t: ["-r", recipe(t, f"steps: !!python/object/apply:os.mkdir ['{t / 'pwned'}']")],
                      ["r.yaml", "not a plain YAML recipe"]),
    "CUDA absent": (lambda t: ["--device", "cuda"], ["no CUDA device", "--device cpu"]),
    "unknown device": (lambda t: ["--device", "gpu"], ["'gpu'", "cuda:N"]),
    "unknown dtype": (lambda t: ["--dtype", "bf16"], ["'bf16'", "bfloat16"]),
    "strict": (lambda t: ["--strict", "-r", recipe(t, "steps: [{method: gptq, match: '*.no_proj'}]")], ["--strict", "*.no_proj"]),
}


WRONG = {       # every other verb with something wrong: (its arguments, what the line says); T is a folder with a plain file "file" in it
    "plan no folder": ("plan T/absent", ["absent", "no such model folder"]),
    "plan json": ("plan MODEL --set gptq.group_size=32 --json T/file/p.json", ["p.json", "cannot be written"]),
    "plan an artifact": ("plan DONE", ["already quantized (compress)"]),
    "plan dtype": ("plan MODEL --dtype fp8", ["'fp8'", "bfloat16"]),
    "recipes": ("recipes w4-gtpq", ["did you mean w4-gptq?"]),
    "run into a file": ("run MODEL -r w4-rtn --set rtn.group_size=32 -o T/file", ["file"]),
    "run below a file": ("run MODEL -r w4-rtn --set rtn.group_size=32 -o T/file/out", ["file"]),
    "run where nobody can": ("run MODEL -r w4-rtn --set rtn.group_size=32 -o /proc/out", ["/proc/out"]),
    "run seqlen": ("run MODEL -c TEXT -o T/out --samples 4 --seqlen 100000 --set gptq.group_size=32", ["100000"]),
    "auto no budget": ("auto MODEL -o T/out", ["give a budget"]),
    "auto two": ("auto MODEL -o T/out --bits 3 --size 4GB", ["one of the three"]),
    "auto too few bits": ("auto MODEL -o T/out -c TEXT --bits 0.5", ["bits", "0.50"]),
    "auto too few bytes": ("auto MODEL -o T/out -c TEXT --size 1kB", ["MB"]),
    "auto size": ("auto MODEL -o T/out --size 4XB", ["4XB", "4GB"]),
    "auto latency": ("auto MODEL -o T/out --latency fast", ["fast", "0.5x"]),
    "auto consumer": ("auto MODEL -o T/out --bits 3 --for vlm", ["'vlm'", "did you mean vllm?"]),
    "auto menu": ("auto MODEL -o T/out --bits 3 --menu none", ["none", "trellis"]),
    "auto below a file": ("auto MODEL -o T/file/out -c TEXT --bits 5 --samples 4 --seqlen 32", ["file"]),
    "auto no model": ("auto T/absent -o T/out --bits 3", ["no such model folder"]),
    "diagnose no model": ("diagnose T/absent", ["no such model folder"]),
    "diagnose an artifact": ("diagnose DONE", ["already quantized (compress)"]),
    "eval no artifact": ("eval T/absent", ["absent", "no such model folder"]),
    "eval no reference": ("eval DONE --reference T/absent --data TEXT", ["absent", "no such model folder"]),
    "eval lengths": ("eval DONE --data TEXT --seqlen 32 --lengths a,b", ["--lengths a,b", "numbers"]),
    "eval activations": ("eval DONE --data TEXT --seqlen 32 --activations int3 --no-speed", ["int3", "int8"]),
    "compare no artifact": ("compare DONE T/absent --reference MODEL --data TEXT --seqlen 32 --samples 2", ["absent"]),
    "compare picture": ("compare DONE --reference MODEL --data TEXT --seqlen 32 --samples 2 -o T/c.pdf", ["c.pdf", ".svg or .png"]),
    "compare below a file": ("compare DONE --reference MODEL --data TEXT --seqlen 32 --samples 2 -o T/file/c.svg", ["c.svg", "cannot be written"]),
    "report of a model": ("report MODEL", ["compress.json"]),
    "report no artifact": ("report T/absent", ["absent"]),
    "report no reference": ("report DONE --reference T/absent --data TEXT", ["absent"]),
    "report below a file": ("report DONE --reference MODEL --data TEXT --seqlen 32 --samples 2 --prompts 0 --no-speed -o T/file/r.html", ["r.html"]),
    "report name": ("report DONE --reference MODEL --data TEXT -o T/r.txt", [".html"]),
    "inspect no artifact": ("inspect T/absent", ["absent"]),
    "verify a file": ("verify T/file", ["file"]),
    "export name": ("export DONE --to gtpq -o T/out", ["gtpq", "gptq"]),
    "export into a file": ("export DONE --to dense -o T/file", ["file"]),
    "export hub name": ("export DONE --to dense -o T/out --push-to-hub a/b/c", ["a/b/c", "USER/NAME"]),
    "decompress no artifact": ("decompress T/absent -o T/out", ["absent"]),
    "import a plain model": ("import MODEL -o T/out", ["model"]),
    "import no model": ("import T/absent -o T/out", ["absent"]),
    "tune rows": ("tune DONE --rows x", ["--rows x", "numbers"]),
    "tune memory": ("tune DONE --memory some", ["some", "keep or bounded"]),
    "heal no teacher": ("heal DONE --teacher T/absent -o T/out", ["absent"]),
    "heal what": ("heal DONE --teacher MODEL --train all -o T/out", ["all", "lora"]),
    "heal option": ("heal DONE --teacher MODEL --set rnk=3 -o T/out", ["rnk", "rank"]),
    "extract width": ("extract MODEL --width 2 -o T/out", ["width"]),
    "demo recipe": ("demo -r w4-gtpq -o T/out", ["did you mean w4-gptq?"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_of_every_verb(case, work, tmp_path, capsys):
    line, said = WRONG[case]
    written(tmp_path / "file", "x")
    places = {"MODEL": str(work.model), "DONE": str(work.done), "TEXT": work.text}
    refuses([places.get(word, word.replace("T/", f"{tmp_path}/", 1) if word.startswith("T/") else word) for word in line.split()], said, work, tmp_path, capsys)
    assert not any(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("case", MODELS)
def test_bad_model(case, work, tmp_path, capsys):
    make, said = MODELS[case]
    refuses(run(make(work, tmp_path), work, tmp_path), said, work, tmp_path, capsys)


@pytest.mark.parametrize("case", TEXTS)
def test_bad_text(case, work, tmp_path, capsys):
    text, said = TEXTS[case]
    if isinstance(text, tuple):
        text = f"file:{written(tmp_path / text[0], text[1])}"
    refuses(run(work.model, work, tmp_path, text=text), said, work, tmp_path, capsys)
    refuses(("eval", work.done, "--data", text, "--seqlen", 32, "--no-speed"), said, work, tmp_path, capsys)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case, work, tmp_path, capsys):
    if case == "CUDA absent" and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    make, said = ARGUMENTS[case]
    refuses(run(work.model, work, tmp_path, *make(tmp_path)), said, work, tmp_path, capsys)
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, said", [
    (["--samples", "0"], ["--samples", "1"]), (["--seqlen", "1"], ["--seqlen", "2"]), (["--samples", "x"], ["--samples", "integer"]),
    (["--recipee", "x"], ["--recipee", "--recipe"]), (["extra"], ["extra"]), (["--set"], ["--set"]),
], ids=" ".join)
def test_wrong_usage(args, said, work, tmp_path, capsys):
    refuses(run(work.model, work, tmp_path, *args), [*said, "--help"], work, tmp_path, capsys, code=2)


def test_wrong_usage_of_the_command_itself(work, tmp_path, capsys):
    refuses(("run", work.model), ["--output", "compress run --help"], work, tmp_path, capsys, code=2)
    refuses(("rnu", work.model), ["'rnu'", "run", "compress --help"], work, tmp_path, capsys, code=2)
    refuses(("inspect",), ["argument", "compress inspect --help"], work, tmp_path, capsys, code=2)


def test_output_holds_another_run(work, tmp_path, capsys):
    out = Path(shutil.copytree(work.done, tmp_path / "out"))
    args = run(work.model, work, tmp_path, "--set", "gptq.bits=3", "--seed", 1)
    refuses(args, ["holds another run", "recipe.steps.0.bits: 4 → 3", "seed: 0 → 1", "--overwrite"], work, tmp_path, capsys)
    assert contents(out).keys() == {out / f.name for f in contents(work.done)}
    other = damaged(work, tmp_path, lambda x: x["lm_head.weight"].neg_())
    refuses(run(other, work, tmp_path), ["holds another run", "source.model.safetensors"], work, tmp_path, capsys)
    assert [f.read_bytes() for f in contents(out)] == [f.read_bytes() for f in contents(work.done)]


def test_output_is_not_ours(work, tmp_path, capsys):
    thesis = written(empty(tmp_path / "out") / "thesis.txt", "years of work")
    for flag in ((), ("--overwrite",)):
        refuses(run(work.model, work, tmp_path, *flag), ["out", "holds files but no compress run"], work, tmp_path, capsys)
        assert thesis.read_text() == "years of work" and list(thesis.parent.iterdir()) == [thesis]
    refuses(("run", work.model, "-o", work.model, *FAST), ["holds files"], work, tmp_path, capsys)
    refuses(("run", work.model, "-o", thesis, *FAST), ["thesis.txt"], work, tmp_path, capsys)
    refuses(("run", work.model, "-o", thesis / "x", *FAST), ["thesis.txt"], work, tmp_path, capsys)


@pytest.mark.parametrize("damage", ["", "[]", "{}", "{", "\xff"])
def test_output_with_a_damaged_record(damage, work, tmp_path, capsys):
    for name in ("compress.partial.json", MANIFEST):
        record = empty(tmp_path / name) / name
        written(record, damage.encode("latin-1"))
        refuses(("run", work.model, "-c", work.text, "-o", record.parent, *FAST), [name, "damaged", "--overwrite"], work, tmp_path, capsys)
        assert record.exists()


def test_tune_measures_every_layer_shape(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    assert main("tune", work.done, "--rows", "1,4", "--device", "cpu", "--json", tmp_path / "t.json") == 0
    found = json.loads((tmp_path / "t.json").read_text())["layers"]
    assert sum(r["layers"] for r in found if r["rows"] == 1) == 14 and {r["route"] for r in found} == {"dense-cached"}  # too small to be measured
    assert "dense-cached" in capsys.readouterr().out
    refuses(("tune", work.done, "--rows", "1,x"), ["--rows 1,x", "1,16"], work, tmp_path, capsys)
    refuses(("tune", work.done, "--memory", "none"), ["keep or bounded"], work, tmp_path, capsys)
    refuses(("tune", work.model), ["no compressed layers"], work, tmp_path, capsys)
    refuses(("eval", work.done, "--activations", "int3", "--no-speed"), ["int8, int4, fp8"], work, tmp_path, capsys)


VERBS = {
    "plan": lambda w, t: ("plan", w.model, "--set", "gptq.group_size=32"),
    "run": lambda w, t: run(w.model, w, t),
    "eval": lambda w, t: ("eval", w.done, "--data", w.text, "--samples", 1, "--seqlen", 32, "--no-speed"),
    "inspect": lambda w, t: ("inspect", w.done),
    "methods": lambda w, t: ("methods",),
    "verify": lambda w, t: ("verify", w.done),
}


@pytest.mark.parametrize("verb", VERBS)
def test_json_into_an_unwritable_place(verb, work, tmp_path, capsys):
    file = written(tmp_path / "file", "x")
    refuses((*VERBS[verb](work, tmp_path), "--json", file / "x.json"), ["x.json", "cannot be written"], work, tmp_path, capsys)
    refuses((*VERBS[verb](work, tmp_path), "--json", tmp_path), [str(tmp_path), "cannot be written"], work, tmp_path, capsys)
    assert file.read_text() == "x"
    if verb == "run":
        assert main("verify", tmp_path / "out") == 0        # the hour's work is there


@pytest.mark.parametrize("verb", ["inspect", "verify", "eval"])
@pytest.mark.parametrize("shard", ["../model/model.safetensors", "/etc/passwd", "..", "", "a/../../b"])
def test_manifest_that_leaves_its_folder(verb, shard, work, tmp_path, capsys):
    out = Path(shutil.copytree(work.done, tmp_path / "out"))
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["tensors"]["lm_head.weight"]["shard"] = shard
    written(out / MANIFEST, json.dumps(manifest))
    rest = ("--data", work.text, "--samples", 1, "--seqlen", 32, "--no-speed") if verb == "eval" else ()
    refuses((verb, out, *rest), ["lm_head.weight", repr(shard), "outside the folder"], work, tmp_path, capsys)


@pytest.mark.parametrize("content, said", [
    ("{", "damaged manifest"), ("[]", "damaged manifest"), ('{"format_version": 1}', "damaged manifest"),
    ('{"format_version": 99}', "99"), ('{"format_version": "x"}', "damaged manifest"), ("\x00", "damaged manifest"),
])
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_damaged_manifest(verb, content, said, work, tmp_path, capsys):
    out = Path(shutil.copytree(work.done, tmp_path / "out"))
    written(out / MANIFEST, content)
    refuses((verb, out), [MANIFEST, said], work, tmp_path, capsys)


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_not_an_artifact(verb, work, tmp_path, capsys):
    refuses((verb, work.model), ["not an artifact", MANIFEST], work, tmp_path, capsys)
    refuses((verb, tmp_path / "absent"), ["absent"], work, tmp_path, capsys)
    out = Path(shutil.copytree(work.done, tmp_path / "out"))
    (out / MANIFEST).rename(out / "compress.partial.json")
    refuses((verb, out), ["unfinished", "compress run"], work, tmp_path, capsys)


def test_strict_takes_no_fallback_from_the_past(work, tmp_path, capsys):
    """Damping is raised where H has no full rank: a run without --strict accepts it, the same run with --strict never does."""
    args = run(work.model, work, tmp_path, "--set", "gptq.damp=0", "--samples", 1)
    refuses((*args, "--strict"), ["--strict: damping raised at model.layers.0", "finished blocks are kept"], work, tmp_path, capsys)
    assert (tmp_path / "out/compress.partial.json").is_file()
    assert main(*args) == 0 and "fallback: damping raised at model.layers.0" in capsys.readouterr().out
    refuses((*args, "--strict"), ["--strict: damping raised at model.layers.0"], work, tmp_path, capsys)
    assert main("verify", tmp_path / "out") == 0


def test_verify_shows_its_problems_before_it_writes_them(work, tmp_path, capsys):
    out = Path(shutil.copytree(work.done, tmp_path / "out"))
    (out / "block-00001.safetensors").unlink()
    assert main("verify", out, "--json", tmp_path / "v.json") == 1
    said = capsys.readouterr().err
    assert said.startswith("problem: block-00001.safetensors: missing") and len(json.loads((tmp_path / "v.json").read_text())["problems"]) == 1
    assert main("verify", out, "--json", out / "config.json" / "v.json") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("problem: block-00001.safetensors: missing") and said[1].startswith("error: ") and len(said) == 2


def test_run_into_the_working_directory(work, tmp_path, monkeypatch):
    monkeypatch.chdir(empty(tmp_path / "here"))
    assert main("run", work.model, "-c", work.text, "-o", ".", *FAST) == 0
    assert {f.name: b for f, b in contents(tmp_path / "here").items()} == {f.name: b for f, b in contents(work.done).items()}
    assert (tmp_path / "here.log.jsonl").is_file()


def test_eval_without_a_tokenizer(work, tmp_path, capsys):
    args = ("eval", without(work, tmp_path, "tokenizer*"), "--data", work.text, "--samples", 1, "--seqlen", 32, "--no-speed")
    refuses(args, ["tokenizer missing"], work, tmp_path, capsys)


def test_eval_against_another_vocabulary(work, tmp_path, capsys):
    other = with_config(work, tmp_path, vocab_size=300)
    tensors = load_file(other / SHARD)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.zeros(300, 64, dtype=torch.bfloat16)
    save_file(tensors, other / SHARD, metadata={"format": "pt"})
    args = ("eval", work.done, "--reference", other, "--data", work.text, "--samples", 1, "--seqlen", 32, "--no-speed")
    refuses(args, ["256", "300", "vocabulary"], work, tmp_path, capsys)


def test_nan_after_a_finished_block_keeps_it(work, tmp_path, capsys):
    refuses(run(damaged(work, tmp_path, poison(BLOCK1, float("nan"))), work, tmp_path), [BLOCK1], work, tmp_path, capsys)
    assert (tmp_path / "out/block-00000.safetensors").is_file() and (tmp_path / "out/compress.partial.json").is_file()


def refuses(args, said, work, tmp_path, capsys, code=1):
    """One error line that says all of `said`; the given exit code; the shared model and artifact as they were."""
    before = contents(work.model, work.done)
    capsys.readouterr()
    assert main(*args) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]     # [1/14] is progress
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in said), lines[0]
    assert contents(work.model, work.done) == before


def test_through_a_real_process(work, tmp_path):
    """What the shell sees: one line and the exit code, nothing of transformers' own chatter."""
    model = pickled(work, tmp_path)
    child = subprocess.run([sys.executable, "-m", "compress", "plan", str(model)], capture_output=True, text=True)
    assert child.returncode == 1 and child.stdout == "" and "Traceback" not in child.stderr
    assert child.stderr.startswith("error: ") and child.stderr.count("\n") == 1 and "pytorch_model.bin" in child.stderr
