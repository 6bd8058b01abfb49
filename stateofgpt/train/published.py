"""The models of the talk, as their papers describe them, with parameters counted from their shapes.

Owns: GPT-3 175B (arXiv 2005.14165, table 2.1 and section 2) and the four LLaMA sizes (arXiv 2302.13971, tables 2 and
15; feed-forward widths from the released weights). Knows nothing of laws or machines.

>>> f"{LLAMA_65B.n_params:,}", f"{GPT3.n_params:,}"
('65,285,660,672', '174,604,259,328')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Published:
    """A model of the literature. `a100_hours` are those its paper reports, None where it ran on something else."""

    name: str
    kind: Literal["gpt3", "llama"]
    n_layer: int
    width: int
    n_head: int
    feed_forward: int
    vocab_size: int
    context: int
    batch_tokens: float
    lr: float
    tokens: float
    told_params: float  # as the paper rounds them
    a100_hours: float | None = None

    @property
    def non_embedding(self) -> int:
        """Parameters without token and position tables and without an output head of its own: Kaplan's N."""
        c, f = self.width, self.feed_forward
        if self.kind == "gpt3":  # two norms and four projections with biases a block, and the last norm
            return self.n_layer * (4 * c + (4 * c * c + 4 * c) + (2 * c * f + f + c)) + 2 * c
        return self.n_layer * (4 * c * c + 3 * c * f + 2 * c) + c

    @property
    def n_params(self) -> int:
        """All parameters. GPT-3's head is its token table; LLaMA's is not."""
        tables = (self.vocab_size + self.context) if self.kind == "gpt3" else 2 * self.vocab_size
        return self.non_embedding + tables * self.width

    @property
    def flops(self) -> float:
        """Training FLOPs by the usual 6 N D."""
        return 6.0 * self.n_params * self.tokens


GPT3 = Published("GPT-3 175B", "gpt3", 96, 12288, 96, 4 * 12288, 50257, 2048, 3.2e6, 0.6e-4, 300e9, 175e9)
LLAMA_7B = Published("LLaMA-7B", "llama", 32, 4096, 32, 11008, 32000, 2048, 4e6, 3e-4, 1.0e12, 6.7e9, 82_432)
LLAMA_13B = Published("LLaMA-13B", "llama", 40, 5120, 40, 13824, 32000, 2048, 4e6, 3e-4, 1.0e12, 13.0e9, 135_168)
LLAMA_33B = Published("LLaMA-33B", "llama", 60, 6656, 52, 17920, 32000, 2048, 4e6, 1.5e-4, 1.4e12, 32.5e9, 530_432)
LLAMA_65B = Published("LLaMA-65B", "llama", 80, 8192, 64, 22016, 32000, 2048, 4e6, 1.5e-4, 1.4e12, 65.2e9, 1_022_362)
TALK = (GPT3, LLAMA_7B, LLAMA_13B, LLAMA_33B, LLAMA_65B)
LLAMA_65B_GPUS, LLAMA_65B_DAYS = 2048, 21  # section 2.4: "approximately 21 days" on 2,048 A100s of 80 GB
