"""Adapters on disk: folders in PEFT's layout that also say which checkpoint they belong to.

Owns `adapter_config.json` in both directions, and saving and loading such a folder with nothing taken on trust. Knows
nothing of training. What a foreign adapter asks for and `model/lora.py` does not do is refused, never ignored.

    laptop/sft/adapter/  ->  peft.PeftModel.from_pretrained(base, "laptop/sft/adapter")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stateofgpt import __version__
from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.model import folder
from stateofgpt.model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Lineage, Parent, read_lineage
from stateofgpt.model.gpt import GPT
from stateofgpt.model.heads import RewardModel
from stateofgpt.model.lora import HEADS, LoraConfig, add_lora, expected_shapes, lora_state_dict
from stateofgpt.run import sha256_file, write_json
from stateofgpt.run.files import plain

_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_FLOATS = ("F32", "F16", "BF16")
_ARCHITECTURES = ("qwen3", "llama")  # where a layer has the name that it has in transformers, and so in PEFT
_TASKS: Mapping[type, str] = {GPT: "CAUSAL_LM", RewardModel: "SEQ_CLS"}
# Keys that say something about the file or its history and change nothing of what is computed.
_REMARKS = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision",
)  # fmt: skip
_READ = ("peft_type", "task_type", "bias", "init_lora_weights", "modules_to_save", "r", "lora_alpha", "lora_dropout",
         "target_modules", "use_rslora")  # fmt: skip
# Beginnings of A and B that leave the base as it is; PiSSA, OLoRA, LoftQ and CorDA replace its weights.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal")


# -------------------------------------------------------------------------------------------------------------- saving


def save_adapter(
    path: Path | str,
    model: nn.Module,
    config: LoraConfig,
    *,
    base: Path | str,
    stage: str,
    run: str,
    metrics: Mapping[str, Any] | None = None,
) -> Lineage:
    """Write the adapters of `model` (a GPT or a RewardModel after `add_lora`) as a folder, all or nothing.

    `base` is the checkpoint they were trained on, and becomes the parent. The name becomes `run:stage`.
    Raises CheckpointError when a number is not finite, RunError when the disk is full: an older folder then stays.
    """
    path = Path(path)
    model = getattr(model, "_orig_mod", model)
    task = _task(model)
    weights = {name: t.to("cpu", torch.float32) for name, t in lora_state_dict(model).items()}
    if bad := folder.non_finite(weights):
        raise CheckpointError(f"{path} is not saved: tensor {bad} holds NaN or infinite values")
    parent = read_lineage(base)
    name, ancestor = f"{run}:{stage}", Parent(parent.id, parent.name, parent.stage)
    known: dict[str, Any] = {"name": name, "stage": stage, "parents": [asdict(ancestor)]}
    described = to_peft(config, task, parent.name)

    def fill(work: Path) -> None:
        write_json(work / ADAPTER_CONFIG, described)
        folder.write_tensors(work / ADAPTER_WEIGHTS, weights)
        (work / "README.md").write_text(_card(name, parent, config, weights), encoding="utf-8")

    def about(work: Path) -> dict[str, Any]:
        content = {**known, "files": [sha256_file(work / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]}
        return {
            "id": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
            **known,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": __version__,
            "metrics": plain(metrics or {}),
        }

    folder.publish(path, fill, about, needed=folder.tensor_bytes(weights) + (1 << 16))
    return read_lineage(path)


def _task(model: nn.Module) -> str:
    """PEFT's name for what `model` does; CheckpointError where its adapters have no file format."""
    if not isinstance(model, (GPT, RewardModel)):
        raise CheckpointError(f"adapters of a {type(model).__name__} have no format, only a GPT's or a RewardModel's")
    if model.config.arch not in _ARCHITECTURES:
        raise CheckpointError(
            f"adapters of the {model.config.arch} architecture have no format, because PEFT's layers are not ours; "
            "save the model as a checkpoint, which merges them"
        )
    return _TASKS[type(model)]


def to_peft(config: LoraConfig, task: str, base: str) -> dict[str, Any]:
    """The `adapter_config.json` of `config` on a model of the base's name, under which PEFT computes the same."""
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.target_modules),
        "modules_to_save": list(HEADS) if task == _TASKS[RewardModel] else None,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _card(name: str, parent: Lineage, config: LoraConfig, weights: Mapping[str, Tensor]) -> str:
    front = ["---", "license: other", "license_name: follows-the-training-text", "language: en",
             "library_name: peft", "tags: [stateofgpt, lora]", "---"]  # fmt: skip
    n = sum(t.numel() for t in weights.values())
    modules = ", ".join(config.target_modules)
    body = [
        f"# {name}",
        "",
        f"A low-rank adapter of `{parent.name}` ({parent.id}), {n:,} parameters, by stateofgpt. Rank {config.r}, "
        f"alpha {config.alpha:g}, on {modules}.",
        "",
        "```python",
        "from peft import PeftModel",
        'model = PeftModel.from_pretrained(base, ".")  # base: the model named above',
        "```",
    ]
    return "\n".join([*front, "", *body, ""])


# ------------------------------------------------------------------------------------------------------------- loading


def load_adapter(path: Path | str, model: nn.Module, *, base: Path | str | None = None) -> LoraConfig:
    """Add the adapters in a folder (ours, or written by PEFT) to `model`, a GPT or a RewardModel; frozen as by
    `add_lora`.

    Given the checkpoint `base` that `model` was loaded from, an adapter of ours that was trained on another one is
    refused. Raises CheckpointError with the reason, and leaves the model as it was, when there is no adapter at `path`,
    or it is damaged, not to be trusted, not for this model, or of a kind that is not known here.
    """
    path = _find(Path(path))
    manifest = folder.verify(path)
    where = str(path / ADAPTER_CONFIG)
    config, task = from_peft(folder.read_json_file(path / ADAPTER_CONFIG), where)
    ours = _task(model)
    if task not in (None, ours):
        raise CheckpointError(f"{where} has task_type = {task}, a {type(model).__name__} takes {ours}")
    if base is not None and manifest is not None:
        _belongs(path, base)
    try:
        shapes = expected_shapes(model, config)
    except ConfigError as failure:
        raise CheckpointError(f"{where} does not fit the model: {failure}") from failure
    tensors = _read(path / ADAPTER_WEIGHTS, shapes)
    add_lora(model, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, tensor in lora_state_dict(model).items():
            tensor.copy_(tensors[name])
    return config


def _find(path: Path) -> Path:
    path = folder.present(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"no adapter at {path}: the folder {what}")
    if not (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{path} is no adapter: it has no {ADAPTER_CONFIG}")
    if not (path / ADAPTER_WEIGHTS).is_file():
        for name in _PICKLED:
            if (path / name).is_file():
                raise CheckpointError(
                    f"{path / name} is a pickle, which can run code when it is read, so it is not; convert it to "
                    f"{ADAPTER_WEIGHTS}"
                )
        raise CheckpointError(f"{path} has no {ADAPTER_WEIGHTS}")
    return path


def _belongs(path: Path, base: Path | str) -> None:
    parents, given = read_lineage(path).parents, read_lineage(base)
    if given.id not in {p.id for p in parents}:
        named = ", ".join(f"{p.name} ({p.id})" for p in parents) or "no known model"
        raise CheckpointError(f"{path} was trained on {named}, not on {given.name} ({given.id})")


def _read(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of `file`, which must be exactly those of `shapes`, of a float type, and finite."""
    header = folder.read_header(file)
    for verb, names in (("lacks", shapes.keys() - header.keys()), ("holds unknown", header.keys() - shapes.keys())):
        if listed := sorted(names):
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            raise CheckpointError(f"{file} {verb} tensors: {', '.join(n[:80] for n in listed[:3])}{more}")
    for name, info in header.items():
        if info.shape != shapes[name]:
            wanted = list(shapes[name])
            raise CheckpointError(f"{file}: tensor {name} has shape {list(info.shape)}, the model asks for {wanted}")
        if info.dtype not in _FLOATS:
            raise CheckpointError(f"{file}: tensor {name} has type {info.dtype}, readable are {', '.join(_FLOATS)}")
    tensors = dict(folder.each_tensor(file))
    if bad := folder.non_finite(tensors):
        raise CheckpointError(f"{file}: tensor {bad} holds NaN or infinite values")
    return tensors


# ------------------------------------------------------------------------------------------------- adapter_config.json


def from_peft(raw: Mapping[str, Any], where: str) -> tuple[LoraConfig, str | None]:
    """The adapter that the `adapter_config.json` found at `where` describes, and PEFT's name of its task if it has one.

    A key that is not read here must be null, false or empty, which is how PEFT says that a feature is not used.
    """

    def refused(key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{where} has {key} = {str(raw.get(key))[:80]}, {expected}")

    if raw.get("peft_type") != "LORA":
        raise refused("peft_type", "only LORA is known")
    for key, value in raw.items():
        if key not in _READ and key not in _REMARKS and value not in (None, False, [], {}, ""):
            raise refused(key, "which is not known here: only plain LoRA is")
    if raw.get("bias", "none") != "none":
        raise refused("bias", "only none is known: biases stay those of the base model")
    if raw.get("init_lora_weights") not in _BEGINNINGS:
        raise refused("init_lora_weights", "which may stand for other weights in the base model; convert it to LoRA")
    task = raw.get("task_type")
    if task not in (None, *_TASKS.values()):
        raise refused("task_type", f"known are {', '.join(_TASKS.values())}")
    heads = raw.get("modules_to_save") or []
    wanted = {*HEADS, "classifier"} if task == _TASKS[RewardModel] else set()  # PEFT names both, whichever there is
    if not isinstance(heads, list) or not all(isinstance(h, str) for h in heads) or not set(heads) <= wanted:
        raise refused("modules_to_save", "only the score head of a reward model can be saved whole")
    names, dropout, rslora = raw.get("target_modules"), raw.get("lora_dropout", 0.0), raw.get("use_rslora", False)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) > 4096:
        raise refused("target_modules", "expected a list of names of layers")
    if type(raw.get("r")) is not int or not 1 <= raw["r"] < 1 << 16:
        raise refused("r", "expected a whole number from 1 to 65535")
    if not _number(raw.get("lora_alpha")):
        raise refused("lora_alpha", "expected a number above 0")
    if not _number(dropout):
        raise refused("lora_dropout", "expected a number from 0 to below 1")
    if type(rslora) is not bool:
        raise refused("use_rslora", "expected true or false")
    try:
        return LoraConfig(raw["r"], float(raw["lora_alpha"]), float(dropout), tuple(names), rslora), task
    except ConfigError as failure:
        raise CheckpointError(f"{where}: {failure}") from failure


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e30
