"""Which way tokens are computed: by our own C where the machine can, by steps that can be recorded on other devices
than the CPU, else by torch's operations.

Owns that choice, the precision of each, and the refusal of what none can do. Knows nothing of requests.
"""

from __future__ import annotations

import torch

from stateofgpt.errors import ModelError
from stateofgpt.infer import forward
from stateofgpt.infer.capture import CudaGraphs, as_it_is
from stateofgpt.infer.decode import Decoder
from stateofgpt.infer.forward import CachePrecision, Precision
from stateofgpt.infer.static import StaticDecoder
from stateofgpt.model.gpt import GPT

__all__ = ["CachePrecision", "Precision", "make_decoder"]


def make_decoder(
    model: GPT,
    dtype: torch.dtype | None,
    native: bool,
    weights: Precision | None,
    cache: CachePrecision | None,
    max_context: int,
    graphs: bool = True,
) -> Decoder | forward.NativeDecoder:
    """On the CPU the native decoder if `native` is wanted and possible, else torch's; on other devices the static one,
    recorded on a GPU if `graphs`. But for the native one the cache has the precision of the weights. Where none is
    asked for it is float32 on the CPU and bfloat16 elsewhere. ModelError where it cannot be had."""
    device = model.lm_head.weight.device
    if device.type == "cpu":
        library = forward.load() if native and dtype in (None, torch.float32) else None
        if library is not None:
            return forward.NativeDecoder(library, model, weights or "float32", max_context, cache or "float32")
    if weights == "int8":
        where = "" if device.type == "cpu" else f", and the model is on {device}"
        raise ModelError(
            f"int8 weights need a CPU and a C compiler (cc, gcc or clang){where}; take bfloat16 or float32, or the CPU"
        )
    usual = torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = {"bfloat16": torch.bfloat16, "float32": dtype or torch.float32, None: dtype or usual}[weights]
    if cache is not None and getattr(torch, cache) != chosen:
        own = str(chosen).removeprefix("torch.")
        where = "without the native path, which needs a C compiler," if device.type == "cpu" else f"on {device}"
        raise ModelError(f"{where} the cache has the precision of the weights, {own}: leave cache out, or ask for both")
    if device.type == "cpu":
        return Decoder(model, chosen, max_context)
    if device.type != "cuda":
        return StaticDecoder(model, chosen, max_context, as_it_is)
    from stateofgpt.infer import paged  # and Triton with it

    capture = CudaGraphs(device) if graphs else as_it_is
    return StaticDecoder(model, chosen, max_context, capture, paged.load(model.config, chosen, device))
