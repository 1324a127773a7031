"""Run: pytest tests/test_report.py. The report and what it is made of: damage by depth, outliers, drift, context lengths, results kept by content."""

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import main
from tiny import save_tiny, tiny_model

import compress
from compress import plots
from compress.calibration.data import CalibrationSet, load_calibration
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.eval import cache, context, depth, tasks
from compress.eval.drift import drift, greedy
from compress.eval.outliers import Outliers
from compress.recipe import load as load_recipe
from compress.recipe import viewed_as
from compress.verification import ArtifactCheckpoint

FAST = dict(samples=4, seqlen=32, show=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Tiny models, a text, and artifacts of them at 2 bits; the last with a view, so that its basis is not the original's."""
    root = tmp_path_factory.mktemp("report")
    (root / "text.txt").write_text(Path(os.__file__).read_text()[:30000])
    text = f"file:{root / 'text.txt'}"
    made = SimpleNamespace(root=root, text=text, model=root / "llama")
    for name, model, extra in (("plain", "llama", {}), ("turned", "llama", {"views": [{"rotate": {"untie": True}}]}), ("experts", "qwen3_moe", {})):
        if not (root / model).is_dir():
            save_tiny(model, root / model)
        recipe = {"name": name, "steps": [{"method": "gptq", "bits": 2, "group_size": 32}]} | extra
        compress.run(str(root / model), recipe, text, root / name, **FAST)
        setattr(made, name, root / name)
    return made


@pytest.fixture(scope="module")
def page(work):
    asked = dict(samples=3, seqlen=96, prompts=2, lengths=[48, 96], speed=False, show=False)
    return compress.report(str(work.plain), None, work.text, work.root / "page.html", **asked)


# ---- outliers


def test_gaussian_activations_have_kurtosis_3_and_a_planted_channel_is_found():
    x = torch.randn(8, 256, 64, generator=torch.Generator().manual_seed(0))
    plain, planted = Outliers(), Outliers()
    y = x.clone()
    y[..., 5] *= 50
    y[0, 0, 7] = 4000.0
    for batch, other in zip(x.split(3), y.split(3)):
        plain.add(batch)
        planted.add(other)
    a, b = plain.figures(), planted.figures()
    assert abs(a["kurtosis"] - 3) < 0.05 and a["excess_kurtosis"] < 1 and (a["channels"], a["tokens"], a["massive"]) == (0, 0, 0)
    assert b["kurtosis"] > 100 and b["excess_kurtosis"] > 30 and b["channels"] == 2 and b["massive"] == 1 and b["max"] == 4000
    assert a["max_norm"] == pytest.approx(x.abs().amax((1, 2)).mean().item())
    z = y.double()
    assert b["kurtosis"] == pytest.approx((((z - z.mean()) ** 4).mean() / z.var(correction=0) ** 2).item(), rel=1e-4)


# ---- damage by depth


def small(work, windows: int = 3) -> CalibrationSet:
    tokenizer = Checkpoint(str(work.model)).tokenizer()
    return load_calibration(work.text, tokenizer, samples=windows, seqlen=32, split="evaluation")


def measured(work, name: str, model: str = "llama", data: CalibrationSet | None = None) -> dict:
    manifest = compress.inspect(str(work.root / name))
    original = Checkpoint(str(work.root / model), dtype=torch.float32)
    artifact = ArtifactCheckpoint(work.root / name, manifest, dtype=torch.float32)
    return depth.measure(original, viewed_as(manifest.run["recipe"], original), artifact, data or small(work), batch=2)


def slow_kl(work, compressed_blocks: int, data: CalibrationSet) -> float:
    """The whole models in memory, blocks put together by hand, fp64 sums."""
    original = compress.load(str(work.model), dtype=torch.float32)
    mixed, squeezed = (compress.load(str(p), dtype=torch.float32, policy="dense") for p in (work.model, work.plain))
    for i in range(compressed_blocks):
        mixed.model.layers[i] = squeezed.model.layers[i]
    with torch.no_grad():
        p, q = (m(data.tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (original, mixed))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_kl_by_depth_is_that_of_models_put_together_by_hand(work):
    data = small(work)
    found = measured(work, "plain", data=data)
    assert [r["blocks"] for r in found["kl"]] == [0, 1, 2] and found["kl"][0]["mean"] == 0
    for row in found["kl"][1:]:
        assert row["mean"] == pytest.approx(slow_kl(work, row["blocks"], data), rel=1e-4)
    whole = compress.evaluate(str(work.plain), str(work.model), data, seqlen=32, show=False)
    assert found["kl"][-1]["mean"] == pytest.approx(whole["kl"]["mean"], rel=1e-4)
    assert len(found["hidden"]) == 2 and all(0 < e < 1 for e in found["hidden"]) and len(found["outliers"]["residual"]) == 3
    assert set(found["outliers"]["sites"][0]) == {"attn.input", "attn.output", "mlp.input", "mlp.down"} or len(found["outliers"]["sites"][0]) == 4


def test_kl_by_depth_in_a_turned_basis_starts_at_nothing_and_ends_at_the_whole(work):
    data = small(work)
    found = measured(work, "turned", data=data)
    whole = compress.evaluate(str(work.turned), str(work.model), data, seqlen=32, show=False)
    assert found["kl"][0]["mean"] < 1e-3 < found["kl"][1]["mean"] and found["kl"][-1]["mean"] == pytest.approx(whole["kl"]["mean"], rel=1e-3)


def test_points_are_few_and_end_at_the_last_block():
    assert depth.points(2) == [1, 2] and depth.points(16) == list(range(1, 17))
    assert len(depth.points(80)) == depth.POINTS and depth.points(80)[-1] == 80


# ---- drift and context


def test_greedy_continues_as_generate_does():
    model, prompts = tiny_model("llama"), torch.arange(12).view(2, 6)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=7, min_new_tokens=7, eos_token_id=None)
    assert torch.equal(greedy(model, prompts, 7), expected[:, 6:])


def test_drift_counts_tokens_until_they_part():
    a = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4]])
    b = torch.tensor([[1, 2, 3, 4], [1, 2, 7, 4], [1, 2, 3, 4]])
    d = drift(a, b)
    assert d["same_tokens"] == [4, 2, 0] and d["mean"] == 2 and d["median"] == 2 and d["identical"] == pytest.approx(1 / 3)
    assert drift(a, a)["identical"] == 1


def test_context_lengths_score_the_same_tokens_with_at_least_half_a_window_before_them():
    model, text = tiny_model("llama"), torch.randint(256, (100,), generator=torch.Generator().manual_seed(1))
    rows = context.by_length(model, None, text, [32, 8, 16], tokens=64)
    assert [r["length"] for r in rows] == [8, 16, 32] and {r["tokens"] for r in rows} == {80}
    for row in rows:
        half, losses = row["length"] // 2, []
        for end in range(16 + half, 97, half):
            with torch.no_grad():
                log_q = model(text[None, end - 2 * half : end]).logits[0].double().log_softmax(-1)
            losses += [-log_q[t - 1, text[end - 2 * half + t]].item() for t in range(half, 2 * half)]
        assert row["perplexity"]["token"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert context.by_length(model, model, text, [8], tokens=64)[0]["kl"]["mean"] == 0
    with pytest.raises(CompressError, match="divide the longest, 32"):
        context.by_length(model, None, text, [32, 12])
    with pytest.raises(CompressError, match="100 tokens, one window takes 128"):
        context.by_length(model, None, text, [128])


# ---- block by block


@pytest.mark.parametrize("name, model", [("plain", "llama"), ("turned", "llama"), ("experts", "qwen3_moe")])
def test_streamed_figures_are_those_of_the_whole_models(work, name, model):
    args = (str(work.root / name), str(work.root / model), work.text)
    whole, streamed = (compress.evaluate(*args, samples=3, seqlen=32, stream=stream, fresh=True, show=False) for stream in (False, True))
    for key, field in (("kl", "mean"), ("kl", "stderr"), ("top1", "agreement"), ("perplexity", "token")):
        assert streamed[key][field] == pytest.approx(whole[key][field], rel=1e-4), key
    assert streamed["reference"]["perplexity"]["token"] == pytest.approx(whole["reference"]["perplexity"]["token"], rel=1e-5)
    with pytest.raises(CompressError, match="--stream goes with --no-speed"):
        compress.evaluate(*args, stream=True, drift=2)


# ---- results kept by content


def test_results_are_kept_by_content_beside_the_artifact(work, monkeypatch):
    data, args = small(work), dict(seqlen=32, show=False)
    first = compress.evaluate(str(work.plain), str(work.model), data, **args)
    assert cache.path(work.plain).name == "plain.eval.json" and cache.path(work.plain).is_file()
    monkeypatch.setattr("compress.api._compare.compare", lambda *a: pytest.fail("measured again"))
    assert compress.evaluate(str(work.plain), str(work.model), data, **args) == first
    for change in (dict(fresh=True), dict(dtype="bfloat16")):
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            compress.evaluate(str(work.plain), str(work.model), data, **(args | change))
    with pytest.raises(pytest.fail.Exception):
        compress.evaluate(str(work.plain), str(work.model), replace(data, tokens=data.tokens + 1), **args)
    with pytest.raises(pytest.fail.Exception):
        compress.evaluate(str(work.turned), str(work.model), replace(data, tokens=data.tokens + 1), **args)


def test_a_damaged_file_of_results_costs_time_only(work):
    key, folder = {"a": 1}, work.experts
    cache.path(folder).write_text("{torn")
    assert cache.cached(folder, key, lambda: {"value": 1}) == {"value": 1} == cache.cached(folder, key, dict)
    told: list[str] = []
    assert cache.cached(folder, key, dict, tell=told.append) == {"value": 1} and "from experts.eval.json (--fresh" in told[0]
    assert cache.cached(folder, key, lambda: {"value": 2}, fresh=True) == {"value": 2} == cache.cached(folder, key, dict)
    cache.path(folder).unlink()


# ---- the page


class Checker(html.parser.HTMLParser):
    """Every element closed in order; what refers to the outside is collected."""

    VOID = {"meta", "br", "img", "link", "path", "use"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.outside = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.outside += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value and not value.startswith("#")]
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.outside += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value and not value.startswith("#")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_one_well_formed_file_that_asks_for_nothing(page, work):
    text = (work.root / "page.html").read_bytes().decode()
    assert text == page.html and Checker(text).outside == [] and "url(http" not in text and "@import" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert text.count("<svg") == 4 and "currentColor" in text and len(text) < 400_000
    data = json.loads((work.root / "page.json").read_text())
    assert data == json.loads(json.dumps(page.data)) and "NaN" not in (work.root / "page.json").read_text()


def test_the_page_says_what_the_figures_say(page, work):
    d, e = page.data, page.data["evaluation"]
    assert d["original"] == "llama" and d["recipe"]["name"] == "plain" and e["data"]["spec"] == work.text and e["windows"] == 3
    words = ("2.56", "No massive activations", "all went as asked", "2 texts", "By the length of the context")
    for shown in (f"{e['kl']['mean']:.5f}", f"{100 * e['top1']['agreement']:.2f} %", *words):
        assert shown in page.html, shown
    assert d["command"].startswith("compress run ") and "--samples 4 --seqlen 32" in d["command"]
    assert e["drift"]["prompts"] == 2 and all(x["original"].startswith(x["shared"]) for x in e["drift"]["examples"])
    assert len(d["layers"]) == 14 and all(name in page.html for name in d["worst"])
    assert d["depth"]["kl"][-1]["mean"] == pytest.approx(e["kl"]["mean"], rel=1e-4) and d["run"]["seconds"] > 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no headless browser here")
def test_nothing_is_wider_than_the_screen(page, tmp_path):
    """At 500 pixels, the narrowest that headless Chromium opens."""
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script></body>"
    (tmp_path / "page.html").write_text(page.html.replace("</body>", measure))
    browser = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*browser, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=60)
    width, window = map(int, re.findall(r"<title>(\d+) of (\d+)</title>", shown.stdout)[0])
    assert width <= window


def test_the_same_figures_make_the_same_page(page):
    assert compress.Page(page.data).html == page.html


def test_a_notebook_shows_it_in_a_frame(page):
    shown = page._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and "&lt;!doctype html&gt;" in shown and shown.count("<") == 2


def test_experts_and_fallbacks_are_on_the_page(work):
    page = compress.report(str(work.experts), str(work.root / "qwen3_moe"), work.text, samples=2, seqlen=32, prompts=0, speed=False, show=False)
    assert [x["block"] for x in page.data["experts"]] == [1] and page.data["experts"][0]["experts"] == 4
    assert page.data["experts"][0]["max"] <= 4 * 32 and "fewest tokens" in page.html and "experts averaged" in page.html
    page.data["fallbacks"] = [{"what": "damping <raised>", "where": "layer", "count": 2, "detail": "from 0.01 to 0.1"}]
    again = compress.Page(page.data)
    assert "damping &lt;raised&gt;" in again.html and "×2" in again.html and Checker(again.html)
    page.data["fallbacks"] *= 12
    assert "4 more kinds of fallback" in (again := compress.Page(page.data)).html and Checker(again.html)


def test_reports_refuse_what_they_cannot_do(work, tmp_path):
    shutil.copytree(work.plain, tmp_path / "moved")
    with pytest.raises(CompressError, match="give --reference MODEL"):
        compress.report(str(tmp_path / "moved"), None, work.text)
    with pytest.raises(CompressError, match=r"a report is a \.html file"):
        compress.report(str(work.plain), str(work.model), work.text, tmp_path / "report.pdf")
    with pytest.raises(CompressError, match=r"a picture is \.svg or \.png"):
        compress.compare([str(work.plain)], str(work.model), work.text, picture=tmp_path / "a.jpg")
    with pytest.raises(CompressError, match="drift compares two models"):
        compress.evaluate(str(work.plain), data=work.text, drift=2)


def test_pictures_are_the_same_bytes_for_the_same_data(tmp_path):
    draw = plots.depth([{"blocks": 0, "mean": 0.0, "stderr": 0.0}, {"blocks": 1, "mean": 0.1, "stderr": None}])
    assert plots.inline(draw, "a < b") == plots.inline(draw, "a < b") and 'aria-label="a &lt; b"' in plots.inline(draw, "a < b")
    for suffix in (".svg", ".png"):
        rows = [{"name": n, "bytes": b, "kl": {"mean": k, "stderr": None}} for n, b, k in (("a", 1e6, 0.1), ("b", 2e6, 0.01), ("c", 3e6, 0.02))]
        for copy in "12":
            plots.save(plots.sizes(rows), tmp_path / (copy + suffix))
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()


# ---- the command line


def test_report_and_compare_commands(work, tmp_path, capsys):
    args = ("--data", work.text, "--samples", 3, "--seqlen", 32)
    assert main("report", work.plain, *args, "-o", tmp_path / "r.html", "--prompts", 0, "--no-speed", "--json", tmp_path / "copy.json") == 0
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads((tmp_path / "copy.json").read_text())
    compared = ("compare", work.plain, work.turned, "--reference", work.model, *args)
    assert main(*compared, "-o", tmp_path / "c.svg", "--json", tmp_path / "c.json") == 0
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert {r["recipe"] for r in rows} == {"plain", "turned"} and rows[0]["kl"]["mean"] <= rows[1]["kl"]["mean"]
    assert (tmp_path / "c.svg").read_text().startswith("<?xml") and "turned" in capsys.readouterr().out


def test_eval_with_drift_and_lengths(work, tmp_path, capsys):
    args = ("--data", work.text, "--samples", 4, "--seqlen", 64, "--no-speed", "--drift", 2, "--lengths", "16,32")
    assert main("eval", work.plain, "--reference", work.model, *args, "--json", tmp_path / "e.json") == 0
    e, shown = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr().out
    assert [r["length"] for r in e["context"]] == [16, 32] and all(r["kl"]["mean"] > 0 for r in e["context"]) and e["drift"]["prompts"] == 2
    assert "written greedily, the same for" in shown and "context, tokens" in shown
    assert main("eval", work.plain, "--data", work.text, "--samples", 2, "--no-speed", "--seqlen", 32, "--lengths", "a") == 1
    assert "--lengths a: expected numbers" in capsys.readouterr().err


def test_tasks(work, tmp_path, capsys):
    """A task defined here, of questions in a file: nothing is fetched."""
    questions = [{"q": "import", "choices": [" os", " 17 17"], "answer": 0}, {"q": "def f", "choices": ["(x):", " 0 0 0"], "answer": 0}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions * 3))
    task = tmp_path / "tiny.yaml"
    task.write_text(f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    args = ("eval", work.plain, "--reference", work.model, "--data", work.text, "--samples", 2, "--seqlen", 32, "--no-speed", "--tasks", task)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        assert main(*args) == 1 and "pip install 'compress[tasks]'" in capsys.readouterr().err
        pytest.skip("lm-eval is not installed")
    assert main(*args, "--limit", 4, "--json", tmp_path / "e.json") == 0
    e = json.loads((tmp_path / "e.json").read_text())
    assert 0 <= e["tasks"]["tiny"]["acc"]["value"] <= 1 and set(e["reference"]["tasks"]) == {"tiny"} and "tiny" in capsys.readouterr().out
    with pytest.raises(CompressError, match="--tasks no_such_task"):
        tasks.run(tiny_model("llama"), None, ["no_such_task.yaml"])


def test_recipes_and_methods(tmp_path, capsys):
    assert main("recipes", "--json", tmp_path / "r.json") == 0
    listed = json.loads((tmp_path / "r.json").read_text())
    assert listed["w4-gptq"]["bits"] == [4.156] and listed["w4-rtn"]["needs"] == "nothing: seconds" and "once" in listed["w4-gptq"]["needs"]
    assert "twice" in listed["w4-balanced"]["needs"] and "gradients" in listed["w4-best"]["needs"] and set(listed) == set(compress.recipe.names())
    assert all(about["description"] and about["bits"] for about in listed.values())
    capsys.readouterr()
    assert main("recipes", "w4-gptq") == 0 and "method: gptq" in capsys.readouterr().out
    assert main("methods", "gptq") == 0 and "group_size" in capsys.readouterr().out
    assert main("methods", "gptk") == 1 and "did you mean gptq?" in capsys.readouterr().err
    assert load_recipe("w4-gptq").name == "w4-gptq"


def test_every_command_teaches_by_example_and_writes_json():
    import typer

    from compress import cli

    for name, command in typer.main.get_command(cli.app).commands.items():
        assert len(re.findall(rf"^\s*compress {name}\b", command.help, re.M)) >= 1, f"{name}: an example in its docstring"
        assert any("--json" in p.opts for p in command.params), name
