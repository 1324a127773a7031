"""Architectures as data: which linears of a decoder block read the same activation, and who makes that activation.

A layer-wise method minimises tr[(Ŵ-W) H (Ŵ-W)ᵀ] with H = E[x xᵀ]. Linears that read one tensor (q, k and v; gate and
up) have one x, hence one H and one factorization: a `Site`. An `Arch` lists the sites of a block in execution order,
which is also the order of true-sequential calibration. Every fact about an architecture lives in ARCHS; no code asks
for a model's name. A model that is not in the table is watched once (`infer`): linears that receive the very same
memory share a site.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import CompressError
from compress.experts import fused_experts

LINEARS = (nn.Linear, Conv1D)  # weights [out, in] and [in, out]


@dataclass(frozen=True)
class Site:
    """One activation and the linears that read it; they share one Hessian.

    `previous` makes the activation and feeds nothing else, so a scale per channel can be folded into it. A norm scales
    channel by channel. A linear feeds the site with its LAST n outputs, n = in_features of the readers: all of up_proj,
    the second half of a fused gate_up_proj. Under grouped-query attention v_proj has fewer than n: each feeds several
    channels, and a fold needs a scale that repeats with them. None means that no fold is exact: a nonlinearity between,
    a norm output that is also the residual, a fused qkv, a norm that also feeds a router and other experts.
    """
    name: str                 # "attn.input", "mlp.output", "experts.3.input"
    linears: tuple[str, ...]  # module paths relative to the block, in call order
    previous: str | None      # relative path of the op that produces the activation


@dataclass(frozen=True)
class Arch:
    blocks: str                                # dotted path of the ModuleList of blocks
    sites: tuple[Site, ...]                    # execution order; a "*" in a path stands for an expert index
    skip: tuple[str, ...] = ()                 # linears left alone on purpose: routers
    when: tuple[tuple[str, object], ...] = ()  # config values it describes; the first entry that matches counts
    also: tuple[tuple[str, str], ...] = ()     # (norm, fused weight) of what reads a norm's output with other readers
    qkv: str = "grouped"                       # rows of a fused qkv: group by group, or "concat": all q, all k, all v
    fixed_heads: str = ""                      # why no head can be taken out

    def sites_of(self, block: nn.Module) -> tuple[Site, ...]:
        """The sites present in this block, experts expanded. No expert feeds another, so the inputs of all experts come
        before the outputs of any: one pass can gather a whole stage. A linear that no site covers is an error."""
        modules = dict(block.named_modules())
        sites = tuple(replace(site, linears=present) for template in self.sites for site in _expand(template, modules)
                      if (present := tuple(path for path in site.linears if path in modules)))
        covered = [path for site in sites for path in site.linears]
        known = {*covered, *self.skip}
        kind = type(block).__name__
        if fused := fused_experts(block):
            raise CompressError(f"{kind}: {', '.join(fused)} holds its experts as 3-D parameters, not as linears; call "
                                "unfuse_experts(model) first")
        if missed := [path for path, m in modules.items() if isinstance(m, LINEARS) and path not in known]:
            raise CompressError(f"{kind}: no site covers {', '.join(missed)} ({len(missed)} of "
                                f"{len(missed) + len(covered)} linears); add them to the sites, or to `skip`, of this "
                                "architecture in compress/arch.py")
        if twice := {path for path in covered if covered.count(path) > 1}:
            raise CompressError(f"{kind}: more than one site covers {', '.join(sorted(twice))}; name each of the "
                                f"{len(set(covered))} linears once in compress/arch.py")
        return sites


def _expand(site: Site, modules: dict[str, nn.Module]) -> list[Site]:
    """One site per expert of this block where the paths have a "*", else the site itself."""
    if "*" not in site.linears[0]:
        return [site]
    pattern = re.compile(re.escape(site.linears[0]).replace(r"\*", r"(\d+)"))
    experts = sorted(int(match[1]) for match in map(pattern.fullmatch, modules) if match)
    return [Site(site.name.replace("*", str(e)), tuple(path.replace("*", str(e)) for path in site.linears),
                 site.previous and site.previous.replace("*", str(e))) for e in experts]


# ---- the table ------------------------------------------------------------------------------------------------------

ATTN_IN = Site("attn.input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm")
ATTN_OUT = Site("attn.output", ("self_attn.o_proj",), "self_attn.v_proj")
MLP_IN = Site("mlp.input", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")
MLP_OUT = Site("mlp.output", ("mlp.down_proj",), "mlp.up_proj")

LLAMA = Arch("model.layers", (ATTN_IN, ATTN_OUT, MLP_IN, MLP_OUT))
# Norms on both sides of a sublayer: post_attention_layernorm closes attention, pre_feedforward_layernorm opens the MLP.
GEMMA = Arch("model.layers", (ATTN_IN, ATTN_OUT, replace(MLP_IN, previous="pre_feedforward_layernorm"), MLP_OUT))
# Norms only after a sublayer: q, k, v and the MLP read the residual stream itself.
OLMO2 = Arch("model.layers", (replace(ATTN_IN, previous=None), ATTN_OUT, replace(MLP_IN, previous=None), MLP_OUT),
             fixed_heads="q_norm and k_norm span all heads")
# A block is dense or sparse; the sites it lacks drop out. The routers are bare parameters, not linears.
MOE = Arch("model.layers", (
    *LLAMA.sites,
    Site("experts.*.input", ("mlp.experts.*.gate_up_proj",), None),
    Site("experts.*.output", ("mlp.experts.*.down_proj",), "mlp.experts.*.gate_up_proj")),
    also=(("post_attention_layernorm", "mlp.gate.weight"), ("post_attention_layernorm", "mlp.experts.gate_up_proj")))
PHI3 = Arch("model.layers", (
    Site("attn.input", ("self_attn.qkv_proj",), "input_layernorm"),
    Site("attn.output", ("self_attn.o_proj",), None),
    Site("mlp.input", ("mlp.gate_up_proj",), "post_attention_layernorm"),
    Site("mlp.output", ("mlp.down_proj",), "mlp.gate_up_proj")), qkv="concat")
OPT = Arch("model.decoder.layers", (
    replace(ATTN_IN, previous="self_attn_layer_norm"),
    Site("attn.output", ("self_attn.out_proj",), "self_attn.v_proj"),
    Site("mlp.input", ("fc1",), "final_layer_norm"),
    Site("mlp.output", ("fc2",), None)), when=(("do_layer_norm_before", True),))
# opt-350m normalises after the residual sum: the output of a norm is the next residual as well.
OPT_POST = Arch("model.decoder.layers", (
    replace(ATTN_IN, previous=None), OPT.sites[1], replace(OPT.sites[2], previous=None), OPT.sites[3]))
GPT2 = Arch("transformer.h", (
    Site("attn.input", ("attn.c_attn",), "ln_1"),
    Site("attn.output", ("attn.c_proj",), None),
    Site("mlp.input", ("mlp.c_fc",), "ln_2"),
    Site("mlp.output", ("mlp.c_proj",), None)), qkv="concat")
# Attention and MLP may run in parallel, but each has a norm of its own: two activations, two sites.
GPT_NEOX = Arch("gpt_neox.layers", (
    Site("attn.input", ("attention.query_key_value",), "input_layernorm"),
    Site("attn.output", ("attention.dense",), None),
    Site("mlp.input", ("mlp.dense_h_to_4h",), "post_attention_layernorm"),
    Site("mlp.output", ("mlp.dense_4h_to_h",), None)))

QKV_IN = Site("attn.input", ("self_attention.query_key_value",), "input_layernorm")  # bloom and falcon
DENSE = Site("attn.output", ("self_attention.dense",), None)
FC1_IN = Site("mlp.input", ("mlp.dense_h_to_4h",), "post_attention_layernorm")
FC2 = Site("mlp.output", ("mlp.dense_4h_to_h",), None)

ALIBI = "ALiBi gives every head a slope by its number"
BLOOM = Arch("transformer.h", (QKV_IN, DENSE, FC1_IN, FC2), when=(("apply_residual_connection_post_layernorm", False),), fixed_heads=ALIBI)
BLOOM_POST = Arch("transformer.h", (replace(QKV_IN, previous=None), DENSE, replace(FC1_IN, previous=None), FC2), fixed_heads=ALIBI)
FALCON_RW = Arch("transformer.h", (QKV_IN, DENSE, FC1_IN, FC2), when=(("parallel_attn", False),), fixed_heads=ALIBI)
FALCON_40B = Arch("transformer.h", (
    replace(QKV_IN, previous="ln_attn"), DENSE, replace(FC1_IN, previous="ln_mlp"), FC2),
    when=(("num_ln_in_parallel_attn", 2),))
# falcon-7b and 11b: one norm feeds attention and MLP, which run in parallel, so qkv and fc1 share a site.
FALCON = Arch("transformer.h", (Site("block.input", QKV_IN.linears + FC1_IN.linears, "input_layernorm"), DENSE, FC2))

ARCHS: dict[str, tuple[Arch, ...]] = {
    "llama": (LLAMA,), "mistral": (LLAMA,), "qwen2": (LLAMA,), "qwen3": (LLAMA,),
    "gemma2": (GEMMA,), "gemma3_text": (GEMMA,), "olmo2": (OLMO2,), "phi3": (PHI3,),
    "mixtral": (MOE,), "qwen3_moe": (MOE,),
    "opt": (OPT, OPT_POST), "gpt2": (GPT2,), "gpt_neox": (GPT_NEOX,),
    "bloom": (BLOOM, BLOOM_POST), "falcon": (FALCON_RW, FALCON_40B, FALCON),
}


def table_entry(model: nn.Module) -> Arch | None:
    """The entry of this model's config in ARCHS. None if there is none, or if the blocks are kept elsewhere (a language
    model inside a multimodal one)."""
    config = getattr(model, "config", None)
    for arch in ARCHS.get(getattr(config, "model_type", ""), ()):
        if all(getattr(config, key) == value for key, value in arch.when):
            return arch if arch.blocks in dict(model.named_modules()) else None
    return None


def arch_of(model: nn.Module) -> Arch:
    return table_entry(model) or infer(model)


# ---- unknown models -------------------------------------------------------------------------------------------------

def find_blocks(model: nn.Module) -> str:
    """Path of the decoder blocks: the longest outermost ModuleList whose children all hold linears. Works on meta."""
    lists = _repeats(model)
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]  # experts are inner
    if not outer:
        raise CompressError(f"{type(model).__name__}: none of its {len(list(model.modules()))} modules is a ModuleList "
                            "of blocks with linears; add the architecture to compress/arch.py")
    return max(outer, key=lambda name: len(model.get_submodule(name)))


def infer_sites(block: nn.Module, run: Callable[[], object]) -> tuple[Site, ...]:
    """Sites of a real (not meta) block, seen while `run()` sends some tokens through it, under no_grad.

    Two linears share a site if every call of both read the same rows of memory in the same version. `previous` is None:
    that a tensor came out of a norm does not tell who else reads it. Linears below one expert become a "*" site, so an
    expert without tokens is covered by one with some. A linear that is never called (its weight is used another way)
    gets no site and `Arch.sites_of` will name it. Routers are left out: put `routers(block)` into `Arch.skip`.
    """
    if any(p.is_meta for p in block.parameters()):
        raise CompressError(f"{type(block).__name__} is on meta, but its sites are inferred from a real forward; load "
                            "its weights first, or add the architecture to compress/arch.py")
    calls: dict[str, list[tuple]] = {}  # linear -> identity of what each of its calls read, in order of first call
    held: list[Tensor] = []             # keeps those tensors alive: freed memory would come back as another activation

    def recorder(path):
        def record(module, args):
            x = args[0]  # [..., in]
            held.append(x)
            if x.numel():  # a loop over experts may call one with no tokens
                calls.setdefault(path, []).append((x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x._version))
        return record

    left_out = routers(block)
    hooks = [m.register_forward_pre_hook(recorder(path)) for path, m in block.named_modules()
             if isinstance(m, LINEARS) and path not in left_out]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    readers: dict[tuple, list[str]] = {}
    for path, read in calls.items():
        readers.setdefault(tuple(read), []).append(path)
    expert = re.compile(rf"({'|'.join(map(re.escape, _repeats(block)))})\.\d+\.")
    sites: dict[tuple[str, ...], Site] = {}
    for paths in readers.values():
        if len({match and match.group() for match in map(expert.match, paths)}) == 1:  # all below one expert, or none
            paths = [expert.sub(r"\1.*.", path, count=1) for path in paths]
        sites.setdefault(tuple(paths), Site(f"{paths[0]}.input", tuple(paths), None))
    return tuple(sites.values())


def routers(block: nn.Module) -> tuple[str, ...]:
    """Linears that choose or weigh experts: in a block with experts, those with an output per expert or just one."""
    experts = [len(block.get_submodule(name)) for name in _repeats(block)]
    return tuple(path for path, m in block.named_modules()
                 if experts and isinstance(m, nn.Linear) and m.out_features in (1, *experts))


def infer(model: nn.Module, input_ids: Tensor | None = None) -> Arch:
    """Arch of a resident model, from one short forward for each kind of block: those whose linears have equal paths."""
    blocks = find_blocks(model)
    if input_ids is None:
        input_ids = torch.arange(16, device=next(model.parameters()).device)[None]  # [1, 16]: any model has 16 tokens
    kinds = {tuple(path for path, m in block.named_modules() if isinstance(m, LINEARS)): block
             for block in model.get_submodule(blocks)}
    sites: list[Site] = []
    skip: dict[str, None] = {}
    for block in kinds.values():
        with torch.no_grad():
            found = infer_sites(block, lambda: model(input_ids))
        at = 0
        for site in found:  # merged so that every kind keeps its own execution order
            if site not in sites:
                sites.insert(at, site)
            at = sites.index(site) + 1
        skip |= dict.fromkeys(routers(block))
    return Arch(blocks, tuple(sites), skip=tuple(skip))


def _repeats(module: nn.Module) -> list[str]:
    """Paths of the ModuleLists whose children all hold linears: decoder blocks in a model, experts in a block."""
    def holds_linears(child):
        return not isinstance(child, LINEARS) and any(isinstance(m, LINEARS) for m in child.modules())
    return [name for name, m in module.named_modules()
            if name and isinstance(m, nn.ModuleList) and len(m) and all(map(holds_linears, m))]
