"""Between our `GPTConfig` and the `config.json` of Hugging Face transformers.

Owns the names of architectures and every key of `config.json`, in both directions. Knows nothing of files or weights.
What a foreign config asks for and this model does not do is refused, never ignored: a model that loads is the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.model.gpt import GPTConfig

Kind = Literal["causal", "reward"]
ARCHITECTURES: Mapping[str, tuple[Literal["qwen3", "llama"], Kind]] = {
    "Qwen3ForCausalLM": ("qwen3", "causal"),
    "LlamaForCausalLM": ("llama", "causal"),
    "Qwen3ForSequenceClassification": ("qwen3", "reward"),
    "LlamaForSequenceClassification": ("llama", "reward"),
}
# Switches of these architectures, each with the only value under which our forward pass is theirs.
_ONLY: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Described:
    """What a `config.json` describes."""

    config: GPTConfig
    kind: Kind
    pad_id: int | None


def to_huggingface(config: GPTConfig, kind: Kind, *, bos: int, eos: list[int], pad: int) -> dict[str, Any]:
    """The `config.json` under which transformers computes what `GPT(config)` does.

    `rope_theta` stands both where transformers 5 reads it (`rope_parameters`) and where older readers do (top level).
    """
    if config.arch == "llama" and config.hidden_size % config.num_attention_heads:
        raise CheckpointError(
            f"transformers refuses a llama of width {config.hidden_size} with {config.num_attention_heads} heads: "
            "make hidden_size a multiple of num_attention_heads, or take the qwen3 architecture"
        )
    architecture = next(name for name, known in ARCHITECTURES.items() if known == (config.arch, kind))
    out: dict[str, Any] = {"architectures": [architecture], "model_type": config.arch}
    out |= {name: getattr(config, name) for name in _SIZES}
    out |= {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": pad,
        "dtype": "float32",
        "use_cache": True,
    }
    if config.arch == "llama":
        out["mlp_bias"] = False
    if kind == "reward":
        out |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return out


def from_huggingface(raw: Mapping[str, Any], where: str) -> Described:
    """The model that the `config.json` found at `where` describes; CheckpointError when it is none of ours."""
    if "auto_map" in raw:
        raise CheckpointError(f"{where} has auto_map, which asks to run code from the folder; that is never done here")
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    if name is None or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{where} describes the architecture {str(names)[:80]}, known are {', '.join(sorted(ARCHITECTURES))}"
        )
    arch, kind = ARCHITECTURES[name]
    for key, only in _ONLY.items():
        if raw.get(key, only) != only:
            raise CheckpointError(f"{where} has {key} = {str(raw[key])[:80]}, this model only knows {only}")
    if kind == "reward" and _labels(raw) != 1:
        raise CheckpointError(f"{where} has {_labels(raw)} labels, a reward model has one")
    try:
        config = GPTConfig(
            arch=arch,
            **_sizes(raw, where),
            rope_theta=_rope_theta(raw, where),
            rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6, where),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except ConfigError as failure:
        raise CheckpointError(f"{where}: {failure}") from failure
    pad = raw.get("pad_token_id")
    return Described(config, kind, pad if type(pad) is int and 0 <= pad < config.vocab_size else None)


def _sizes(raw: Mapping[str, Any], where: str) -> dict[str, int]:
    sizes = dict(raw)
    sizes["num_key_value_heads"] = raw.get("num_key_value_heads") or raw.get("num_attention_heads")
    if raw.get("head_dim") is None:  # LLaMA's rule; Qwen3's own default is 128
        known = type(raw.get("hidden_size")) is int and type(raw.get("num_attention_heads")) is int
        heads = raw["num_attention_heads"] if known else 0
        sizes["head_dim"] = 128 if raw.get("model_type") == "qwen3" else raw["hidden_size"] // heads if heads else None
    for name in _SIZES:
        if type(sizes.get(name)) is not int or not 1 <= sizes[name] < 1 << 31:
            raise CheckpointError(f"{where} has {name} = {str(sizes.get(name))[:80]}, expected a whole number >= 1")
    return {name: sizes[name] for name in _SIZES}


def _rope_theta(raw: Mapping[str, Any], where: str) -> float:
    """transformers 5 keeps it in `rope_parameters`, older writers at the top level."""
    rope = raw.get("rope_parameters")
    if rope is None:
        return _positive(raw, "rope_theta", 10000.0, where)
    plain = isinstance(rope, dict) and not rope.keys() - {"rope_type", "rope_theta"}
    if not plain or rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{where} has rope_parameters = {str(rope)[:80]}, only rope_type default is known")
    return _positive(rope, "rope_theta", raw.get("rope_theta", 10000.0), where)


def _positive(raw: Mapping[str, Any], key: str, default: Any, where: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"{where} has {key} = {str(value)[:80]}, expected a number above 0")
    return float(value)


def _labels(raw: Mapping[str, Any]) -> int:
    named = raw.get("id2label")
    if isinstance(named, dict):
        return len(named)
    count = raw.get("num_labels")
    return count if isinstance(count, int) else 2  # two is what transformers takes when nothing is said
