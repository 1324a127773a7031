"""pytest tests/test_stream.py — one block at a time gives what the whole model gives, bit for bit, for every architecture."""

import os

import pytest
import torch
from tiny import TINY, save_tiny

from compress.calibration import guidance, hidden
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.stream import Stream
from compress.walk import sites_of

TOKENS = torch.randint(1, 256, (5, 24), generator=torch.Generator().manual_seed(0))


def plain(model, tokens, mask=None, batch=2):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return torch.cat([model(t, attention_mask=m, use_cache=False).logits for t, m in
                          zip(tokens.split(batch), mask.long().split(batch) if mask is not None else [None] * 99, strict=False)])  # fmt: skip


def load(folder, dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_streamed_logits_equal_the_plain_forward_bit_for_bit(name, dtype, tmp_path):
    save_tiny(name, tmp_path)
    stream = Stream(Checkpoint(str(tmp_path), dtype=dtype), TOKENS, batch=2)
    for i in range(2):
        stream.advance(stream.source.load_block(i))
    assert torch.equal(torch.cat(list(stream.logits())), plain(load(tmp_path, dtype), TOKENS))


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "opt"])
def test_padded_windows_equal_the_plain_forward_with_a_mask(name, tmp_path):
    save_tiny(name, tmp_path)
    mask = torch.arange(24)[None] < torch.tensor([24, 10, 24, 3, 17])[:, None]
    stream = Stream(Checkpoint(str(tmp_path), dtype=torch.float32), TOKENS, mask, batch=2)
    for i in range(2):
        stream.advance(stream.source.load_block(i))
    assert torch.equal(torch.cat(list(stream.logits()))[mask], plain(load(tmp_path, torch.float32), TOKENS, mask)[mask])


@pytest.mark.parametrize("name", TINY)
def test_freezing_a_finished_child_changes_no_bit(name, tmp_path):
    """Attention frozen by its output, and by the input of its last linear: the block gives the same bits, without running attention again."""
    save_tiny(name, tmp_path)
    source = Checkpoint(str(tmp_path))
    plain, by_output, by_input = (Stream(source, TOKENS, batch=2) for _ in range(3))
    for i in range(2):
        block = source.load_block(i)
        out = next(p for s in sites_of(source, block, plain) if s.name == "attn.output" for p in s.linears)
        child = out.partition(".")[0]
        by_output.freeze(block, child)
        by_output.collect(block, {"again": out})
        by_input.collect(block, {"attn.output": out}, keep=True)
        by_input.freeze(block, child, out)
        calls = []
        handle = block.get_submodule(child).register_forward_hook(lambda *a, calls=calls: calls.append(1))
        for _ in range(2):
            outputs = [torch.cat([s.forward(block, r, c) for r, c in zip(s.batches(), s.calls[i], strict=True)]) for s in (plain, by_output, by_input)]
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        handle.remove()
        if by_input._frozen[child].ends_in is not None:
            assert len(calls) == 6 + 3  # twice through all three batches for `plain`, once for `by_output`, never for `by_input`
        for s in (plain, by_output, by_input):
            s.advance(block)


def test_sharded_and_single_file_checkpoints_read_alike(tmp_path):
    save_tiny("llama", tmp_path / "one")
    save_tiny("llama", tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = Checkpoint(str(tmp_path / "one")), Checkpoint(str(tmp_path / "many"))
    for i in range(2):
        for (n, p), (m, q) in zip(one.load_block(i).state_dict().items(), many.load_block(i).state_dict().items(), strict=True):
            assert n == m and torch.equal(p, q)


def test_statistics_leave_padding_out(tmp_path):
    save_tiny("llama", tmp_path)
    source = Checkpoint(str(tmp_path), dtype=torch.float32)
    mask = torch.arange(24)[None] < torch.tensor([24, 10, 24, 3, 17])[:, None]
    site = {"mlp.input": "mlp.up_proj"}
    padded = Stream(source, TOKENS, mask, batch=2).collect(source.load_block(0), site)["mlp.input"]
    assert padded.count == int(mask.sum())
    rows = [Stream(source, TOKENS[i : i + 1, :n], batch=1).collect(source.load_block(0), site)["mlp.input"] for i, n in enumerate(mask.sum(1).tolist())]
    pooled = sum(r.hessian * r.count for r in rows) / sum(r.count for r in rows)
    torch.testing.assert_close(padded.hessian, pooled, rtol=1e-4, atol=1e-5 * pooled.abs().max().item())


def test_hidden_states_past_the_limit_live_in_a_file_that_no_kill_leaves_behind(tmp_path):
    small, large = hidden.allocate((2, 3, 4), torch.float32, tmp_path), hidden.allocate((2, 3, 4), torch.bfloat16, tmp_path, limit=10)
    for t in (small, large):
        t[:] = torch.arange(24).view(2, 3, 4)
        assert t.sum() == 276
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    broken = dict(weights)
    broken["model.layers.1.mlp.up_proj.weight"] = torch.full_like(weights["model.layers.1.mlp.up_proj.weight"], float("nan"))
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(CompressError, match=r"layers\.1\.mlp\.up_proj\.weight holds 8192 NaN"):
        Checkpoint(str(tmp_path)).load_block(1)
    del broken["model.layers.1.mlp.up_proj.weight"]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(CompressError, match=r"lacks mlp\.up_proj\.weight"):
        Checkpoint(str(tmp_path)).load_block(1)
    broken["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(CompressError, match=r"is \[3, 3\], the configuration says \[128, 64\]"):
        Checkpoint(str(tmp_path)).load_block(1)


@pytest.mark.parametrize(("name", "kept"), [("mixtral", "64"), ("llama", None)])
def test_routed_experts_have_few_compiled_products_kept(name, kept, tmp_path, monkeypatch):
    """No two batches give an expert as many tokens, and oneDNN compiles for each number."""
    caches = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
    for cache in caches:
        monkeypatch.setenv(cache, "")  # so that it is put back
        monkeypatch.delenv(cache)
    save_tiny(name, tmp_path)
    Stream(Checkpoint(str(tmp_path)), TOKENS, batch=2)
    assert [os.environ.get(cache) for cache in caches] == [kept, kept]


def test_the_pass_back_from_the_loss_holds_few_logits(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    seen = []

    class Watched(Stream):
        def tail(self):
            run = super().tail()
            return lambda h: seen.append(len(h)) or run(h)

    for limit, windows in ((guidance.LOGITS, [2, 2, 1]), (2 * 4 * 24 * 256 - 1, [1] * 5)):
        monkeypatch.setattr(guidance, "LOGITS", limit)
        seen.clear()
        found = guidance.guide(Watched(Checkpoint(str(tmp_path)), TOKENS, batch=2))
        assert seen == windows and len(found) == 2 and all(g.tokens.shape == (4, TOKENS.numel()) for block in found for g in block.values())
