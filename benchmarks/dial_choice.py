"""Is the dial right? Trains its choice of size and the sizes around it for the same seconds, and compares.

    python benchmarks/dial_choice.py OUT [--seconds 100] [--ladder LADDER.json] [--seeds 1]

OUT is a folder for the texts, the tokenizer and the models (all of them the laptop recipe's); what is there already is
not made again. Each size trains as `sog pretrain` would, for `--seconds` from its own measured steps. Printed are the
held-out losses in nats per token, by mixture weight, with the seconds that it took in the end (on a machine whose speed
drifts they differ), and how far the dial's choice is from the best.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pairs

from stateofgpt.config import to_dict
from stateofgpt.recipes.laptop import recipe
from stateofgpt.run import Run
from stateofgpt.stages import collect, pretrain, tokenize
from stateofgpt.train.dial import SHAPES

SMALLER = ((64, 1),)  # below the list of the dial


def main() -> None:
    """Prepare the run, ask the dial, train the sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--ladder", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--around", type=int, default=2, help="sizes on each side of the dial's choice")
    options = parser.parse_args()
    made = recipe()
    rows: list[dict[str, Any]] = []
    with Run.open(options.out, "dial", to_dict(made), 0) as run:
        collect.run(made.collect, run)
        tokenize.run(made.tokenize, run)
        per_token = (run.stage("tokenize").result() or {})["bytes_per_token"]["all"] * math.log(2.0)
        asked = replace(made.pretrain, seconds=options.seconds, law=options.ladder, sample_at=(), fewest_layers=None)
        plan = pretrain.plan(asked, run)
        chosen = plan["model"]["hidden_size"], plan["model"]["num_hidden_layers"]
        sizes = [*SMALLER, *SHAPES]
        at = sizes.index(chosen)
        for width, layers in sizes[max(0, at - options.around) : at + options.around + 1]:
            losses, tokens, taken = [], 0, []
            for seed in range(options.seeds):
                config = replace(asked, width=width, layers=layers, dtype=plan["dtype"], fused=plan["fused"])
                stage = run.inside(f"pretrain/{width}x{layers}-{options.seconds:g}-{seed}")
                with stage.timed():
                    run.seed = seed
                    result = stage.result() or pretrain.train(config, run, stage)
                losses.append(result["val_bpb"] * per_token)
                tokens = result["tokens"]
                taken.append(stage.seconds())
            mark = " (the dial's choice)" if (width, layers) == chosen else ""
            told = f"{fmean(losses):.3f} nats after {tokens / 1e6:.2f}M tokens and {fmean(taken):.0f} s{mark}"
            print(f"{width}x{layers}: {told}", flush=True)
            rows.append({"width": width, "layers": layers, "losses": losses, "tokens": tokens, "seconds": taken})
    best = min(fmean(row["losses"]) for row in rows)
    own = next(fmean(row["losses"]) for row in rows if (row["width"], row["layers"]) == chosen)
    print(f"the dial's choice is {own - best:.3f} nats from the best size at {options.seconds:g} s")
    print(json.dumps({"machine": pairs.machine(), "chosen": chosen, "behind": own - best, "sizes": rows}))


if __name__ == "__main__":
    main()
