"""Time to loss, ten minutes: what a well-tuned peer reaches on this machine in ten minutes, and when ours is there.

    python benchmarks/bench_time_to_loss_ten_minutes.py TEXT [--pairs 5] [--minutes 10] [--share 0.1]

Both sides read the same byte-pair tokens (8,192, trained on the training part of TEXT) and are judged in bits per byte
on its last tenth. Peer: GPT-2 of transformers, 6 layers, 384 wide, context 256, AdamW with a cosine that ends with its
time; precision and compilation are the fastest of four trials, and the learning rate is the best of a sweep of shorter
runs with the whole schedule each. Ours: a Qwen3-shaped decoder, smaller, because in so few minutes more tokens are
worth more than more parameters; it trains for `share` of the peer's minutes. The gate: in every pair our bits per byte
must be at most the peer's. What is compared is the wall time of whole processes: imports, compiling, training, and one
pass over the held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pairs
import texts

VOCABULARY = 8192
PEER = {
    "layers": 6,
    "heads": 6,
    "width": 384,
    "context": 256,
    "batch": 8,
    "warmup": 20,
    "beta2": 0.95,
    "weight_decay": 0.1,
}
WAYS = tuple({"dtype": dtype, "compiled": compiled} for dtype in ("float32", "bfloat16") for compiled in (False, True))
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
OURS = {
    "layers": 4,
    "heads": 4,
    "width": 256,
    "intermediate": 768,
    "context": 256,
    "batches": [[0.0, 8]],
    "lr": 4e-3,
    "muon_lr": 0.02,
    "beta2": 0.95,
    "weight_decay": 0.02,
    "warmup": 10,
    "decay_share": 0.6,
}


def peer(folder: str, seconds: float, rate: float, seed: int, way: dict[str, Any]) -> dict[str, Any]:
    """One run of the peer."""
    task = {**PEER, **way, "corpus": folder, "seed": seed, "lr": rate, "min_lr": rate / 10, "seconds": seconds}
    return pairs.run("peers.py", task)


def fastest_way(folder: str) -> dict[str, Any]:
    """The precision and compilation with which the peer makes the most steps, once it is compiled."""
    rates = {}
    for number, way in enumerate(WAYS):
        result = peer(folder, 25.0 if not way["compiled"] else 75.0, 1e-3, 0, way)
        rates[number] = result["late_steps_per_second"]
        print(f"peer, {way}: {rates[number]:.2f} steps a second", flush=True)
    return WAYS[max(rates, key=lambda number: rates[number])]


def best_rate(folder: str, seconds: float, way: dict[str, Any]) -> float:
    """The learning rate of the lowest held-out loss after shorter runs."""
    losses = {}
    for rate in RATES:
        losses[rate] = peer(folder, seconds, rate, 0, way)["val_loss"]
        print(f"peer, learning rate {rate:g}: {losses[rate]:.3f} nats after {seconds:g} s", flush=True)
    return min(losses, key=lambda rate: losses[rate])


def main() -> None:
    """Trials, sweep, pairs; ends with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--sweep-seconds", type=float, default=120.0)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--peer-rate", type=float, help="skip the sweep: a rate that an earlier run found")
    parser.add_argument("--peer-way", choices=[f"{w['dtype']}{'+' * w['compiled']}" for w in WAYS], help="skip trials")
    parser.add_argument("--only-ours", action="store_true", help="for tuning: our side alone")
    options = parser.parse_args()
    seconds = 60.0 * options.minutes
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = texts.prepare(options.text.read_text(encoding="utf-8"), Path(folder), VOCABULARY)
        bits = 1.0 / (math.log(2.0) * corpus.bytes_per_token)  # of a byte, per nat of a token
        way = next((w for w in WAYS if f"{w['dtype']}{'+' * w['compiled']}" == options.peer_way), None)
        rate = options.peer_rate
        if not options.only_ours:
            way = way or fastest_way(folder)
            rate = rate or best_rate(folder, options.sweep_seconds, way)
        for seed in range(options.first_seed, options.first_seed + options.pairs):
            mine = pairs.run("ours.py", {**OURS, "corpus": folder, "seed": seed, "seconds": seconds * options.share})
            told = f"ours {mine['wall']:.0f} s to {bits * mine['val_loss']:.3f} ({mine['tokens'] / 1e6:.2f}M tokens)"
            if options.only_ours:
                print(told, flush=True)
                continue
            theirs = peer(folder, seconds, rate, seed, way)
            row = pairs.compared(theirs, mine)
            row |= {"peer_bits_per_byte": bits * row["peer_loss"], "bits_per_byte": bits * row["loss"]}
            rows.append(row)
            print(
                f"pair {seed}: peer {row['peer_seconds']:.0f} s to {row['peer_bits_per_byte']:.3f} bits per byte "
                f"({row['peer_tokens'] / 1e6:.2f}M tokens), {told}: {pairs.told(row)}",
                flush=True,
            )
    if rows:
        print(pairs.summed_up(rows))
        found = {"way": way, "rate": rate, "ratio": median(r["ratio"] for r in rows), "pairs": rows}
        print(json.dumps({"machine": pairs.machine(), "text": options.text.name, **found}))


if __name__ == "__main__":
    main()
