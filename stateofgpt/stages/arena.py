"""The arena: blind pairwise battles between the tricked base model, SFT and RL, and the leaderboard they give.

Owns who fights whom over what. The judge is the labeller without noise, who sees two answers and no names; ratings are
`eval/arena.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from stateofgpt.assistant.session import Session
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import Problem
from stateofgpt.errors import RunError
from stateofgpt.eval.arena import Battle, leaderboard, win_rates
from stateofgpt.eval.suites import conversation, fake_transcript_prompt
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model
from stateofgpt.model.gpt import GPT
from stateofgpt.rl.labeller import SimulatedLabeller
from stateofgpt.run import Run
from stateofgpt.stages.evaluate import complete_plainly
from stateofgpt.stages.place import device_of
from stateofgpt.stages.transcript import written
from stateofgpt.stages.way import is_native
from stateofgpt.text.chat import ChatFormat, Conversation
from stateofgpt.text.tokenizer import Tokenizer

EXAMPLES = 8


@dataclass(frozen=True)
class Config:
    """How many held-out prompts every pair of models is asked, and how warm their answers are."""

    prompts: int = 640
    temperature: float = 0.7
    max_tokens: int = 150
    mixture: PromptConfig = field(default_factory=PromptConfig)


def run(config: Config, run: Run) -> dict[str, Any]:
    """Let the run's models fight; returns the stage's result."""
    stage = run.stage("arena")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        folders = {"base": run.stage("pretrain"), "sft": run.stage("sft"), "rl": run.stage("rl")}
        present = {name: s.checkpoint for name, s in folders.items() if s.done}
        if len(present) < 2:
            raise RunError(f"{run.root} has fewer than two models, and a battle needs two; run `sog sft` first")
        asked = prompts(run.seed, config.prompts, config.mixture, "heldout", 20_000)
        tokenizer, native = Tokenizer.load(present["sft"]), is_native(run)
        answers: dict[str, list[Conversation]] = {}
        for name, folder in present.items():
            model = load_model(folder).to(device_of(run))
            if name == "base":
                texts = [fake_transcript_prompt(p) for p in asked]
                answers[name] = complete_plainly(
                    model, tokenizer, texts, temperature=config.temperature, seed=run.seed, native=native
                )
            else:
                answers[name] = answers_of(model, tokenizer, [conversation(p) for p in asked], config, run.seed, native)
        result = hold(asked, answers, SimulatedLabeller(run.seed), run.seed)
        stage.finish(result)
        return result


def answers_of(
    model: GPT, tokenizer: Tokenizer, asked: Sequence[Conversation], config: Config, seed: int, native: bool = False
) -> list[Conversation]:
    """What an assistant answers, tools in hand."""
    session = Session(Engine(model, max_batch=96, native=native), ChatFormat(tokenizer), Toolbox())
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=seed)
    return [turn.messages for turn in session.converse(asked, params)]


def hold(
    asked: list[Problem], answers: dict[str, list[Conversation]], judge: SimulatedLabeller, seed: int
) -> dict[str, Any]:
    """All battles over all problems, as the labeller without noise judges them."""
    return battle([p.question for p in asked], answers, lambda i, a, b: judge.prefer(asked[i], a, b), seed)


def battle(
    asked: Sequence[str],
    answers: Mapping[str, Sequence[Conversation]],
    prefer: Callable[[int, Conversation, Conversation], float],
    seed: int,
) -> dict[str, Any]:
    """All battles over all prompts, sides drawn by lot: the leaderboard, win rates and some examples.

    `prefer(i, a, b)` judges two answers to prompt i: 1.0 where a is better, 0.0 where b is, else a tie.
    """
    rng = random.Random(f"sides {seed}")
    battles: list[Battle] = []
    examples: list[dict[str, Any]] = []
    pairs = list(combinations(answers, 2))
    step = max(1, len(asked) // EXAMPLES * 3)
    for number, (one, other) in enumerate(pairs):
        shown = range(number * step // len(pairs), len(asked), step)  # other prompts of each pair
        for i, question in enumerate(asked):
            a, b = (one, other) if rng.random() < 0.5 else (other, one)
            verdict = prefer(i, answers[a][i], answers[b][i])
            winner = "a" if verdict == 1.0 else "b" if verdict == 0.0 else "tie"
            battles.append(Battle(a, b, winner, str(i)))  # type: ignore[arg-type]
            if i in shown:
                examples.append(
                    {
                        "prompt": question,
                        "model_a": a,
                        "answer_a": written(answers[a][i]),
                        "model_b": b,
                        "answer_b": written(answers[b][i]),
                        "winner": winner,
                    }
                )
    return {
        "leaderboard": leaderboard(battles, seed=seed),
        "win_rates": win_rates(battles),
        "battles": len(battles),
        "examples": examples,
    }
