"""A model that was made elsewhere, and the plain Hugging Face folder that it becomes.

Owns: what every reader hands over, the files of the folder, its model card and manifest, and which folder may be
replaced. Knows nothing of the formats that models come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stateofgpt import __version__
from stateofgpt.errors import CheckpointError
from stateofgpt.model import folder
from stateofgpt.model.convert import to_huggingface
from stateofgpt.model.gpt import GPTConfig
from stateofgpt.run import sha256_file

STAGE = "imported"
DType = Literal["float32", "bfloat16"]
_DTYPES: Mapping[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for its card: its name, a sentence on its source, its licence (SPDX, or None)."""

    name: str
    source: str
    licence: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the folder's files have it.

    `definition` is the content of `tokenizer.json`. `eos` holds every id that ends a text, the tokenizer's own first.
    """

    definition: str
    tokens: tuple[str, ...]
    bos: int
    eos: tuple[int, ...]
    pad: int
    unk: int | None = None
    specials: tuple[int, ...] = ()
    chat_template: str | None = None


@dataclass(frozen=True)
class Imported:
    """A whole model: `tensors` are float32 under transformers' names, rows of q and k in transformers' order."""

    origin: Origin
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    vocabulary: Vocabulary


def write(out: Path, model: Imported, dtype: DType = "float32") -> None:
    """Make `out` the folder of `model`, whole or not at all; an earlier import there is replaced.

    Raises CheckpointError when a weight is not finite or `out` holds something else, RunError when the disk is full.
    """
    words = model.vocabulary
    if bad := folder.non_finite(model.tensors):
        raise CheckpointError(f"{model.origin.source}: tensor {bad} holds NaN or infinite values, so it is damaged")
    weights = {name: tensor.to(_DTYPES[dtype]) for name, tensor in model.tensors.items()}
    eos = list(words.eos)
    config = {**to_huggingface(model.config, "causal", bos=words.bos, eos=eos, pad=words.pad), "dtype": dtype}
    card = model_card(model.origin, config["architectures"][0], model.config, sum(t.numel() for t in weights.values()))

    def fill(work: Path) -> None:
        _write_json(work / "config.json", config)
        folder.write_tensors(work / "model.safetensors", weights)
        generation = {"bos_token_id": words.bos, "eos_token_id": config["eos_token_id"], "pad_token_id": words.pad}
        _write_json(work / "generation_config.json", {**generation, "do_sample": True})
        _write_tokenizer(work, words, model.config.max_position_embeddings)
        (work / "README.md").write_text(card, encoding="utf-8")

    publish(out, model.origin.name, fill, folder.tensor_bytes(weights) + (16 << 20))


def publish(out: Path, name: str, fill: Callable[[Path], None], needed: int) -> None:
    """Publish what `fill` writes as a checkpoint without parents; `needed` is its size in bytes, at most."""
    check_place(out)

    def about(work: Path) -> dict[str, Any]:
        return {
            "id": _identity(name, work),
            "name": name,
            "stage": STAGE,
            "parents": [],
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": __version__,
            "metrics": {},
        }

    folder.publish(out, fill, about, needed)


def check_place(out: Path) -> None:
    """Raise CheckpointError unless `out` is free, an empty folder, or an earlier import, which may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = out / folder.MANIFEST
    if not manifest.is_file() or folder.read_json_file(manifest).get("stage") != STAGE:
        raise CheckpointError(f"{out} exists and is no earlier import, so it is not replaced; give another --out")


def _identity(name: str, work: Path) -> str:
    """An id made of the content, as a run's checkpoints have it."""
    files = {
        file.name: sha256_file(file) for file in sorted(work.iterdir()) if file.suffix in (".json", ".safetensors")
    }
    return hashlib.sha256(json.dumps([name, files], sort_keys=True).encode()).hexdigest()[:16]


def _write_tokenizer(work: Path, words: Vocabulary, context: int) -> None:
    ids = {"bos_token": words.bos, "eos_token": words.eos[0], "pad_token": words.pad, "unk_token": words.unk}
    roles = {role: words.tokens[number] for role, number in ids.items() if number is not None}
    others = [words.tokens[n] for n in words.specials if words.tokens[n] not in roles.values()]
    named: dict[str, Any] = {**roles, "additional_special_tokens": others}
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": context, "add_prefix_space": False}
    (work / "tokenizer.json").write_text(words.definition, encoding="utf-8")
    _write_json(work / "special_tokens_map.json", named)
    _write_json(work / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings})
    if words.chat_template is not None:
        (work / "chat_template.jinja").write_text(words.chat_template, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(origin: Origin, architecture: str, config: GPTConfig, n_params: int) -> str:
    """The folder's README.md: what it is, where it comes from, and under which licence."""
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size}"
    licence = origin.licence or "not named by its source; ask whoever made it before passing it on"
    lines = [
        "---",
        f"license: {json.dumps(origin.licence or 'unknown')}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [stateofgpt, imported]",
        "---",
        "",
        f"# {_line(origin.name)}",
        "",
        "A language model made elsewhere, imported by stateofgpt. It was not trained here.",
        "",
        f"- source: {_line(origin.source)}",
        *([f"- made by: {_line(origin.page)}"] if origin.page else []),
        f"- licence: {_line(licence)}",
        f"- architecture: {architecture}, {n_params:,} parameters ({shape})",
        f"- context: {config.max_position_embeddings} tokens",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _line(text: str) -> str:
    """Foreign text as one line of a card."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def from_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of a q or k projection (heads * head_dim, C), from pairs side by side to transformers' halves.

    Rotary embedding turns pairs of rows. LLaMA's own code, llama2.c and GGUF keep a pair in rows 2i and 2i + 1 of a
    head; transformers keeps it in rows i and i + head_dim / 2.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The way back from `from_interleaved`."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
