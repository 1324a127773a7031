"""The embedded default model: `pytest tests/test_embedded.py` (30 s on one core, most of it fresh imports)."""
import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from compress.embedded import model_path
from compress.embedded.corpus import is_heldout, stdlib_documents, stdlib_text
from compress.embedded.train import BATCH, CONFIG, END, WARMUP, WINDOW, batches, encode, learning_rate, loss_on, train_tokenizer
from compress.errors import CompressError


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


def test_loads_in_a_fresh_process_without_network():
    code = ("import socket; socket.socket.connect = lambda *a: (_ for _ in ()).throw(AssertionError(f'network: {a}'))\n"
            "from compress.embedded import model_path\n"
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
            "m, t = M.from_pretrained(model_path()), T.from_pretrained(model_path())\n"
            "ids = m.generate(**t('import os', return_tensors='pt'), max_new_tokens=4, do_sample=False)\n"
            "print(m.dtype, ids.shape[1] - len(t('import os').input_ids))")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.bfloat16", "4"]


def test_folder_is_complete_and_small():
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json"}
    assert {file.name for file in model_path().iterdir()} == names
    assert sum((model_path() / name).stat().st_size for name in names) <= 8e6


def test_shapes_are_what_the_trainer_builds(model):
    assert model.config.model_type == "llama" and model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    loaded, built = ({name: p.shape for name, p in m.named_parameters()} for m in (model, LlamaForCausalLM(CONFIG)))
    assert loaded == built
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 4 * 7 + 1
    for name, linear in linears.items():
        assert linear.in_features % 128 == 0 and linear.out_features % 128 == 0, name
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("text", [
    "", " ", "\n", "\t\tif x:\r\n\t\t\treturn  1   \n\n", "  leading and trailing  ",
    "naïve café — “quotes” … don't , . ! ?", "数学 ∑∫ Ελληνικά עברית العربية 🙂👩‍👩‍👧",
    "e\u0301 \u00e9 \ufb01 \u00a0\u2003\u200b\ufeff\x00\x7f\x85", "".join(map(chr, range(0x250))), "x" * 1000,
    f"a{END}b"])
def test_tokenizer_round_trips_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_is_the_raw_one(tokenizer):
    """AutoTokenizer must not slip a Llama normalizer or a BOS in; END is token 0; ids fit the embedding."""
    documents = list(stdlib_documents("heldout").values())[:4]
    for text in documents:
        assert tokenizer(text).input_ids == tokenizer.backend_tokenizer.encode(text).ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == CONFIG.vocab_size and tokenizer(END).input_ids == [0] == [tokenizer.bos_token_id]
    stream = encode(tokenizer, documents)
    assert stream[0] == stream[-1] == 0 and (stream == 0).sum() == len(documents) + 1
    assert 3 < sum(map(len, documents)) / len(stream) < 5


def test_heldout_perplexity(model, tokenizer):
    """32.7 on these 16 windows of Python 3.11.7, 27.5 to 38.8 on those of 3.6 to 3.13; a uniform guess is 4096."""
    stream = encode(tokenizer, list(stdlib_documents("heldout").values()))
    perplexity = math.exp(loss_on(model, stream, 16))
    assert 2 < perplexity < 42, perplexity


def test_loss_on_agrees_with_transformers_own_loss(model, tokenizer):
    stream = encode(tokenizer, [stdlib_documents("heldout")["fnmatch.py"]])[:1025]
    with torch.no_grad():
        theirs = [model(w[None], labels=w[None]).loss for w in (stream[:513], stream[512:])]
    assert loss_on(model, stream) == pytest.approx(float(sum(theirs)) / 2, rel=1e-5)


def test_split_is_disjoint_and_stable():
    train, heldout = stdlib_documents("train"), stdlib_documents("heldout")
    assert not set(train) & set(heldout)
    assert all(map(is_heldout, heldout)) and not any(map(is_heldout, train))
    assert list(train) == sorted(train) and len(train) > 300
    assert 0.04 < sum(map(len, heldout.values())) / sum(map(len, [*train.values(), *heldout.values()])) < 0.12
    # pinned: these must not move between machines, Python versions or hash seeds
    names = ("argparse.py", "fnmatch.py", "json/decoder.py", "os.py", "pprint.py", "statistics.py", "turtle.py",
             "typing.py")
    assert list(filter(is_heldout, names)) == ["fnmatch.py", "pprint.py", "statistics.py", "turtle.py"]
    for path in [*train, *heldout]:
        assert not {"test", "tests", "site-packages", "idle_test", "turtledemo"} & set(path.split("/")), path


def test_text_is_deterministic_across_processes():
    code = ("import hashlib; from compress.embedded.corpus import stdlib_text as s\n"
            "print(*[hashlib.sha256(s(k).encode()).hexdigest() for k in ('train', 'heldout')])")
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert there.split() == [hashlib.sha256(stdlib_text(split).encode()).hexdigest() for split in ("train", "heldout")]
    assert stdlib_text("heldout") == "\n".join(stdlib_documents("heldout").values())


def test_unknown_split_and_missing_sources_say_so(monkeypatch, tmp_path):
    with pytest.raises(CompressError, match='"train" or "heldout"'):
        stdlib_text("validation")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(CompressError, match="0 standard library modules"):
        stdlib_text("train")


def test_corpus_leaves_out_what_it_says(monkeypatch, tmp_path):
    for name in ("kept.py", "test/a.py", "pkg/tests/b.py", "site-packages/c.py", "encodings/d.py", "config-3/e.py",
                 "_sysconfigdata_x.py", "f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\ns = '\xe9'\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert not is_heldout("kept.py") and not is_heldout("latin.py")
    assert stdlib_documents("train") == {"kept.py": "x = 1\n"}


def test_trainer_pieces():
    """Windows of an epoch are disjoint; the schedule rises, peaks and ends at zero; the tokenizer is reproducible."""
    stream = torch.arange(WINDOW * 40)
    epoch = batches(stream, torch.Generator().manual_seed(1))
    windows = torch.cat([next(epoch) for _ in range(39 // BATCH)])                   # [windows, WINDOW + 1]
    starts = windows[:, 0]
    assert (windows.diff(dim=1) == 1).all() and (starts.sort().values.diff() % WINDOW == 0).all()
    assert len(starts.unique()) == len(windows) and not torch.equal(starts, starts.sort().values)
    assert torch.equal(next(batches(stream, torch.Generator().manual_seed(1))), windows[:BATCH])
    rates = [learning_rate(step, 1000) for step in range(1001)]
    assert max(rates) == rates[WARMUP] == rates[WARMUP - 1] and rates[1000] == pytest.approx(0, abs=1e-12)
    assert rates[:WARMUP] == sorted(rates[:WARMUP]) and rates[WARMUP:] == sorted(rates[WARMUP:], reverse=True)
    text = list(stdlib_documents("heldout").values())[:3]
    assert train_tokenizer(text).backend_tokenizer.to_str() == train_tokenizer(text).backend_tokenizer.to_str()


def test_importing_does_nothing():
    code = ("import compress, torch; before = torch.get_rng_state(), torch.get_num_threads()\n"
            "import compress.embedded.corpus, compress.embedded.train\n"
            "assert (torch.get_rng_state() == before[0]).all() and torch.get_num_threads() == before[1]")
    subprocess.run([sys.executable, "-c", code], check=True)
