"""One stream of the engine against llama.cpp: the same weights, one thread, the machine's own instructions on both.

    python benchmarks/bench_llama_cpp.py [--model FOLDER | --width 320 --layers 6 --vocab 8192] [--pairs 5]

The weights are written as GGUF files, in float32, half precision (both kinds) and Q8_0, and read through
`llama-cpp-python`, which builds llama.cpp for the machine it is installed on. Ids go in and come out, so no tokenizer
is in the files. Gate first: with everything in float32, llama.cpp's cache too, both sides draw the same ids. Then every
precision of both sides in turn, tokens per second from the first drawn to the last; llama.cpp with its own defaults
(cache in half precision, fused attention where it chooses it) and its sampler in C. Ours keeps its cache in float32.

With --file what each precision costs on that text follows (with --pairs 0 nothing else): nats per token, how far the
distributions are from those of float32, and how often the most likely token is another one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import bench_engine
import numpy as np
import pairs
import torch

from stateofgpt.infer.engine import Engine
from stateofgpt.interchange.gguf_file import tensor_names
from stateofgpt.interchange.imported import to_interleaved
from stateofgpt.model.gpt import GPT

CONTEXT = 1024
KINDS = {"F32": "float32", "F16": "bfloat16", "BF16": "bfloat16", "Q8_0": "int8"}  # GGUF's, and ours of that size


def write_gguf(path: Path, model: GPT, kind: str) -> None:
    """The model's weights, its norms in float32, without a tokenizer."""
    import gguf

    c, weights = model.config, dict(model.state_dict())
    writer = gguf.GGUFWriter(path, "llama")
    for key, number in {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
    }.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", c.rope_theta)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    form = gguf.GGMLQuantizationType[kind]
    for theirs, ours in tensor_names(c):
        weight = weights[ours].float()
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            weight = to_interleaved(weight, c.num_attention_heads if "q_proj" in ours else c.num_key_value_heads)
        if weight.ndim == 1:
            writer.add_tensor(theirs, weight.numpy())
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(weight.contiguous().numpy(), form), raw_dtype=form)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


class LlamaCpp:
    """One GGUF file in llama.cpp, by its own interface in C."""

    def __init__(self, path: Path, *, exact: bool = False) -> None:
        import llama_cpp

        self.api = llama_cpp
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = CONTEXT
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        if exact:
            how.type_k = how.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        self.sampler = llama_cpp.llama_sampler_init_greedy()

    def _read(self, ids: list[int]) -> None:
        array = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama.cpp could not read the tokens")

    def _forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def single(self, prompt: list[int], tokens: int) -> bench_engine.Side:
        """Greedy tokens after `prompt`."""

        def run() -> dict[str, Any]:
            api, one = self.api, (self.api.llama_token * 1)()
            batch = api.llama_batch_get_one(one, 1)
            self._forget()
            self._read(prompt)
            ids = [api.llama_sampler_sample(self.sampler, self.context, -1)]
            begun = time.perf_counter()
            while len(ids) < tokens:
                one[0] = ids[-1]
                if api.llama_decode(self.context, batch):
                    raise RuntimeError("llama.cpp could not read the token")
                ids.append(api.llama_sampler_sample(self.sampler, self.context, -1))
            return {"ids": ids, "rate": (tokens - 1) / (time.perf_counter() - begun)}

        return run

    def logits(self, rows: list[list[int]]) -> Iterator[torch.Tensor]:
        """The logits after each token of each row, each read from its beginning."""
        for row in rows:
            self._forget()
            batch = self.api.llama_batch_init(len(row), 0, 1)
            batch.n_tokens = len(row)
            for i, token in enumerate(row):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
            if self.api.llama_decode(self.context, batch):
                raise RuntimeError("llama.cpp could not read the text")
            found = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (len(row), self.vocab))
            yield torch.from_numpy(found.copy())
            self.api.llama_batch_free(batch)


def dequantised(model: GPT, kind: str) -> GPT:
    """A copy of the model with the weights that a GGUF file of that kind has."""
    import gguf

    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    form = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for p in copy.parameters():
            if p.ndim > 1:
                whole = gguf.quants.dequantize(gguf.quants.quantize(p.numpy(), form), form)
                p.copy_(torch.from_numpy(whole).view(p.shape))
    return copy.eval()


def quality(options: argparse.Namespace, model: GPT, peers: dict[str, LlamaCpp]) -> dict[str, Any]:
    """What each precision costs on a text, beside float32 of our own. Rotating by pairs or halves only changes the
    order of rows, so the weights of a file can also be had in our own order."""
    from stateofgpt.text.tokenizer import Tokenizer

    ids = Tokenizer.load(options.model).encode(Path(options.file).read_text())[options.skip :][: options.of_file]
    rows = bench_engine.rows_of(ids)
    exact = list(bench_engine.logits_of(model, rows, "float32"))
    found: dict[str, Any] = {}
    for weights in ("float32", "bfloat16", "int8"):
        found[f"ours {weights}"] = bench_engine.differing(rows, exact, bench_engine.logits_of(model, rows, weights))
    found["ours float32, cache bfloat16"] = bench_engine.differing(
        rows, exact, bench_engine.logits_of(model, rows, "float32", "bfloat16")
    )
    eight = bench_engine.logits_of(dequantised(model, "Q8_0"), rows, "float32")
    found["weights of Q8_0, our float32"] = bench_engine.differing(rows, exact, eight)
    for kind, peer in peers.items():
        found[f"llama.cpp {kind}"] = bench_engine.differing(rows, exact, peer.logits(rows))
    return {"tokens": len(ids), **found}


def compared(options: argparse.Namespace, model: GPT, folder: Path) -> dict[str, Any]:
    """The gate, then all precisions of both sides in turn."""
    prompt = bench_engine.prompt_of(options, model)
    files = {kind: folder / f"{kind}.gguf" for kind in KINDS}
    for kind, path in files.items():
        write_gguf(path, model, kind)
    ours = {
        weights: bench_engine.ours_single(
            Engine(model, max_batch=1, native=True, weights=weights), prompt, options.tokens
        )
        for weights in ("float32", "bfloat16", "int8")
    }
    if not options.pairs:
        return {"quality": quality(options, model, {kind: LlamaCpp(path) for kind, path in files.items()})}
    bench_engine.gate(ours["float32"], LlamaCpp(files["F32"], exact=True).single(prompt, options.tokens))
    peers = {kind: LlamaCpp(path) for kind, path in files.items()}
    sides = {f"ours {weights}": side for weights, side in ours.items()}
    sides |= {f"llama.cpp {kind}": peer.single(prompt, options.tokens) for kind, peer in peers.items()}
    done = bench_engine.measured(sides, options.pairs, "rate")
    found: dict[str, Any] = {"tokens_per_second": {name: median(values) for name, values in done.items()}}
    found["ratio"] = {
        f"{weights} to {kind}": bench_engine.ratio(done[f"ours {weights}"], done[f"llama.cpp {kind}"])
        for kind, weights in KINDS.items()
    }
    if options.file:
        found["quality"] = quality(options, model, peers)
    return {**found, "system": peers["F32"].api.llama_print_system_info().decode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_engine.shape_options(parser)
    parser.add_argument("--file", help="a text whose nats per token are told, too")
    parser.add_argument("--of-file", type=int, default=1024, help="tokens of it")
    parser.add_argument("--skip", type=int, default=0, help="tokens before them")
    options = parser.parse_args()
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    model, _ = bench_engine.models(options)
    with tempfile.TemporaryDirectory() as folder:
        result = compared(options, model, Path(folder))
    print(json.dumps({"what": "llama.cpp", **result, **pairs.machine()}))


if __name__ == "__main__":
    main()
