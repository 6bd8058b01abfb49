"""The fused kernels of a training step: loading what `kernels.c` became, and calling it on tensors.

Owns: the compiler's flags, the check against torch, and one method per kernel. Knows nothing of models. What is
measured: without these passes a step of a small model spends more time between its matrix products than in them
(`docs/log.md`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateofgpt import native

SOURCES = ("kernels.c", "kernels.h", "lanes.h", "products.h", "tiles.h")
FLAGS = (
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)
QUERIES = 32  # that attend together, as in `kernels.c`
Lists = Sequence[Tensor]
SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


# cosines and sines [positions, D / 2], and the positions [B, T] int64 where they are not 0, 1, 2 ...
Tables = tuple[Tensor, Tensor, Tensor | None]


class Kernels:
    """The loaded library. Tensors must be contiguous, on the CPU, and of the shapes that `kernels.h` names."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _call(self, name: str, *values: Tensor | int | float | ctypes.Array[Any] | None) -> None:
        """Call a function: tensors and arrays by address, whole numbers as int64, fractions as float, None as null."""
        words: list[object] = []
        for value in values:
            if isinstance(value, Tensor):
                words.append(ctypes.c_void_p(value.data_ptr()))
            elif value is None:
                words.append(ctypes.c_void_p(None))
            elif isinstance(value, int):
                words.append(ctypes.c_int64(value))
            elif isinstance(value, ctypes.Array):
                words.append(value)
            else:
                words.append(ctypes.c_float(value))
        getattr(self._library, name)(*words, ctypes.c_int(torch.get_num_threads()))

    def rmsnorm(self, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm of `x` [N, C] with `gain` [C] float32; the result, and 1 / rms [N] for the way back."""
        y, rstd = torch.empty_like(x), torch.empty(x.shape[0])
        self._call(f"rmsnorm_forward_{SUFFIX[x.dtype]}", x, gain, y, rstd, x.shape[0], x.shape[1], float(eps))
        return y, rstd

    def rmsnorm_backward(
        self, dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `x` (with `residual` [N, C] added) and of `gain`."""
        n, c = x.shape
        dx, partial = torch.empty_like(x), torch.zeros(torch.get_num_threads(), c)
        self._call(f"rmsnorm_backward_{SUFFIX[x.dtype]}", dy, x, gain, rstd, residual, dx, partial, n, c)
        return dx, partial.sum(0)

    def rope(
        self, qkv: Tensor, gains: Tensor | None, tables: Tables, sizes: tuple[int, ...], eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, K, T, D] of `qkv` [B T, (H + 2K) D], normalised and rotated, and
        1 / rms of each head. `sizes` is (B, T, H, K, D)."""
        B, T, H, K, D = sizes
        q, k, v = qkv.new_empty(B, H, T, D), qkv.new_empty(B, K, T, D), qkv.new_empty(B, K, T, D)
        rstd = torch.empty(B * T, H + K)
        name = f"rope_forward_{SUFFIX[qkv.dtype]}"
        self._call(name, qkv, gains, *tables, q, k, v, rstd, *sizes, float(eps))
        return q, k, v, rstd

    def rope_backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        qkv: Tensor,
        gains: Tensor | None,
        tables: Tables,
        rstd: Tensor,
        sizes: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `qkv` and of the gains [H + K, D] (zeros where there are none)."""
        _, _, H, K, D = sizes
        dqkv, partial = torch.empty_like(qkv), torch.zeros(torch.get_num_threads(), H + K, D)
        self._call(
            f"rope_backward_{SUFFIX[qkv.dtype]}", *grads, qkv, gains, *tables, rstd, dqkv, partial, *sizes
        )  # fmt: skip
        return dqkv, partial.sum(0)

    def softmax_(
        self,
        scores: Tensor,
        firsts: Tensor | None,
        start: int,
        heads: int,
        scale: float,
        shared: Tensor | None = None,
        gap: int = 0,
    ) -> None:
        """Causal softmax in place. `scores` [B * heads, R, W]: the row r of W keys is the query at start + r; `heads`
        rows of the first dimension belong to one row of `firsts` [B, T] int32, where each position's document begins.
        Of `shared` [B, T] int32 keys at the row's beginning each position sees them too; W leaves out the `gap` keys
        after those that no query here sees."""
        n, rows, width = scores.shape
        T = firsts.shape[1] if firsts is not None else 0
        name = f"softmax_forward_{SUFFIX[scores.dtype]}"
        sizes = (n * rows, rows, width, start, gap, heads * rows, T)
        self._call(name, scores, firsts, shared, *sizes, float(scale))

    def softmax_backward_(self, probs: Tensor, grad: Tensor, start: int, scale: float) -> None:
        """`grad` of the probabilities becomes that of the scores, in place; shapes as in `softmax_`, `start` less its
        gap."""
        n, rows, width = probs.shape
        name = f"softmax_backward_{SUFFIX[probs.dtype]}"
        self._call(name, probs, grad, n * rows, rows, width, start, float(scale))

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(gate) * up [N, I] of `x` [N, 2 I] = gate and up side by side."""
        n, c = x.shape[0], x.shape[1] // 2
        out = x.new_empty(n, c)
        self._call(f"swiglu_forward_{SUFFIX[x.dtype]}", x, out, n, c)
        return out

    def swiglu_backward(self, dout: Tensor, x: Tensor) -> Tensor:
        """Gradient of `x`."""
        dx = torch.empty_like(x)
        self._call(f"swiglu_backward_{SUFFIX[x.dtype]}", dout, x, dx, x.shape[0], x.shape[1] // 2)
        return dx

    def cross_entropy_(self, logits: Tensor, targets: Tensor, weights: Tensor, with_gradient: bool) -> Tensor:
        """Weighted losses [N] of `logits` [N, V], which become their gradient where one is wanted."""
        losses = torch.empty(logits.shape[0])
        name = f"cross_entropy_{SUFFIX[logits.dtype]}"
        self._call(name, logits, targets, weights, losses, *logits.shape, int(with_gradient))
        return losses

    def has_tiles(self, dtype: torch.dtype) -> bool:
        """Whether this processor can do what `tiles.h` has, in this precision."""
        return dtype in SUFFIX and hasattr(self._library, f"tiles_{SUFFIX[dtype]}")

    def enter_block(
        self,
        x: Tensor,
        norm: Tensor,
        weights: Sequence[Tensor],
        gains: Tensor | None,
        tables: Tables,
        sizes: tuple[int, ...],
        eps: float,
    ) -> tuple[Tensor, ...]:
        """q, k, v of `x` [B T, C] as `rope` gives them, and what the way back needs: qkv, 1 / rms of rows and heads.
        `weights` are those of q, k and v, in float32 as all weights below."""
        B, T, H, K, D = sizes
        q, k, v = x.new_empty(B, H, T, D), x.new_empty(B, K, T, D), x.new_empty(B, K, T, D)
        qkv, rstd, rstd_qk = x.new_empty(B * T, (H + 2 * K) * D), torch.empty(B * T), torch.empty(B * T, H + K)
        made = (rstd, qkv, q, k, v, rstd_qk)
        name = f"enter_block_{SUFFIX[x.dtype]}"
        self._call(name, x, norm, *weights, gains, *tables, *made, B, T, x.shape[1], H, K, D, float(eps))
        return q, k, v, qkv, rstd, rstd_qk

    def enter_block_backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        residual: Tensor,
        x: Tensor,
        norm: Tensor,
        weights: Sequence[Tensor],
        gains: Tensor | None,
        tables: Tables,
        kept: tuple[Tensor, Tensor, Tensor],
        sizes: tuple[int, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gradient of `x` with `residual` added; those of the weights, norm and gains [H + K, D], in float32. `kept` is
        1 / rms of rows, qkv, 1 / rms of heads."""
        B, T, H, K, D = sizes
        C, dx = x.shape[1], torch.empty_like(x)
        shapes = (*(w.shape for w in weights), norm.shape, (H + K, D))
        sums = torch.empty(sum(map(math.prod, shapes)))
        name = f"enter_block_backward_{SUFFIX[x.dtype]}"
        given = (*grads, residual, x, norm, *weights, gains, *tables, *kept)
        self._call(name, *given, dx, sums, B, T, C, H, K, D)
        return dx, _apart(sums, shapes)

    def leave_block(
        self, y: Tensor, x: Tensor, norm: Tensor, weights: Sequence[Tensor], eps: float
    ) -> tuple[Tensor, ...]:
        """The block's output of its attention `y` [N, A] and its input `x` [N, C]; and for the way back what lies
        between attention and feed-forward, its 1 / rms, gate and up. `weights`: output, gate, up, down."""
        (n, c), inner = x.shape, weights[-1].shape[1]
        middle, out, rstd, gate_up = torch.empty_like(x), torch.empty_like(x), torch.empty(n), x.new_empty(n, 2 * inner)
        name = f"leave_block_{SUFFIX[x.dtype]}"
        self._call(name, y, x, norm, *weights, middle, rstd, gate_up, out, n, c, y.shape[1], inner, float(eps))
        return out, middle, rstd, gate_up

    def leave_block_backward(
        self, dout: Tensor, norm: Tensor, weights: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Gradients of what lies between, of `y`, and of the weights and `norm`, in float32. `kept` is y and what
        `leave_block` gave after its output."""
        y, middle, rstd, gate_up = kept
        (n, c), inner = middle.shape, weights[-1].shape[1]
        dmiddle, dy = torch.empty_like(middle), torch.empty_like(y)
        shapes = (*(w.shape for w in weights), norm.shape)
        made = (dmiddle, dy, torch.empty(sum(map(math.prod, shapes))))
        name = f"leave_block_backward_{SUFFIX[y.dtype]}"
        self._call(name, dout, y, norm, *weights, middle, rstd, gate_up, *made, n, c, y.shape[1], inner)
        return dmiddle, dy, _apart(made[2], shapes)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, firsts: Tensor | None, sizes: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Causal attention [B T, H D] of q [B, H, T, D] over k and v [B, K, T, D], and its probabilities."""
        B, T, H, _, D = sizes
        size = sum(min(QUERIES, T - start) * (start + QUERIES) for start in range(0, T, QUERIES))
        probs, y = q.new_empty(B * H, size), q.new_empty(B * T, H * D)
        self._call(f"attend_{SUFFIX[q.dtype]}", q, k, v, firsts, probs, y, *sizes, D**-0.5)
        return y, probs

    def attend_backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, probs: Tensor, sizes: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        self._call(f"attend_backward_{SUFFIX[q.dtype]}", dy, q, k, v, probs, *grads, *sizes, sizes[4] ** -0.5)
        return grads

    def head(
        self, x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, eps: float, wanted: bool
    ) -> tuple[Tensor, ...]:
        """Weighted losses [N] of `x` [N, C] after `norm` through the head [V, C]; and where they are `wanted` the
        gradients of x, and of head and norm in float32."""
        (n, c), vocab = x.shape, weight.shape[0]
        losses, dx, sums = torch.empty(n), None, None
        if wanted:
            dx, sums = torch.empty_like(x), torch.empty(-(-vocab // 32) * 32 * c + c)
        name = f"head_{SUFFIX[x.dtype]}"
        self._call(name, x, norm, weight, targets, weights, losses, dx, sums, n, c, vocab, float(eps))
        if dx is None or sums is None:
            return (losses,)
        return losses, dx, sums[: vocab * c].view(vocab, c), sums[-c:]

    def adamw(
        self,
        params: Lists,
        grads: Lists,
        firsts: Lists,
        seconds: Lists,
        decays: Sequence[float],
        rates: Sequence[float],
    ) -> None:
        """One step on `params`, float32, in place; `decays` are the weight decays of each, `rates` lr, beta1, beta2,
        eps, 1 - beta1^t, 1 - beta2^t, and the factor of the gradients."""
        n = len(params)
        lists = [(ctypes.c_void_p * n)(*(x.data_ptr() for x in xs)) for xs in (params, grads, firsts, seconds)]
        sizes, shrink = (ctypes.c_int64 * n)(*(x.numel() for x in params)), (ctypes.c_float * n)(*decays)
        self._call("adamw", *lists, sizes, shrink, n, *map(float, rates))

    def norm(self, tensors: Lists) -> float:
        """The Euclidean norm of all numbers of `tensors`, float32, together."""
        n, sums = len(tensors), torch.zeros(torch.get_num_threads(), dtype=torch.float64)
        addresses = (ctypes.c_void_p * n)(*(x.data_ptr() for x in tensors))
        self._call("squares", addresses, (ctypes.c_int64 * n)(*(x.numel() for x in tensors)), sums, n)
        return math.sqrt(sum(sums.tolist()))

    def muon_momentum(self, grads: Tensor, momentum: Tensor, beta: float, scale: float) -> Tensor:
        """Take `grads` times `scale` into `momentum`, both float32; the Nesterov update in bfloat16."""
        update = torch.empty_like(grads, dtype=torch.bfloat16)
        self._call("muon_momentum", grads, momentum, update, grads.numel(), float(beta), float(scale))
        return update

    def polar_(self, update: Tensor, steps: Sequence[Sequence[float]]) -> Tensor:
        """Muon's iteration with the coefficients `steps`, on matrices [n, rows, columns] in bfloat16, in place."""
        numbers = [x for step in steps for x in step]
        self._call("polar", update, *update.shape, (ctypes.c_float * len(numbers))(*numbers), len(steps))
        return update

    def muon_apply(self, weights: Tensor, update: Tensor, lr: float, decay: float) -> None:
        """Cautious decay and the step of `update`, bfloat16, on `weights`, float32."""
        self._call("muon_apply", weights, update.contiguous(), weights.numel(), float(lr), float(decay))


def _apart(sums: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Parts of `sums`, one after the other, in their shapes."""
    parts = sums.split([*map(math.prod, shapes)])
    return tuple(part.view(*shape) for part, shape in zip(parts, shapes, strict=True))


# -------------------------------------------------------------------------------------------------- loading, checking


@lru_cache(maxsize=1)
def load() -> Kernels | None:
    """The kernels, compiled for this machine the first time; None where there is no compiler, or where what it made
    does not load or does not agree with torch."""
    library = native.load([Path(__file__).with_name(name) for name in SOURCES], FLAGS)
    if library is None:
        return None
    kernels = Kernels(library)
    return kernels if _agrees(kernels) else None


def _agrees(kernels: Kernels) -> bool:
    """Whether a few of the kernels give torch's numbers here: a miscompiled library must never train anything."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 96, generator=generator)
    norm, _ = kernels.rmsnorm(x, torch.ones(96), 1e-6)
    wide = torch.randn(33, 2 * 96, generator=generator)
    logits, targets = x.clone(), torch.arange(33)
    losses = kernels.cross_entropy_(logits, targets, torch.ones(33), with_gradient=True)
    pairs = (
        (norm, F.rms_norm(x, (96,), None, 1e-6)),
        (kernels.swiglu(wide), F.silu(wide[:, :96]) * wide[:, 96:]),
        (losses, F.cross_entropy(x, targets, reduction="none")),
        (kernels.rmsnorm(x.bfloat16(), torch.ones(96), 1e-6)[0].float(), norm.bfloat16().float()),
    )
    return all(_products_agree(kernels, dtype) for dtype in SUFFIX) and all(
        torch.allclose(mine, theirs, rtol=1e-2 if i == 3 else 1e-4, atol=1e-5) for i, (mine, theirs) in enumerate(pairs)
    )


def _products_agree(kernels: Kernels, dtype: torch.dtype) -> bool:
    """Whether a head by tiles, where there are any, has torch's losses, and its gradient of the weights."""
    if not kernels.has_tiles(dtype):
        return True
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(70, 32, generator=generator).to(dtype).float() for _ in range(2))
    losses, _, dw, _ = kernels.head(x.to(dtype), torch.ones(32), w, torch.arange(70), torch.ones(70), 1e-6, wanted=True)
    h = F.rms_norm(x, (32,), None, 1e-6)
    logs = F.log_softmax(h @ w.t(), -1)
    near, wanted = 1e-4 if dtype == torch.float32 else 0.1, (-logs.diagonal(), (logs.exp() - torch.eye(70)).t() @ h)
    return all(float((a - b).abs().max()) <= near for a, b in zip((losses, dw), wanted, strict=True))
