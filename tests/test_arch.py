"""Run: pytest tests/test_arch.py. Sites, inference of sites and unfused experts on every tiny architecture."""
import dataclasses

import pytest
import torch
from tiny import TINY, save_tiny, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from compress.arch import ARCHS, LINEARS, Arch, Site, arch_of, find_blocks, infer, infer_sites, table_entry
from compress.errors import CompressError
from compress.experts import UnfusedExperts, fused_experts, unfuse_experts

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def unfused(name, **kwargs):
    model = tiny_model(name, **kwargs)
    unfuse_experts(model)
    return model


def by_path(sites):
    return [site.linears for site in sites]


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_every_table_entry_has_a_tiny_model():
    configs = [make() for make in TINY.values()]
    assert {config.model_type for config in configs} == set(ARCHS)


@pytest.mark.parametrize("name", TINY)
def test_sites_partition_the_linears_of_every_block(name):
    model = unfused(name)
    arch = arch_of(model)
    assert find_blocks(model) == arch.blocks
    for block in model.get_submodule(arch.blocks):
        sites = arch.sites_of(block)
        linears = [path for path, m in block.named_modules() if isinstance(m, LINEARS)]
        assert sorted(path for site in sites for path in site.linears) == sorted(linears)
        assert len({site.name for site in sites}) == len(sites) and not any("*" in str(site) for site in sites)


@pytest.mark.parametrize("name", TINY)
def test_linears_of_a_site_receive_one_tensor_and_run_in_order(name):
    model = unfused(name)
    arch, inputs = arch_of(model), {}
    for i, block in enumerate(model.get_submodule(arch.blocks)):
        for site in arch.sites_of(block):
            for path in site.linears:
                block.get_submodule(path).register_forward_pre_hook(
                    lambda m, args, key=(i, path): inputs.setdefault(key, args[0]))
    model(IDS)
    for i, block in enumerate(model.get_submodule(arch.blocks)):
        ran = [path for at, path in inputs if at == i]  # dicts keep insertion order: the order of first calls
        sites = [site for site in arch.sites_of(block) if site.linears[0] in ran]  # an expert may have no token
        for site in sites:
            assert all(inputs[i, path] is inputs[i, site.linears[0]] for path in site.linears)
            assert list(site.linears) == sorted(site.linears, key=ran.index)
        dense = [site for site in sites if "experts" not in site.name]
        assert dense == sorted(dense, key=lambda site: ran.index(site.linears[0]))


@pytest.mark.parametrize("name", TINY)
def test_a_scale_folds_into_previous(name):
    """Scale what `previous` makes by s and the readers' input columns by 1/s: the logits stay."""
    model = unfused(name, dtype=torch.float64)
    arch, expected, folded = arch_of(model), model(IDS).logits, 0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.get_submodule(arch.blocks):
            for site in arch.sites_of(block):
                if site.previous is None:
                    continue
                readers, op = [block.get_submodule(path) for path in site.linears], block.get_submodule(site.previous)
                n = readers[0].weight.shape[0 if isinstance(readers[0], Conv1D) else 1]
                if op.weight.shape[0] < n:
                    continue  # grouped-query attention: v feeds several heads
                s = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
                unit_offset = op.weight.dim() == 1 and "gemma" in name  # a gemma norm multiplies by 1 + weight
                for p in op.parameters():
                    p[-n:] = (p[-n:] + 1) * s - 1 if unit_offset else p[-n:] * (s if p.dim() == 1 else s[:, None])
                for linear in readers:
                    linear.weight /= s[:, None] if isinstance(linear, Conv1D) else s
                folded += 1
    error = (model(IDS).logits - expected).abs().max()
    assert folded and error < 1e-5 * expected.abs().max()  # norms compute in fp32 here; a wrong fold is off by 1e-1


@pytest.mark.parametrize("name", TINY)
def test_infer_finds_the_sites_of_the_table(name):
    model = unfused(name)
    arch, found = arch_of(model), infer(model, IDS)
    assert found.blocks == arch.blocks and found.skip == ()
    for block in model.get_submodule(arch.blocks):
        assert by_path(found.sites_of(block)) == by_path(arch.sites_of(block))


@pytest.mark.parametrize("name", TINY)
def test_skeleton_on_meta_has_the_same_sites(name):
    model, skeleton = unfused(name), on_meta(TINY[name]())
    unfuse_experts(skeleton)
    arch = arch_of(skeleton)
    assert arch == arch_of(model) and find_blocks(skeleton) == arch.blocks
    for real, meta in zip(model.get_submodule(arch.blocks), skeleton.get_submodule(arch.blocks), strict=True):
        assert arch.sites_of(meta) == arch.sites_of(real)
    with pytest.raises(CompressError, match="on meta"):
        infer(skeleton, IDS.to("meta"))


@pytest.mark.parametrize("name, key, value", [("opt", "do_layer_norm_before", False),
                                              ("bloom", "apply_residual_connection_post_layernorm", True)])
def test_post_norm_variants_have_no_norm_to_fold_into(name, key, value):
    config = TINY[name]()
    setattr(config, key, value)
    arch = table_entry(on_meta(config))
    assert [site.previous for site in arch.sites if site.name.endswith("input")] == [None, None]
    assert by_path(arch.sites) == by_path(ARCHS[name][0].sites)


def test_previous_and_order_of_llama():
    block = tiny_model("llama").model.layers[0]
    assert [(s.name, s.linears, s.previous) for s in arch_of(tiny_model("llama")).sites_of(block)] == [
        ("attn.input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        ("attn.output", ("self_attn.o_proj",), "self_attn.v_proj"),
        ("mlp.input", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        ("mlp.output", ("mlp.down_proj",), "mlp.up_proj")]


def test_uncovered_linear_is_named_and_skip_silences_it():
    model = tiny_model("llama")
    block, arch = model.model.layers[0], arch_of(model)
    block.mlp.adapter = nn.Linear(64, 64)
    with pytest.raises(CompressError, match=r"mlp\.adapter \(1 of 8 linears\)"):
        arch.sites_of(block)
    assert arch.sites_of(model.model.layers[1]) == dataclasses.replace(arch, skip=("mlp.adapter",)).sites_of(block)
    twice = dataclasses.replace(arch, sites=(*arch.sites, Site("again", ("mlp.adapter", "mlp.up_proj"), None)))
    with pytest.raises(CompressError, match=r"more than one site covers mlp\.up_proj"):
        twice.sites_of(block)


# ---- experts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, layers", [("mixtral", 2), ("qwen3_moe", 1)])
def test_unfused_forward_equals_eager_bit_for_bit(name, layers, dtype):
    model = tiny_model(name, dtype=dtype)
    model.set_experts_implementation("eager")
    fused = fused_experts(model)
    stacks = [model.get_submodule(path).gate_up_proj for path in fused]
    expected = model(IDS).logits
    assert unfuse_experts(model) == layers == len(fused) and unfuse_experts(model) == 0 and fused_experts(model) == []
    assert torch.equal(model(IDS).logits, expected)
    for path, stack in zip(fused, stacks, strict=True):
        experts = model.get_submodule(path)
        assert isinstance(experts, UnfusedExperts) and len(experts) == 4
        assert all(experts[e].gate_up_proj.weight.data_ptr() == stack[e].data_ptr() for e in range(4))  # views
        assert model.get_submodule(f"{path}.3.gate_up_proj") is experts[3].gate_up_proj
    few = model(IDS[:1, :1]).logits  # one token: two experts have none
    assert few.shape == (1, 1, 256) and few.isfinite().all()


def test_expert_sites_come_stage_by_stage():
    model = unfused("mixtral")
    sites = arch_of(model).sites_of(model.model.layers[0])
    stages = [site.name for site in sites if site.name.startswith("experts")]
    assert stages == [f"experts.{e}.input" for e in range(4)] + [f"experts.{e}.output" for e in range(4)]
    assert sites[-1] == Site("experts.3.output", ("mlp.experts.3.down_proj",), "mlp.experts.3.gate_up_proj")


def test_fused_experts_are_never_skipped():
    model = tiny_model("mixtral")
    with pytest.raises(CompressError, match=r"mlp\.experts holds its experts as 3-D parameters.* unfuse_experts"):
        arch_of(model).sites_of(model.model.layers[0])


SMALL = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             num_local_experts=4, head_dim=16, vocab_size=256, pad_token_id=0)


@pytest.mark.parametrize("model_type, fields, reason", [
    ("gpt_oss", {}, "has_bias=True, is_transposed=True, is_concatenated=False"),
    ("llama4_text", {"intermediate_size_mlp": 32}, "is_transposed=undeclared"),  # [E, H, 2I], weighs its input
    ("nemotron_h", {"layers_block_type": ["moe", "moe"]}, "has_gate=False"),
    ("jetmoe", {"kv_channels": 16}, "parameter weight"),  # a module for each projection
])
def test_other_expert_layouts_are_refused(model_type, fields, reason):
    config = CONFIG_MAPPING[model_type](**{**SMALL, **fields})
    with pytest.raises(CompressError, match=reason):
        unfuse_experts(on_meta(config))


# ---- unknown models -------------------------------------------------------------------------------------------------

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return self.down(self.up(x) * self.gate(x).sigmoid())


class Block(nn.Module):
    """A mixer, then an MLP or experts in a ModuleList with a linear router that never chooses the last two."""

    def __init__(self, sparse):
        super().__init__()
        self.norm, self.scan_in, self.scan_out = nn.LayerNorm(32), Conv1D(64, 32), Conv1D(32, 32)
        if sparse:
            self.router, self.experts = nn.Linear(32, 4), nn.ModuleList(Mlp() for _ in range(4))
        else:
            self.mlp = Mlp()

    def forward(self, x):
        a, b = self.scan_in(self.norm(x)).chunk(2, dim=-1)
        x = x + self.scan_out(a.cumsum(1) * b)
        y = self.norm(x)
        if hasattr(self, "mlp"):
            return x + self.mlp(y)
        best, out = self.router(y)[..., :2].argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[best == e] = expert(y[best == e])
        return (x + out,)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.stack = nn.Embedding(256, 32), nn.ModuleList(Block(sparse) for sparse in (False, True))
        self.towers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))  # longer than the blocks, but of linears
        self.head = nn.Linear(32, 256)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.stack:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def unknown():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Unknown()


def test_unknown_model_goes_through_infer():
    model = unknown()
    arch = arch_of(model)
    assert arch.blocks == "stack" and arch.skip == ("router",)
    dense, sparse = (arch.sites_of(block) for block in model.stack)
    assert by_path(dense) == [("scan_in",), ("scan_out",), ("mlp.up", "mlp.gate"), ("mlp.down",)]
    expert = [(f"experts.{e}.up", f"experts.{e}.gate") for e in range(4)] + [(f"experts.{e}.down",) for e in range(4)]
    assert by_path(sparse) == [("scan_in",), ("scan_out",), *expert]  # experts 2 and 3 got no token


def test_infer_sites_of_one_block_and_what_it_never_saw():
    model = unknown()
    block = model.stack[0]
    block.unused = nn.Linear(32, 32)
    sites = infer_sites(block, lambda: [block(torch.randn(1, n, 32)) for n in (5, 7)])  # two calls, two batches
    assert by_path(sites) == [("scan_in",), ("scan_out",), ("mlp.up", "mlp.gate"), ("mlp.down",)]
    assert not block.mlp.up._forward_pre_hooks
    with pytest.raises(CompressError, match=r"no site covers unused"):
        Arch("stack", sites).sites_of(block)


def test_equal_values_in_place_edits_and_reused_memory_are_not_one_activation():
    class Tricky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            y = self.a(x * 1.0) + self.b(x * 1.0)  # equal values; the first product's memory is free for the second
            z = self.c(y)
            y.add_(1.0)
            return z + self.d(y)  # the same memory in another version

    block = Tricky()
    with torch.no_grad():
        assert by_path(infer_sites(block, lambda: block(torch.randn(4, 8)))) == [("a",), ("b",), ("c",), ("d",)]


def test_no_blocks_to_find():
    with pytest.raises(CompressError, match="none of its 1 modules is a ModuleList"):
        find_blocks(nn.Linear(2, 2))


# ---- the tiny checkpoints -------------------------------------------------------------------------------------------

def test_tiny_models_repeat_and_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    a, b, c = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16), tiny_model("llama", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.lm_head.weight.bfloat16(), b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize("name", TINY)
def test_tiny_checkpoint_loads_back(name, tmp_path):
    model = save_tiny(name, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    logits = model(IDS).logits
    assert torch.equal(loaded(IDS).logits, logits) and logits.isfinite().all() and 0.1 < logits.float().std() < 10
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 256
    text = "Grüße, \n\t two  spaces"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text
