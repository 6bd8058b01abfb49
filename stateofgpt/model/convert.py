"""Between our `GPTConfig` and the `config.json` of Hugging Face transformers.

Owns the names of architectures and every key of `config.json`, in both directions. Knows nothing of files or weights.
What a foreign config asks for and this model does not do is refused, never ignored: a model that loads is the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.model.gpt import Arch, GPTConfig
from stateofgpt.model.rotary import RopeScaling

Kind = Literal["causal", "reward"]
ARCHITECTURES: Mapping[str, tuple[Arch, Kind]] = {
    "Qwen3ForCausalLM": ("qwen3", "causal"),
    "LlamaForCausalLM": ("llama", "causal"),
    "Qwen3ForSequenceClassification": ("qwen3", "reward"),
    "LlamaForSequenceClassification": ("llama", "reward"),
    "GPT2LMHeadModel": ("gpt2", "causal"),
    "GPT2ForSequenceClassification": ("gpt2", "reward"),
}
# Switches of these architectures, each with the only values under which our forward pass is theirs; the first is the
# one that holds where nothing is said.
_ROTARY_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
_ONLY: Mapping[Arch, Mapping[str, tuple[Any, ...]]] = {
    "qwen3": {**_ROTARY_ONLY, "mlp_bias": (False,)},
    "llama": _ROTARY_ONLY,
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh approximation
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
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
_GPT2_SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}
# Shares of numbers set to zero in training, which change nothing of what a model computes, and what transformers takes
# where a config does not say.
_DROPOUT: Mapping[Arch, Mapping[str, float]] = {
    "qwen3": {"attention_dropout": 0.0},
    "llama": {"attention_dropout": 0.0},
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Described:
    """What a `config.json` describes. `dropout` is what it asks for in training, by key, zeros left out: there is none
    here."""

    config: GPTConfig
    kind: Kind
    pad_id: int | None
    dropout: Mapping[str, float]


def to_huggingface(config: GPTConfig, kind: Kind, *, bos: int, eos: list[int], pad: int) -> dict[str, Any]:
    """The `config.json` under which transformers computes what `GPT(config)` does.

    What is rotary stands both where transformers 5 reads it (`rope_parameters`) and where older readers do
    (`rope_theta` and `rope_scaling`).
    """
    if config.arch == "llama" and config.hidden_size % config.num_attention_heads:
        raise CheckpointError(
            f"transformers refuses a llama of width {config.hidden_size} with {config.num_attention_heads} heads: "
            "make hidden_size a multiple of num_attention_heads, or take the qwen3 architecture"
        )
    architecture = next(name for name, known in ARCHITECTURES.items() if known == (config.arch, kind))
    out: dict[str, Any] = {"architectures": [architecture], "model_type": config.arch}
    out |= _gpt2_keys(config) if config.arch == "gpt2" else _rotary_keys(config)
    out |= {
        "bos_token_id": bos,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": pad,
        "dtype": "float32",
        "use_cache": True,
    }
    if config.arch == "llama":
        out["mlp_bias"] = config.mlp_bias
    if kind == "reward":
        out |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return out


def _rotary_keys(config: GPTConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    turned: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        turned = {"rope_type": "llama3", **{name: getattr(scaling, name) for name in _LLAMA3}}
    return {
        **{name: getattr(config, name) for name in _SIZES},
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, **turned},
        **({"rope_scaling": turned} if scaling is not None else {}),
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
    }


def _gpt2_keys(config: GPTConfig) -> dict[str, Any]:
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _GPT2_SIZES.items()},
        "layer_norm_epsilon": config.rms_norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


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
    for key, only in _ONLY[arch].items():
        if raw.get(key, only[0]) not in only:
            raise CheckpointError(
                f"{where} has {key} = {str(raw[key])[:80]}, this model only knows {' or '.join(map(str, only))}"
            )
    if kind == "reward" and _labels(raw) != 1:
        raise CheckpointError(f"{where} has {_labels(raw)} labels, a reward model has one")
    try:
        config = _gpt2(raw, where) if arch == "gpt2" else _rotary(arch, raw, where)
    except ConfigError as failure:
        raise CheckpointError(f"{where}: {failure}") from failure
    pad = raw.get("pad_token_id")
    pad_id = pad if type(pad) is int and 0 <= pad < config.vocab_size else None
    return Described(config, kind, pad_id, _dropout(raw, arch, where))


def _rotary(arch: Arch, raw: Mapping[str, Any], where: str) -> GPTConfig:
    layers = raw.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise CheckpointError(f"{where} has layer_types = {str(layers)[:80]}, this model only knows full_attention")
    theta, scaling = _rope(raw, where)
    return GPTConfig(
        arch,
        **_sizes(arch, raw, where),
        rope_theta=theta,
        rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6, where),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", False, where),
        attention_bias=_flag(raw, "attention_bias", False, where),
        mlp_bias=_flag(raw, "mlp_bias", False, where),
        rope_scaling=scaling,
    )


def _gpt2(raw: Mapping[str, Any], where: str) -> GPTConfig:
    width, heads = _whole(raw, "n_embd", where), _whole(raw, "n_head", where)
    if width % heads:
        raise CheckpointError(f"{where} has n_embd = {width}, which must be a multiple of n_head = {heads}")
    given = raw if raw.get("n_inner") is not None else {**raw, "n_inner": 4 * width}
    sizes: dict[str, Any] = {ours: _whole(given, theirs, where) for theirs, ours in _GPT2_SIZES.items()}
    return GPTConfig(
        "gpt2",
        **sizes,
        num_key_value_heads=heads,
        head_dim=width // heads,
        rms_norm_eps=_positive(raw, "layer_norm_epsilon", 1e-5, where),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", True, where),
    )


def _sizes(arch: Arch, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    sizes = dict(raw)
    sizes["num_key_value_heads"] = raw.get("num_key_value_heads") or raw.get("num_attention_heads")
    if raw.get("head_dim") is None:  # LLaMA's rule; Qwen3's own default is 128
        known = type(raw.get("hidden_size")) is int and type(raw.get("num_attention_heads")) is int
        heads = raw["num_attention_heads"] if known else 0
        sizes["head_dim"] = 128 if arch == "qwen3" else raw["hidden_size"] // heads if heads else None
    return {name: _whole(sizes, name, where) for name in _SIZES}


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and stretching. transformers 5 keeps them in `rope_parameters`; older writers had a `rope_scaling`, and the
    base at the top level. transformers reads an older one first."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    known = {"rope_type", "type", "rope_theta", *(_LLAMA3 if kind == "llama3" else ())}
    if kind not in ("default", "llama3") or rope.keys() - known:
        raise CheckpointError(f"{where} has {key} = {str(rope)[:80]}, only rope_type default and llama3 are known")
    theta = _positive(rope, "rope_theta", raw.get("rope_theta", 10000.0), where)
    if kind == "default":
        return theta, None
    top = raw.get("original_max_position_embeddings")
    original = {"original_max_position_embeddings": raw.get("max_position_embeddings"), **rope}
    if top is not None:
        original["original_max_position_embeddings"] = top
    factor, low, high = (_positive(rope, name, None, where) for name in _LLAMA3[:3])
    return theta, RopeScaling(factor, low, high, _whole(original, "original_max_position_embeddings", where))


def _whole(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise CheckpointError(f"{where} has {key} = {str(value)[:80]}, expected a whole number >= 1")
    return value


def _flag(raw: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where} has {key} = {str(value)[:80]}, expected true or false")
    return value


def _positive(raw: Mapping[str, Any], key: str, default: Any, where: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"{where} has {key} = {str(value)[:80]}, expected a number above 0")
    return float(value)


def _dropout(raw: Mapping[str, Any], arch: Arch, where: str) -> dict[str, float]:
    asked = {}
    for key, default in _DROPOUT[arch].items():
        value = default if raw.get(key) is None else raw[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise CheckpointError(f"{where} has {key} = {str(value)[:80]}, expected a number from 0 to below 1")
        asked[key] = float(value)
    return {key: value for key, value in asked.items() if value}


def _labels(raw: Mapping[str, Any]) -> int:
    named = raw.get("id2label")
    if isinstance(named, dict):
        return len(named)
    count = raw.get("num_labels")
    return count if isinstance(count, int) else 2  # two is what transformers takes when nothing is said
