"""Ways of reinforcement learning at equal seconds, from the SFT and reward model of finished runs: one table.

    python benchmarks/compare_rl.py RUN [RUN ...] --out DIR [--seconds 60] [--seeds 0,1,2] [--most N]
                                    [--only ppo,grpo] [--shares 0.01,0.1,1] [--switches]

Every way is a policy training of the laptop recipe's rl stage with some settings changed (`WAYS`); with `--shares` PPO
also climbs reward models of a part of the labels, and with `--switches` PPO's own settings are switched one at a time.
After each training the new policy and SFT answer the same held-out prompts, which no stage asks, and the simulated
labeller without noise, which nothing was trained on, scores and compares them. Intervals resample whole trainings and,
within each, prompts: what differs from one SFT model to another shows only with several runs. With `--most` only the
first N of (run, seed) are trained, all runs with the first seed before any with the second. Results are kept in DIR and
read back: the same command continues, and a table of more is made without training again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from stateofgpt.config import apply_overrides, to_dict
from stateofgpt.data.comparisons import read_rankings
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.eval.suites import conversation
from stateofgpt.model.checkpoint import load_model
from stateofgpt.recipes.laptop import recipe
from stateofgpt.rl.guards import GuardConfig
from stateofgpt.rl.labeller import SimulatedLabeller
from stateofgpt.run import Run, read_json, write_json
from stateofgpt.stages import arena, rl
from stateofgpt.stages.proxies import of_a_share
from stateofgpt.stages.way import way_of
from stateofgpt.text.chat import ChatFormat, Conversation, message_from_json, message_to_json
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loss import Way

FIRST = 60_000  # the index of the first held-out prompt asked here
HELD_OUT = 96  # prompts of the measure before and after, which gives KL and entropy
TEMPERATURE = 0.7  # as in the arena


@dataclass(frozen=True)
class Variant:
    """A name, the settings of the rl stage that make it, and the share of the labels its reward model learned."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    share: float | None = None  # None: the run's own reward model


WAYS = (
    Variant("ppo"),
    Variant("grpo", {"algorithm": "grpo"}),
    Variant("dr_grpo", {"algorithm": "dr_grpo"}),
    Variant("rloo", {"algorithm": "rloo"}),
    Variant("reinforce", {"algorithm": "reinforce"}),
    Variant("rejection", {"algorithm": "rejection"}),
    Variant("best_of_n", {"algorithm": "best_of_n"}),
    Variant("dpo", {"algorithm": "dpo"}),
    Variant("ipo", {"algorithm": "ipo"}),
    Variant("kto", {"algorithm": "kto"}),
    Variant("ppo, verified", {"reward": "verified"}),
    Variant("grpo, verified", {"algorithm": "grpo", "reward": "verified"}),
)
RUSH = {"ppo.kl_coefficient": "0", "ppo.policy.optim.lr": "1e-3"}  # a policy that has to be stopped
SWITCHES = (
    Variant("ppo, no KL penalty", {"ppo.kl_coefficient": "0"}),
    Variant("ppo, 4 times the penalty", {"ppo.kl_coefficient": "0.6"}),
    Variant("ppo, one epoch", {"ppo.epochs": "1"}),
    Variant("ppo, no ratio clip", {"ppo.clip": "1e6"}),
    Variant("ppo, no value clip", {"ppo.value_clip": "1e6"}),
    Variant("ppo, lambda 1", {"ppo.lam": "1.0"}),
    Variant("ppo, value model by lambda 0.95", {"ppo.value_lam": "none"}),
    Variant("ppo, updates whole", {"ppo.part_tokens": "none"}),
    Variant("ppo, without guards", {"guards.every": "0"}),
    Variant("ppo in a rush", RUSH),
    Variant("ppo in a rush, without guards", {**RUSH, "guards.every": "0", "max_kl": "1e9"}),
    Variant("ppo, twice the rate", {"ppo.policy.optim.lr": "3e-4"}),
    Variant("ppo, KL held at 1 nat", {"ppo.kl_target": "1.0"}),
    Variant("ppo, half the batch", {"batch": "32"}),
    Variant("ppo, no end is no fault", {"ppo.no_end_score": "0.0"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--iterations", type=int, help="in place of the seconds")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--most", type=int, help="trainings of each way")
    parser.add_argument("--only", default="ppo,grpo,dpo", help='names of ways, or "all"')
    parser.add_argument("--shares", default="", help="as 0.01,0.1,1")
    parser.add_argument("--switches", action="store_true")
    parser.add_argument("--prompts", type=int, default=256)
    options = parser.parse_args()
    ways, found = variants(options), {}
    for run, seed in trainings(options):  # all ways in turn, so that a slower hour is every way's
        for variant in ways:
            found[variant.name, run, seed] = measured = one(variant, run, seed, options)
            print(f"{variant.name}, {run.name}, seed {seed}: won {fmean(measured['won']):.1%}", flush=True)
    rows = [row(v.name, [found[v.name, run, seed] for run, seed in trainings(options)]) for v in ways]
    print(as_text(rows))
    about = {"seconds": options.seconds, "prompts": options.prompts, "threads": torch.get_num_threads()}
    print(json.dumps({**about, "trainings": [[run.name, seed] for run, seed in trainings(options)], "rows": rows}))


def trainings(options: argparse.Namespace) -> list[tuple[Path, int]]:
    """The runs and seeds that every way is trained with."""
    pairs = [(run, int(seed)) for seed in options.seeds.split(",") for run in options.runs]
    return pairs[: options.most]


def variants(options: argparse.Namespace) -> list[Variant]:
    """What was asked for."""
    names = [way.name for way in WAYS] if options.only == "all" else [n.strip() for n in options.only.split(",") if n]
    known = {way.name: way for way in WAYS}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"there is no way {', '.join(unknown)}; there are {', '.join(known)}")
    parts = [float(share) for share in options.shares.split(",") if share]
    shares = [Variant(f"ppo, {100 * share:g} % of the labels", share=share) for share in parts]
    return [*(known[name] for name in names), *shares, *(SWITCHES if options.switches else ())]


def one(variant: Variant, source: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one policy from a run's models, and measure it; kept in the folder of its own."""
    old = Run.read(source)
    limit = {"seconds": options.seconds} if options.iterations is None else {"iterations": options.iterations}
    config = rl.Config(**limit, held_out_prompts=HELD_OUT, guards=GuardConfig(), ppo=recipe().rl.ppo)
    config = apply_overrides(config, variant.settings)
    place = options.out / source.name / f"{variant.name.replace(' ', '_').replace(',', '')}-{seed}"
    asked = {"rl": to_dict(config), "source": str(source.resolve()), "share": variant.share, "prompts": options.prompts}
    with Run.open(place, "compare", asked, seed) as run:
        if (place / "measured.json").exists():
            known: dict[str, Any] = read_json(place / "measured.json")
            return known
        start, way, stage = old.stage("sft").checkpoint, way_of(old), run.stage("rl")
        chat = ChatFormat(Tokenizer.load(start))
        reward, usual = old.stage("reward").checkpoint, old.stage("reward").result() or {}
        rankings = read_rankings(old.stage("reward").dir / "rankings.jsonl")
        if variant.share is not None:
            proxy = run.inside("proxy")
            held_out = read_rankings(old.stage("reward").dir / "rankings_held_out.jsonl")[:16]
            usual = of_a_share(run, proxy, start, rankings, held_out, variant.share, chat=chat, way=way, repeat=seed)
            reward = proxy.checkpoint
        with stage.timed():
            result = (
                stage.result()
                or rl.PolicyTraining(
                    config, run, stage, start, reward, way, usual["mean"], usual["std"], rankings=rankings
                ).work()
            )
        keys = ("iterations", "stopped", "kl", "entropy_sft", "entropy_rl")
        measured = {"seconds": stage.seconds(), **{key: result[key] for key in keys}}
        measured |= {
            "given_up": result["given_up"],
            "best_step": result["guards"].get("best_step"),
            "reward": result["after"]["proxy_reward"],
        }
        kept = options.out / source.name / f"sft-{seed}-{options.prompts}.json"
        before = answers(start, seed, options.prompts, way, kept)
        after = answers(stage.checkpoint, seed, options.prompts, way)
        measured |= battles(seed, options.prompts, before, after)
        write_json(place / "measured.json", measured)
        return measured


def answers(model: Path, seed: int, n: int, way: Way, kept: Path | None = None) -> list[Conversation]:
    """What a model answers to the prompts; read from the file `kept` where that is there."""
    if kept is not None and kept.exists():
        return [tuple(map(message_from_json, answer)) for answer in read_json(kept)]
    asked = [conversation(p) for p in prompts(seed, n, PromptConfig(), "heldout", FIRST)]
    config = replace(arena.Config(), temperature=TEMPERATURE)
    told = arena.answers_of(load_model(model), Tokenizer.load(model), asked, config, seed, way.native)
    if kept is not None:
        write_json(kept, [[message_to_json(message) for message in answer] for answer in told])
    return told


def battles(seed: int, n: int, before: Sequence[Conversation], after: Sequence[Conversation]) -> dict[str, Any]:
    """Scores of both policies and who is better, prompt by prompt."""
    asked, labeller = prompts(seed, n, PromptConfig(), "heldout", FIRST), SimulatedLabeller(seed)
    return {
        "sft": [labeller.score(p, answer) for p, answer in zip(asked, before, strict=True)],
        "true": [labeller.score(p, answer) for p, answer in zip(asked, after, strict=True)],
        "won": [labeller.prefer(p, b, a) for p, a, b in zip(asked, before, after, strict=True)],
    }


def row(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table's row: means over trainings, their intervals, and the win rate of each training."""
    keys = ("seconds", "iterations", "kl", "entropy_sft", "entropy_rl")
    told: dict[str, Any] = {"name": name, "trained": len(found)}
    told |= {key: fmean(one[key] for one in found) for key in keys}
    for key in ("sft", "true", "won"):
        values = np.array([one[key] for one in found])
        told[key], told[f"{key}_interval"] = float(values.mean()), interval(values)
    told |= {"better": share_of(found, 1.0), "worse": share_of(found, 0.0)}
    told["each"] = [{"kl": one["kl"], "true": fmean(one["true"]), "won": fmean(one["won"])} for one in found]
    # results of before there was a look at the end have no word of what was given up
    ended = {key: sum(bool(one.get(key)) for one in found) for key in ("stopped", "given_up")}
    return told | ended


def share_of(found: Sequence[dict[str, Any]], verdict: float) -> float:
    """Share of all prompts on which the verdict was this."""
    return fmean(float(value == verdict) for one in found for value in one["won"])


def interval(values: np.ndarray, resamples: int = 4000) -> list[float]:
    """95 % bootstrap interval of the mean of `values` [trainings, prompts]: trainings are drawn, then their prompts."""
    (n, asked), rng = values.shape, np.random.default_rng(0)
    drawn = np.zeros(resamples)
    for chosen in rng.integers(n, size=(n, resamples)):
        counts = rng.multinomial(asked, np.full(asked, 1 / asked), resamples)
        drawn += (counts * values[chosen]).sum(1) / asked / n
    return [float(x) for x in np.quantile(drawn, [0.025, 0.975])]


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    names = ("", "trained", "s", "iterations", "KL", "entropy (SFT)", "true score (SFT)", "won against SFT", "each")
    lines = ["| " + " | ".join((*names, "stopped, given up")) + " |", "|" + "---|" * (len(names) + 1)]
    for r in rows:
        true = f"{r['true']:.3f} [{r['true_interval'][0]:.3f}, {r['true_interval'][1]:.3f}] ({r['sft']:.3f})"
        won = f"{r['won']:.1%} [{r['won_interval'][0]:.1%}, {r['won_interval'][1]:.1%}]"
        won += f" ({r['better']:.1%} better, {r['worse']:.1%} worse)"
        each, ended = ", ".join(f"{one['won']:.1%}" for one in r["each"]), f"{r['stopped']}, {r['given_up']}"
        lines.append(
            f"| {r['name']} | {r['trained']} | {r['seconds']:.0f} | {r['iterations']:.0f} | {r['kl']:.2f} | "
            f"{r['entropy_rl']:.3f} ({r['entropy_sft']:.3f}) | {true} | {won} | {each} | {ended} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
