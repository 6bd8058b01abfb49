"""Held-out loss by weight decay where a small text is read many times: which multiple of the usual decay is best.

    python benchmarks/bench_repeats.py [TEXT] [--bytes 60000] [--epochs 4 16 64] [--times 1 4 12 30] [--seeds 0 1 2]

Without TEXT it is the language reference that lies in every Python installation. Each seed cuts another piece of it,
sets some aside, and trains the same model from nothing once for every pair of epochs and decay. Nothing is compared
with a peer here: it is the measurement behind `--pretrain.repeat_decay`. One line per training, one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import tempfile
from pathlib import Path

from stateofgpt.run import Run
from stateofgpt.stages import collect, pretrain, tokenize
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.optim import OptimConfig

USUAL = OptimConfig().weight_decay


def main() -> None:
    options = parse()
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.txt"
            text.write_text(piece(options.text, options.bytes, seed), encoding="utf-8")
            with Run.open(Path(folder) / "run", "repeats", {}, seed) as run:
                tokens = prepare(run, text, options.vocab)
                for epochs in options.epochs:
                    for times in options.times:
                        row = {"seed": seed, "epochs": epochs, "times": times, "tokens": tokens}
                        row |= train(run, options, tokens, epochs, times)
                        print(json.dumps(row), flush=True)
                        rows.append(row)
    print(json.dumps({"bench": "repeats", "rows": rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--bytes", type=int, default=60_000)
    parser.add_argument("--epochs", type=float, nargs="+", default=[4, 16, 64])
    parser.add_argument("--times", type=float, nargs="+", default=[1, 4, 12, 30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def piece(path: Path | None, n: int, seed: int) -> str:
    """About `n` characters of the text, in one piece that the seed chooses, as paragraphs apart."""
    if path is None:
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n\n".join(topics[key] for key in sorted(topics))
    else:
        text = path.read_text(encoding="utf-8")
    start = random.Random(f"piece {seed}").randrange(max(1, len(text) - n))
    return text[start : start + n]


def prepare(run: Run, text: Path, vocab: int) -> int:
    """Texts and tokenizer of the run; the training tokens."""
    own = collect.Config(
        sources=(), corpus=(str(text),), corpus_weight=1.0, validation_share=0.25, most_characters=1500
    )
    collect.run(own, run)
    tokens: dict[str, int] = tokenize.run(tokenize.Config(vocab_size=vocab), run)["tokens"]
    return sum(tokens.values())


def train(run: Run, options: argparse.Namespace, tokens: int, epochs: float, times: float) -> dict[str, float]:
    """Held-out bits per byte after so many epochs with so many times the usual decay."""
    steps = max(1, round(epochs * tokens / (options.rows * options.context)))
    stage = run.inside(f"pretrain/{epochs:g}_{times:g}")
    config = pretrain.Config(
        steps=steps, width=options.width, layers=options.layers, context=options.context, rows=options.rows,
        dtype=options.dtype, sample_at=(), repeat_decay=1.0, eval_at=(0.0, 0.25, 0.5, 0.75, 1.0), eval_tokens=1 << 16,
        loop=LoopConfig(optim=OptimConfig(weight_decay=USUAL * times), save_every_s=1e9),
    )  # fmt: skip
    with stage.timed():
        made = pretrain.train(config, run, stage)
    lines = [line for line in stage.metrics() if "val_bpb" in line]
    losses = [line["loss"] for line in stage.metrics() if "loss" in line]
    last = losses[-max(1, len(losses) // 20) :]
    return {
        "steps": steps,
        "val_bpb": round(made["val_bpb"], 4),
        "best_look": round(min(line["val_bpb"] for line in lines), 4),
        "train_loss": round(sum(last) / len(last), 4),
        "n_params": made["n_params"],
        "seconds": round(stage.seconds(), 1),
    }


if __name__ == "__main__":
    main()
