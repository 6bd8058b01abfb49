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

import torch
import torch.nn.functional as F
from torch import Tensor

from stateofgpt import native
from stateofgpt.train.memory import keep_memory
from stateofgpt.train.tiles import SUFFIX, Tables, Tiles

SOURCES = ("kernels.c", "kernels.h", "lanes.h", "products.h", "tiles.h", "head.h", "trunk.h")
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
Lists = Sequence[Tensor]


class Kernels(Tiles):
    """The loaded library. Tensors must be contiguous, on the CPU, and of the shapes that `kernels.h` names."""

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

    def muon_apply(self, weights: Tensor, update: Tensor, lr: float, decay: float) -> None:
        """Cautious decay and the step of `update`, bfloat16, on `weights`, float32."""
        self._call("muon_apply", weights, update.contiguous(), weights.numel(), float(lr), float(decay))


# -------------------------------------------------------------------------------------------------- loading, checking


@lru_cache(maxsize=1)
def load() -> Kernels | None:
    """The kernels, compiled for this machine the first time; None where there is no compiler, or where what it made
    does not load or does not agree with torch."""
    library = native.load([Path(__file__).with_name(name) for name in SOURCES], FLAGS)
    if library is None:
        return None
    keep_memory()  # what blocks keep for their way back is one large piece
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
