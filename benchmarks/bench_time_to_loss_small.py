"""Time to loss, small: how long until a character-level model of any text file is as good as the well-known CPU recipe.

    python benchmarks/bench_time_to_loss_small.py TEXT [--pairs 5]

Peer: GPT-2 of transformers, 4 layers, 4 heads, 128 wide, context 64, batch 12, 2,000 steps of AdamW with a learning
rate of 1e-3 to 1e-4 over 100 steps of warm-up, betas 0.9 and 0.99, weight decay 0.1, clipping at 1. Ours: a
Qwen3-shaped decoder of no more parameters and this project's trainer, for a fixed 15.6 % of the peer's tokens. Both are
whole processes: imports, compiling, training, and one pass over the held-out text are in the seconds. The gate: in
every pair our held-out loss must be at most the peer's of that pair.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import pairs
import texts

PEER = {
    "layers": 4,
    "heads": 4,
    "width": 128,
    "context": 64,
    "batch": 12,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "warmup": 100,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "steps": 2000,
}
OURS = {
    "layers": 4,
    "heads": 2,
    "width": 128,
    "intermediate": 320,
    "context": 64,
    "tokens": 240_000,
    "batches": [[0.0, 16]],
    "lr": 5e-3,
    "muon_lr": 0.03,
    "beta2": 0.95,
    "weight_decay": 0.02,
    "warmup": 10,
    "decay_share": 0.6,
}


def main() -> None:
    """Run the pairs, print each, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        texts.prepare(options.text.read_text(encoding="utf-8"), Path(folder))
        for number in range(options.pairs):
            theirs = pairs.run("peers.py", {**PEER, "corpus": folder, "seed": number})
            mine = pairs.run("ours.py", {**OURS, "corpus": folder, "seed": number})
            row = pairs.compared(theirs, mine)
            rows.append(row)
            print(
                f"pair {number + 1}: peer {row['peer_seconds']:.1f} s to {row['peer_loss']:.3f}, "
                f"ours {row['seconds']:.1f} s to {row['loss']:.3f}: {pairs.told(row)}",
                flush=True,
            )
    print(pairs.summed_up(rows))
    median_ratio = median(r["ratio"] for r in rows)
    print(json.dumps({"machine": pairs.machine(), "text": options.text.name, "ratio": median_ratio, "pairs": rows}))


if __name__ == "__main__":
    main()
