"""Run: pytest tests/test_artifact.py. What lies on disk: verified byte by byte, the same every time, resumed, loaded."""
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import compress
from compress import CompressError
from compress.artifact import INDEX, MANIFEST, PARTIAL, PROBE, Writer, differences, file_sha256, head_sha256, sha256
from compress.calibration.data import CalibrationSet
from compress.linear import CompressedLinear

LAYER = "model.layers.1.mlp.up_proj"
ARCHITECTURES = ["llama", "gpt2", "opt", "bloom", "falcon", "mixtral", "qwen3_moe"]
WINDOWS = CalibrationSet(torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0)), None, 0, {"spec": "random"})


def run(model: Path, out: Path, bits: int = 4, **options) -> compress.Report:
    return compress.run(str(model), "w4-gptq", WINDOWS, out, settings={"gptq.group_size": 32, "gptq.bits": bits}, show=False, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name): (model folder, artifact folder), each made once; tests that change an artifact copy it."""
    root, done = tmp_path_factory.mktemp("artifacts"), {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in done:
            save_tiny(name, root / name)
            run(root / name, root / f"{name}-w4")
            done[name] = root / name, root / f"{name}-w4"
        return done[name]
    return make


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made("llama")[1], tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def edit_json(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def problems(folder: Path) -> str:
    """All that verify finds, which must be something."""
    result = compress.verify(str(folder))
    assert not result.ok
    return "\n".join(result.problems)


# ---- verify


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verify_passes_on_a_fresh_artifact(name, made):
    model, out = made(name)
    result = compress.verify(str(out))
    assert result.ok and result.kl == 0
    manifest = compress.inspect(str(out))
    assert result.tensors == len(manifest.tensors) and {f.what for f in manifest.fallbacks} <= {"inputs never active"}
    assert {t.shard for t in manifest.tensors.values()} == set(manifest.shards) == {f.name for f in out.glob("*.safetensors")}
    assert not list(out.glob("*.tmp")) and not (out / PARTIAL).exists()
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in out.iterdir())       # others may read it
    assert {f.name for f in model.glob("*.json")} <= {f.name for f in out.iterdir()}       # tokenizer and generation files too


def test_one_flipped_bit_anywhere_is_found(copy):
    rng, manifest = random.Random(0), compress.inspect(str(copy))
    for file in sorted(copy.glob("*.safetensors")):
        raw = file.read_bytes()
        header = 8 + int.from_bytes(raw[:8], "little")
        names = [n for n, t in manifest.tensors.items() if t.shard == file.name]
        places = [0, 7, 8, header - 1, header, len(raw) - 1, *rng.sample(range(header), 8), *rng.sample(range(header, len(raw)), 8)]
        for place in places:
            flipped = bytearray(raw)
            flipped[place] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            found = problems(copy)
            assert any(name in found for name in names), (file.name, place, found)
            assert place < header or "SHA-256 differs" in found
        file.write_bytes(raw)
    assert compress.verify(str(copy)).ok


def test_whitespace_in_a_header_counts_as_a_change(copy):
    """safetensors pads its header with spaces to a multiple of 8 and reads any other blank as well."""
    padded = 0
    for file in copy.glob("*.safetensors"):
        raw = file.read_bytes()
        last = 7 + int.from_bytes(raw[:8], "little")
        if raw[last] == ord(" "):
            padded += 1
            file.write_bytes(raw[:last] + b"\n" + raw[last + 1:])
            assert f"{file.name}: its header is not the one that was written" in problems(copy)
    assert padded


def test_a_tensor_that_holds_nan_is_named(copy):
    forge(copy, "model.norm.weight", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))
    assert "model.norm.weight: holds NaN or Inf" in problems(copy)


def test_missing_extra_and_cut_shards(copy):
    shard = copy / "block-00001.safetensors"
    raw = shard.read_bytes()
    for damage, said in ((raw[:-1], "corrupt or truncated"), (raw[:40], "corrupt or truncated"), (b"", "corrupt or truncated"), (raw + b"x", "corrupt")):
        shard.write_bytes(damage)
        assert said in (found := problems(copy)) and "block-00001" in found and "model.layers.1.input_layernorm.weight" in found
    shard.unlink()
    assert "block-00001.safetensors: missing" in problems(copy)
    with safe_open(copy / "block-00000.safetensors", "pt") as f:
        metadata = f.metadata()
    save_file(load_file(copy / "block-00000.safetensors") | {"surprise": torch.ones(1)}, copy / "block-00000.safetensors", metadata)
    assert "surprise is not in the manifest" in problems(copy)


MANIFEST_EDITS = {
    "wrong sha": (lambda m: m["tensors"][f"{LAYER}.codes"].update(sha256="0" * 64), f"{LAYER}.codes: its bytes"),
    "wrong dtype": (lambda m: m["tensors"][f"{LAYER}.codes"].update(dtype="int8"), f"{LAYER}.codes: int32"),
    "wrong shape": (lambda m: m["tensors"][f"{LAYER}.codes"].update(shape=[8, 128]), f"{LAYER}.codes: int32"),
    "no tensor": (lambda m: m["tensors"].pop(f"{LAYER}.scales"), f"{LAYER}.scales is not in the manifest"),
    "new tensor": (lambda m: m["tensors"].update(x=m["tensors"][f"{LAYER}.codes"]), "x is missing"),
    "wrong bits": (lambda m: m["layers"][LAYER].update(bits=2.0), f"{LAYER}.bits: 4.625 → 2.0"),
    "wrong error": (lambda m: m["layers"][LAYER].update(error=0.0), f"{LAYER}.error"),
    "wrong format": (lambda m: m["layers"][LAYER]["format"].update(bits=3), f"{LAYER}.format.bits: 4 → 3"),
    "no layer": (lambda m: m["layers"].pop(LAYER), LAYER),
    "wrong recipe": (lambda m: m["run"]["recipe"].update(name="w2"), "runs.0"),
    "wrong size": (lambda m: m["totals"].update(bytes=1), "totals.bytes"),
}


@pytest.mark.parametrize("case", MANIFEST_EDITS)
def test_edited_manifest(case, copy):
    change, said = MANIFEST_EDITS[case]
    edit_json(copy / MANIFEST, change)
    assert said in problems(copy)


CONFIG_EDITS = {
    "no quantization": (lambda c: c.pop("quantization_config"), "no quantization_config of method compress"),
    "other method": (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "no quantization_config of method compress"),
    "fewer blocks": (lambda c: c.update(num_hidden_layers=1), "layers.1.self_attn.q_proj: in the manifest, but not in the model"),
    "more blocks": (lambda c: c.update(num_hidden_layers=3), "model.layers.2 lacks"),
    "activation": (lambda c: c.update(hidden_act="relu"), "does not give the logits"),
    "unknown activation": (lambda c: c.update(hidden_act="reluu"), "reluu"),
    "impossible": (lambda c: c.update(num_attention_heads=3), "config.json cannot be used"),
    "tied": (lambda c: c.update(tie_word_embeddings=True), "does not give the logits"),
}


@pytest.mark.parametrize("case", CONFIG_EDITS)
def test_edited_config(case, copy):
    change, said = CONFIG_EDITS[case]
    edit_json(copy / "config.json", change)
    assert "config.json: not the file that was written" in problems(copy)
    sign(copy, "config.json")
    assert said in problems(copy)


def sign(folder: Path, name: str) -> None:
    """Make the manifest vouch for a file as it is now: only the deeper checks can tell."""
    edit_json(folder / MANIFEST, lambda m: m["files"].update({name: file_sha256(folder / name)}))


def test_edited_index(copy):
    edit_json(copy / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "block-00000.safetensors"}))
    assert f"{INDEX}: not the file that was written" in problems(copy)
    sign(copy, INDEX)
    assert f"{INDEX} is not what {MANIFEST} says: lm_head.weight" in problems(copy)
    (copy / INDEX).write_text("[]")
    sign(copy, INDEX)
    assert f"{INDEX}: missing or damaged" in problems(copy)
    (copy / INDEX).unlink()
    assert f"{INDEX}: missing" in problems(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_changed_companion_is_found_and_mended(name, made, copy):
    model, out = made("llama")
    (copy / name).write_text("{}")
    assert f"{name}: not the file that was written" in problems(copy)
    assert run(model, copy).resumed_layers == 14  # the same command puts it right, and computes nothing again
    assert contents(copy) == contents(out)


def test_overwrite_leaves_what_is_not_ours(made, copy):
    model, _ = made("llama")
    (copy / "eval.json").write_text("my figures")
    run(model, copy, bits=3, overwrite=True)
    assert (copy / "eval.json").read_text() == "my figures"


def forge(folder: Path, name: str, change) -> None:
    """Change a tensor and every hash of it: what a careful forger, or a bug between memory and file, would leave."""
    manifest = json.loads((folder / MANIFEST).read_text())
    file = folder / manifest["tensors"][name]["shard"]
    with safe_open(file, "pt") as f:
        header = json.loads(f.metadata()["compress"])
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    header["tensors"][name]["sha256"] = manifest["tensors"][name]["sha256"] = sha256(tensors[name])
    save_file(tensors, file, {"compress": json.dumps(header)})
    manifest["shards"][file.name] = head_sha256(file)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name, change", [
    ("model.layers.0.input_layernorm.weight", lambda t: t * 1.5), (f"{LAYER}.codes", lambda t: t ^ 0x01010101), (f"{LAYER}.zeros", lambda t: t ^ 0x11),
    (f"{LAYER}.scales", lambda t: -t), ("lm_head.weight", lambda t: t.roll(1, 0)),
])
def test_only_the_probe_can_tell(name, change, copy):
    forge(copy, name, lambda t: t)      # the forgery itself leaves no trace
    assert compress.verify(str(copy)).ok
    forge(copy, name, change)
    found = problems(copy)
    assert found.startswith("the model on disk does not give the logits of the model in memory: KL") and "\n" not in found


# ---- the same bytes, however they came about


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_two_runs_give_the_same_bytes(name, made, tmp_path):
    model, out = made(name)
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    torch.manual_seed(123)      # nothing may draw from the global generator
    run(moved, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)


def test_tied_and_sharded_checkpoints(tmp_path):
    """Qwen2 ties its head; a source in many files gives the same shards as one in a single file."""
    save_tiny("qwen2", tmp_path / "one")
    save_tiny("qwen2", tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for name in ("one", "many"):
        run(tmp_path / name, tmp_path / f"{name}-w4")
        assert compress.verify(str(tmp_path / f"{name}-w4")).ok
    one, many = (compress.inspect(str(tmp_path / f"{name}-w4")) for name in ("one", "many"))
    assert one.tensors == many.tensors and one.layers == many.layers and "lm_head.weight" not in one.tensors


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("lost", ["block-00000", "block-00001", "outer-00000", "probe", "block-*", "*"])
def test_resume_gives_the_same_bytes(name, lost, made, tmp_path):
    model, out = made(name)
    part = Path(shutil.copytree(out, tmp_path / "part"))
    (part / MANIFEST).rename(part / PARTIAL)        # interrupted before the end
    for file in part.glob(f"{lost}.safetensors"):
        file.unlink()
    kept = {f.name: f.stat().st_mtime_ns for f in part.glob("block-*")}
    report = run(model, part)
    assert contents(part) == contents(out)
    assert {f: (part / f).stat().st_mtime_ns for f in kept} == kept
    assert report.resumed_layers == sum(f"block-{int(n.split('.')[2]):05d}.safetensors" in kept for n in report.manifest.layers)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "foreign"])
def test_the_same_command_repairs_a_finished_artifact(damage, made, copy, tmp_path):
    model, out = made("llama")
    shard = copy / "block-00001.safetensors"
    raw = shard.read_bytes()
    if damage == "foreign":     # right name, other run
        run(model, tmp_path / "other", bits=3)
        shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    else:
        shard.write_bytes({"missing": b"", "flipped": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "cut": raw[:-7]}[damage])
    if damage == "missing":
        shard.unlink()
    assert not compress.verify(str(copy)).ok
    assert run(model, copy).resumed_layers == 7
    assert contents(copy) == contents(out)


def test_leftovers_of_a_kill_are_cleared(made, tmp_path):
    """Between any two system calls: a record half written, a shard half written, the manifest beside the record."""
    model, out = made("llama")
    (fresh := tmp_path / "fresh").mkdir()
    (fresh / f"{PARTIAL}.tmp").write_bytes(b'{"ru')
    run(model, fresh)
    assert contents(fresh) == contents(out)
    done = Path(shutil.copytree(out, tmp_path / "done"))
    (done / PARTIAL).write_text("{}")
    (done / "block-00001.safetensors.tmp").write_bytes(b"half")
    assert run(model, done).resumed_layers == 14
    assert contents(done) == contents(out)


def test_overwrite(made, copy):
    model, out = made("llama")
    (copy / "merges.txt").write_text("of another model")
    with pytest.raises(CompressError, match=r"holds another run, which differs in recipe\.steps\.0\.bits: 4 → 3"):
        run(model, copy, bits=3)
    run(model, copy, bits=3, overwrite=True)        # right after the refusal, in the same process
    assert {r.describe for r in compress.inspect(str(copy)).layers.values()} == {"int3 g32 asym"} and not (copy / "merges.txt").exists()
    run(model, copy, overwrite=True)
    assert contents(copy) == contents(out)


def test_overwrite_replaces_a_damaged_record(made, copy):
    model, out = made("llama")
    (copy / MANIFEST).write_text("{")
    with pytest.raises(CompressError, match="damaged"):
        run(model, copy)
    run(model, copy, overwrite=True)
    assert contents(copy) == contents(out)


def test_overwrite_continues_what_it_began(made, copy):
    """The same command again after an interruption, --overwrite included, keeps the finished blocks."""
    model, out = made("llama")
    (copy / MANIFEST).rename(copy / PARTIAL)
    (copy / "block-00001.safetensors").unlink()
    assert run(model, copy, overwrite=True).resumed_layers == 7
    assert contents(copy) == contents(out)


@pytest.mark.parametrize("survives", range(0, 9, 2))
def test_overwrite_killed_half_way(survives, made, copy, monkeypatch):
    model, out = made("llama")
    unlink, left = Path.unlink, [survives]

    def dying(self, missing_ok=False):
        if self.parent == copy and self.exists():
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", dying)
        run(model, copy, bits=3, overwrite=True)
    if (copy / MANIFEST).exists():
        assert contents(copy).keys() - {PARTIAL} == contents(out).keys()      # not begun: the old artifact is whole
    run(model, copy, bits=3, overwrite=True)
    assert compress.verify(str(copy)).ok and not (copy / PARTIAL).exists()


def test_one_writer_a_folder(made, tmp_path):
    model, _ = made("llama")
    first = Writer(tmp_path / "out", {"run": 1})
    with pytest.raises(CompressError, match="another compress run is writing here"):
        run(model, tmp_path / "out")
    first.close()
    with pytest.raises(CompressError, match="holds another run"):
        run(model, tmp_path / "out")
    run(model, tmp_path / "out", overwrite=True)


def test_differences_name_the_place():
    old, new = {"a": [1, {"b": 2}], "c": None, "d": "x"}, {"a": [1, {"b": 3}], "d": "x", "e": 1}
    assert differences(old, new) == ["a.1.b: 2 → 3", "e: null → 1"]
    assert differences([1], [1, 2], "x") == ["x: [1] → [1, 2]"] and len(differences("y" * 999, "", "z")[0]) < 100


# ---- loaded


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_logits_are_the_streamed_ones(name, dtype, made, tmp_path):
    """The probe's logits were made block by block from the model in memory; the loaded model gives them bit for bit."""
    model, out = made(name)
    if dtype != compress.inspect(str(out)).run["dtype"]:
        run(model, tmp_path / "out", dtype=dtype)
        out = tmp_path / "out"
    probe = load_file(out / PROBE)
    loaded = compress.load(str(out), dtype=dtype, policy="dense")
    with torch.no_grad():
        logits = loaded(probe["tokens"], use_cache=False).logits[:, -probe["logits"].shape[1]:].float()
    assert torch.equal(logits, probe["logits"])
    assert sum(isinstance(m, CompressedLinear) for m in loaded.modules()) == len(compress.inspect(str(out)).layers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_pretrained_and_generate(name, made):
    model, out = made(name)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])
    prompt = WINDOWS.tokens[:2, :9]
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    cached, plain = (loaded.eval().generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.shape == (2, 21) and torch.equal(cached, plain)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        p, q = (m(WINDOWS.tokens, use_cache=False).logits.log_softmax(-1) for m in (original, loaded))
    assert 1e-5 < (p.exp() * (p - q)).sum(-1).mean() < 0.1        # another model, but not by much


def test_a_recipe_that_keeps_everything(made, tmp_path):
    model, _ = made("llama")
    kept = {"name": "keep", "steps": [{"method": "rtn"}], "ignore": ["*"]}
    report = compress.run(str(model), kept, output=tmp_path / "out", show=False)
    source, stored = load_file(model / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*-*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == source.keys() and all(torch.equal(stored[n], source[n]) for n in source)
    assert compress.verify(str(tmp_path / "out")).ok and report.manifest.layers == {}
