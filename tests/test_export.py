"""Run: pytest tests/test_export.py. What other programs read: exact codes, checked by dequantizers of their published layouts and, where they are
installed (`-m consumer`), by their own code; refusals before anything is written; and back again by import."""
import importlib.util
import json
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_cli import main
from tiny import LLAMA, TINY, save_tiny
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import compress
from compress import CompressError
from compress.artifact import INDEX
from compress.export import EXPORTS, base, can_export, write
from compress.formats import FloatBlock, IntGroup, Lut, build
from compress.importing import READERS
from compress.methods import FP
from compress.methods.nf import TABLES

TOKENS = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(1))
needs = lambda *names: [pytest.mark.consumer, *(pytest.mark.skipif(importlib.util.find_spec(n) is None, reason=f"{n} is not installed") for n in names)]
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(architecture, **options of rtn): an artifact, each made once; `steps` for a recipe of its own, `dtype` of the checkpoint."""
    root = tmp_path_factory.mktemp("export")

    def make(name: str = "llama", dtype=torch.bfloat16, steps=None, **options) -> Path:
        model, tag = root / f"{name}-{str(dtype)[6:]}", "-".join(map(str, ("artifact", name, str(dtype)[6:], *options.values(), *(steps or []))))
        out = root / re.sub(r"[^\w.-]+", "_", tag)
        if not model.exists():
            save_tiny(name, model, dtype)
        if not out.exists():
            steps = steps or [{"method": "rtn", "group_size": 32, **options}]
            compress.run(str(model), {"name": "tiny", "steps": steps}, output=out, dtype="float32", show=False)
        return out
    return make


def source(artifact: Path) -> base.Source:
    return base.Source(artifact)


def formats(artifact: Path) -> dict:
    """Every layer of an artifact as its Format."""
    s, found = source(artifact), {}
    for tensors, layers in s.shards():
        found |= {n: build(s.layers[n].format, {t: tensors[f"{n}.{t}"] for t in s.layers[n].tensors}) for n in layers}
    return found


def stored(folder: Path) -> dict[str, torch.Tensor]:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {k: t for shard in sorted(set(names.values())) for k, t in load_file(folder / shard).items()}
    assert set(tensors) == set(names)
    return tensors


def export(artifact: Path, to: str, out: Path, **options) -> tuple[Path, dict]:
    compress.export(str(artifact), to, out, **options)
    return out, json.loads((out / "config.json").read_text()) if (out / "config.json").is_file() else {}


def kl(consumer: torch.nn.Module, artifact: Path, dtype=torch.float32) -> float:
    """Of the consumer's logits from those of our own dequantized model."""
    with torch.no_grad():
        ours, theirs = compress.load(str(artifact), dtype=dtype, policy="dense"), consumer.eval() if isinstance(consumer, torch.nn.Module) else consumer
        p, q = (m(TOKENS).logits.double().log_softmax(-1) for m in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---- dense


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "phi3", "gemma3", "mixtral", "qwen3_moe"])
def test_dense_is_the_model_that_load_gives_under_the_names_of_the_checkpoint(name, made, tmp_path):
    artifact = made(name)
    out, config = export(artifact, "dense", tmp_path / "out")
    assert "quantization_config" not in config
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert kl(model, artifact, torch.bfloat16 if name == "gpt2" else torch.float32) < 1e-4  # bf16 weights: (q − z)·s is rounded once
    original = artifact.parent / f"{name}-bfloat16"
    assert set(stored(out)) == set(load_file(original / "model.safetensors"))
    assert all(t.dtype == torch.bfloat16 for t in stored(out).values() if t.is_floating_point())
    assert {f.name for f in original.glob("token*")} <= {f.name for f in out.iterdir()}


def test_dense_weights_are_bit_for_bit_those_that_load_multiplies_by(made, tmp_path):
    artifact = made(bits=3)
    out, _ = export(artifact, "dense", tmp_path / "out")
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        assert torch.equal(tensors[f"{name}.weight"], weight.dequantize(torch.bfloat16))


# ---- layouts, dequantized by their own published formulas in numpy


def bits_of(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The first n values of a little-endian bit stream, one bit at a time: int32 [rows, words] → [rows, n]."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, : n * bits]
    return (stream.reshape(len(words), n, bits) << np.arange(bits)).sum(-1)


def ct_dequantize(t: dict, bits: int, symmetric: bool) -> np.ndarray:
    out, n = t["weight_shape"].tolist()
    scale = t["weight_scale"].double().numpy()
    q = bits_of(t["weight_packed"].numpy(), bits, n) - 2 ** (bits - 1)  # signed, stored with an offset
    z = 0 if symmetric else bits_of(t["weight_zero_point"].numpy().T, bits, out).T - 2 ** (bits - 1)
    return ((q.reshape(out, scale.shape[1], -1) - np.reshape(z, (*np.shape(z), 1))) * scale[:, :, None]).reshape(out, n)


def gptq_dequantize(t: dict, bits: int, version: int) -> np.ndarray:
    out, n = t["scales"].shape[1], len(t["g_idx"])
    q = bits_of(t["qweight"].numpy().T, bits, n).T  # [in, out]
    z = bits_of(t["qzeros"].numpy(), bits, out) + (version == 1)
    g = t["g_idx"].numpy()
    return ((q - z[g]) * t["scales"].double().numpy()[g]).T


def awq_dequantize(t: dict, group_size: int) -> np.ndarray:
    def unpack(words):  # eight nibbles a word, value i of a word in nibble 0 4 1 5 2 6 3 7
        nibbles = (words.numpy().astype(np.int64)[:, :, None] >> np.arange(0, 32, 4)) & 15
        return nibbles[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1)
    assert t["scales"].dtype == torch.float16
    g = np.arange(t["qweight"].shape[0]) // group_size
    return ((unpack(t["qweight"]) - unpack(t["qzeros"])[g]) * t["scales"].double().numpy()[g]).T


def parts(tensors: dict, module: str) -> dict:
    return {k.removeprefix(module + "."): t for k, t in tensors.items() if k.startswith(module + ".")}


@pytest.mark.parametrize(("bits", "sym"), [(b, s) for b in range(2, 9) for s in (True, False)] + [("ternary", True), (4, "full")])
def test_compressed_tensors_holds_the_same_matrix(bits, sym, made, tmp_path):
    artifact = made(bits=bits, sym=sym)
    out, config = export(artifact, "compressed-tensors", tmp_path / "out")
    (group,) = config["quantization_config"]["config_groups"].values()
    width = 2 if bits == "ternary" else bits
    assert group["targets"] == ["Linear"] and group["weights"] | {"num_bits": width, "symmetric": bool(sym), "group_size": 32} == group["weights"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        t = parts(tensors, name)
        np.testing.assert_array_equal(ct_dequantize(t, width, bool(sym)), weight.dequantize().double().numpy())
        if bits != "ternary":
            assert torch.equal(t["weight_packed"], weight.codes)  # the very words
        assert torch.equal(t["weight_scale"], weight.scales)


@pytest.mark.parametrize(("bits", "sym", "to"), [(b, True, "gptq") for b in (2, 3, 4, 8, "ternary")] + [(b, False, "gptq-v2") for b in (2, 3, 4, 8)])
def test_gptq_holds_the_same_matrix(bits, sym, to, made, tmp_path):
    artifact = made(bits=bits, sym=sym)
    out, config = export(artifact, to, tmp_path / "out")
    q = config["quantization_config"]
    assert (q["quant_method"], q["group_size"], q["sym"], q["desc_act"]) == ("gptq", 32, sym, False)
    assert q["checkpoint_format"] == {"gptq": "gptq", "gptq-v2": "gptq_v2"}[to]
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        t = parts(tensors, name)
        np.testing.assert_array_equal(gptq_dequantize(t, q["bits"], 1 if to == "gptq" else 2), weight.dequantize().double().numpy())
        assert t["g_idx"].tolist() == [j // 32 for j in range(weight.shape[1])] and t["qweight"].dtype == torch.int32


@pytest.mark.parametrize("sym", [True, False])
def test_awq_holds_the_same_matrix(sym, made, tmp_path):
    artifact = made(sym=sym)
    out, config = export(artifact, "awq", tmp_path / "out")
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        np.testing.assert_array_equal(awq_dequantize(parts(tensors, name), 32), weight.dequantize().double().numpy())


NF4, FP4 = ([{"method": "nf", "type": t, "group_size": 32}] for t in ("nf4", "fp4"))
INT8 = [{"method": "rtn", "bits": 8, "group_size": -1, "sym": True}]


def bnb_dequantize(t: dict) -> np.ndarray:
    if "SCB" in t:
        return t["weight"].numpy() * (t["SCB"].double().numpy() / 127)[:, None]
    (key,) = (k for k in t if "quant_state" in k)
    state = json.loads(t[key].numpy().tobytes())
    octets = t["weight"].numpy().ravel()
    q = np.stack([octets // 16, octets % 16], 1).reshape(-1, state["blocksize"])  # blocks run through the whole weight, row by row
    return (t["weight.quant_map"].double().numpy()[q] * t["weight.absmax"].double().numpy()[:, None]).reshape(state["shape"])


@pytest.mark.parametrize("steps", [NF4, FP4, INT8])
def test_bitsandbytes_holds_the_same_matrix(steps, made, tmp_path):
    artifact = made(steps=steps)
    out, config = export(artifact, "bitsandbytes", tmp_path / "out")
    q = config["quantization_config"]
    assert q["load_in_8bit"] is not q["load_in_4bit"] and q["load_in_8bit"] is (steps is INT8) and q["llm_int8_skip_modules"] == ["lm_head"]
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        np.testing.assert_allclose(bnb_dequantize(parts(tensors, name)), weight.dequantize().double().numpy(), rtol=1e-7)


def fp(kind: str, **options) -> list[dict]:
    return [{"method": "fp", "type": kind, **options}]


def e4m3(octets: np.ndarray) -> np.ndarray:
    """Sign, four exponent bits around 7, three of mantissa; exponent 0 is linear."""
    e, m = octets.astype(int) >> 3 & 15, octets & 7
    return np.where(octets > 127, -1.0, 1.0) * np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))


def e2m1(octets: np.ndarray) -> np.ndarray:
    """Two a byte, the first below: sign, two exponent bits, one of mantissa; exponent 0 is linear."""
    codes = np.stack([octets & 15, octets >> 4], -1).reshape(len(octets), -1).astype(int)
    e, m = codes >> 1 & 3, codes & 1
    return np.where(codes > 7, -1.0, 1.0) * np.where(e == 0, m / 2, (1 + m / 2) * 2.0 ** (e - 1))


def ct_floats(t: dict) -> np.ndarray:
    raw = lambda name: t[name].view(torch.uint8).numpy()
    if "weight" in t:
        scale = t["weight_scale"].double().numpy().reshape(*(t["weight_scale"].shape if t["weight_scale"].dim() == 2 else (1, 1)))
        rows, columns = (-(-n // k) for n, k in zip(t["weight"].shape, scale.shape))
        return e4m3(raw("weight")) * scale.repeat(rows, 0).repeat(columns, 1)
    if "weight_global_scale" in t:
        scale = (e4m3(raw("weight_scale")).astype(np.float32) / t["weight_global_scale"].numpy()).astype(np.float64)
    else:
        scale = 2.0 ** (raw("weight_scale").astype(int) - 127)
    W = e2m1(raw("weight_packed"))
    return W * scale.repeat(W.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize(("kind", "options", "layout", "strategy"), [
    ("fp8", {}, "float-quantized", "channel"), ("fp8", {"scale": "tensor"}, "float-quantized", "tensor"),
    ("mxfp4", {}, "mxfp4-pack-quantized", "group"), ("nvfp4", {}, "nvfp4-pack-quantized", "tensor_group")])  # fmt: skip
def test_compressed_tensors_holds_the_same_floats(kind, options, layout, strategy, made, tmp_path):
    artifact = made(steps=fp(kind, **options))
    out, config = export(artifact, "compressed-tensors", tmp_path / "out")
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["format"] == config["quantization_config"]["format"] == layout and group["weights"]["strategy"] == strategy
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        np.testing.assert_array_equal(ct_floats(parts(tensors, name)), weight.dequantize().double().numpy())


def test_w8a8_holds_the_same_matrix(made, tmp_path):
    artifact = made(steps=INT8)
    out, config = export(artifact, "compressed-tensors-w8a8", tmp_path / "out")
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert group["input_activations"] == {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        t = parts(tensors, name)
        np.testing.assert_array_equal(t["weight"].numpy() * t["weight_scale"].double().numpy(), weight.dequantize().double().numpy())


@pytest.mark.parametrize("options", [*({"bits": b} for b in (2, 3, 4, 5, 6, 8)), {"bits": 4, "sym": True}, {"bits": "ternary", "sym": True}])
def test_mlx_holds_the_same_matrix(options, made, tmp_path):
    artifact = made(**options)
    out, config = export(artifact, "mlx", tmp_path / "out")
    bits = 2 if options["bits"] == "ternary" else options["bits"]
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"} and "quantization_config" not in config
    tensors = stored(out)
    for name, weight in formats(artifact).items():
        t = parts(tensors, name)
        assert t["weight"].dtype == torch.uint32 and t["biases"].dtype == t["scales"].dtype
        assert not options.get("sym") or t["scales"].dtype == torch.bfloat16
        q = bits_of(t["weight"].numpy(), bits, weight.shape[1]).reshape(len(t["weight"]), -1, 32)
        W = q * t["scales"].double().numpy()[:, :, None] + t["biases"].double().numpy()[:, :, None]
        np.testing.assert_array_equal(W.reshape(weight.shape), weight.dequantize().double().numpy())


def test_mlx_finds_the_settings_that_transformers_5_moved(made, tmp_path, monkeypatch):
    monkeypatch.setitem(TINY, "llama_far", lambda: CONFIG_MAPPING["llama"](**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    assert export(made("llama_far"), "mlx", tmp_path / "a")[1]["rope_theta"] == 5e5


def test_mlx_keeps_mxfp4_and_names_layers_that_differ(made, tmp_path):
    artifact = made(steps=[dict(fp("mxfp4")[0], match="*mlp*"), {"method": "rtn", "bits": 8, "group_size": 32, "sym": True}])
    out, config = export(artifact, "mlx", tmp_path / "out")
    q = config["quantization"]
    assert (q["bits"], q["mode"]) == (8, "affine") and q["model.layers.1.mlp.up_proj"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    t, weight = parts(stored(out), "model.layers.1.mlp.up_proj"), formats(artifact)["model.layers.1.mlp.up_proj"]
    W = e2m1(t["weight"].view(torch.uint8).numpy()).reshape(len(t["weight"]), -1, 32) * 2.0 ** (t["scales"].numpy().astype(int) - 127)[:, :, None]
    np.testing.assert_array_equal(W.reshape(weight.shape), weight.dequantize().double().numpy())


def test_scales_are_widened_to_the_models_dtype_never_narrowed(made, tmp_path):
    artifact = made(dtype=torch.float32)
    tensors = stored(export(artifact, "compressed-tensors", tmp_path / "out")[0])
    weight = formats(artifact)[Q_PROJ]
    assert weight.scales.dtype == torch.bfloat16 and tensors[f"{Q_PROJ}.weight_scale"].dtype == torch.float32
    assert torch.equal(tensors[f"{Q_PROJ}.weight_scale"], weight.scales.float())


def test_experts_get_the_names_of_the_checkpoint(made, tmp_path):
    artifact = made("mixtral", sym=True)
    tensors = stored(export(artifact, "compressed-tensors", tmp_path / "out")[0])
    whole = formats(artifact)["model.layers.1.mlp.experts.2.gate_up_proj"].dequantize().double().numpy()
    expert = "model.layers.1.block_sparse_moe.experts.2"
    halves = [ct_dequantize(parts(tensors, f"{expert}.{w}"), 4, True) for w in ("w1", "w3")]
    np.testing.assert_array_equal(np.concatenate(halves), whole)


# ---- what cannot be expressed


def refused(artifact: Path, to: str, out: Path) -> str:
    with pytest.raises(CompressError) as error:
        compress.export(str(artifact), to, out / "x")
    assert list(out.iterdir()) == [] and "\n" not in str(error.value)
    return str(error.value)


def test_every_layer_is_named_before_anything_is_written(made, tmp_path):
    artifact = made(bits=5)
    assert {r.layer for r in EXPORTS["awq"].refusals(source(artifact))} == set(source(artifact).layers)
    text = refused(artifact, "awq", tmp_path)
    assert text.startswith("14 of 14 layers cannot be exported as awq: model.layers.*.self_attn.q_proj (2)")
    assert "5 bits, awq has 4; nearest recipe {bits: 4, group_size: 32, sym: false}" in text
    assert "nearest recipe {bits: 8, group_size: 32, sym: false}" in refused(artifact, "gptq-v2", tmp_path)


@pytest.mark.parametrize(("name", "options"), [
    ("llama", {}), ("llama", {"bits": 3, "sym": True}), ("mixtral", {"sym": True}), ("gpt2", {}), ("opt", {"bits": 5})])  # fmt: skip
def test_what_a_manifest_says_before_any_tensor_is_read_is_what_export_does(name, options, made, tmp_path):
    artifact = made(name, **options)
    loads = compress.loads_in(str(artifact))
    assert loads.keys() == EXPORTS.keys() and loads["dense"] == []
    for to, reasons in loads.items():
        if to == "onnx" or (to == "gguf" and importlib.util.find_spec("gguf") is None):  # torch takes seconds to trace a model
            continue
        if not reasons:
            compress.export(str(artifact), to, tmp_path / to)
        else:
            with pytest.raises(CompressError) as error:
                compress.export(str(artifact), to, tmp_path / to)
            assert all(reason in str(error.value) for reason in reasons)


def test_refusals_of_floats_and_groups(made, tmp_path):
    assert "8-bit activations are multiplied by fp8" in refused(made(), "compressed-tensors-w8a8", tmp_path)
    assert "groups of 16, mlx has 32, 64, 128; nearest recipe {bits: 4, group_size: 64, sym: false}" in refused(made(group_size=16), "mlx", tmp_path)
    assert "mlx-lm 0.32 stacks quantized ones of Mixtral only" in refused(made("qwen3_moe", sym=True), "mlx", tmp_path)
    assert "nvfp4 has scales that mlx has not" in refused(made(steps=fp("nvfp4")), "mlx", tmp_path)
    ragged = FP(scale="block")(torch.ones(192, 256), None, stored=torch.bfloat16)
    whole = SimpleNamespace(peek=lambda _: ragged, transposed=set(), experts=set())
    assert "192×256 is not made of whole 128×128 blocks" in EXPORTS["compressed-tensors"]._refusal("a", whole).reason
    assert "int-quantized tensors transformers 5 cannot convert" in refused(made("mixtral", steps=INT8), "compressed-tensors-w8a8", tmp_path)
    assert "fp8 channel is not a uniform integer grid" in refused(made(steps=fp("fp8")), "awq", tmp_path)
    assert "zero points that are fractions of a step" in refused(made(steps=[{"method": "hqq", "group_size": 32}]), "gptq-v2", tmp_path)
    halves = [dict(fp("fp8")[0], match="*q_proj"), dict(fp("mxfp4")[0], match="*k_proj")]
    assert "served inside qkv_proj, whose parts must have one scheme and have" in refused(made(steps=halves), "compressed-tensors", tmp_path)


def test_bitsandbytes_refusals(made, tmp_path):
    assert "int4 g32 asym is neither NF4 nor FP4 nor 8 bits" in refused(made(), "bitsandbytes", tmp_path)
    assert "blocks of 16, bitsandbytes has 32, 64" in refused(made(steps=[{"method": "nf", "group_size": 16}]), "bitsandbytes", tmp_path)
    assert "leaves the experts of a bitsandbytes checkpoint random" in refused(made("mixtral", steps=NF4), "bitsandbytes", tmp_path)
    mixed = [dict(NF4[0], match="*_attn*"), dict(INT8[0], match="*mlp*")]
    assert "4 and 8 bits in one model, and most layers have 4" in refused(made(steps=mixed), "bitsandbytes", tmp_path)


def test_a_plan_is_judged_by_its_formats(tmp_path):
    from compress.methods import RTN, SVD
    planned = lambda method: {f"model.layers.{i}.mlp.{p}": method.planned(s, torch.bfloat16, p) for i in range(2)
                              for p, s in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128)))}  # fmt: skip
    assert can_export(planned(RTN(group_size=32, sym=True)), TINY["llama"]())["awq"] == []
    (reason,) = can_export(planned(SVD()), TINY["llama"]())["awq"]
    assert "model.layers.*.mlp.gate_proj (2)" in reason and "is not a uniform integer grid" in reason


def test_other_refusals_say_what_would_do(made, tmp_path):
    assert "{bits: 4, group_size: 32, sym: true}, or --to gptq-v2" in refused(made(), "gptq", tmp_path)
    assert "{bits: 2, group_size: 32, sym: true}" in refused(made(bits=1, sym=True), "compressed-tensors", tmp_path)
    for to in ("compressed-tensors", "gptq", "awq"):
        assert "a Conv1D" in refused(made("gpt2", sym=True), to, tmp_path)
    assert "leaves the experts of a gptq checkpoint random; nearest recipe --to compressed-tensors" in refused(made("mixtral", sym=True), "gptq", tmp_path)
    assert "an expert with zero points" in refused(made("mixtral"), "compressed-tensors", tmp_path)
    with pytest.raises(CompressError, match=r"unknown export format 'gptqq', did you mean gptq\?"):
        compress.export(str(made()), "gptqq", tmp_path / "x")


def test_parts_of_a_fused_matrix_must_have_one_scheme(made, tmp_path):
    steps = [{"method": "rtn", "match": ["*q_proj", "*k_proj"], "bits": 8, "group_size": 32, "sym": True},
             {"method": "rtn", "match": "*v_proj", "bits": 4, "group_size": 32, "sym": True}]  # fmt: skip
    text = refused(made(steps=steps), "compressed-tensors", tmp_path)
    assert "served inside qkv_proj" in text and "8 bits g32 sym and 4 bits g32 sym" in text and "{bits: 8, group_size: 32, sym: true} for all" in text
    kept = [{"method": "rtn", "match": "*gate_proj", "bits": 4, "group_size": 32, "sym": True}]
    assert "served inside gate_up_proj" in refused(made(steps=kept), "gptq", tmp_path)
    uniform = [{"method": "rtn", "match": "*_attn*", "bits": 4, "group_size": 32, "sym": True}, {"method": "rtn", "bits": 8, "group_size": 32, "sym": True}]
    assert "loaders of gptq take one scheme" in refused(made(steps=uniform), "gptq", tmp_path)
    _, config = export(made(steps=uniform), "compressed-tensors", tmp_path / "out")
    groups = config["quantization_config"]["config_groups"].values()
    assert {(g["weights"]["num_bits"], len(g["targets"])) for g in groups} == {(4, 8), (8, 6)}


def test_awq_checks_every_scale_for_fp16(made, tmp_path):
    weight = IntGroup.pack(torch.zeros(8, 32, dtype=torch.uint8), torch.full((8, 1), 1e-30).bfloat16(), None, 4)
    assert not base.fits_half(weight.scales) and base.fits_half(torch.tensor([2.0**-17, 1.9921875 * 2**-14, 65280]).bfloat16())
    assert EXPORTS["awq"]._refusal("a", weight).reason == "scales that fp16 cannot hold exactly"


def test_a_channel_layer_takes_the_group_size_of_the_others_where_it_is_its_width(made):
    found = base.schemes(source(made(bits=4, group_size=64, sym=True)))  # q_proj reads 64 inputs, down_proj 128
    assert {s.group_size for s in found.values()} == {64}
    assert {s.group_size for s in base.schemes(source(made(bits=4, group_size=-1, sym=True))).values()} == {-1}


# ---- what vLLM and SGLang ask of a configuration, restated from their sources (vllm-project/vllm be69645: model_executor/layers/quantization/
# compressed_tensors/{compressed_tensors,utils}.py; gptq_marlin.py and awq.py there, sglang's quantization/gptq.py and awq.py ask for the same keys)

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def vllm_kernel(q: dict, layer: str) -> str | None:
    """What CompressedTensorsConfig.get_scheme picks for a linear of its model, whose parts lie apart on disk; None: it is not quantized."""
    leaf = layer.rpartition(".")[2]
    names = [layer.removesuffix(leaf) + p for p in PARTS.get(leaf, [leaf])]
    ignored = {n in q["ignore"] for n in names}
    assert len(ignored) == 1, "Found a different quantization schemes"
    if ignored.pop():
        return None
    (group,) = {k for n in names for k, g in q["config_groups"].items() if n in g["targets"] or "Linear" in g["targets"]}
    w, x, layout = (q["config_groups"][group][k] for k in ("weights", "input_activations", "format"))
    four = w["type"] == "float" and w["num_bits"] == 4 and x is None
    if four and (w["strategy"], w["group_size"]) in (("tensor_group", 16), ("group", 32)):
        return "W4A16Fp4" if w["group_size"] == 16 else "W4A16Mxfp4"
    if x is None and layout == "pack-quantized" and w["strategy"] in ("channel", "group") and w["num_bits"] in (4, 8):
        return "WNA16"
    assert layout in ("int-quantized", "float-quantized") and w["symmetric"] and not w["dynamic"]
    if w["type"] == "float" and w["strategy"] in ("tensor", "channel", "block"):
        return "W8A8Fp8" if x and x["dynamic"] else "W8A16Fp8"
    assert (w["num_bits"], x["num_bits"], x["strategy"], x["dynamic"]) == (8, 8, "token", True) and w["strategy"] in ("tensor", "channel")
    return "W8A8Int8"


@pytest.mark.parametrize(("steps", "to", "kernels"), [
    ([{"method": "rtn", "group_size": 32, "sym": True}], "compressed-tensors", {"WNA16"}),
    ([{"method": "rtn", "group_size": 32, "match": "*_attn*"}, {"method": "rtn", "bits": 8, "group_size": -1, "match": "*.1.mlp.*"}], "compressed-tensors",
     {"WNA16", None}),
    (INT8, "compressed-tensors-w8a8", {"W8A8Int8"}), (fp("fp8"), "compressed-tensors-w8a8", {"W8A8Fp8"}),
    ([dict(fp("fp8")[0], match="*_attn*"), *fp("mxfp4")], "compressed-tensors", {"W8A16Fp8", "W4A16Mxfp4"}),
    (fp("nvfp4"), "compressed-tensors", {"W4A16Fp4"})])  # fmt: skip
def test_vllm_finds_a_kernel_for_every_linear(steps, to, kernels, made, tmp_path):
    out, config = export(made(steps=steps), to, tmp_path / "out")
    q, tensors = config["quantization_config"], stored(out)
    served = [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    assert {vllm_kernel(q, layer) for layer in served} == kernels and vllm_kernel(q, "lm_head") is None
    needed = {"WNA16": {"weight_packed", "weight_scale", "weight_shape"}, "W4A16Mxfp4": {"weight_packed", "weight_scale"}, None: {"weight"},
              "W4A16Fp4": {"weight_packed", "weight_scale", "weight_global_scale"}}  # fmt: skip
    for layer in served:
        parent, _, leaf = layer.rpartition(".")
        found = [parts(tensors, f"{parent}.{p}") for p in PARTS.get(leaf, [leaf])]
        assert all(t.keys() - {"weight_zero_point"} == needed.get(vllm_kernel(q, layer), {"weight", "weight_scale"}) for t in found)
        assert len({float(t["weight_global_scale"]) for t in found if "weight_global_scale" in t}) < 2  # it keeps the largest


@pytest.mark.parametrize(("to", "keys"), [("gptq", {"bits", "group_size", "desc_act", "sym"}), ("awq", {"bits", "group_size", "zero_point"})])
def test_vllm_and_sglang_find_the_keys_that_they_read(to, keys, made, tmp_path):
    out, config = export(made(sym=True), to, tmp_path / "out")
    q, tensors = config["quantization_config"], stored(out)
    assert keys <= q.keys() and q["quant_method"] == to
    assert (q["bits"], q.get("sym", True)) in ((4, True), (8, True)) and q.get("lm_head", False) is False  # what their Marlin kernels take
    for name in formats(made(sym=True)):
        t = parts(tensors, name)
        n, out_features = (t["qweight"].shape[0] * 32 // 4, t["qweight"].shape[1]) if to == "gptq" else (t["qweight"].shape[0], t["qweight"].shape[1] * 8)
        assert n % q["group_size"] == 0 and out_features % 8 == 0
        assert t["scales"].shape == (n // q["group_size"], out_features) and t["qzeros"].shape == (n // q["group_size"], out_features // 8)


def test_the_table_of_recipes_and_consumers_is_current():
    written = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "generate.py"))["exports"]()
    assert (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8") == written, "run: python docs/generate.py"


# ---- the folder


def test_a_failed_write_leaves_nothing(made, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(EXPORTS["dense"].__class__, "tensors", fail)
    with pytest.raises(CompressError, match="No space left on device; nothing is left there"):
        compress.export(str(made()), "dense", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_left_alone(made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CompressError, match="is not an empty folder"):
        compress.export(str(made()), "dense", tmp_path)
    (tmp_path / "empty").mkdir()
    export(made(), "dense", tmp_path / "empty")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "notes.txt"]


def test_a_damaged_artifact_is_not_exported(made, tmp_path):
    copy = Path(shutil.copytree(made(), tmp_path / "copy"))
    file = copy / "block-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CompressError, match="is not what was written"):
        compress.export(str(copy), "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["dense", "compressed-tensors", "gptq-v2", "awq"])
def test_two_exports_are_the_same_bytes(to, made, tmp_path):
    a, b = (export(made(), to, tmp_path / n / "out")[0] for n in "ab")
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}
    assert len(list(a.glob("*.safetensors"))) == 3 and all(f.stat().st_mode & 0o044 == 0o044 for f in a.iterdir())


def test_the_model_card(made, tmp_path):
    evaluation = {"perplexity": {"token": 12.5}, "kl": {"mean": 0.01}, "top1": {"agreement": 0.9}, "windows": 3, "tokens": 93, "data": {"spec": "wikitext2"},
                  "reference": {"perplexity": {"token": 12.0}}}  # fmt: skip
    out, _ = export(made(), "awq", tmp_path / "out", base_model="maker/model", evaluation=evaluation)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "maker/model" and front["tags"] == ["compress", "awq"] and front["library_name"] == "transformers"
    for said in ("| 14 | int4 g32 asym |", "method: rtn", "No calibration data", "| perplexity (token) | 12.5 | 12 |", "vllm serve out", "model.safetensors"):
        assert said in text


def test_the_command_line(made, tmp_path, capsys):
    artifact = made()
    assert main("export", artifact, "--to", "awq", "-o", tmp_path / "out", "--json", tmp_path / "e.json") == 0
    assert json.loads((tmp_path / "e.json").read_text())["to"] == "awq" and "note: scales stored as fp16" in capsys.readouterr().out
    assert main("import", tmp_path / "out", "-o", tmp_path / "back") == 0
    for bad in (("export", artifact, "--to", "gptq", "-o", tmp_path / "x"), ("export", tmp_path, "--to", "awq", "-o", tmp_path / "x"),
                ("export", artifact, "--to", "awq", "-o", tmp_path / "x", "--evaluation", tmp_path / "out" / "config.json"),
                ("import", artifact, "-o", tmp_path / "y"), ("import", artifact.parent / "llama-bfloat16", "-o", tmp_path / "y")):  # fmt: skip
        capsys.readouterr()
        assert main(*bad) == 1
        assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_push_to_hub_uploads_the_finished_folder(made, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, repo_id, exist_ok):
            calls.append(repo_id)

        def upload_folder(self, folder_path, repo_id, commit_message):
            if repo_id == "me/full":
                raise OSError("507 insufficient storage")
            calls.append((repo_id, sorted(f.name for f in Path(folder_path).glob("*.json"))))
    monkeypatch.setitem(write.__globals__, "HfApi", Hub)  # compress.export is the function
    assert main("export", made(), "--to", "dense", "-o", tmp_path / "a", "--push-to-hub", "me/model") == 0
    assert calls[0] == "me/model" and calls[1][0] == "me/model" and "config.json" in calls[1][1]
    assert main("export", made(), "--to", "dense", "-o", tmp_path / "b", "--push-to-hub", "me/full") == 1
    assert "me/full: cannot be pushed (507 insufficient storage)" in capsys.readouterr().err and (tmp_path / "b" / "config.json").is_file()


def test_decompress_is_the_dense_export(made, tmp_path):
    assert main("decompress", made(), "-o", tmp_path / "a") == 0
    export(made(), "dense", tmp_path / "b" / "a")
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "b" / "a").iterdir()}


# ---- and back


def drawn(kind: str, g: torch.Generator):
    """A random format: any values that it can hold, not only those that a method makes."""
    pick = lambda *values: values[int(torch.randint(len(values), (), generator=g))]
    out, group, groups, dtype = 32 * pick(1, 2, 3), pick(32, 64), pick(1, 2, 3), pick(torch.bfloat16, torch.float16)
    octets = lambda *size, top=256: torch.randint(0, top, size, generator=g, dtype=torch.uint8)
    scales = torch.rand(out, groups, generator=g).add_(2.0**-9).to(dtype)
    if kind in ("nf4", "fp4"):
        return Lut.pack(octets(out, group * groups, top=16), torch.tensor(TABLES[kind])[None], scales, kind)
    if kind == "fp8":
        q = octets(out, group * groups)
        return FloatBlock(q & ~(((q & 127) == 127).to(torch.uint8) << 3), pick(scales[:, :1], scales[:1, :1]).contiguous(), None, "fp8")  # no NaN
    if kind in ("mxfp4", "nvfp4"):
        n = group * groups
        divisor, block = (torch.tensor([512.0]), 16) if kind == "nvfp4" else (None, 32)
        return FloatBlock(octets(out, n // 2), octets(out, n // block, top=120), divisor, kind)
    bits = pick(*{"gptq": (2, 3, 4, 8), "gptq-v2": (2, 3, 4, 8), "awq": (4,), "int8": (8,)}.get(kind, range(2, 9)))
    sym = kind in ("gptq", "int8") or (kind != "awq" and pick(True, False))
    groups = 1 if kind == "int8" else groups
    return IntGroup.pack(octets(out, group * groups, top=2**bits), scales[:, :groups].contiguous(), None if sym else octets(out, groups, top=2**bits), bits)


@pytest.mark.parametrize(("kind", "to"), [
    ("gptq", "gptq"), ("gptq-v2", "gptq-v2"), ("awq", "awq"), ("any", "compressed-tensors"), ("int8", "compressed-tensors-w8a8"), ("fp8", "compressed-tensors"),
    ("mxfp4", "compressed-tensors"), ("nvfp4", "compressed-tensors"), ("nf4", "bitsandbytes"), ("fp4", "bitsandbytes"), ("int8", "bitsandbytes")])  # fmt: skip
def test_any_codes_and_scales_come_back(kind, to, tmp_path):
    g, reader = torch.Generator().manual_seed(0), READERS[{"gptq-v2": "gptq", "compressed-tensors-w8a8": "compressed-tensors"}.get(to, to)]
    for i in range(12):
        weight = drawn(kind, g)
        if to == "awq":
            weight = IntGroup.pack(weight.unpack(), weight.scales.half(), weight.zero_points().to(torch.uint8), 4)
        wide = SimpleNamespace(model_dtype=torch.float32 if i % 2 else torch.bfloat16, transposed=set())
        save_file({k: t.contiguous() for k, t in EXPORTS[to].tensors(wide, "a", weight).items()}, tmp_path / "a.safetensors")
        config = {"checkpoint_format": {"gptq-v2": "gptq_v2"}.get(to, "gptq"), "sym": to == "gptq" or getattr(weight, "zeros", 1) is None}
        config |= {"config_groups": {"group_0": {"weights": {"num_bits": getattr(weight, "bits_per_code", 8)}}}}
        again = reader.read(load_file(tmp_path / "a.safetensors"), config, "a")
        assert torch.equal(again.unpack(), weight.unpack()) and again.describe() == weight.describe()
        assert torch.equal(again.scales.float(), weight.scales.float()) and torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("name", "to", "options"), [
    ("llama", "gptq", {"sym": True}), ("llama", "gptq-v2", {"bits": 3}), ("llama", "awq", {}), ("llama", "compressed-tensors", {"bits": 5}),
    ("qwen2", "compressed-tensors", {"sym": True}), ("opt", "gptq-v2", {"bits": 8}), ("mixtral", "compressed-tensors", {"sym": True}),
    ("qwen3_moe", "compressed-tensors", {"bits": 8, "group_size": -1, "sym": True}), ("qwen3", "bitsandbytes", {"steps": NF4}),
    ("gpt2", "bitsandbytes", {"steps": FP4}), ("opt", "bitsandbytes", {"steps": INT8})])  # fmt: skip
def test_export_and_import_give_the_same_codes(name, to, options, made, tmp_path):
    artifact = made(name, **options)
    export(artifact, to, tmp_path / "out")
    compress.import_checkpoint(str(tmp_path / "out"), tmp_path / "back", dtype="float32")
    result = compress.verify(str(tmp_path / "back"))
    assert result.ok and result.kl == 0
    before, after = formats(artifact), formats(tmp_path / "back")
    assert before.keys() == after.keys()
    for layer, weight in before.items():
        assert torch.equal(weight.unpack(), after[layer].unpack()) and weight.describe() == after[layer].describe()
        assert torch.equal(weight.scales.float(), after[layer].scales.float()) and torch.equal(weight.dequantize(), after[layer].dequantize())


def test_import_refuses_what_it_cannot_hold(made, tmp_path):
    out, config = export(made(sym=True), "gptq", tmp_path / "out")
    shard = next(f for f in out.glob("*.safetensors") if any("g_idx" in k for k in load_file(f)))
    tensors = load_file(shard)
    name = next(k for k in tensors if k.endswith("g_idx"))
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, shard)
    with pytest.raises(CompressError, match="act-order with a group index that is not contiguous"):
        compress.import_checkpoint(str(out), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    config["quantization_config"]["quant_method"] = "hqq"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match="quantized by hqq, which cannot be imported; gptq, awq, compressed-tensors, bitsandbytes can"):
        compress.import_checkpoint(str(out), tmp_path / "back")


# ---- the consumers themselves


def consumed(out: Path, **options) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(out, **{"dtype": torch.float32, "output_loading_info": True, **options})
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    from compress.embedded import model_path
    out = tmp_path_factory.mktemp("embedded") / "w4"
    compress.run(str(model_path()), "w4-rtn", output=out, show=False)
    return out


class TestCompressedTensors:
    pytestmark = needs("compressed_tensors")

    @pytest.mark.parametrize(("name", "options"), [
        ("qwen3", {"sym": True}), ("opt", {"bits": 3, "sym": True}), ("mixtral", {"sym": True}), ("gpt_neox", {"bits": 8, "group_size": -1, "sym": True}),
        ("gemma3", {"bits": "ternary", "sym": True})])  # fmt: skip
    def test_symmetric(self, name, options, made, tmp_path):
        artifact = made(name, torch.float32, **options)
        assert kl(consumed(export(artifact, "compressed-tensors", tmp_path / "out")[0]), artifact) < 1e-9

    @pytest.mark.parametrize(("name", "bits"), [("qwen3", 4), ("opt", 5), ("embedded", 4)])
    def test_asymmetric(self, name, bits, made, embedded, tmp_path):
        from transformers import CompressedTensorsConfig
        artifact = embedded if name == "embedded" else made(name, torch.float32, bits=bits)
        out, _ = export(artifact, "compressed-tensors", tmp_path / "out")
        assert kl(consumed(out, quantization_config=CompressedTensorsConfig(dequantize=True)), artifact) < (1e-4 if name == "embedded" else 1e-9)

    def test_mixed_and_partly_kept(self, made, tmp_path):
        steps = [{"method": "rtn", "match": "*_attn*", "group_size": 32, "sym": True},
                 {"method": "rtn", "match": "*.1.mlp.*", "bits": 8, "group_size": -1, "sym": True}]  # fmt: skip
        artifact = made("qwen3", torch.float32, steps=steps)
        assert kl(consumed(export(artifact, "compressed-tensors", tmp_path / "out")[0]), artifact) < 1e-9


    @pytest.mark.parametrize(("name", "kind"), [("qwen3", "fp8"), ("gemma3", "fp8"), ("opt", "fp8"), ("mixtral", "fp8"), ("qwen3", "mxfp4"), ("opt", "mxfp4"),
                                                ("qwen3", "nvfp4"), ("gemma3", "nvfp4")])  # fmt: skip
    def test_floats(self, name, kind, made, tmp_path):
        dtype = torch.float32 if kind == "fp8" else torch.bfloat16  # 4-bit floats are unpacked to bf16, whatever the model's dtype
        artifact = made(name, dtype, steps=fp(kind))
        assert kl(consumed(export(artifact, "compressed-tensors", tmp_path / "out")[0], dtype=dtype), artifact, dtype) < 1e-9

    @pytest.mark.parametrize("steps", [INT8, fp("fp8")])
    def test_w8a8(self, steps, made, tmp_path):
        artifact = made("qwen3", torch.float32, steps=steps)
        assert kl(consumed(export(artifact, "compressed-tensors-w8a8", tmp_path / "out")[0]), artifact) < 1e-2  # it rounds activations to 8 bits


class TestMLX:
    pytestmark = needs("mlx", "mlx_lm")

    @pytest.mark.parametrize(("name", "options"), [
        ("llama", {"sym": True}), ("qwen3", {}), ("qwen2", {"bits": 6}), ("mixtral", {"sym": True}), ("phi3", {"bits": 3}),
        ("llama_far", {}), ("embedded", {}),
        ("qwen3", {"steps": fp("mxfp4")}),
        ("llama", {"steps": [dict(fp("mxfp4")[0], match="*mlp*"), {"method": "rtn", "bits": 8, "group_size": 32}]})])  # fmt: skip
    def test_loads_and_matches(self, name, options, made, embedded, tmp_path, monkeypatch):
        import mlx.core as mx
        from mlx_lm.utils import load_model
        monkeypatch.setitem(TINY, "llama_far", lambda: CONFIG_MAPPING["llama"](**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
        artifact = embedded if name == "embedded" else made(name, torch.float32, **options)
        model, _ = load_model(export(artifact, "mlx", tmp_path / "out")[0])
        model.set_dtype(mx.float32)  # of what is stored as bf16; codes stay
        logits = torch.tensor(np.array(model(mx.array(TOKENS.numpy())).astype(mx.float32)))
        assert kl(lambda _: SimpleNamespace(logits=logits), artifact) < 1e-4


class TestONNX:
    pytestmark = needs("onnxscript", "onnxruntime")

    @pytest.mark.parametrize("name", ["opt"])
    def test_onnxruntime_gives_the_logits(self, name, made, tmp_path):
        import onnxruntime
        artifact = made(name, torch.float32)
        out, config = export(artifact, "onnx", tmp_path / "out")
        assert "quantization_config" not in config and not list(out.glob("*.safetensors"))
        (logits,) = onnxruntime.InferenceSession(str(out / "model.onnx")).run(["logits"], {"input_ids": TOKENS.numpy()})
        assert kl(lambda _: SimpleNamespace(logits=torch.tensor(logits)), artifact) < 1e-9


class TestBitsAndBytes:
    pytestmark = needs("bitsandbytes")

    @pytest.mark.parametrize(("name", "steps"), [("qwen3", NF4), ("gemma3", FP4), ("opt", NF4), ("gpt2", NF4), ("mixtral", [dict(NF4[0], match="*_attn*")]),
                                                 ("qwen3", [dict(NF4[0], match="*.0.*"), dict(FP4[0], match="*q_proj", group_size=64)])])  # fmt: skip
    def test_four_bits(self, name, steps, made, tmp_path):
        from bitsandbytes.functional import dequantize_4bit
        artifact = made(name, torch.float32, steps=steps)
        model = consumed(export(artifact, "bitsandbytes", tmp_path / "out")[0])
        for layer, weight in formats(artifact).items():
            theirs = model.get_submodule(layer).weight
            assert torch.equal(dequantize_4bit(theirs.data, theirs.quant_state), weight.dequantize())
        assert kl(model, artifact) < 1e-4  # where the processor has it, bitsandbytes multiplies in bf16

    def test_eight_bits(self, made, tmp_path):
        from bitsandbytes.functional import int8_vectorwise_dequant
        artifact = made("opt", torch.float32, steps=INT8)
        model = consumed(export(artifact, "bitsandbytes", tmp_path / "out")[0])
        for layer, weight in formats(artifact).items():
            theirs = model.get_submodule(layer).weight
            torch.testing.assert_close(int8_vectorwise_dequant(theirs.data, theirs.SCB), weight.dequantize(), rtol=1e-6, atol=0)
        assert kl(model, artifact) < 1e-3  # it rounds activations to 8 bits

    @pytest.mark.parametrize("double", [False, True])
    def test_import_of_what_transformers_wrote(self, double, made, tmp_path):
        from bitsandbytes.functional import dequantize_4bit
        from transformers import BitsAndBytesConfig
        made("llama", torch.bfloat16)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(made().parent / "llama-bfloat16", quantization_config=config, dtype=torch.float32)
        model.save_pretrained(tmp_path / "theirs")
        shutil.copyfile(made() / "tokenizer.json", tmp_path / "theirs" / "tokenizer.json")
        compress.import_checkpoint(str(tmp_path / "theirs"), tmp_path / "back", dtype="float32")
        assert compress.verify(str(tmp_path / "back")).ok
        for layer, weight in formats(tmp_path / "back").items():
            theirs = model.get_submodule(layer).weight
            assert torch.equal(weight.dequantize(), dequantize_4bit(theirs.data, theirs.quant_state))


class TestGPTQModel:
    """pip install gptqmodel optimum: compiles kernels on its first run, which takes minutes."""

    pytestmark = [*needs("gptqmodel", "optimum"), pytest.mark.slow]

    @pytest.mark.parametrize(("name", "to", "options"), [
        ("qwen3", "gptq", {"sym": True}), ("qwen3", "gptq-v2", {}), ("opt", "awq", {}), ("opt", "gptq-v2", {"bits": 8})])
    def test_loads_and_matches(self, name, to, options, made, tmp_path):
        artifact = made(name, torch.float32, **options)
        assert kl(consumed(export(artifact, to, tmp_path / "out")[0]), artifact) < 1e-4

    @pytest.mark.parametrize("to", ["gptq", "awq"])
    def test_partly_kept(self, to, made, tmp_path):
        artifact = made("qwen3", torch.float32, steps=[{"method": "rtn", "match": "*_attn*", "group_size": 32, "sym": True}])
        assert kl(consumed(export(artifact, to, tmp_path / "out")[0]), artifact) < 1e-4


class TestGGUF:
    pytestmark = needs("gguf")

    @pytest.fixture(autouse=True)
    def wide_heads(self, monkeypatch):
        """transformers reads no head width of a qwen3 from GGUF and takes 128, that of all real ones."""
        monkeypatch.setitem(TINY, "qwen3_wide", lambda: CONFIG_MAPPING["qwen3"](**dict(LLAMA, head_dim=128)))

    @pytest.mark.parametrize(("options", "kind"), [
        ({"bits": 4, "sym": True}, "Q4_0"), ({"bits": 4, "sym": "full"}, "Q4_0"), ({"bits": 2}, "Q4_0"), ({"bits": 4}, "Q5_0"),
        ({"bits": 5, "sym": True}, "Q5_0"), ({"bits": 7}, "Q8_0"), ({"bits": 8, "group_size": -1, "sym": True}, "Q8_0"),
        ({"bits": 8}, "BF16"), ({"bits": 4, "group_size": 16}, "BF16")])  # fmt: skip
    def test_the_reader_gives_the_same_matrix(self, options, kind, made, tmp_path):
        import gguf
        artifact = made(**options)
        report = compress.export(str(artifact), "gguf", tmp_path / "out")
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
        assert ("stored as BF16" in {n.what for n in report.notes}) == (kind == "BF16")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        kinds = set()
        for layer, weight in formats(artifact).items():
            t = tensors[names.get_name(layer) + ".weight"]
            kinds.add(t.tensor_type.name)
            W = gguf.quants.dequantize(t.data, t.tensor_type).reshape(weight.shape)
            if heads := {"q_proj": 4, "k_proj": 2}.get(layer.rpartition(".")[2]):
                W = W.reshape(heads, -1, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)
            np.testing.assert_array_equal(W, weight.dequantize(torch.bfloat16 if kind == "BF16" else torch.float32).float().numpy())
        assert kind in kinds and kinds <= {kind, "Q4_0", "Q5_0"}  # a layer whose zero points leave less to hold takes less

    @pytest.mark.parametrize(("name", "options"), [("llama", {}), ("qwen2", {"bits": 3}), ("qwen3_wide", {"bits": 6})])
    def test_transformers_loads_it(self, name, options, made, tmp_path):
        artifact = made(name, torch.float32, **options)
        compress.export(str(artifact), "gguf", tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
        assert kl(model, artifact) < 1e-9

    def test_the_tokenizer_comes_along(self, embedded, tmp_path):
        from transformers import AutoTokenizer
        report = compress.export(str(embedded), "gguf", tmp_path / "out")
        assert report.notes == []
        shutil.copytree(tmp_path / "out", tmp_path / "bare", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
        text = "def export(path):\n    return 'it\\'s 1234 tokens'  # übrig\n"
        ours, theirs = AutoTokenizer.from_pretrained(embedded), AutoTokenizer.from_pretrained(tmp_path / "bare", gguf_file="model.gguf")
        assert ours(text).input_ids == theirs(text, add_special_tokens=False).input_ids

    def test_a_model_of_another_kind_is_refused(self, made, tmp_path):
        assert "model type opt is not mapped" in refused(made("opt"), "gguf", tmp_path)
