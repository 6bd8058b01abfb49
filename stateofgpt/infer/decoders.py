"""Which way tokens are computed: by our own C where the machine can, else by torch's operations.

Owns that choice, and the refusal of what neither can do. Knows nothing of requests.
"""

from __future__ import annotations

import torch

from stateofgpt.errors import ModelError
from stateofgpt.infer import forward
from stateofgpt.infer.decode import Decoder
from stateofgpt.infer.forward import CachePrecision, Precision
from stateofgpt.model.gpt import GPT

__all__ = ["CachePrecision", "Precision", "make_decoder"]


def make_decoder(
    model: GPT, dtype: torch.dtype, native: bool, weights: Precision, cache: CachePrecision, max_context: int
) -> Decoder | forward.NativeDecoder:
    """The native decoder if `native` is wanted and possible, else torch's in `dtype`, whose cache is in `dtype`, too.
    ModelError where neither can."""
    library = None
    if native and dtype == torch.float32 and model.lm_head.weight.device.type == "cpu":
        library = forward.load()
    if library is not None:
        return forward.NativeDecoder(library, model, weights, max_context, cache)
    if weights == "int8":
        raise ModelError("int8 weights need a CPU and a C compiler (cc, gcc or clang); take bfloat16 or float32")
    return Decoder(model, torch.bfloat16 if weights == "bfloat16" else dtype, max_context)
