"""The native path through a decoder: the whole forward pass of a step in one call of C.

Owns: compiling and checking `forward.c`, the packed copies of the weights in the precision that was asked for, and the
cache's memory as that file lays it out. Same interface as `infer.decode.Decoder`, which is the way on other devices and
on machines without a compiler. Knows nothing of requests or sampling.

A token's numbers do not depend on what is computed beside it (see `forward.c`): this is what makes an answer the same
alone, in a batch, read in pieces, resumed, or continued from a shared prefix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from stateofgpt import native
from stateofgpt.infer.cache import BLOCK, zeroed
from stateofgpt.model.gpt import GPT, MLP, Block, GPTConfig, LayerNorm, RMSNorm
from stateofgpt.model.lora import effective_weight
from stateofgpt.model.rotary import rotary_angles

FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
PANEL = 32  # as in products.h
Precision = Literal["float32", "bfloat16", "int8"]
CachePrecision = Literal["float32", "bfloat16"]
_KINDS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
_TOKENS = 512  # in one call: bounds the scratch memory


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm_in", "shift_in", "norm_mlp", "shift_mlp", "qk_gain")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("head", _Linear),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("embed", "places", "norm", "shift", "cosines", "sines")),
        *(
            (name, ctypes.c_int64)
            for name in ("n_layers", "hidden", "heads", "kv_heads", "head_dim", "inner", "kind", "gated")
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("cache", ctypes.c_int64),
    )


class NativeDecoder:
    """Packed weights of one model, adapters merged. `refresh()` after every change of the model's weights."""

    exact = True  # a token's bits do not depend on the batch
    guesses = True

    def __init__(
        self,
        library: ctypes.CDLL,
        model: GPT,
        precision: Precision,
        max_context: int,
        cache: CachePrecision = "float32",
    ) -> None:
        self._cache = cache
        self.config, self._model, self._library, self.precision = model.config, model, library, precision
        self.device = torch.device("cpu")
        c = model.config
        self._kept: list[Tensor] = []  # what the structures point to
        self._turns: list[Tensor] = []
        if c.rotary:
            angles = rotary_angles(c.head_dim, c.rope_theta, max_context, c.rope_scaling)
            self._turns = [angles.cos().contiguous(), angles.sin().contiguous()]
        self.refresh()
        self._pool = torch.zeros(0)
        self.block_bytes = 4 * int(library.block_floats(ctypes.byref(self._c)))

    @torch.inference_mode()
    def refresh(self) -> None:
        """Read the model's weights again."""
        c, trunk = self.config, self._model.model
        self._kept = []
        blocks = [block for block in trunk.layers if isinstance(block, Block)]
        self._layers = (_Layer * len(blocks))(*map(self._layer, blocks))
        cosines, sines = self._turns or (None, None)
        places = trunk.embed_positions
        self._c = _Model(
            self._linear(self._model.lm_head),
            self._layers,
            self._keep(trunk.embed_tokens.weight),
            self._keep(None if places is None else places.weight),
            *self._norm(trunk.norm),
            self._keep(cosines),
            self._keep(sines),
            c.num_hidden_layers,
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.intermediate_size,
            _KINDS[self.precision],
            int(c.arch != "gpt2"),
            c.rms_norm_eps,
            c.head_dim**-0.5,
            _KINDS[self._cache],
        )

    def _layer(self, block: Block) -> _Layer:
        c, attn, mlp = self.config, block.self_attn, block.mlp
        gain = None
        if attn.qk_norm:
            q, k = attn.q_norm.weight, attn.k_norm.weight
            gain = torch.cat((q.expand(c.num_attention_heads, -1), k.expand(c.num_key_value_heads, -1)))
        ups = (mlp.gate_proj, mlp.up_proj) if isinstance(mlp, MLP) else (mlp.up_proj,)
        return _Layer(
            self._linear(attn.q_proj, attn.k_proj, attn.v_proj),
            self._linear(attn.o_proj),
            self._linear(*ups),
            self._linear(mlp.down_proj),
            *self._norm(block.input_layernorm),
            *self._norm(block.post_attention_layernorm),
            self._keep(gain),
        )

    def _norm(self, norm: RMSNorm | LayerNorm) -> tuple[int | None, int | None]:
        return self._keep(norm.weight), self._keep(norm.bias if isinstance(norm, LayerNorm) else None)

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        """The address of these numbers, which stay."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().to(dtype).contiguous())
        return self._kept[-1].data_ptr()

    def _linear(self, *parts: nn.Linear) -> _Linear:
        """`parts`, which have one input, as one product."""
        weight = torch.cat([effective_weight(part).detach().float() for part in parts])
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        packed, scale = pack(weight, self.precision)
        bias = self._keep(torch.cat(biases) if biases else None)
        return _Linear(self._keep(packed, packed.dtype), self._keep(scale), bias, *weight.shape)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def make_room(self, blocks: int) -> None:
        """Memory for `blocks` blocks; what was in it is lost. The machine gives it when it is first written to."""
        self._pool = zeroed((blocks, self.block_bytes // 4), torch.float32, self.device)

    def copy(self, source: int, target: int) -> None:
        """Copy one block to another."""
        self._pool[target] = self._pool[source]

    # ---- passes ---------------------------------------------------------------------------------------------------

    def prefill(self, ids: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """Read `ids[i]` at positions starts[i], starts[i] + 1, ... of the row whose blocks are tables[i]."""
        tokens, places, rows, flat = _laid_out(ids, starts, tables)
        for first in range(0, len(tokens), _TOKENS):
            part = slice(first, first + _TOKENS)
            self._forward(tokens[part], places[part], rows[part], flat, np.zeros(0, dtype=np.int64), None, None)

    def decode(self, ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Read token ids[i] at positions[i] of row i; logits [n, V] of the next ones."""
        return self.verify([[token] for token in ids], positions, tables)

    def verify(self, ids: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """As `prefill`, with the logits [sum of lengths, V] after every token."""
        tokens, places, rows, flat = _laid_out(ids, starts, tables)
        logits = torch.empty(len(tokens), self.config.vocab_size)
        for first in range(0, len(tokens), _TOKENS):
            part = slice(first, first + _TOKENS)
            own = np.arange(len(tokens[part]), dtype=np.int64)
            self._forward(tokens[part], places[part], rows[part], flat, own, logits[part], None)
        return logits

    def _forward(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        rows: np.ndarray,
        tables: np.ndarray,
        wanted: np.ndarray,
        logits: Tensor | None,
        states: Tensor | None,
    ) -> None:
        threads, longest = torch.get_num_threads(), int(positions.max()) + 1
        model, size = ctypes.byref(self._c), self._library.scratch_floats
        scratch = torch.empty(size(model, len(ids), longest, threads))
        self._library.forward(
            model,
            self._pool.data_ptr(),
            *(a.ctypes.data for a in (ids, positions, rows, tables)),
            len(ids),
            wanted.ctypes.data,
            len(wanted),
            None if logits is None else logits.data_ptr(),
            None if states is None else states.data_ptr(),
            scratch.data_ptr(),
            longest,
            threads,
        )


def pack(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """`weight` [outputs, inputs] as panels [panels, inputs, PANEL, 1] in `precision`; int8 as [panels, inputs / 2,
    PANEL, 2], and the scale of each output: the largest of its weights becomes 127."""
    outputs, inputs = weight.shape
    scale, together = None, 1
    if precision == "int8":
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127.0
        weight, together = (weight / scale[:, None]).round(), 2
    panels, groups = -(-outputs // PANEL), -(-inputs // together)
    padded = weight.new_zeros(panels * PANEL, groups * together)
    padded[:outputs, :inputs] = weight
    packed = padded.view(panels, PANEL, groups, together).transpose(1, 2)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[precision]
    if scale is not None:
        scale = torch.cat((scale, scale.new_ones(panels * PANEL - outputs)))
    return packed.to(dtype).contiguous(), scale


def _laid_out(
    ids: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and beginnings of tables [N], int64, of all rows in one list; and all tables in one, int32."""
    sizes = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    lengths = np.fromiter(map(len, tables), dtype=np.int64, count=len(ids))
    begins = np.cumsum(lengths) - lengths
    flat = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=int(lengths.sum()))
    total = int(sizes.sum())
    tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=total)
    if total == len(ids):  # one each
        return tokens, np.array(starts, dtype=np.int64), begins, flat
    first = np.cumsum(sizes) - sizes
    places = np.arange(total, dtype=np.int64) + np.repeat(np.array(starts, dtype=np.int64) - first, sizes)
    return tokens, places, np.repeat(begins, sizes), flat


# -------------------------------------------------------------------------------------------------- loading, checking


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, compiled for this machine the first time; None where that is not possible, or where it does not
    agree with the model's own forward pass, or a token's bits depend on its batch."""
    library = native.load([Path(__file__).with_name(name) for name in ("forward.c", "products.h")], FLAGS)
    if library is None:
        return None
    library.block_floats.restype = library.scratch_floats.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.block_floats.argtypes = (pointer,)
    library.scratch_floats.argtypes = (pointer, number, number, ctypes.c_int)
    library.forward.argtypes = (*[pointer] * 6, number, pointer, number, *[pointer] * 3, number, ctypes.c_int)
    library.forward.restype = None
    return library if _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether a small model gives torch's numbers here, and the same bits token by token as all at once: a miscompiled
    library must never answer anybody."""
    config = GPTConfig(
        vocab_size=70,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18,
        intermediate_size=50,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = GPT(config)
        ids = torch.randint(config.vocab_size, (37,)).tolist()
        wanted = model(torch.tensor([ids]))[0]
        decoder = NativeDecoder(library, model, "float32", 64)
        decoder.make_room(-(-len(ids) // BLOCK))
        table = list(range(-(-len(ids) // BLOCK)))
        whole = decoder.verify([ids], [0], [table])
        single = torch.cat([decoder.decode([token], [i], [table]) for i, token in enumerate(ids)])
    return torch.allclose(whole, wanted, rtol=1e-4, atol=1e-5) and torch.equal(whole, single)
