"""Reward modelling and reinforcement learning on a GPU, in a few minutes, without network.

    python benchmarks/bench_gpu_rl.py [--model FOLDER --votes FILE] [--seconds 450] [--out DIR] [--device cuda] [--tiny]

Prints a line of JSON after each part, and goes on with the next when one fails:

1. `reward`: a reward model of four fifths of the votes, adapters on the last blocks of the model (`--layers` N: these
   whole; all blocks with a large N); its held-out accuracy with an interval, beside always taking the longer answer;
   and a head of the other votes, the judge.
2. `ppo`: PPO of the model against that reward on the votes' prompts, a tenth of them held out. Reward, KL, entropy and
   length of every iteration, and at the looks the judge's score, are the lines of `ppo.jsonl` and the curves of
   `ppo.svg` in `--out`; about twenty of the lines are printed.
3. `grpo`: completions per second of an iteration of GRPO, of a model of ten million made-up weights, ours in bfloat16
   and where trl is installed trl's in turn (`bench_rl.py`).

Without `--model` and `--votes` the same with made-up weights and votes, which say nothing of accuracy. `--tiny` makes
all of it small enough for a test on a CPU. The seconds are divided among the parts and bound each; what they do not
bound is loading, and the fits of the heads (on the CPU).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_rl
import pairs
import torch
from markupsafe import Markup

from stateofgpt.config import to_dict
from stateofgpt.data.comparisons import Ranking, write_rankings
from stateofgpt.data.vote_file import read_comparisons
from stateofgpt.model.device import choose_device
from stateofgpt.recipes import prompts
from stateofgpt.report.plots import Series, line_chart
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.run import Run
from stateofgpt.stages import prompted, votes
from stateofgpt.text.chat import Message
from stateofgpt.train.threads import wait_briefly

REWARD_SHARE, PPO_SHARE = 0.3, 0.5  # of the seconds; the rest is the comparison's
JUDGE_ONE_IN = 5  # votes
PRINTED = 20
CURVES = (("proxy_reward", "reward"), ("kl", "KL, nats"), ("entropy", "entropy, nats per token"), ("length", "tokens"))


def tell(part: str, **told: Any) -> None:
    """One line."""
    print(json.dumps({"part": part, **told}), flush=True)


def made_up(folder: Path, tiny: bool) -> tuple[Path, Path]:
    """A model of random weights and votes of somebody who likes digits, for machines without anything else."""
    shape = {"width": 64, "layers": 2, "vocab": 384} if tiny else {"width": 576, "layers": 30, "vocab": 2048}
    bench_rl.prepare(folder / "model", argparse.Namespace(**shape, tokens=64 if tiny else 192, words=0, ends=0.03))
    rng = random.Random(0)

    def answer(liked: bool) -> tuple[Message, ...]:
        words = rng.choices(["seven", "12", "40", "305"] if liked else ["word", "say", "about", "answer"], k=6)
        return (Message("assistant", " ".join(words)),)

    rows = [Ranking(bench_rl.question(i), (answer(True), answer(False)), (1, 2)) for i in range(100 if tiny else 1000)]
    write_rankings(folder / "votes.jsonl", rows)
    return folder / "model", folder / "votes.jsonl"


def divided(data: Path, folder: Path) -> tuple[Path, Path]:
    """The votes of the reward model and those of the judge, as files; no prompt in both."""
    found = [r for r in read_comparisons(data).rankings if r.pairs()]
    names = sorted({r.prompt for r in found}, key=lambda prompt: repr(prompt))
    random.Random(0).shuffle(names)
    apart = set(names[::JUDGE_ONE_IN])
    for name, rows in (
        ("reward", [r for r in found if r.prompt not in apart]), ("judge", [r for r in found if r.prompt in apart]),
    ):  # fmt: skip
        write_rankings(folder / f"{name}.jsonl", rows)
    return folder / "reward.jsonl", folder / "judge.jsonl"


def reward(name: str, data: Path, seconds: float, options: argparse.Namespace, **learned: int | None) -> Path:
    """Train a reward model on a file of votes; its folder."""
    began = time.perf_counter()
    config = votes.Config(
        str(data), str(options.model), seconds=seconds, folds=3, context=options.context, device=options.device,
        **learned,
    )  # fmt: skip
    with Run.open(options.work / name, "votes", to_dict(config), 0) as run:
        result = votes.run(config, run)
        folder = run.stage("reward").checkpoint
    health = result["health"]
    tell(
        name, seconds=time.perf_counter() - began, pairs=result["n_pairs"], prompts=result["n_prompts"],
        accuracy=health["accuracy"], longer=health["baselines"]["longer"], verdict=health["verdict"]["word"],
        head=result.get("head_accuracy"), n_params=result["n_params"], learned=learned,
    )  # fmt: skip
    return folder


def ppo(seconds: float, options: argparse.Namespace, rewards: Path, judge: Path | None) -> None:
    """Climb the reward for some seconds; a line an iteration and a picture."""
    began = time.perf_counter()
    config = prompts.settings(
        options.votes, options.model, rewards, judge=judge, context=options.context, device=options.device,
        minutes=seconds / 60, overrides={"rl.batch": str(options.batch), "rl.max_tokens": str(options.tokens)},
    )  # fmt: skip
    guards = GuardConfig(every=2 if options.tiny else 8, prompts=4 if options.tiny else 64, stop=False)
    held_out = 4 if options.tiny else 64
    few_saves = replace(config.rl, guards=guards, held_out_prompts=held_out, save_every_s=1e6)
    config = replace(config, rl=few_saves)
    with Run.open(options.work / "ppo", prompts.RECIPE, to_dict(config), 0) as run:
        result = prompted.run(config, run)
        lines = (run.stage("rl").dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (options.out / "ppo.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for row in rows[:: -(-len(rows) // PRINTED)]:
        shown = (*(key for key, _ in CURVES), *(key for key in row if key.startswith("held_out_")))
        tell("ppo", step=row["step"], **{key: round(row[key], 3) for key in shown if key in row})
    (options.out / "ppo.svg").write_text(picture(rows), encoding="utf-8")
    both = {side: {key: result[side][key] for key, _ in CURVES} for side in ("before", "after")}
    told = {key: result[key] for key in ("iterations", "kl", "score_before", "score_after", "p_value", "n", "stopped")}
    each = (time.perf_counter() - began) / max(1, result["iterations"])
    tell("ppo", done=True, **told, **both, seconds_per_iteration_in_all=each, picture=str(options.out / "ppo.svg"))


def picture(rows: list[dict[str, Any]]) -> str:
    """The curves as one SVG, four charts in two columns."""
    charts = []
    for key, name in CURVES:
        points = [(float(row["step"]), float(row[key])) for row in rows if key in row]
        charts.append(line_chart([Series(name, points, "c-1", noisy=True)], title=name, x_name="iteration"))
    style = (
        "text{font:12px sans-serif;fill:#333}.line{fill:none;stroke:#1f5f8b;stroke-width:2}.raw{fill:none;"
        "stroke:#1f5f8b;opacity:.25}.end{fill:#1f5f8b}line{stroke:#ddd}"
    )
    placed = [
        Markup('<g transform="translate({} {})">{}</g>').format(
            10 + 420 * (i % 2), 10 + 240 * (i // 2), chart.replace("<svg ", Markup('<svg width="400" height="225" '), 1)
        )
        for i, chart in enumerate(charts)
        if chart
    ]
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 850 500"><style>{}</style>').format(style)
    return str(head + Markup("").join(placed) + Markup("</svg>"))


def grpo(seconds: float, options: argparse.Namespace) -> None:
    """Iterations of GRPO beside trl's, in turn, while there is time."""
    began = time.perf_counter()
    asked = argparse.Namespace(
        prompts=2 if options.tiny else 16, samples=4, tokens=8 if options.tiny else 64, words=0, ends=0.0, part=None,
        width=64 if options.tiny else 320, layers=2 if options.tiny else 7, vocab=384 if options.tiny else 2048,
        plain=False, torch_engine=False, device=options.device, lr=bench_rl.LR, ours="bfloat16", theirs="bfloat16",
    )  # fmt: skip
    updates = 1 if options.tiny else 8
    completions = updates * asked.prompts * asked.samples
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        bench_rl.prepare(folder, asked)
        peer = _importable("trl") and not options.tiny
        rounds = 0
        while True:
            rounds += 1
            mine = bench_rl.Ours(folder, asked).run(updates)
            told = {"ours": completions / mine["seconds"], "split": mine["split"], "length": mine["length"]}
            if peer:
                with contextlib.redirect_stdout(sys.stderr):  # it tells its own numbers in its own way
                    theirs = bench_rl.theirs(folder, asked, updates)
                told |= {"trl": completions / theirs["seconds"], "ratio": theirs["seconds"] / mine["seconds"]}
            tell("grpo", **told, completions=completions)
            spent = time.perf_counter() - began
            if options.tiny or spent + spent / rounds > seconds:
                return


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def tried(part: str, act: Callable[[], Any]) -> Any:
    """What `act` returns; nothing, and a line, where it fails."""
    try:
        return act()
    except Exception as failure:
        tell(part, error=f"{type(failure).__name__}: {failure}"[:400])
        return None


def main(arguments: list[str] | None = None) -> None:
    """All parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder, as of `sog import smollm2`")
    parser.add_argument("--votes", type=Path, help="a file of votes in any form that is read")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all parts (default 450)")
    parser.add_argument("--out", type=Path, help="where the curves and their picture go (default: nowhere)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--layers", type=int, help="blocks that learn whole in the reward model, in place of adapters")
    parser.add_argument("--tiny", action="store_true", help="everything small, for a test")
    options = parser.parse_args(arguments)
    options.device = choose_device(options.device)
    options.batch, options.tokens, options.context = (4, 8, 64) if options.tiny else (64, 200, 512)
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        options.out = options.out or options.work
        options.out.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else None
        tell("machine", device=options.device, gpu=gpu, **pairs.machine())
        if (options.model is None) != (options.votes is None):
            raise SystemExit("give --model and --votes, or neither")
        if options.model is None:
            options.model, options.votes = made_up(options.work, options.tiny)
        first, second = divided(options.votes, options.work)
        seconds = REWARD_SHARE * options.seconds
        learned: dict[str, int | None] = {"lora": None if options.layers else 16, "layers": options.layers or 8}
        learned = {"lora": 2, "layers": 1} if options.tiny else learned
        taught = tried("reward", lambda: reward("reward", first, 0.8 * seconds, options, **learned))
        judge = tried("judge", lambda: reward("judge", second, 0.2 * seconds, options))
        if taught is not None:
            tried("ppo", lambda: ppo(PPO_SHARE * options.seconds, options, taught, judge))
        tried("grpo", lambda: grpo((1 - REWARD_SHARE - PPO_SHARE) * options.seconds, options))


if __name__ == "__main__":
    wait_briefly()
    main()
