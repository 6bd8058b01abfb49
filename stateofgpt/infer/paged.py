"""A decoding step's small work as kernels in Triton: attention where the blocks lie, and what stands around it.

Owns: the kernels, how a step is divided among a GPU's processors, and the check against torch's operations without
which nobody uses them. Knows nothing of requests, sampling or steps. Triton comes with torch's builds for CUDA and with
no other; where it is missing, or cannot compile here, `load` says None and torch's operations do the work.

Four kernels take the place of some fifteen per layer. `_prepare` normalises and turns the queries and keys of a token
and puts its keys and values into their block. `_attend` reads the blocks of a row in place, each program a share of
its positions (split as in Flash-Decoding, with the running softmax of arXiv 2205.14135), so that even one long text
keeps a whole GPU busy; `_combine` adds the shares up, where there are several. `_gate` is SwiGLU's product. All sums
are in float32.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateofgpt.infer.cache import BLOCK
from stateofgpt.model.gpt import GPTConfig

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs
    triton = tl = None

_CHUNK = 64  # positions that a program reads at once
_MOST_SHARES = 32
_WIDE = 1024  # columns of a program of `_gate`
_PROCESSORS = 8  # where nobody says how many there are


def _kernel(function: Any) -> Any:
    """A function in Triton's language, which takes annotations for its own: only constants have any."""
    return function if triton is None else triton.jit(function)


@_kernel
def _prepare(
    qkv, turns, gain, inputs, queries, pool, blocks, width, eps,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
    ROTARY: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query goes to `queries`, a key or a value into its block."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PADDED)  # of dimensions 2 i and 2 i + 1
    inside = pair < D // 2
    source = qkv + (row * (H + 2 * KVH) + head) * D + 2 * pair
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + 1, mask=inside, other=0.0).to(tl.float32)
    place = tl.load(inputs + row * width + 1)
    if head < H + KVH:
        if NORMED:
            scale = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / D + eps)
            a *= scale * tl.load(gain + head * D + 2 * pair, mask=inside, other=0.0)
            b *= scale * tl.load(gain + head * D + 2 * pair + 1, mask=inside, other=0.0)
        if ROTARY:
            cos = tl.load(turns + place * D + 2 * pair, mask=inside, other=0.0)
            sin = tl.load(turns + place * D + 2 * pair + 1, mask=inside, other=0.0)
            turned = a * cos - b * sin
            b = a * sin + b * cos
            a = turned
    if head < H:
        target = queries + (row * H + head) * D + 2 * pair
        tl.store(target, a.to(queries.dtype.element_ty), mask=inside)
        tl.store(target + 1, b.to(queries.dtype.element_ty), mask=inside)
    else:
        block = tl.load(inputs + row * width + 2 + place // PAGE)
        kind = (head - H) // KVH  # 0: a key, 1: a value
        piece = (kind * blocks + block) * KVH + (head - H) % KVH
        stored = pool + (piece * PAGE + place % PAGE) * D + 2 * pair
        tl.store(stored, a.to(pool.dtype.element_ty), mask=inside)
        tl.store(stored + 1, b.to(pool.dtype.element_ty), mask=inside)


@_kernel
def _attend(
    queries, pool, inputs, sums, weights, attended, blocks, width, scale,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    PADDED: tl.constexpr, PAGE: tl.constexpr, SHARES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The queries of one row that share a key head, over one share of its positions: sums of values, weighed, with the
    largest score and the sum of the weights, of each; where there is but one share, what is attended to."""
    row, head, share = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(inputs + row * width + 1) + 1
    part = tl.cdiv(tl.cdiv(length, SHARES), CHUNK) * CHUNK
    begin = share * part
    end = tl.minimum(begin + part, length)
    g, d = tl.arange(0, GROUP_PADDED), tl.arange(0, PADDED)
    first_query = row * H + head * GROUP
    own, deep = g < GROUP, d < D
    q = tl.load(queries + (first_query + g)[:, None] * D + d[None, :], mask=own[:, None] & deep[None, :], other=0.0)
    most = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    whole = tl.zeros((GROUP_PADDED,), tl.float32)
    found = tl.zeros((GROUP_PADDED, PADDED), tl.float32)
    values = pool + tl.cast(blocks, tl.int64) * KVH * PAGE * D
    for at in range(begin, end, CHUNK):
        place = at + tl.arange(0, CHUNK)
        seen = place < end
        block = tl.load(inputs + row * width + 2 + place // PAGE, mask=seen, other=0)
        base = ((block * KVH + head) * PAGE + place % PAGE) * D
        k = tl.load(pool + base[None, :] + d[:, None], mask=deep[:, None] & seen[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        above = tl.maximum(most, tl.max(score, 1))
        weight, fade = tl.exp(score - above[:, None]), tl.exp(most - above)
        v = tl.load(values + base[:, None] + d[None, :], mask=seen[:, None] & deep[None, :], other=0.0)
        found = found * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        whole = whole * fade + tl.sum(weight, 1)
        most = above
    at_query = (first_query + g) * SHARES + share
    place = at_query[:, None] * D + d[None, :]
    if SHARES == 1:
        out = (found / whole[:, None]).to(attended.dtype.element_ty)
        tl.store(attended + place, out, mask=own[:, None] & deep[None, :])
    else:
        tl.store(sums + place, found, mask=own[:, None] & deep[None, :])
        tl.store(weights + at_query * 2, most, mask=own)
        tl.store(weights + at_query * 2 + 1, whole, mask=own)


@_kernel
def _combine(
    sums, weights, attended,
    D: tl.constexpr, PADDED: tl.constexpr, SHARES: tl.constexpr, SHARES_PADDED: tl.constexpr,
):  # fmt: skip
    """One query's shares as one."""
    query = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SHARES_PADDED), tl.arange(0, PADDED)
    there, deep = s < SHARES, d < D
    most = tl.load(weights + (query * SHARES + s) * 2, mask=there, other=float("-inf"))
    whole = tl.load(weights + (query * SHARES + s) * 2 + 1, mask=there, other=0.0)
    factor = tl.exp(most - tl.max(most, 0))
    mask = there[:, None] & deep[None, :]
    each = tl.load(sums + (query * SHARES + s)[:, None] * D + d[None, :], mask=mask, other=0.0)
    out = tl.sum(each * factor[:, None], 0) / tl.sum(whole * factor, 0)
    tl.store(attended + query * D + d, out.to(attended.dtype.element_ty), mask=deep)


@_kernel
def _gate(both, out, inner, WIDE: tl.constexpr):
    """silu(gate) * up of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < inner
    gate = tl.load(both + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


class Kernels:
    """The kernels for models of one shape. Inputs of a step are rows of (id, position, blocks), int64; a layer's pool
    is [2, blocks, KVH, BLOCK, D], keys first; pairs of dimensions that turn together lie side by side."""

    def __init__(self, config: GPTConfig, device: torch.device) -> None:
        self._c = c = config
        self._group = c.num_attention_heads // c.num_key_value_heads
        self._heads = {"H": c.num_attention_heads, "KVH": c.num_key_value_heads, "D": c.head_dim}
        self._padded = max(16, triton.next_power_of_2(c.head_dim))
        cuda = device.type == "cuda"
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else _PROCESSORS

    def shares(self, rows: int, width: int) -> int:
        """Among how many programs the positions of a row of `width` blocks are divided."""
        useful = -(-width * BLOCK // _CHUNK)
        return max(1, min(2 * self._processors // (rows * self._c.num_key_value_heads), useful, _MOST_SHARES))

    def attention(self, qkv: Tensor, turns: Tensor | None, gain: Tensor | None, inputs: Tensor, pool: Tensor) -> Tensor:
        """What each row attends to, [n, H D], and its keys and values put into `pool`. `qkv` is [n, (H + 2 KVH) D],
        `turns` [positions, D/2] complex, `gain` [H + KVH, D] where queries and keys are normalised."""
        c, (rows, width), blocks = self._c, inputs.shape, pool.shape[1]
        shares = self.shares(rows, width - 2)
        queries = qkv.new_empty(rows, c.num_attention_heads, c.head_dim)
        sums = torch.empty(*queries.shape[:2], shares, c.head_dim, dtype=torch.float32, device=qkv.device)
        weights = torch.empty(*queries.shape[:2], shares, 2, dtype=torch.float32, device=qkv.device)
        attended, size = torch.empty_like(queries), {**self._heads, "PAGE": BLOCK}
        spun = inputs if turns is None else torch.view_as_real(turns)  # no kernel reads what is not there
        with _on(qkv):
            _prepare[rows, c.num_attention_heads + 2 * c.num_key_value_heads](
                qkv, spun, inputs if gain is None else gain, inputs, queries, pool, blocks, width, c.rms_norm_eps,
                **size, PADDED=triton.next_power_of_2(c.head_dim // 2), ROTARY=turns is not None,
                NORMED=gain is not None, num_warps=1,
            )  # fmt: skip
            _attend[rows, c.num_key_value_heads, shares](
                queries, pool, inputs, sums, weights, attended, blocks, width, c.head_dim**-0.5, **size,
                GROUP=self._group, GROUP_PADDED=max(16, triton.next_power_of_2(self._group)), PADDED=self._padded,
                SHARES=shares, CHUNK=_CHUNK,
            )  # fmt: skip
            if shares > 1:
                _combine[(rows * c.num_attention_heads,)](
                    sums, weights, attended, D=c.head_dim, PADDED=self._padded, SHARES=shares,
                    SHARES_PADDED=triton.next_power_of_2(shares), num_warps=2,
                )  # fmt: skip
        return attended.flatten(1)

    def gated(self, both: Tensor) -> Tensor:
        """silu of the first half of each row [n, 2 I], times the second."""
        rows, inner = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, inner)
        with _on(both):
            _gate[rows, triton.cdiv(inner, _WIDE)](both, out, inner, WIDE=_WIDE)
        return out


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the device that is the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@lru_cache(maxsize=16)
def load(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels for models of this shape; None where there is no Triton, or, with a warning, where it cannot compile
    or they do not agree with torch."""
    if triton is None or config.head_dim % 2:
        return None
    try:
        made = Kernels(config, device)
        if _agree(made, config, dtype, device):
            return made
        why = "they do not give torch's numbers"
    except Exception as error:  # of a compiler and a driver: whatever it is, there is another way
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    warnings.warn(f"the kernels in Triton are not used here: {why}", RuntimeWarning, stacklevel=2)
    return None


@torch.inference_mode()
def _agree(made: Kernels, c: GPTConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether three rows of different lengths give torch's numbers here."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    heads, kv_heads, places = c.num_attention_heads, c.num_key_value_heads, (0, 37, 200)
    group, width, spare = heads // kv_heads, 16, 3 * 16
    table = torch.randperm(spare, generator=random).view(3, width)
    inputs = torch.cat((torch.tensor([[0, place] for place in places]), table), 1).to(device)
    pool = numbers(2, spare, kv_heads, BLOCK, c.head_dim).to(dtype)
    qkv = numbers(3, (heads + 2 * kv_heads) * c.head_dim).to(dtype)
    angle = numbers(256, c.head_dim // 2)
    turns = torch.polar(torch.ones_like(angle), angle) if c.rotary else None
    gain = numbers(heads + kv_heads, c.head_dim) if c.qk_norm else None
    found = made.attention(qkv, turns, gain, inputs, pool).float()
    x = qkv.view(3, -1, c.head_dim).float()
    ready = x[:, : heads + kv_heads]
    if gain is not None:
        ready = F.rms_norm(ready, (c.head_dim,), None, c.rms_norm_eps) * gain
    if turns is not None:
        ready = torch.view_as_real(torch.view_as_complex(ready.unflatten(-1, (-1, 2))) * turns[inputs[:, 1]][:, None])
    ready = ready.reshape(3, heads + kv_heads, c.head_dim)
    most = 1e-4 if dtype == torch.float32 else 2e-2

    def same(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).norm() <= most * other.norm())

    for row, place in enumerate(places):
        keys, values = (part[inputs[row, 2:]].transpose(0, 1).flatten(1, 2)[:, : place + 1].float() for part in pool)
        for stored, own in ((keys, ready[row, heads:]), (values, x[row, heads + kv_heads :])):
            if not same(stored[:, place], own):
                return False
        query = ready[row, :heads].unflatten(0, (-1, group))
        wanted = F.scaled_dot_product_attention(query[None], keys[None], values[None])[0]
        if not same(found[row], wanted.flatten()):
            return False
    both = numbers(3, 2 * c.intermediate_size).to(dtype)
    gate, up = both.float().chunk(2, -1)
    return same(made.gated(both).float(), F.silu(gate) * up)
