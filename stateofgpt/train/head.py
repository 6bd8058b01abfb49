"""The head and its loss in parts of some rows: never all logits at once, and their gradient made on the way forward.

Owns: how many rows are a part on which device, and the loss with its own gradient. With a vocabulary of 50,000 the
logits of 32,000 tokens are 1.6 billion numbers, and a plain cross-entropy holds several copies of them from forward to
backward. Here a part's logits become their own gradient, which is taken into those of the hidden states and of the
head, and are forgotten (the idea of fused linear cross-entropy, as in arXiv 2410.10989). Knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_LOGITS = 1 << 29  # at once on a GPU; in float32 two gigabytes
OF_MEMORY = 128  # bytes of a GPU's memory for each of them
LEAST_ROWS = 256

# (hidden states, head, targets, weights, whether gradients are wanted of the hidden states and the head) ->
# (summed loss, gradient of the hidden states, of the head)
Part = Callable[[Tensor, Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor | None, Tensor | None]]


def rows_at_once(rows: int, vocab_size: int, device: torch.device) -> int | None:
    """How many of so many rows are a part; None on the CPU, where the whole is one: a run's sums keep their order."""
    if device.type == "cpu":
        return None
    most = MOST_LOGITS
    if device.type == "cuda":
        most = min(most, torch.cuda.get_device_properties(device).total_memory // OF_MEMORY)
    parts = -(-rows // max(LEAST_ROWS, most // vocab_size))
    return -(-rows // parts)


def part(
    h: Tensor, head: Tensor, targets: Tensor, weights: Tensor, of_hidden: bool, of_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross-entropy of `h` [R, C] through `head` [V, C], both of one dtype, summed by `weights` [R], and gradients."""
    logs = F.log_softmax((h @ head.t()).float(), dim=-1)
    loss = -(logs.gather(1, targets[:, None])[:, 0] * weights).sum()
    if not (of_hidden or of_head):
        return loss, None, None
    shares = logs.exp()
    hit = torch.arange(head.shape[0], device=h.device) == targets[:, None]
    dlogits = (torch.where(hit, shares - 1.0, shares) * weights[:, None]).to(h.dtype)
    return loss, dlogits @ head if of_hidden else None, dlogits.t() @ h if of_head else None


def in_parts(h: Tensor, head: Tensor, targets: Tensor, weights: Tensor, rows: int, compute: Part = part) -> Tensor:
    """The loss in nats, summed by `weights` [N], of hidden states `h` [N, C] (after the last norm), `rows` at a time.

    `head` [V, C] is float32 and is cast to the dtype of `h`; its gradient is added up in float32. `compute` is `part`,
    or the same compiled.
    """
    learning = torch.is_grad_enabled()
    wanted = (learning and h.requires_grad, learning and head.requires_grad)
    out: Tensor = _InParts.apply(h, head, targets, weights, rows, compute, wanted)
    return out


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        rows: int,
        compute: Part,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        cast = head.to(h.dtype)
        losses: list[Tensor] = []
        of_hidden: list[Tensor] = []
        of_head: Tensor | None = None
        for start in range(0, h.shape[0], rows):
            some = slice(start, start + rows)
            loss, dh, dhead = compute(h[some], cast, targets[some], weights[some], *wanted)
            losses.append(loss)
            if dh is not None:
                of_hidden.append(dh)
            if dhead is not None:
                of_head = dhead.to(head.dtype) if of_head is None else of_head.add_(dhead)
        ctx.save_for_backward(torch.cat(of_hidden) if of_hidden else None, of_head)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head = ctx.saved_tensors
        scaled = (None if x is None else x * dout.to(x.dtype) for x in (of_hidden, of_head))
        return *scaled, None, None, None, None, None
