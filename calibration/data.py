"""Calibration and evaluation text: one SPEC in, one frozen set of token windows out.

A calibration set decides what H = E[x xT] means, and a perplexity means nothing without the rule that cut its text into
windows. So every source has ONE rule, and `record` states which, beside a hash of the tokens:

    wikitext2   Calibration: train, its non-empty lines joined by a blank line, tokenised once, distinct windows picked
                by the seed. Evaluation: test, ALL its lines, windows from the start (GPTQ, arXiv 2210.17323).
    ptb         The same, its sentences joined by a space.
    c4          Calibration: the first train shard, one random window of each random document longer than seqlen
                (GPTQ; biased to long documents). Evaluation: the first 1100 validation documents joined by a space;
                published figures use the first 256 windows of 2048.
    stdlib      This Python's standard library. Calibration: one random window of random pieces of the train modules.
                Evaluation: the held-out modules, windows from the start.
    self        Text the model wrote, sampled at temperature 1 (LLM-QAT, arXiv 2305.17888): its own domain, no data.
    file:PATH[:COLUMN]                  .txt, .jsonl, .parquet: windows from the start, in order, no seed: anyone
                                        reproduces the figures.
    hf:NAME[:CONFIG][:SPLIT][:COLUMN]   A hub dataset or a local folder of parquet / jsonl / txt: as many documents as
                                        the windows take, shuffled by the seed for calibration, else in order.

Windows never overlap within a document (GPTQ's random starts may), the tail that fills none is dropped, and no special
token is added anywhere: one rule for every tokenizer, told in `record["bos"]`. `pack=False` keeps documents apart
instead: one a sample, cut to seqlen, padded on the right.
"""
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import CompressError

FILE, HUB = "file:PATH[:COLUMN]", "hf:NAME[:CONFIG][:SPLIT][:COLUMN]"
SPECS = ("wikitext2", "ptb", "c4", "stdlib", "self", FILE, HUB)


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    tokens: Tensor              # int64 [n, seqlen]
    mask: Tensor | None         # bool [n, seqlen], True = a real token; None = every token is real
    words: int                  # whitespace-separated words in the text of the real tokens, for word perplexity
    record: dict                # JSON: what was asked for, what was obtained, by which rule, and its hash
    fallbacks: list[dict] = field(default_factory=list)     # {what, where, count, detail}: what fell short of the asked

    def with_generated(self, other: "CalibrationSet") -> "CalibrationSet":
        """These windows and then the other's, which the model wrote itself; the record tells both."""
        masks = [torch.ones_like(c.tokens, dtype=torch.bool) if c.mask is None else c.mask for c in (self, other)]
        mask = None if self.mask is None and other.mask is None else torch.cat(masks)
        record = self.record | {"generated": {key: other.record[key] for key in ("seed", "obtained", "sha256")}}
        return CalibrationSet(torch.cat([self.tokens, other.tokens]), mask, self.words + other.words, record, self.fallbacks + other.fallbacks)


def load_calibration(spec: str, tokenizer: PreTrainedTokenizerBase | None, *, samples: int | None = 128,
                     seqlen: int = 512, seed: int = 0, pack: bool = True, chat_template: bool = False,
                     split: Literal["calibration", "evaluation"] = "calibration",
                     model: PreTrainedModel | None = None) -> CalibrationSet:
    """Windows of `spec` (top of this file). samples=None takes everything; `model` is what "self" samples from."""
    if tokenizer is None:
        raise CompressError(f"tokenizer missing: {spec} is text; put tokenizer.json beside the model's weights")
    if seqlen < 2 or (samples is not None and samples < 1):
        raise CompressError(f"samples={samples}, seqlen={seqlen}: a prediction takes at least 1 sample of 2 tokens")
    generator, dropped, truncated = torch.Generator().manual_seed(seed), 0, 0
    in_order = split == "evaluation" or spec.startswith("file:")
    if spec == "self":
        rows = _sampled(model, tokenizer, samples, seqlen, generator, split)
    else:
        source = _open(spec, tokenizer, samples, seqlen, split, pack, chat_template)
        keep = in_order or (pack and source.cut is _whole)        # _whole draws windows of the running text instead
        documents = map(source.render, source.rows if keep else _shuffled(source.rows, generator))

        def encode(text: str) -> list[int]:     # verbose=False: a text longer than the model's context is cut, not fed
            return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

        try:
            if pack:
                rows = source.cut(documents, source.join, encode, samples, seqlen, None if in_order else generator)
            else:
                rows, dropped, truncated = _one_each(documents, encode, samples, seqlen)
        except _TooShort as short:
            raise CompressError(f"{spec}: {short}; give a longer text, a smaller seqlen, or pack=False") from None

    real = torch.tensor([len(row) for row in rows])[:, None] > torch.arange(seqlen)         # [n, seqlen]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    tokens = torch.full((len(rows), seqlen), pad)
    tokens[real] = torch.cat(list(rows))
    mask = None if real.all() else real
    # Windows in order are one running text: decoded as one, a word that straddles two of them counts once.
    runs = [tokens.flatten()] if pack and in_order else rows
    words = sum(len(tokenizer.decode(run.tolist(), skip_special_tokens=True).split()) for run in runs)

    fallbacks = []
    if samples is not None and len(rows) < samples:
        fallbacks.append({"what": "fewer samples than asked for", "where": spec, "count": samples - len(rows),
                          "detail": f"asked for {samples} of {seqlen} tokens, the text gave {len(rows)}"})
    if dropped:
        fallbacks.append({"what": "documents dropped", "where": spec, "count": dropped,
                          "detail": "shorter than 2 tokens"})
    digest = hashlib.sha256(tokens.numpy().tobytes() + (b"" if mask is None else mask.numpy().tobytes())).hexdigest()
    distinct = tokens[real].unique().numel()
    bos = "first token of a sample, if the tokenizer adds one" if spec == "self" else \
          "as the chat template writes it" if chat_template else "never added"
    record = {"spec": spec, "split": split, "seed": seed, "pack": pack, "chat_template": chat_template, "bos": bos,
              "asked": {"samples": samples, "seqlen": seqlen},
              "obtained": {"samples": len(rows), "tokens": int(real.sum())},
              "documents": {"dropped": dropped, "truncated": truncated}, "padding": 1 - real.double().mean().item(),
              "distinct_tokens": distinct, "vocabulary_coverage": distinct / len(tokenizer), "sha256": digest}
    return CalibrationSet(tokens, mask, words, record, fallbacks)


# -- how a text becomes windows ----------------------------------------------------------------------------------------

class _TooShort(Exception):
    """Told to the user by load_calibration, which knows the spec."""


def _shuffled(rows: Sequence, generator: torch.Generator) -> Iterator:
    return (rows[i] for i in torch.randperm(len(rows), generator=generator).tolist())


def _grid(ids: list[int], seqlen: int) -> Tensor:
    """Non-overlapping windows from the start, tail dropped: [len(ids) // seqlen, seqlen]."""
    n = len(ids) // seqlen
    if n == 0:
        raise _TooShort(f"{len(ids)} tokens found, one window needs {seqlen}")
    return torch.tensor(ids[:n * seqlen]).view(n, seqlen)


def _whole(documents, join, encode, samples, seqlen, generator) -> Tensor:
    """Everything tokenised once; the first windows, or a seeded pick of distinct ones."""
    windows = _grid(encode(join.join(documents)), seqlen)
    return windows[:samples] if generator is None else \
        windows[torch.randperm(len(windows), generator=generator)[:samples]]


def _enough(documents, join, encode, samples, seqlen, generator) -> Tensor:
    """The first windows of as many documents as that takes: a hub dataset may be terabytes, so the text doubles."""
    wanted = float("inf") if samples is None else samples * seqlen
    parts, characters, budget = [], 0, 4 * wanted
    for document in documents:
        parts.append(document)
        characters += len(document)
        if characters >= budget:
            if len(ids := encode(join.join(parts))) >= wanted:
                return _grid(ids, seqlen)[:samples]
            budget = 2 * characters
    return _grid(encode(join.join(parts)), seqlen)[:samples]


def _one_window_each(documents, join, encode, samples, seqlen, generator) -> Tensor:
    """One random window of every document longer than seqlen, until there are enough."""
    windows, longest = [], 0
    for document in documents:
        ids = encode(document)
        longest = max(longest, len(ids))
        if len(ids) > seqlen:
            start = int(torch.randint(len(ids) - seqlen + 1, (), generator=generator))
            windows.append(torch.tensor(ids[start:start + seqlen]))
            if len(windows) == samples:
                break
    if not windows:
        raise _TooShort(f"the longest document has {longest} tokens, one window needs more than {seqlen}")
    return torch.stack(windows)


def _one_each(documents, encode, samples, seqlen) -> tuple[list[Tensor], int, int]:
    """One document a sample, cut to seqlen; and how many were dropped (nothing to predict) and how many cut."""
    rows, dropped, truncated = [], 0, 0
    for document in documents:
        ids = encode(document)
        if len(ids) < 2:
            dropped += 1
            continue
        rows.append(torch.tensor(ids[:seqlen]))
        truncated += len(ids) > seqlen
        if len(rows) == samples:
            break
    if not rows:
        raise _TooShort(f"{dropped} documents found, none has the 2 tokens a prediction takes")
    return rows, dropped, truncated


# -- where a text comes from -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Source:
    rows: Sequence                          # documents, or conversations when `render` applies a chat template
    cut: Callable[..., Tensor] = _whole     # how packing cuts them
    join: str = "\n\n"                      # what stands between two documents in a packed text
    render: Callable[..., str] = str


def _open(spec, tokenizer, samples, seqlen, split, pack, chat_template) -> _Source:
    """The documents of a spec, and how its convention joins and cuts them."""
    kind, _, rest = spec.partition(":")
    train = split == "calibration"
    if kind == "file" and rest:
        return _file(spec, rest, tokenizer, pack, chat_template)
    if kind == "hf" and rest:
        name, config, part, column = (rest.split(":", 3) + [""] * 3)[:4]
        data = _load_dataset(spec, name, config or None, split=part or ("train" if train else "test"))
        return _table(spec, data.column_names, column, lambda column: data[column], tokenizer, chat_template, _enough)
    if spec not in SPECS[:4]:
        near = [f"file:{spec}"] if Path(spec).is_file() else difflib.get_close_matches(spec, SPECS, 1, 0.5)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise CompressError(f"unknown data {spec!r}{hint} valid: {', '.join(SPECS)}")
    if chat_template:
        raise CompressError(f"{spec}: chat_template takes conversations; give a .jsonl, .parquet or hub dataset with a "
                            "'messages' column")
    part = "train" if train else "test"
    if spec == "wikitext2":
        lines = _load_dataset(spec, "Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"]
        return _Source([line for line in lines if line.strip()] if train or not pack else list(lines))
    if spec == "ptb":   # its repository holds a script, which `datasets` 4 refuses; the hub's own parquet copy works
        data = _load_dataset(spec, "ptb-text-only/ptb_text_only", data_files={part: f"penn_treebank/{part}/*.parquet"},
                             revision="refs/convert/parquet", split=part)
        return _Source(list(data["sentence"]), join=" ")
    if spec == "c4":    # no_checks: the hub's record counts every shard, and one is all the convention reads
        files = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
        data = _load_dataset(spec, "allenai/c4", data_files={part: files[part]}, verification_mode="no_checks",
                             split=part if train else "test[:1100]")
        return _Source(data["text"], _one_window_each if train else _whole, join=" ")
    from compress.embedded.corpus import stdlib_documents
    modules = list(stdlib_documents("train" if train else "heldout").values())
    if not (train and pack and samples):
        return _Source(modules, join="\n")
    text, width = "\n".join(modules), 8 * seqlen    # pieces, because tokenising all 9 MB would take 12 s
    return _Source([text[i:i + width] for i in range(0, len(text), width)], _one_window_each)


def _file(spec, path, tokenizer, pack, chat_template) -> _Source:
    column = ""
    if not Path(path).exists() and ":" in path:
        path, _, column = path.rpartition(":")
    file = Path(path)
    if file.is_dir():
        raise CompressError(f"{spec}: {path} is a folder; load it with hf:{path}")
    if not file.is_file():
        raise CompressError(f"{spec}: no file {path} in {Path.cwd()}; check the path")
    if file.suffix not in (".txt", ".jsonl", ".parquet"):
        raise CompressError(f"{spec}: {file.suffix or 'no suffix'} is not .txt, .jsonl or .parquet; convert it, or "
                            "rename plain text to .txt")
    if file.stat().st_size == 0:
        raise CompressError(f"{spec}: the file is empty, 0 bytes; give a text")
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise CompressError(f"{spec}: not a parquet file ({_one_line(error)}); rename or rewrite it") from error
        return _table(spec, table.schema_arrow.names, column, lambda name: table.read([name])[name].to_pylist(),
                      tokenizer, chat_template)
    data = file.read_bytes()
    if b"\0" in data:
        raise CompressError(f"{spec}: binary, a NUL at byte {data.index(0)} of {len(data)}; give plain UTF-8 text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CompressError(f"{spec}: byte {error.start} of {len(data)} is not UTF-8; convert it to UTF-8") from error
    if file.suffix == ".txt":
        if chat_template or column:
            extra = "chat_template" if chat_template else repr(column)
            raise CompressError(f"{spec}: a .txt has no columns or conversations; leave {extra} out, or give a .jsonl")
        return _Source([text] if pack else re.split(r"\n\s*\n", text.strip()))      # apart, paragraphs are documents
    rows = []
    for number, line in enumerate(text.split("\n"), 1):     # not splitlines(): a JSON string may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise CompressError(f"{spec}: line {number} is not JSON ({error}); write one object a line") from error
            if not isinstance(rows[-1], dict):
                raise CompressError(f"{spec}: line {number} is a {type(rows[-1]).__name__}; write one object a line")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return _table(spec, columns, column, lambda name: [row.get(name) for row in rows], tokenizer, chat_template)


def _table(spec, columns, column, read, tokenizer, chat_template, cut=_whole) -> _Source:
    """One column of a table as documents: strings, or conversations that the chat template writes out."""
    column = column or ("messages" if chat_template else "text")
    if column not in columns:
        way = "chat_template=True reads 'messages'" if "messages" in columns and not chat_template else \
              f"name one: {FILE if spec.startswith('file:') else HUB}"
        raise CompressError(f"{spec}: no column {column!r}, it has {', '.join(columns) or 'none'}; {way}")
    if chat_template and not tokenizer.chat_template:
        raise CompressError(f"{spec}: this tokenizer has no chat template; leave chat_template out, or add a "
                            "chat_template.jinja beside the model's weights")

    def text(document) -> str:
        if not isinstance(document, str):
            raise CompressError(f"{spec}: column {column!r} holds {str(document)[:40]!r}, a {type(document).__name__}; "
                                "name a column of text")
        return document

    def conversation(messages) -> str:
        from jinja2 import TemplateError
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, AttributeError) as error:
            raise CompressError(f"{spec}: the chat template refuses {str(messages)[:80]} ({_one_line(error)}); fix or "
                                "remove that conversation") from error

    return _Source(read(column), cut, *(("", conversation) if chat_template else ("\n\n", text)))


def _load_dataset(spec, name, config=None, **options):
    import datasets
    try:
        return datasets.load_dataset(name, config, **options)
    except Exception as error:      # offline, unknown name, config or split, gated: one line each, the cause attached
        raise CompressError(f"{spec}: cannot load {name} ({type(error).__name__}: {_one_line(error)}); check name, "
                            "config, split and network; file:PATH, hf:FOLDER and stdlib work offline") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _sampled(model, tokenizer, samples, seqlen, generator, split) -> Tensor:
    """[samples, seqlen] the model wrote: BOS if its tokenizer starts texts so, else a random token, then ancestral."""
    if model is None or samples is None:
        raise CompressError(f"self: the model writes this text; give samples= (got {samples}, and it has no end) and "
                            f"model= (got {type(model).__name__})")
    # Two draws, one for each split: an evaluation never sees the calibration's text.
    stream = int(torch.randint(2**62, (2,), generator=generator)[int(split == "evaluation")])
    generator = torch.Generator().manual_seed(stream)
    if tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]:
        first = torch.full((samples, 1), tokenizer.bos_token_id)
    else:
        ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        first = ordinary[torch.randint(len(ordinary), (samples, 1), generator=generator)]
    device = model.device
    # generate() draws from the global generators: they are seeded inside, and put back after.
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(stream)
        # min_new_tokens keeps an end-of-text from ending a sample; the rest undoes what generation_config.json prefers
        return torch.cat([model.generate(
            batch.to(device), attention_mask=torch.ones_like(batch, device=device), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, repetition_penalty=1.0, min_new_tokens=seqlen - 1, max_new_tokens=seqlen - 1,
            pad_token_id=tokenizer.pad_token_id or 0).cpu() for batch in first.split(16)])
