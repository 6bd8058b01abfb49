"""From a budget to a plan: shape, tokens, batch, learning rate, memory, disk and time of a pretraining run.

Owns: turning the optimum of a scaling law into a shape that exists, and the arithmetic of what training it takes. Knows
nothing of terminals, and of machines only what it is told (a rate in FLOP/s). Every formula is an estimate made of the
shape alone; what this project's own stage measures is in `train.dial`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stateofgpt.errors import ConfigError
from stateofgpt.model.gpt import GPTConfig
from stateofgpt.train.published import LLAMA_65B
from stateofgpt.train.scaling import flops_per_token

BATCH_EXPONENT = 0.383  # the best batch in tokens grows as D^0.383 (arXiv 2505.13738); drawn through LLaMA-65B's
LR_EXPONENT = math.log(6e-4 / 0.6e-4) / math.log(175e9 / 125e6)  # through GPT-3's family (arXiv 2005.14165, table 2.1)
VOCABULARIES = (
    (3e5, 512),
    (5e6, 2048),
    (3e7, 4096),
    (1.5e8, 16384),
    (3e9, 32000),
    (math.inf, 65536),
)  # parameters up to, tokens
CONTEXTS = ((1e7, 256), (1e8, 1024), (1e10, 2048), (math.inf, 4096))
SMALLEST, LARGEST = 5e4, 1e14  # parameters
SMALL_WIDTH = 1024  # up to here memory is no matter, and few rows would be slow
BYTES_PER_TOKEN = 4.0  # of English text at a large vocabulary; a small one makes shorter tokens


@dataclass(frozen=True)
class Memory:
    """Bytes while training: float32 weights, gradients and optimizer, and the activations of `rows` rows."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    rows: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Disk:
    """Bytes: the text, its ids, the finished model, and the two states that a run resumes from."""

    text: float
    shards: float
    checkpoint: float
    resume: float

    @property
    def total(self) -> float:
        return self.text + self.shards + self.checkpoint + self.resume


@dataclass(frozen=True)
class Plan:
    """What to train, and what it takes. `lr` is AdamW's peak rate."""

    config: GPTConfig
    n_params: int
    tokens: float
    flops: float
    batch_tokens: int
    lr: float
    memory: Memory
    disk: Disk

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / self.batch_tokens))


def count(config: GPTConfig) -> tuple[int, int]:
    """Parameters of a shape: all, and those outside the embedding (and the head, where it is not the embedding)."""
    c, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    block = 2 * c * heads * d + 2 * c * groups * d + 3 * c * f + 2 * c + (2 * d if config.qk_norm else 0)
    inner = config.num_hidden_layers * block + c
    return inner + config.vocab_size * c * (1 if config.tie_word_embeddings else 2), inner


def shape_for(n_params: float, vocab_size: int | None = None, context: int | None = None) -> GPTConfig:
    """The default architecture nearest to `n_params`, its width over its depth near what good models have.

    That ratio is 32 in the smallest of the dial's shapes and about 128 in LLaMA-7B; between, it grows with the width.
    """
    if not SMALLEST <= n_params <= LARGEST:
        raise ConfigError(f"a model of {n_params:.3g} parameters cannot be planned; it must have 5e4 to 1e14")
    vocab = vocab_size or next(size for most, size in VOCABULARIES if n_params <= most)
    length = context or next(size for most, size in CONTEXTS if n_params <= most)
    best: tuple[float, GPTConfig] | None = None
    for width in _widths():
        ratio = min(128.0, 32.0 * max(1.0, width / 128) ** 0.4)
        one, none = (count(_shape(width, layers, vocab, length))[0] for layers in (2, 1))
        per_layer = one - none
        layers = max(1, round((n_params - (none - per_layer)) / per_layer))
        config = _shape(width, layers, vocab, length)
        far = abs(math.log(count(config)[0] / n_params))
        odd = abs(math.log(width / layers / ratio))
        if best is None or 10 * far + odd < best[0]:
            best = (10 * far + odd, config)
    assert best is not None
    return best[1]


def _widths() -> list[int]:
    widths, width = [], 32
    while width <= 131072:
        widths.append(width)
        width += 32 if width < 64 else 64 if width < 1024 else 128 if width < 4096 else 512
    return widths


def _shape(width: int, layers: int, vocab: int, context: int) -> GPTConfig:
    head = 32 if width < 64 else 64 if width < 2048 else 128
    heads = width // head
    return GPTConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head,
        intermediate_size=3 * width,
        max_position_embeddings=context,
    )


def batch_tokens(tokens: float, context: int) -> int:
    """Tokens of a batch for a run over `tokens`: 4M at 1.4T as LLaMA-65B's, growing as D^0.383; whole rows."""
    wanted = LLAMA_65B.batch_tokens * (tokens / LLAMA_65B.tokens) ** BATCH_EXPONENT
    return context * max(1, round(min(wanted, tokens / 20) / context))


def learning_rate(n_params: float) -> float:
    """AdamW's peak rate by size: the line through 6e-4 at 125M and 0.6e-4 at 175B parameters, N^-0.318."""
    return float(6e-4 * (n_params / 125e6) ** -LR_EXPONENT)


def train_flops(config: GPTConfig) -> float:
    """FLOPs for one token, forward and backward, attention included."""
    n_params, inner = count(config)
    once = inner + config.vocab_size * config.hidden_size  # the head multiplies; the look-up of the embedding does not
    d_attention = config.num_attention_heads * config.head_dim
    assert once <= n_params
    return flops_per_token(
        once,
        n_layer=config.num_hidden_layers,
        d_attention=d_attention,
        context=config.max_position_embeddings,
    )


def activation_bytes(config: GPTConfig, rows: int) -> float:
    """What backward needs of a forward pass in bfloat16, with attention that keeps no T x T matrix, and the logits.

    Of a block, per token: both norms' inputs and outputs (4 C), queries, keys and values before and after their norm
    and rotation (6 C), attention's output (C), and gate, up, their activation and product (4 F). Logits in 2 + 4 bytes.
    """
    tokens = rows * config.max_position_embeddings
    d_attention = config.num_attention_heads * config.head_dim
    block = 4 * config.hidden_size + 7 * d_attention + 4 * config.intermediate_size
    return float(tokens * (2 * config.num_hidden_layers * block + 6 * config.vocab_size))


def memory(config: GPTConfig, rows: int) -> Memory:
    """Bytes of a training step of `rows` rows: Muon keeps one number a weight, AdamW (embedding, gains) two."""
    n_params, inner = count(config)
    gains = (2 * config.num_hidden_layers + 1) * config.hidden_size
    if config.qk_norm:
        gains += 2 * config.num_hidden_layers * config.head_dim
    muon = inner - gains
    optimizer = 4.0 * muon + 8.0 * (n_params - muon)
    return Memory(4.0 * n_params, 4.0 * n_params, optimizer, activation_bytes(config, rows), rows)


def disk(config: GPTConfig, tokens: float, optimizer: float, bytes_per_token: float = BYTES_PER_TOKEN) -> Disk:
    """Bytes on disk: ids take 2 bytes up to a vocabulary of 65,536, else 4."""
    per_id = 2 if config.vocab_size <= 1 << 16 else 4
    weights = 4.0 * count(config)[0]
    return Disk(bytes_per_token * tokens, per_id * tokens, weights, 2 * (weights + optimizer))


def make_plan(config: GPTConfig, tokens: float, *, batch: int | None = None, lr: float | None = None) -> Plan:
    """The plan for a shape and a number of tokens; `batch` and `lr` in place of the rules of thumb.

    A batch is accumulated from 8 rows at once; of a wide model from as many as need no more than its weights' state.
    """
    if not (tokens >= 1 and math.isfinite(tokens)):
        raise ConfigError(f"a plan needs at least one token, not {tokens:.3g}; give it a larger budget")
    n_params = count(config)[0]
    context = config.max_position_embeddings
    batch = batch or batch_tokens(tokens, context)
    most = min(8, max(1, batch // context))
    one = memory(config, 1)
    rows = min(most, max(1, int((one.total - one.activations) / one.activations)))
    held = memory(config, most if config.hidden_size <= SMALL_WIDTH else rows)
    return Plan(
        config,
        n_params,
        tokens,
        train_flops(config) * tokens,
        batch,
        lr or learning_rate(n_params),
        held,
        disk(config, tokens, held.optimizer),
    )
