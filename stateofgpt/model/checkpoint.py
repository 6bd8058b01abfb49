"""Checkpoints: plain Hugging Face model folders that also say where they come from.

Owns what is in the folder (`config.json`, `model.safetensors`, `generation_config.json`, tokenizer files,
`chat_template.jinja`, model card, and last `MANIFEST.json` with the sha256 of every file and the lineage), and
loading one with nothing taken on trust. Knows nothing of stages, optimizers or run folders.

    laptop/sft/checkpoint/  ->  transformers.AutoModelForCausalLM.from_pretrained("laptop/sft/checkpoint")
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stateofgpt.errors import CheckpointError
from stateofgpt.model import folder, layout
from stateofgpt.model.convert import Described, Kind, from_huggingface, to_huggingface
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel
from stateofgpt.model.weights import WEIGHTS, Shards, load, open_shards
from stateofgpt.run import sha256_file
from stateofgpt.text.files import TextFiles
from stateofgpt.text.tokenizer import Tokenizer

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MARKS = (WEIGHTS, ADAPTER_WEIGHTS, "config.json", ADAPTER_CONFIG)  # the first is what a foreign folder is known by


@dataclass(frozen=True)
class Parent:
    """A checkpoint that another was made from."""

    id: str
    name: str
    stage: str


@dataclass(frozen=True)
class Lineage:
    """Where a checkpoint comes from. `id` is made of its content and its parents', never of a path or a time."""

    id: str
    name: str
    stage: str
    parents: tuple[Parent, ...]
    created: str
    metrics: Mapping[str, Any]


# -------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    *,
    tokenizer: Tokenizer,
    stage: str,
    run: str,
    parents: Sequence[Path | str] = (),
    metrics: Mapping[str, Any] | None = None,
) -> Lineage:
    """Write `model` (a GPT or a RewardModel, compiled or not) as a checkpoint folder, all or nothing.

    The name of the checkpoint becomes `run:stage`. Weights are float32, and the same weights give the same file.
    Raises CheckpointError when a weight is not finite, RunError when the disk is full: an older folder then stays.
    """
    path = Path(path)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, (GPT, RewardModel)):
        raise CheckpointError(f"a {type(model).__name__} has no checkpoint format, only a GPT or a RewardModel has")
    kind: Kind = "reward" if isinstance(model, RewardModel) else "causal"
    own = {name: t.detach().to("cpu", torch.float32) for name, t in layout.own_tensors(model, model.config).items()}
    weights = layout.to_file(model.config, own)
    if bad := folder.non_finite(weights):
        raise CheckpointError(f"{path} is not saved: tensor {bad} holds NaN or infinite values")
    text = TextFiles(tokenizer, base=stage == "pretrain")
    ids: dict[str, Any] = {"bos": text.bos, "eos": list(text.eos), "pad": tokenizer.pad}
    config = to_huggingface(model.config, kind, **ids)
    ancestors = [read_lineage(p) for p in parents]
    known = {"name": f"{run}:{stage}", "stage": stage, "parents": [_parent(a) for a in ancestors]}
    measured = _plain(metrics or {})

    def fill(work: Path) -> None:
        _write_json(work / "config.json", config)
        folder.write_tensors(work / WEIGHTS, weights)
        text.write(work, generates=kind == "causal")
        card = _model_card(known, config, model.config, measured, sum(t.numel() for t in weights.values()))
        (work / "README.md").write_text(card, encoding="utf-8")

    def about(work: Path) -> dict[str, Any]:
        return {
            "id": _identity(known, work),
            **known,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": _code_version(),
            "metrics": measured,
        }

    room = folder.tensor_bytes(weights) + (4 << 20)  # tokenizer and the small files
    folder.publish(path, fill, about, needed=room)
    return read_lineage(path)


def _identity(known: Mapping[str, Any], work: Path) -> str:
    content = {**known, "weights": sha256_file(work / WEIGHTS), "config": sha256_file(work / "config.json")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _parent(lineage: Lineage) -> dict[str, str]:
    return {"id": lineage.id, "name": lineage.name, "stage": lineage.stage}


def _code_version() -> str:
    try:
        return metadata.version("stateofgpt")
    except metadata.PackageNotFoundError:
        return "unknown"


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become null, anything unknown its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _model_card(
    known: Mapping[str, Any], config: Mapping[str, Any], shape: GPTConfig, metrics: Mapping[str, Any], n_params: int
) -> str:
    reward = "num_labels" in config
    loader = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    front = [
        "---",
        "license: other",
        "license_name: follows-the-training-text",
        "language: en",
        "library_name: transformers",
        f"pipeline_tag: {'text-classification' if reward else 'text-generation'}",
        f"tags: [stateofgpt, {json.dumps(known['stage'])}]",
        "---",
    ]
    what = "A reward model: one number for a conversation, higher is better." if reward else "A small language model."
    parents = ", ".join(f"`{p['name']}` ({p['id']})" for p in known["parents"]) or "none: trained from scratch"
    size = f"{shape.num_hidden_layers} layers of width {shape.hidden_size}, vocabulary {shape.vocab_size}"
    rows = [f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in metrics.items()
            if isinstance(v, (bool, int, float, str))]  # fmt: skip
    body = [
        f"# {known['name']}",
        "",
        f"{what} Raised by stateofgpt, stage `{known['stage']}`.",
        "",
        f"- architecture: {config['architectures'][0]}, {n_params:,} parameters ({size})",
        f"- context: {shape.max_position_embeddings} tokens",
        f"- parents: {parents}",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {loader}",
        f'model = {loader}.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]
    table = ["", "| metric | value |", "|---|---|", *rows] if rows else []
    return "\n".join([*front, "", *body, *table, ""])


# ------------------------------------------------------------------------------------------------------------- reading


def read_lineage(path: Path | str) -> Lineage:
    """Where the checkpoint at `path` comes from; a folder made by other software is its own beginning."""
    path = _find(path)
    if not (path / folder.MANIFEST).exists():
        mark = sha256_file(next(f for name in _MARKS if (f := path / name).is_file()))[:16]
        return Lineage(mark, path.resolve().name, "imported", (), "", {})
    raw = folder.read_json_file(path / folder.MANIFEST)
    try:
        parents = tuple(Parent(str(p["id"]), str(p["name"]), str(p["stage"])) for p in raw["parents"])
        own = (str(raw["id"]), str(raw["name"]), str(raw["stage"]))
        return Lineage(*own, parents, str(raw.get("created", "")), dict(raw.get("metrics", {})))
    except (KeyError, TypeError, ValueError) as failure:
        raise CheckpointError(f"{path / folder.MANIFEST} does not say where the checkpoint comes from") from failure


def verify(path: Path | str) -> None:
    """Raise CheckpointError naming the first file of the checkpoint that is missing or is not what was saved."""
    folder.verify(_find(path))


def load_model(path: Path | str) -> GPT:
    """The language model in a checkpoint folder (ours, or any of a known architecture), in float32 on the CPU.

    Raises CheckpointError with the reason when there is none, or it is damaged, tampered with, or not to be trusted.
    """
    path, described, shards = _open(path)
    if described.kind != "causal":
        raise CheckpointError(f"{path} is a reward model, which cannot write; give a language model's checkpoint")
    return load(path, described.config, shards, lambda: GPT(described.config))


def load_reward(path: Path | str) -> RewardModel:
    """The reward model in a checkpoint folder; errors as `load_model`."""
    path, described, shards = _open(path)
    if described.kind != "reward":
        raise CheckpointError(f"{path} is a language model; give a reward model's checkpoint")
    pad = described.pad_id
    if pad is None:
        raise CheckpointError(f"{path / 'config.json'} has no valid pad_token_id, which a reward model needs")
    return load(path, described.config, shards, lambda: RewardModel(GPT(described.config), pad))


def asked_dropout(path: Path | str) -> dict[str, float]:
    """The dropout that a folder made elsewhere asks for in training, by the keys of its config; there is none here."""
    return dict(_open(path)[1].dropout)


def _find(path: Path | str) -> Path:
    path = folder.present(Path(path))
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"no checkpoint at {path}: the folder {what}")
    if not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise CheckpointError(f"{path} is no checkpoint: it has no config.json")
    return path


def _open(path: Path | str) -> tuple[Path, Described, Shards]:
    """Check all that can be checked without reading a weight."""
    path = _find(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is an adapter, no whole model; load its base model, then the adapter")
    folder.verify(path)
    described = from_huggingface(folder.read_json_file(path / "config.json"), str(path / "config.json"))
    shards = open_shards(path)
    _bound(path, described.config, shards)
    return path, described, shards


def _bound(path: Path, config: GPTConfig, shards: Shards) -> None:
    """Refuse sizes that the weights do not bear out, before anything of that size is made."""
    n_bytes = sum(file.stat().st_size for file in shards)
    widest = max(config.vocab_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    n_tensors = sum(map(len, shards.values()))
    if config.num_hidden_layers > n_tensors or 2 * config.hidden_size * widest > n_bytes:
        raise CheckpointError(f"{path / 'config.json'} describes a model larger than the weights beside it")
    if not config.rotary and 2 * config.hidden_size * config.max_position_embeddings > n_bytes:
        raise CheckpointError(f"{path / 'config.json'} describes more positions than the weights beside it have")
    if config.rotary and 8 * config.max_position_embeddings * config.head_dim > max(n_bytes, 64 << 20):
        raise CheckpointError(
            f"{path / 'config.json'} has max_position_embeddings = {config.max_position_embeddings:,}, whose rotary "
            "tables would be larger than the model; lower it"
        )
