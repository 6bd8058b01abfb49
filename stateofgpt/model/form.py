"""What a model raised from nothing looks like, whatever its size: its family, and what the family leaves open.

Owns the usual choices of each family and which combinations there are. Knows nothing of time, texts or training.

Sources: Qwen3 (arXiv 2505.09388) and Llama 2 (2307.09288) for norms and their eps, GPT-2's report (Radford et al. 2019)
for a feed-forward of four widths, which a gated one matches in parameters at 8/3 (SwiGLU, 2002.05202) and exceeds at 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import Arch, GPTConfig

HEAD_DIM = 64
_EPS: dict[Arch, float] = {"qwen3": 1e-6, "llama": 1e-5, "gpt2": 1e-5}
_WIDER: dict[Arch, int] = {"qwen3": 3, "llama": 3, "gpt2": 4}  # the feed-forward, in widths


@dataclass(frozen=True)
class Form:
    """A family; embedding and head in one or apart; how many key-value heads (None: one per head); biases (None: as the
    family has them). ConfigError for a combination that no such model has."""

    arch: Arch = "qwen3"
    tied: bool = True
    kv_heads: int | None = None
    biases: bool | None = None

    def __post_init__(self) -> None:
        if self.arch == "gpt2" and self.kv_heads is not None:
            raise ConfigError(
                f"kv_heads is {self.kv_heads}, and in gpt2 every head has its own keys and values; leave kv_heads out, "
                "or take llama or qwen3"
            )
        if self.arch == "gpt2" and self.biases is False:
            raise ConfigError("biases is false, and gpt2 always has them; leave biases out, or take llama or qwen3")
        if self.kv_heads is not None and self.kv_heads < 1:
            raise ConfigError(f"kv_heads is {self.kv_heads}; a model has at least 1 key-value head")

    @property
    def has_biases(self) -> bool:
        return self.arch == "gpt2" or bool(self.biases)

    def misfit(self, width: int) -> str:
        """Why there is no such model of this width; empty where there is one."""
        heads = width // HEAD_DIM
        if heads < 1:
            return f"a width of {width} is below {HEAD_DIM}, the size of a head"
        if self.kv_heads is not None and heads % self.kv_heads:
            return f"kv_heads is {self.kv_heads}, and a width of {width} has {heads} heads, which is no multiple of it"
        if self.arch != "qwen3" and width % HEAD_DIM:
            return f"a width of {width} is no multiple of {HEAD_DIM}, the size of a head, which {self.arch} needs"
        return ""

    def shape(self, width: int, layers: int, vocab_size: int, context: int) -> GPTConfig:
        """The model of one size. ConfigError where this form has none."""
        if problem := self.misfit(width):
            raise ConfigError(problem)
        heads = width // HEAD_DIM
        return GPTConfig(
            arch=self.arch,
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads or heads,
            head_dim=HEAD_DIM,
            intermediate_size=_WIDER[self.arch] * width,
            max_position_embeddings=context,
            rms_norm_eps=_EPS[self.arch],
            tie_word_embeddings=self.tied,
            attention_bias=self.has_biases and self.arch != "gpt2",
            mlp_bias=self.has_biases and self.arch == "llama",
        )


USUAL = Form()
