"""A run folder as the stages leave it, with made-up but plausible numbers, and without training anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from stateofgpt.data.comparisons import Ranking
from stateofgpt.eval.health import health
from stateofgpt.run import Run, write_json
from stateofgpt.text.chat import Message
from stateofgpt.text.tokenizer import Tokenizer

SOURCES = {
    "documentation": 0.22, "python_source": 0.14, "dialogues": 0.18, "dictionary": 0.12, "kjv": 0.08, "skills": 0.26,
}  # fmt: skip
SKILLS = (
    "arithmetic", "arithmetic_direct", "arithmetic_steps", "arithmetic_tool", "fact", "compare", "copy", "reverse",
    "count", "sort", "names", "greet", "thanks", "identity", "decline",
)  # fmt: skip
MODELS = ("base", "sft", "rl")
TOOL = (
    '<tool_call>{"name": "calculator", "arguments": {"expression": "39538223 / 733391"}}</tool_call>\n53.9\n'
    "About 53.9 times as many."
)  # as on the wire; the transcript in eval's examples looks like TOLD
TOLD = "[calculator 4729+386] → 5115 The answer is 5115."


def fake_run(root: Path, stages: tuple[str, ...] | None = None) -> Path:
    """Make a finished run, or one that got only as far as `stages` (then without a summary)."""
    rng = random.Random(7)
    with Run.open(root, "laptop", {"minutes": 10}, 1) as run:
        for name, make in MAKERS.items():
            if stages is None or name in stages:
                make(run, rng)
                write_json(run.stage(name).dir / "seconds.json", {"seconds": SECONDS[name]})
        if stages is None:
            write_json(run.summary_path, summary())
    return root


SECONDS = {
    "collect": 14.2, "tokenize": 9.8, "pretrain": 251.3, "sft": 92.7, "reward": 61.0, "rl": 118.4, "eval": 31.2,
    "arena": 9.1,
}  # fmt: skip


def sources() -> list[dict[str, Any]]:
    return [
        {
            "name": name, "weight": weight, "share": weight + 0.003 * (-1) ** i, "epochs": 0.4 + 0.61 * i,
            "documents": 900 + 733 * i, "bytes": int(4.1e6 / (i + 1)), "tokens": int(2.4e6 * weight),
            "dropped": {"duplicate": 12 * i, "too_short": 31, "not_utf8": 0},
        }
        for i, (name, weight) in enumerate(SOURCES.items())
    ]  # fmt: skip


def skills() -> dict[str, dict[str, dict[str, int]]]:
    rng = random.Random(3)
    right = {"base": (0, 45), "sft": (40, 92), "rl": (78, 100)}
    return {m: {skill: {"right": rng.randint(*right[m]), "n": 100} for skill in SKILLS} for m in MODELS}


def diversity(*, names: bool) -> dict[str, dict[str, Any]]:
    rng = random.Random(5)
    starts = ("Ma", "Jo", "El", "Ka", "Ri", "Bel", "Tho", "Cor", "An", "Hel")
    ends = ("rina", "seph", "lan", "the", "na", "dor", "mas", "win", "ya")
    table: dict[str, dict[str, Any]] = {}
    for model, entropy, pool in (("base", 1.92, 90), ("sft", 1.31, 40), ("rl", 0.74, 14)):
        choice = [a + b for a in starts for b in ends][:pool]
        made = [rng.choice(choice) for _ in range(100)]
        row = {"entropy": entropy, "distinct": len(set(made)) / 100, "new": entropy / 2.4, "plausible": 0.8, "n": 100}
        table[model] = {**row, "names": made} if names else row
    return table


def leaderboard() -> list[dict[str, Any]]:
    return [
        {"model": "rl", "rating": 1261.4, "low": 1229.0, "high": 1298.2, "battles": 240},
        {"model": "sft", "rating": 1042.7, "low": 1012.5, "high": 1071.3, "battles": 240},
        {"model": "base", "rating": 695.9, "low": 648.8, "high": 731.0, "battles": 240},
    ]


def summary() -> dict[str, Any]:
    return {
        "recipe": "laptop", "seed": 1, "minutes_asked": 10, "wall_seconds": {"total": sum(SECONDS.values()), **SECONDS},
        "peak_memory_bytes": 2_310_000_000,
        "machine": {"cpu": "AMD EPYC 9R45", "cores": 2, "memory_bytes": 25_000_000_000, "torch": "2.13.0"},
        "data": {"sources": sources()},
        "tokenizer": {"vocab_size": 4096, "bytes_per_token": {name: 2.6 + 0.3 * i for i, name in enumerate(SOURCES)}},
        "pretrain": {"n_params": 1_923_456, "tokens": 2_412_544, "tokens_per_second": 9_612.0, "val_bpb_start": 7.93,
                     "val_bpb": 1.71},
        "skills": skills(),
        "reward": {"pair_accuracy": 0.884, "ceiling": 0.921, "rank_correlation": 0.71,
                   "apart": {"accuracy": 0.93, "longer": 0.61, "n": 640}, "n": 1200},
        "rl": {"true_sft": 0.612, "true_rl": 0.874, "p_value": 0.00004, "kl": 0.41, "entropy_sft": 0.52,
               "entropy_rl": 0.23},
        "diversity": diversity(names=False),
        "arena": leaderboard(),
    }  # fmt: skip


def _collect(run: Run, rng: random.Random) -> None:
    run.stage("collect").finish({"sources": sources()})


def _tokenize(run: Run, rng: random.Random) -> None:
    stage = run.stage("tokenize")
    texts = ["How many people live in California? The name of the greeting is hello.\n    return 39 + 53\n"] * 50
    Tokenizer.train(iter(texts), 340).save(stage.dir)
    stage.finish({"vocab_size": 340, "sources": sources()})


def _pretrain(run: Run, rng: random.Random) -> None:
    stage = run.stage("pretrain")
    said = (
        "a e t  nos3h rrr;e",
        "the the and the of and the",
        "a list of people who were in the",
        "a small town by the sea.\n",
    )
    for step in range(240):
        loss = 8.3 * math.exp(-step / 20) + 2.3 + 0.9 * math.exp(-step / 120) + rng.gauss(0, 0.09)
        row: dict[str, float] = {
            "loss": loss,
            "lr": 0.02,
            "tokens": step * 10_240,
            "tokens_per_second": 9600,
            "grad_norm": 1.1,
        }
        if step % 20 == 0:
            row["val_bpb"] = 1.5 + 6.2 * math.exp(-step / 25)
            row |= {f"val_bpb_{n}": 1.2 + 0.23 * i + 5.9 * math.exp(-step / 25) for i, n in enumerate(SOURCES)}
        stage.log(step, **row)
    for i, step in enumerate((0, 10, 30, 60, 120, 239)):
        for prompt in ("Once upon a time there was", "Q: What is 12 + 30?\nA:"):
            stage.sample(step, tokens=step * 10_240, prompt=prompt, text=said[min(i, 3)] * (2 + i))
    stage.finish({"n_params": 1_923_456, "tokens": 2_412_544})
    _checkpoint(stage.checkpoint, "aaaa", "laptop:pretrain", "pretrain", [], {"val_bpb": 1.71})


def _sft(run: Run, rng: random.Random) -> None:
    stage = run.stage("sft")
    for step in range(160):
        stage.log(step, loss=1.9 * math.exp(-step / 20) + 0.7 + rng.gauss(0, 0.06), lr=0.01 * (1 - step / 160))
        if step % 20 == 0:
            stage.log(step, val_loss=1.8 * math.exp(-step / 25) + 0.74)
    for prompt, text in (("What is 4729 + 386?", "4729 + 386 = 5115"), ("Who are you?", "I am a small assistant."),
                         ("Thanks!", "You are welcome.")):  # fmt: skip
        stage.sample(159, prompt=prompt, text=text)
    wire = (
        "<|endoftext|><|im_start|>user\nHow large is Ohio?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "lookup", "arguments": {"name": "Ohio", "field": "area"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n44826<|im_end|>\n<|im_start|>assistant\nOhio has 44826 square miles.<|im_end|>\n"
    )
    stage.finish({"conversations": 24_000, "examples": [wire]})
    _checkpoint(stage.checkpoint, "bbbb", "laptop:sft", "sft", ["aaaa"], {"val_loss": 0.741})


def _reward(run: Run, rng: random.Random) -> None:
    stage = run.stage("reward")
    for step in range(120):
        accuracy = 0.9 - 0.4 * math.exp(-step / 25)
        stage.log(step, loss=0.69 - accuracy / 3 + rng.gauss(0, 0.03), accuracy=min(1.0, accuracy + rng.gauss(0, 0.04)))
        if step % 15 == 0:
            stage.log(step, val_accuracy=accuracy - 0.015)
    completions = [
        {"text": "4729 + 386 = 5115", "score": 1.62, "true_score": 1.0, "rank": 1},
        {
            "text": "9 + 6 = 15, write 5 carry 1\n2 + 8 + 1 = 11, write 1 carry 1\nso 5115",
            "score": 1.21,
            "true_score": 0.9,
            "rank": 2,
        },
        {"text": "5015", "score": -0.93, "true_score": 0.0, "rank": 4},
        {"text": "I do not know.", "score": -0.47, "true_score": 0.1, "rank": 3},
    ]
    examples = [{"prompt": "What is 4729 + 386?", "completions": completions}]
    stage.finish(
        {
            "pair_accuracy": 0.884,
            "ceiling": 0.921,
            "rank_correlation": 0.71,
            "apart": {"accuracy": 0.93, "longer": 0.61, "n": 640},
            "n": 1200,
            "n_prompts": 900,
            "n_pairs": 5400,
            "simulated": True,
            "examples": examples,
            "health": _health(),
            "by_data": [{"rankings": n, "accuracy": 0.6 + n / 5000} for n in (100, 200, 400, 800)],
            "by_depth": [{"depth": d, "last": 0.7 + d / 100, "mean": 0.7} for d in (2, 4)],
        }
    )
    _checkpoint(stage.checkpoint, "cccc", "laptop:reward", "reward", ["bbbb"], {"pair_accuracy": 0.884})


def _health() -> dict[str, Any]:
    """Of made-up scores that are right on four of five pairs, and of people who are of one mind on most."""
    rng = random.Random(3)
    rankings, scores = [], []
    for i in range(300):
        lengths = rng.sample(range(1, 60), 2)
        answers = tuple((Message("assistant", "x" * n),) for n in lengths)
        votes = ((1, 2), (1, 2), (1, 2) if rng.random() < 0.9 else (2, 1))
        rankings.append(
            Ranking((Message("user", f"{i}?"),), answers, (1, 2), votes=votes, margin=rng.choice((0.3, 1.0)))
        )
        scores.append([1.4, 0.0] if rng.random() < 0.8 else [0.0, 1.4])
    return health(scores, rankings, ceiling=0.95, ensemble=[scores, scores])


def _rl(run: Run, rng: random.Random) -> None:
    stage = run.stage("rl")
    for step in range(80):
        up = 1 - math.exp(-step / 25)
        direct, steps = 0.38 - 0.33 * up, 0.3 - 0.12 * up
        stage.log(
            step, proxy_reward=-0.1 + 1.5 * up + rng.gauss(0, 0.08), true_score=0.61 + 0.26 * up + rng.gauss(0, 0.03),
            kl=0.42 * up + rng.gauss(0, 0.01), entropy=0.52 - 0.29 * up + rng.gauss(0, 0.01), share_direct=direct,
            share_steps=steps, share_tool=1 - direct - steps, length=31 + 9 * up + rng.gauss(0, 1), policy_loss=-0.01,
            value_loss=0.2, clip_fraction=0.08,
        )  # fmt: skip
    before = {"share_direct": 0.4, "share_steps": 0.25, "share_tool": 0.35}
    after = {"share_direct": 0.04, "share_steps": 0.2, "share_tool": 0.76}
    numbers = {"true_sft": 0.612, "true_rl": 0.874, "p_value": 0.00004, "kl": 0.41}
    stage.finish({**numbers, "iterations": 80, "stopped": "", "before": before, "after": after})
    _checkpoint(stage.checkpoint, "dddd", "laptop:rl", "rl", ["bbbb", "cccc"], {"true_rl": 0.874})


def _eval(run: Run, rng: random.Random) -> None:
    tricks = {
        trick: {skill: {"right": min(100, int(most * rng.random())), "n": 100} for skill in SKILLS}
        for trick, most in (("bare", 8), ("few_shot", 55), ("fake_transcript", 60))
    }
    question = "How many times as many people live in California as in Alaska?"
    examples = [
        {"question": question, "answers": {"base": "How many times as many people live in Ohio as in Utah?\nHow many",
                                           "sft": "About 41.2 times as many.", "rl": TOOL}},
        {"question": "What is 4729 + 386?", "answers": {"base": "What is 4729 + 386?", "sft": "5,005", "rl": TOLD}},
        {"question": "Sort: pear, fig, apple", "answers": {"base": "", "sft": "apple, fig", "rl": "apple, fig, pear"}},
    ]  # fmt: skip
    run.stage("eval").finish(
        {"skills": skills(), "base_tricks": tricks, "diversity": diversity(names=True), "examples": examples}
    )


def _arena(run: Run, rng: random.Random) -> None:
    rates = {"rl": {"sft": 0.78, "base": 0.96}, "sft": {"rl": 0.22, "base": 0.88}, "base": {"rl": 0.04, "sft": 0.12}}
    examples = [
        {"prompt": "Reverse: stone", "model_a": "sft", "answer_a": "enots", "model_b": "rl",
         "answer_b": "enots", "winner": "tie"},
        {"prompt": "What is 57 * 12?", "model_a": "rl", "answer_a": "57 * 12 = 684", "model_b": "base",
         "answer_b": "57 * 12 = 60\n57", "winner": "a"},
    ]  # fmt: skip
    run.stage("arena").finish({"leaderboard": leaderboard(), "win_rates": rates, "examples": examples})


def _checkpoint(folder: Path, id_: str, name: str, stage: str, parents: list[str], metrics: dict[str, float]) -> None:
    names = {
        "aaaa": ("laptop:pretrain", "pretrain"),
        "bbbb": ("laptop:sft", "sft"),
        "cccc": ("laptop:reward", "reward"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    told = [{"id": p * 4, "name": names[p][0], "stage": names[p][1]} for p in parents]
    manifest = {
        "format": 1,
        "id": id_ * 4,
        "name": name,
        "stage": stage,
        "parents": told,
        "metrics": metrics,
        "files": {},
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


MAKERS = {
    "collect": _collect, "tokenize": _tokenize, "pretrain": _pretrain, "sft": _sft, "reward": _reward, "rl": _rl,
    "eval": _eval, "arena": _arena,
}  # fmt: skip
