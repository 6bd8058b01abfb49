"""An imported llama2.c model and tokenizer do what llama2.c does; its forward pass and its encoder are the twins."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from foreign import (
    as_float32,
    log_probabilities,
    pieces,
    some_ids,
    tiny_llama,
    write_llama2c,
    write_tokenizer_bin,
)

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.infer.score import score
from stateofgpt.interchange.source import import_model
from stateofgpt.model.checkpoint import load_model, verify

transformers = pytest.importorskip("transformers")

LETTERS = " etaoinshrdluABT.,é"
WORDS = [
    " t", "he", " the", "in", "er", "an", "  ", " an", "and", " and", "th", "    ", "   ", "aa", "aaa", "nt", " ther",
    "e ", "ee", *LETTERS,
]  # fmt: skip
TOKENS = pieces(WORDS)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    write_llama2c(tmp_path / "tiny.bin", tiny_llama(len(TOKENS), tied=request.param))
    write_tokenizer_bin(tmp_path / "tok.bin", TOKENS)
    return tmp_path / "tiny.bin", tmp_path / "tok.bin"


def forward(path: Path, ids: list[int]) -> Any:
    """Log-probabilities (T, V) as run.c computes them: token by token, pairs of neighbouring rows turned."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    at = 28

    def take(*shape: int) -> Any:
        nonlocal at
        count = int(numpy.prod(shape))
        values = as_float32(data, count, at).reshape(shape).astype(numpy.float64)
        at += 4 * count
        return values

    size, kv_dim, shared = dim // heads, dim // heads * kv_heads, vocab > 0
    vocab = abs(vocab)
    table, att_norm = take(vocab, dim), take(layers, dim)
    wq, wk, wv, wo = (
        take(layers, dim, dim),
        take(layers, kv_dim, dim),
        take(layers, kv_dim, dim),
        take(layers, dim, dim),
    )
    ffn_norm, w1, w2, w3 = (
        take(layers, dim),
        take(layers, hidden, dim),
        take(layers, dim, hidden),
        take(layers, hidden, dim),
    )
    last_norm = take(dim)
    take(2, context, size // 2)
    classify = table if shared else take(vocab, dim)
    assert at == len(data)

    def norm(x: Any, weight: Any) -> Any:
        return weight * x / numpy.sqrt((x * x).mean() + 1e-5)

    def turn(vector: Any, position: int) -> Any:
        out = vector.copy()
        for i in range(0, len(vector), 2):
            angle = position / 10000.0 ** ((i % size) / size)
            c, s = numpy.cos(angle), numpy.sin(angle)
            out[i], out[i + 1] = vector[i] * c - vector[i + 1] * s, vector[i] * s + vector[i + 1] * c
        return out

    keys: list[list[Any]] = [[] for _ in range(layers)]
    values: list[list[Any]] = [[] for _ in range(layers)]
    rows = []
    for position, token in enumerate(ids):
        x = table[token].copy()
        for layer in range(layers):
            h = norm(x, att_norm[layer])
            q = turn(wq[layer] @ h, position)
            keys[layer].append(turn(wk[layer] @ h, position))
            values[layer].append(wv[layer] @ h)
            mixed = numpy.zeros(dim)
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                first = head // (heads // kv_heads) * size
                shared_part = slice(first, first + size)
                scores = numpy.array([q[own] @ key[shared_part] for key in keys[layer]]) / numpy.sqrt(size)
                weights = numpy.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[own] = sum(w * value[shared_part] for w, value in zip(weights, values[layer], strict=True))
            x = x + wo[layer] @ mixed
            h = norm(x, ffn_norm[layer])
            gate = w1[layer] @ h
            x = x + w2[layer] @ (gate / (1 + numpy.exp(-gate)) * (w3[layer] @ h))
        logits = classify @ norm(x, last_norm)
        rows.append(logits - logits.max() - numpy.log(numpy.exp(logits - logits.max()).sum()))
    return torch.tensor(numpy.array(rows), dtype=torch.float32)


def encode(tokens: list[tuple[str, float]], text: str) -> list[int]:
    """As run.c encodes: a space in front, characters or their bytes, then the best-scored neighbours are joined."""
    ids = {piece: number for number, (piece, _) in enumerate(tokens)}
    out = [ids[" "]] if text else []
    for character in text:
        out += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        best, where = -1e10, -1
        for i in range(len(out) - 1):
            joined = ids.get(tokens[out[i]][0] + tokens[out[i + 1]][0])
            if joined is not None and tokens[joined][1] > best:
                best, where = tokens[joined][1], i
        if where < 0:
            return out
        out[where : where + 2] = [ids[tokens[out[where]][0] + tokens[out[where + 1]][0]]]


def test_the_imported_model_gives_the_log_probabilities_of_llama2c(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = import_model(str(files[0]), tmp_path / "out", tokenizer=files[1])
    verify(out)
    ids = some_ids(len(TOKENS), 30)
    expected = torch.stack([forward(files[0], row) for row in ids.tolist()])
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert expected.std() > 0.3
    assert (log_probabilities(theirs.eval(), ids) - expected).abs().max() <= 1e-4
    chosen = expected[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert (torch.tensor(score(load_model(out), ids.tolist())) - chosen).abs().max() <= 1e-4


def test_the_imported_tokenizer_encodes_as_llama2c_does(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = import_model(str(files[0]), tmp_path / "out", tokenizer=files[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    rng = random.Random(2)
    texts = ["", " ", "the", " the theater and an ant", "aaaaaaa", "      ", "<0x41>", "漢字 \n\t€😀é"]
    texts += ["".join(rng.choice(LETTERS + "aan  thz") for _ in range(rng.randrange(1, 40))) for _ in range(400)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encode(TOKENS, text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer("the")["input_ids"] == [1, *encode(TOKENS, "the")]  # llama2.c puts <s> first
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert json.loads((out / "generation_config.json").read_bytes())["eos_token_id"] == [2, 1]


def test_no_text_becomes_a_special_token(files: tuple[Path, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    out = import_model(str(files[0]), tmp_path / "out", tokenizer=files[1])
    data = json.loads((out / "tokenizer.json").read_bytes())
    assert [(t["content"], t["id"]) for t in data["added_tokens"]] == [("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    twin = Tokenizer.from_str(json.dumps({**data, "added_tokens": []}))
    ids = twin.encode("<s> a </s> <unk>", add_special_tokens=False).ids
    assert min(ids) > 2 and ids == encode(TOKENS, "<s> a </s> <unk>")


def numbers(path: Path, **changes: int) -> None:
    """Change numbers of a model's header."""
    names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")
    data = path.read_bytes()
    found = dict(zip(names, struct.unpack_from("<7i", data), strict=True)) | changes
    path.write_bytes(struct.pack("<7i", *found.values()) + data[28:])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dim": 0x616B3432}, "later llama2.c format"),
        ({"dim": 1 << 30}, "its header says"),
        ({"layers": -2}, "its header says"),
        ({"heads": 5}, "its header says"),
        ({"kv_heads": 3}, "num_key_value_heads"),
        ({"layers": 1 << 20, "hidden": 1 << 20}, "header asks for"),
        ({"context": 63}, "header asks for"),
        ({"vocab": 0}, "its header says"),
    ],
)
def test_a_header_that_the_file_does_not_bear_out_is_refused(
    changes: dict[str, int], expected: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    numbers(files[0], **changes)
    with pytest.raises(CheckpointError, match=expected):
        import_model(str(files[0]), tmp_path / "out", tokenizer=files[1])
    assert not (tmp_path / "out").exists()


def test_a_model_cut_short_or_with_nan_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    data = files[0].read_bytes()
    for bad, expected in (
        (data[:20], "too short"),
        (data[:-4], "no whole llama2.c model"),
        (data[:28] + struct.pack("<f", float("nan")) + data[32:], "embed_tokens.weight holds NaN"),
    ):
        files[0].write_bytes(bad)
        with pytest.raises(CheckpointError, match=expected):
            import_model(str(files[0]), tmp_path / "out", tokenizer=files[1])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (TOKENS[:-1], "no tokenizer.bin of"),
        ([*TOKENS, ("more", -99.0)], "belongs to another model"),
        ([*TOKENS[:-1], ("the"[:2] + "e", -99.0)], None),
        ([*TOKENS[:-1], ("he", -99.0)], "holds a token twice"),
        ([*TOKENS[:-1], ("z", float("inf"))], "is damaged"),
        ([("<pad>", 0.0), *TOKENS[1:]], "does not begin with"),
        ([*TOKENS[:-1], ("x" * 2000, 0.0)], "length 2000"),
    ],
)
def test_a_tokenizer_of_another_model_or_none_is_refused(
    tokens: list[tuple[str, float]], expected: str | None, files: tuple[Path, Path], tmp_path: Path
) -> None:
    write_tokenizer_bin(files[1], tokens)
    if expected is None:
        import_model(str(files[0]), tmp_path / "out", tokenizer=files[1])
        return
    with pytest.raises(CheckpointError, match=expected):
        import_model(str(files[0]), tmp_path / "out", tokenizer=files[1])
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_tokenizer_and_a_tokenizer_without_need_are_refused(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--tokenizer"):
        import_model(str(files[0]), tmp_path / "out")
    with pytest.raises(ConfigError, match="--tokenizer"):
        import_model("smollm2", tmp_path / "out", tokenizer=files[1])
    with pytest.raises(CheckpointError, match="cannot read"):
        import_model(str(files[0]), tmp_path / "out", tokenizer=tmp_path / "none.bin")
