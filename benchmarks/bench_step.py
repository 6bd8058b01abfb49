"""Steps per second at equal mathematics: one LLaMA shape, one batch, one optimizer family, ours against transformers.

    python benchmarks/bench_step.py [--pairs 7] [--width 256 --layers 6 --vocab 4096 --context 256 --rows 8]

Gate first: with the same weights in float32 both losses and all gradients agree to 1e-4. Then whole training steps
(forward, backward, clipping, AdamW) in turn: both in float32; and each side's best, which for transformers is the
fastest of float32 and bfloat16, plain and compiled, with torch's fused AdamW. Compiling is not counted here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pairs
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, Dtype, LanguageModelLoss
from stateofgpt.train.optim import OptimConfig


def shape(options: argparse.Namespace) -> GPTConfig:
    """The LLaMA shape that both sides have."""
    return GPTConfig(
        arch="llama",
        vocab_size=options.vocab,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        head_dim=64,
        intermediate_size=3 * options.width,
        max_position_embeddings=options.context,
    )


def theirs_of(config: GPTConfig, model: GPT) -> LlamaForCausalLM:
    """The same model in transformers."""
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    made.load_state_dict(model.state_dict())
    return made


def peer_loss(model: Any, batch: Batch, dtype: str) -> torch.Tensor:
    """Mean cross-entropy by transformers."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(batch.ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def peer_step(model: LlamaForCausalLM, batch: Batch, dtype: str, compiled: bool) -> Callable[[], None]:
    """One training step of the peer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(peer_loss, dynamic=False) if compiled else peer_loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(model, batch, dtype).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_step(model: GPT, batch: Batch, dtype: Dtype) -> Callable[[], None]:
    """One training step of ours, with AdamW for everything, as the peer has it."""
    loss = LanguageModelLoss(dtype, fused=True)
    trainer = Trainer(model, LoopConfig(optim=OptimConfig(lr=1e-4, weight_decay=0.1, use_muon=False)), loss.kernels)
    return lambda: trainer.step([batch], loss, 1.0) and None


def gate(config: GPTConfig, batch: Batch) -> None:
    """Same weights, same numbers: loss and every gradient."""
    mine = GPT(config)
    mine.init_weights(torch.Generator().manual_seed(0))
    for name, p in mine.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(p, std=0.02)
    theirs = theirs_of(config, mine)
    loss = LanguageModelLoss(fused=True)(mine, batch) / batch.weight
    expected = peer_loss(theirs, batch, "float32")
    loss.backward()
    expected.backward()
    wanted = dict(theirs.named_parameters())
    worst = max(
        float((p.grad - wanted[n].grad).norm() / wanted[n].grad.norm())  # type: ignore[operator,union-attr]
        for n, p in mine.named_parameters()
    )
    print(f"gate: loss {loss.item():.6f} and {expected.item():.6f}, gradients at most {worst:.1e} apart", flush=True)
    if abs(loss.item() - expected.item()) > 1e-4 or worst > 1e-4:
        raise SystemExit("the two sides do not compute the same")


def seconds(step: Callable[[], None], n: int = 3) -> float:
    """Seconds of a step, the mean of a few."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - start) / n


def compare(mine: Callable[[], None], theirs: Callable[[], None], n_pairs: int) -> list[float]:
    """Ratios of the peer's seconds to ours, pair by pair."""
    for step in (mine, theirs):
        step()
        step()
    return [seconds(theirs) / seconds(mine) for _ in range(n_pairs)]


def main() -> None:
    """Gate, pairs in float32, pairs of each side's best."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 256), ("layers", 6), ("vocab", 4096), ("context", 256), ("rows", 8), ("pairs", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    config = shape(options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, options.vocab, (options.rows, options.context + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(options.rows, options.context))
    gate(config, batch)
    start = GPT(config)
    start.init_weights(torch.Generator().manual_seed(0))
    peers = {
        (dtype, compiled): peer_step(theirs_of(config, start), batch, dtype, compiled)
        for dtype in ("float32", "bfloat16")
        for compiled in (False, True)
    }
    ours: dict[Dtype, Callable[[], None]] = {}
    for dtype in ("float32", "bfloat16"):
        model = GPT(config)
        model.load_state_dict(start.state_dict())
        ours[dtype] = our_step(model, batch, dtype)
    equal = compare(ours["float32"], peers["float32", False], options.pairs)
    print(f"float32: {pairs.spread(equal)} times the steps per second", flush=True)
    rates = {way: (step(), step(), seconds(step))[2] for way, step in peers.items()}
    best = min(rates, key=lambda way: rates[way])
    mine = min(ours, key=lambda dtype: (ours[dtype](), seconds(ours[dtype]))[1])
    each_best = compare(ours[mine], peers[best], options.pairs)
    told = f"{best[0]}{' compiled' if best[1] else ''}"
    print(f"best: {pairs.spread(each_best)} times the steps per second (ours {mine}, transformers {told})")
    result = {"float32": median(equal), "best": median(each_best), "peer_best": told, "n_params": start.n_params()}
    print(json.dumps({"machine": pairs.machine(), "shape": vars(options), **result}))


if __name__ == "__main__":
    main()
