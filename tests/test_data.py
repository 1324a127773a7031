"""OMP_NUM_THREADS=1 python -m pytest tests/test_data.py"""
import hashlib
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.calibration.data import SPECS, load_calibration
from compress.errors import CompressError

datasets = pytest.importorskip("datasets")  # images with torch and a GPU often lack it, and `pytest -m gpu` reads this file too
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
TEXT = "\n\n".join(f"Paragraph {i} says: the square of {i} is {i * i}, naïve as it sounds." for i in range(200))
CHAT = [{"messages": [{"role": "user", "content": f"What is {i} + {i}?"},
                      {"role": "assistant", "content": f"{2 * i}."}]} for i in range(40)]


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, so a test can count by hand; <s> = 256, </s> = 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=64)


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"]


def text_of(row: torch.Tensor) -> str:
    return TOKENIZER.decode(row.tolist())


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same documents as .txt, .jsonl, .parquet and as local dataset folders; `datasets` caches beside them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = TEXT.split("\n\n")
    rows = [{"text": d, "body": d.upper()} for d in documents]
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in CHAT))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, file in (("folder_jsonl", "a.jsonl"), ("folder_parquet", "a.parquet"), ("folder_txt", "a.txt"),
                       ("folder_chat", "chat.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"train.{file.split('.')[1]}").write_bytes((tmp_path / file).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl:text"])
def test_file_is_the_plain_windows_of_the_whole_text(files, name):
    data = load_calibration(f"file:{files / name}", TOKENIZER, samples=10, seqlen=64, seed=1)
    again = load_calibration(f"file:{files / name}", TOKENIZER, samples=10, seqlen=64, seed=2)      # no seed enters
    assert torch.equal(data.tokens, torch.tensor(ids(TEXT)[:640]).view(10, 64)) and data.tokens.dtype == torch.int64
    assert torch.equal(data.tokens, again.tokens) and data.mask is None and data.fallbacks == []
    assert data.words == len(TOKENIZER.decode(ids(TEXT)[:640]).split())     # a word cut by a window counts once
    record = data.record
    assert record["asked"] == {"samples": 10, "seqlen": 64} and record["obtained"] == {"samples": 10, "tokens": 640}
    assert record["padding"] == 0 and record["bos"] == "never added"
    assert record["distinct_tokens"] == len(set(ids(TEXT)[:640])) and record["vocabulary_coverage"] < 1
    assert record["sha256"] == hashlib.sha256(data.tokens.numpy().tobytes()).hexdigest()
    json.dumps(record)


def test_a_named_column_and_everything(files):
    data = load_calibration(f"file:{files / 'a.jsonl'}:body", TOKENIZER, samples=None, seqlen=64)
    assert len(data.tokens) == len(ids("\n\n".join(d.upper() for d in TEXT.split("\n\n")))) // 64
    assert text_of(data.tokens[0]).startswith("PARAGRAPH 0 SAYS") and data.fallbacks == []


def test_fewer_samples_than_asked_is_told(files):
    data = load_calibration(f"file:{files / 'a.txt'}", TOKENIZER, samples=10_000, seqlen=64)
    n = len(ids(TEXT)) // 64
    assert data.record["obtained"]["samples"] == len(data.tokens) == n
    assert data.fallbacks == [{"what": "fewer samples than asked for", "where": f"file:{files / 'a.txt'}",
                               "count": 10_000 - n, "detail": f"asked for 10000 of 64 tokens, the text gave {n}"}]


@pytest.mark.parametrize("folder", ["folder_jsonl", "folder_parquet"])
def test_hub_dataset_from_a_local_folder(files, folder):
    def load(**options):
        return load_calibration(f"hf:{files / folder}::train", TOKENIZER, samples=20, seqlen=64, **options)
    data, again, other = load(seed=0), load(seed=0), load(seed=1)
    assert data.record == again.record and not torch.equal(data.tokens, other.tokens)
    documents = text_of(data.tokens.flatten()).split("\n\n")[:-1]       # shuffled documents, whole but for the last
    assert documents != TEXT.split("\n\n")[:len(documents)] and set(documents) <= set(TEXT.split("\n\n"))
    whole = load(split="evaluation")
    assert torch.equal(whole.tokens, torch.tensor(ids(TEXT)[:20 * 64]).view(20, 64))
    upper = load_calibration(f"hf:{files / folder}::train:body", TOKENIZER, samples=2, seqlen=64, split="evaluation")
    assert text_of(upper.tokens[0]).startswith("PARAGRAPH 0 SAYS")
    everything = load_calibration(f"hf:{files / folder}", TOKENIZER, samples=None, seqlen=64)
    assert len(everything.tokens) == len(ids(TEXT)) // 64


def test_hub_dataset_of_plain_text_lines(files):
    data = load_calibration(f"hf:{files / 'folder_txt'}::train", TOKENIZER, samples=4, seqlen=64, split="evaluation")
    assert text_of(data.tokens[0]).startswith(TEXT[:30])


def test_unpacked_documents_are_padded_masked_and_counted(files):
    rows = ["", "x", "ab", "cde", "a sentence that is much longer than the window is"]
    (files / "short.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    data = load_calibration(f"file:{files / 'short.jsonl'}", TOKENIZER, samples=None, seqlen=8, pack=False)
    lengths = [2, 3, 8]
    assert data.mask.tolist() == [[i < n for i in range(8)] for n in lengths]
    assert [text_of(row[m]) for row, m in zip(data.tokens, data.mask)] == ["ab", "cde", "a senten"]
    assert set(data.tokens[~data.mask].tolist()) == {TOKENIZER.eos_token_id}        # no pad token: end of text
    assert data.words == 1 + 1 + 2 and data.record["documents"] == {"dropped": 2, "truncated": 1}
    assert data.record["padding"] == pytest.approx(1 - 13 / 24)
    assert [(f["what"], f["count"]) for f in data.fallbacks] == [("documents dropped", 2)]
    paragraphs = load_calibration(f"file:{files / 'a.txt'}", TOKENIZER, samples=3, seqlen=128, pack=False)
    assert text_of(paragraphs.tokens[1][paragraphs.mask[1]]) == TEXT.split("\n\n")[1]


@pytest.mark.parametrize("source", ["file:{}/chat.jsonl", "hf:{}/folder_chat::train"])
def test_conversations_go_through_the_chat_template(files, source):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    written = [f"<s>user: What is {i} + {i}?</s><s>assistant: {2 * i}.</s>" for i in range(40)]
    packed = load_calibration(source.format(files), tokenizer, samples=2, seqlen=128, chat_template=True,
                              split="evaluation")
    assert packed.tokens.flatten().tolist() == ids("".join(written))[:256]       # <s> is one token, and none is added
    assert packed.words == len(text_of(packed.tokens[packed.tokens < 256]).split())      # tags are not words
    apart = load_calibration(source.format(files), tokenizer, samples=40, seqlen=128, pack=False, chat_template=True)
    assert {text_of(row[m]) for row, m in zip(apart.tokens, apart.mask)} == set(written)
    with pytest.raises(CompressError, match="no chat template"):
        load_calibration(source.format(files), TOKENIZER, chat_template=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CompressError, match=r"refuses .* \(roles must alternate\)"):
        load_calibration(source.format(files), tokenizer, chat_template=True)


def test_standard_library_windows(files):
    from compress.embedded.corpus import stdlib_text
    train, heldout = stdlib_text("train"), stdlib_text("heldout")
    data, again, other = (load_calibration("stdlib", TOKENIZER, samples=16, seqlen=64, seed=s) for s in (0, 0, 1))
    assert torch.equal(data.tokens, again.tokens) and not torch.equal(data.tokens, other.tokens)
    assert all(bytes_of(row) in train.encode() for row in data.tokens)
    first = load_calibration("stdlib", TOKENIZER, samples=4, seqlen=64, split="evaluation")
    assert first.tokens.flatten().tolist() == ids(heldout[:400])[:256]


def bytes_of(row: torch.Tensor) -> bytes:
    """Windows may cut a character: compare bytes."""
    back = {c: b for b, c in byte_characters().items()}
    return bytes(back[c] for c in TOKENIZER.convert_ids_to_tokens(row.tolist()))


def byte_characters() -> dict[int, str]:
    """GPT-2's bytes-to-characters table: printable latin-1 stays, the rest moves past 255."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(moved)}


def test_text_of_the_model_itself():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2, bos_token_id=256, eos_token_id=257)).eval()
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0      # ancestral sampling anyway
    state = torch.random.get_rng_state()
    load = lambda tokenizer, seed: load_calibration("self", tokenizer, samples=20, seqlen=12, seed=seed, model=model)
    a, b, c = load(TOKENIZER, 0), load(TOKENIZER, 0), load(TOKENIZER, 1)
    assert a.tokens.shape == (20, 12) and torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
    assert torch.equal(state, torch.random.get_rng_state())
    assert a.tokens[:, 0].unique().numel() > 5 and a.tokens[:, 0].max() < 256 and (a.tokens != 257).all()
    assert (load(byte_tokenizer(bos=True), 0).tokens[:, 0] == 256).all()
    unseen = load_calibration("self", TOKENIZER, samples=20, seqlen=12, split="evaluation", model=model)
    assert not set(map(tuple, unseen.tokens.tolist())) & set(map(tuple, a.tokens.tolist()))
    for options in ({"model": None}, {"model": model, "samples": None}):
        with pytest.raises(CompressError, match=r"self: .*model="):
            load_calibration("self", TOKENIZER, **options)


@pytest.mark.parametrize("spec", ["wikitext2", "ptb", "c4"])
def test_hub_conventions(monkeypatch, spec):
    """What each convention asks the hub for, and how it cuts the answer: offline, the hub is a function."""
    asked, lines = [], [f" line {i} of the set, somewhat long, with words \n" if i % 2 else "" for i in range(200)]

    def load_dataset(name, config=None, **options):
        asked.append((name, config, options["split"]))
        return datasets.Dataset.from_dict({"sentence" if spec == "ptb" else "text": lines})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load = lambda **options: load_calibration(spec, TOKENIZER, samples=5, seqlen=32, **options)
    data, again, other = load(), load(), load(seed=1)
    whole = load(split="evaluation")
    assert torch.equal(data.tokens, again.tokens) and not torch.equal(data.tokens, other.tokens)
    name = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "c4": ("allenai/c4", None),
            "ptb": ("ptb-text-only/ptb_text_only", None)}[spec]
    assert asked[0] == (*name, "train") and asked[-1] == (*name, "test[:1100]" if spec == "c4" else "test")
    join = "\n\n" if spec == "wikitext2" else " "
    assert whole.tokens.flatten().tolist() == ids(join.join(lines))[:160]
    if spec == "c4":
        assert all(any(text_of(row) in line for line in lines) for row in data.tokens)
    else:
        train = ids(join.join(filter(None, lines) if spec == "wikitext2" else lines))
        grid = [train[i:i + 32] for i in range(0, len(train), 32)]
        places = [grid.index(row) for row in data.tokens.tolist()]
        assert len(set(places)) == 5 and places != sorted(places)
    assert load(pack=False).tokens.shape == (5, 32)


def test_a_long_text_does_not_warn(files, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = byte_tokenizer()        # its model_max_length is 64
    load_calibration(f"file:{files / 'a.txt'}", tokenizer, samples=2, seqlen=32)
    assert "longer than the specified maximum" not in caplog.text
    tokenizer(TEXT)
    assert "longer than the specified maximum" in caplog.text


def test_errors_are_one_line_with_a_way_out(files):
    (files / "empty.txt").write_text("")
    (files / "nul.txt").write_bytes(b"abc\0def")
    (files / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (files / "short.txt").write_text("only this")
    (files / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (files / "list.jsonl").write_text('["a"]\n')
    (files / "number.jsonl").write_text('{"text": 3}\n')
    (files / "fake.parquet").write_text("not parquet at all")
    (files / "a.csv").write_text("text\nhello\n")
    (files / "blank.jsonl").write_text('{"text": ""}\n')
    at = lambda name: f"file:{files / name}"
    cases = [
        ("wikitxt2", {}, "did you mean 'wikitext2'.*stdlib"), ("random", {}, "unknown data 'random'.*valid: wikitext2"),
        (str(files / "a.txt"), {}, "did you mean 'file:/"), ("file:", {}, "unknown data"),
        (at("none.txt"), {}, "no file .*none.txt"), (f"file:{files}", {}, "is a folder; load it with hf:"),
        (at("a.csv"), {}, ".csv is not .txt"), (at("empty.txt"), {}, "empty, 0 bytes"),
        (at("nul.txt"), {}, "NUL at byte 3 of 7"), (at("latin.txt"), {}, "byte 2 of 5 is not UTF-8"),
        (at("short.txt"), {}, "9 tokens found, one window needs 512; .*pack=False"),
        (at("a.txt") + ":body", {}, "no columns"), (at("a.txt"), {"chat_template": True}, "leave chat_template out"),
        (at("bad.jsonl"), {}, "line 2 is not JSON"), (at("list.jsonl"), {}, "line 1 is a list"),
        (at("number.jsonl"), {}, "holds '3', a int"), (at("fake.parquet"), {}, "not a parquet file"),
        (at("a.jsonl") + ":nope", {}, "no column 'nope', it has text, body; name one: file:PATH"),
        (at("a.parquet") + ":nope", {}, "no column 'nope', it has text, body"),
        (at("chat.jsonl"), {}, "no column 'text', it has messages; chat_template=True"),
        (at("a.jsonl"), {"chat_template": True}, "no column 'messages', it has text, body; name one"),
        (at("blank.jsonl"), {"pack": False}, "1 documents found, none has the 2 tokens"),
        ("stdlib", {"chat_template": True}, "chat_template takes conversations"),
        (f"hf:{files / 'folder_jsonl'}:::nope", {}, "no column 'nope', it has text, body; name one: hf:NAME"),
        (f"hf:{files / 'folder_jsonl'}::tset", {}, "cannot load .*tset"),
        (f"hf:{files / 'folder_jsonl'}", {"split": "evaluation"}, "cannot load .*test"),
        (f"hf:{files / 'nowhere'}", {}, "cannot load .*work offline"),
        (at("a.txt"), {"seqlen": 1}, "at least 1 sample of 2 tokens"), (at("a.txt"), {"samples": 0}, "samples=0"),
    ]
    for spec, options, message in cases:
        with pytest.raises(CompressError, match=message) as error:
            load_calibration(spec, TOKENIZER, **options)
        assert "\n" not in str(error.value) and len(str(error.value)) < 800, spec
    with pytest.raises(CompressError, match="tokenizer missing"):
        load_calibration("stdlib", None)
    assert len(SPECS) == 7


def test_an_unreachable_hub_is_one_line(files, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for spec in ("hf:nobody/nothing", "wikitext2", "ptb", "c4"):
        with pytest.raises(CompressError, match=f"{spec}: cannot load .*work offline") as error:
            load_calibration(spec, TOKENIZER)
        assert "\n" not in str(error.value)
