"""Evaluation: what each model can do, what the base model can be prompted into, and what RLHF costs in diversity.

Owns which models are asked what and how often. Prompts and judging live in `eval/suites.py`, measures in `eval/`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stateofgpt.assistant.session import Session
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.data.prompts import PromptConfig, prompts
from stateofgpt.data.skills import SKILLS, Problem, final_text, known_names, read_name
from stateofgpt.errors import RunError
from stateofgpt.eval.diversity import measure_names
from stateofgpt.eval.suites import (
    bare_prompt,
    conversation,
    fake_transcript_prompt,
    few_shot_prompt,
    name_list_prompt,
    plausible_share,
    read_completion,
    read_names,
    score_suite,
    suite,
)
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model
from stateofgpt.model.gpt import GPT
from stateofgpt.run import Run, Stage
from stateofgpt.stages.place import device_of
from stateofgpt.stages.transcript import written
from stateofgpt.stages.varied import varied
from stateofgpt.stages.watch import STOPPED
from stateofgpt.stages.way import is_native
from stateofgpt.text.chat import ChatFormat, Conversation, Message
from stateofgpt.text.tokenizer import Tokenizer

KEY_SKILLS = ("arithmetic", "arithmetic_direct", "arithmetic_steps", "arithmetic_tool", "compare")
TRICK_SKILLS = (
    "arithmetic_direct",
    "arithmetic_steps",
    "fact",
    "copy",
    "reverse",
    "count",
    "sort",
    "greet",
    "identity",
)
SAMPLED = ("names",)  # nothing in particular is right
NAME_QUESTION = "Invent a name for a creature."
N_NAMES = 100
VARIED, ANSWERS = 16, 8  # prompts, and answers to each


@dataclass(frozen=True)
class Config:
    """How many held-out questions: `key` for each of the five that the talk is about, `other` for the rest, `tricks`
    for each way of prompting the base model, and `varied` of which each gets `answers` answers to see how different
    they are (None: 16 and 8). With `seconds` the questions are fewer where the machine is slow."""

    seconds: float | None = None
    key: int = 150
    other: int = 40
    tricks: int = 20
    shots: int = 3
    max_tokens: int = 170
    names_temperature: float = 1.0
    varied: int | None = None
    answers: int | None = None


def run(config: Config, run: Run) -> dict[str, Any]:
    """Measure base, SFT and RL model; returns the stage's result."""
    stage = run.stage("eval")
    with stage.timed():
        if (done := stage.result()) is not None:
            return done
        result = _Evaluation(config, run, stage).work()
        stage.finish(result)
        return result


class _Evaluation:
    def __init__(self, config: Config, run: Run, stage: Stage) -> None:
        self.config, self.run, self.stage = config, run, stage
        self.folders = {
            name: run.stage(of).checkpoint
            for name, of in (("base", "pretrain"), ("sft", "sft"), ("rl", "rl"))
            if run.stage(of).done
        }
        if "sft" not in self.folders:
            raise RunError(f"{run.root} has no finetuned model to evaluate yet; run `sog sft` first")
        self.tokenizer = Tokenizer.load(self.folders["sft"])
        self.chat = ChatFormat(self.tokenizer)
        self.native, self.device = is_native(run), device_of(run)

    def work(self) -> dict[str, Any]:
        skills: dict[str, Any] = {}
        answers: dict[str, dict[str, str]] = {}
        diversity: dict[str, Any] = {}
        models = {name: load_model(folder).to(self.device) for name, folder in self.folders.items()}
        stopped = self.run.stage("rl").dir / STOPPED  # what a guard of reinforcement learning gave up
        scale = self.stage.decide("scale", lambda: {"scale": self._scale(models["sft"])})["scale"]
        tricks = self._tricks(models["base"], scale) if "base" in models else {}
        for name, model in models.items():
            if name == "base":
                skills[name] = tricks["fake_transcript"]
            else:
                skills[name], answers[name] = self._skills(model, scale)
            diversity[name] = self._names(name, model)
        kept = {**models, **({"rl_stopped": load_model(stopped).to(self.device)} if stopped.exists() else {})}
        variety = {name: self._variety(name, model, scale) for name, model in kept.items()}
        questions = list(answers["sft"])
        if "base" in models:
            answers = {"base": self._tricked(models["base"], questions), **answers}
        examples = [{"question": q, "answers": {name: told[q] for name, told in answers.items()}} for q in questions]
        return {
            "skills": skills,
            "base_tricks": tricks,
            "diversity": diversity,
            "variety": variety,
            "examples": examples,
            "scale": scale,
        }

    # ---- skills ---------------------------------------------------------------------------------------------------

    def _problems(self, skill: str, scale: float) -> list[Problem]:
        n = self.config.key if skill in KEY_SKILLS else self.config.other
        return suite(skill, max(4, round(n * scale)), self.run.seed)

    def _scale(self, model: GPT) -> float:
        """1, or less where a trial says that everything would take longer than `seconds`."""
        if self.config.seconds is None:
            return 1.0
        trial = suite("arithmetic_steps", 24, self.run.seed)
        session = Session(Engine(model, max_batch=96, native=self.native), self.chat, Toolbox())
        start = time.perf_counter()
        session.converse([conversation(p) for p in trial], self._params(0.0))
        per_question = (time.perf_counter() - start) / len(trial)
        key, other = len(KEY_SKILLS) * self.config.key, (len(SKILLS) - len(KEY_SKILLS)) * self.config.other
        varied = 3 * (self.config.varied or VARIED) * (self.config.answers or ANSWERS)
        whole = per_question * (2 * (key + 0.4 * other) + 3 * len(TRICK_SKILLS) * self.config.tricks + varied)
        return min(1.0, self.config.seconds / max(1e-9, whole))

    def _params(self, temperature: float, seed: int = 0) -> SamplingParams:
        return SamplingParams(max_tokens=self.config.max_tokens, temperature=temperature, seed=seed)

    def _skills(self, model: GPT, scale: float) -> tuple[dict[str, Any], dict[str, str]]:
        """Answers to held-out questions of every skill; counts, and two answers of each to show.

        They are greedy, but for skills of which anything new is right: there the likeliest answer is nearly the same to
        every wording, and counting it forty times would say nothing.
        """
        session = Session(Engine(model, max_batch=96, native=self.native), self.chat, Toolbox())
        asked = {skill: self._problems(skill, scale) for skill in SKILLS}
        free = {skill: asked[skill] for skill in SAMPLED}
        told = self._answered(session, {s: ps for s, ps in asked.items() if s not in free}, self._params(0.0))
        told |= self._answered(session, free, self._params(self.config.names_temperature, self.run.seed))
        counts: dict[str, Any] = {}
        shown: dict[str, str] = {}
        for skill, problems in asked.items():
            counts[skill] = score_suite(problems, told[skill])
            shown |= {p.question: written(m) for p, m in list(zip(problems, told[skill], strict=True))[:2]}
        return counts, shown

    @staticmethod
    def _answered(
        session: Session, asked: dict[str, list[Problem]], params: SamplingParams
    ) -> dict[str, list[Conversation]]:
        """The answers to the problems of each skill, all drawn together."""
        turns = iter(session.converse([conversation(p) for problems in asked.values() for p in problems], params))
        return {skill: [next(turns).messages for _ in problems] for skill, problems in asked.items()}

    # ---- the base model -------------------------------------------------------------------------------------------

    def _tricks(self, model: GPT, scale: float) -> dict[str, Any]:
        """The base model asked barely, after a few examples, and inside a fake transcript."""
        rng = random.Random(f"tricks {self.run.seed}")
        ways: dict[str, Callable[[str, Problem], str]] = {
            "bare": lambda skill, p: bare_prompt(p),
            "few_shot": lambda skill, p: few_shot_prompt(skill, self._shots(skill), p, rng),
            "fake_transcript": lambda skill, p: fake_transcript_prompt(p),
        }
        asked = {s: suite(s, max(4, round(self.config.tricks * scale)), self.run.seed) for s in TRICK_SKILLS}
        prompts = [make(skill, p) for make in ways.values() for skill, ps in asked.items() for p in ps]
        told = iter(complete_plainly(model, self.tokenizer, prompts, temperature=0.0, native=self.native))
        out: dict[str, Any] = {}
        for way in ways:
            out[way] = {s: score_suite(ps, [next(told) for _ in ps]) for s, ps in asked.items()}
        return out

    def _shots(self, skill: str) -> int:
        """As many examples as fit beside the answer: written-out sums are long."""
        return 1 if skill == "arithmetic_steps" else self.config.shots

    def _tricked(self, model: GPT, questions: Sequence[str]) -> dict[str, str]:
        """What the base model says to questions inside a fake transcript."""
        texts = [fake_transcript_prompt(Problem("", question, "", "")) for question in questions]
        told = complete_plainly(model, self.tokenizer, texts, temperature=0.0, native=self.native)
        return {question: written(answer) for question, answer in zip(questions, told, strict=True)}

    # ---- how different answers are --------------------------------------------------------------------------------

    def _variety(self, name: str, model: GPT, scale: float) -> dict[str, float]:
        n = max(4, round((self.config.varied or VARIED) * scale))
        asked = prompts(self.run.seed, n, PromptConfig(), "heldout", 30_000)
        each, most = self.config.answers or ANSWERS, self.config.max_tokens
        seed, chat = self.run.seed * 1_000_003 + 7, name != "base"
        return varied(model, self.tokenizer, asked, each, chat=chat, max_tokens=most, seed=seed, native=self.native)

    # ---- entropy and names ----------------------------------------------------------------------------------------

    def _names(self, name: str, model: GPT) -> dict[str, Any]:
        """A hundred invented names at temperature 1: a list continued by the base model, questions to the others."""
        if name == "base":
            names, rows = self._listed_names(model)
        else:
            params = self._params(self.config.names_temperature, self.run.seed)
            session = Session(Engine(model, max_batch=N_NAMES, native=self.native), self.chat, Toolbox())
            question: Conversation = (Message("user", NAME_QUESTION),)
            turns = session.converse([question] * N_NAMES, params)
            names = [read_name(final_text(t.messages)) or "" for t in turns]
            rows = [([*t.prompt_ids, *t.ids], len(t.prompt_ids)) for t in turns]
        measured = measure_names(names, known_names())
        return {
            **measured,
            "entropy": mean_token_entropy(model, rows),
            "plausible": plausible_share(names),
            "n": len(names),
            "names": names,
        }

    def _listed_names(self, model: GPT) -> tuple[list[str], list[tuple[list[int], int]]]:
        names: list[str] = []
        rows: list[tuple[list[int], int]] = []
        rng = random.Random(f"names {self.run.seed}")
        engine = Engine(model, max_batch=32, native=self.native)
        for attempt in range(8):
            prompts = [self._document(name_list_prompt(rng)) for _ in range(32)]
            params = SamplingParams(
                max_tokens=60,
                temperature=self.config.names_temperature,
                seed=self.run.seed * 100 + attempt,
                stop_ids=(self.tokenizer.eot,),
            )
            for prompt, made in zip(prompts, engine.complete(prompts, params), strict=True):
                names += read_names(self.tokenizer.decode(made.ids, inner=True))
                rows.append(([*prompt, *made.ids], len(prompt)))
            if len(names) >= N_NAMES:
                break
        return names[:N_NAMES], rows[:32]

    def _document(self, text: str) -> list[int]:
        return [self.tokenizer.eot, *self.tokenizer.encode(text)]


def complete_plainly(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    temperature: float,
    seed: int = 0,
    max_tokens: int = 110,
    native: bool = False,
) -> list[Conversation]:
    """A base model's continuations of plain texts, read as answers; the oldest words of a long prompt are dropped."""
    room = model.config.max_position_embeddings - max_tokens
    ids = [[tokenizer.eot, *tokenizer.encode(text)[-(room - 1) :]] for text in prompts]
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop_ids=(tokenizer.eot,))
    made = Engine(model, max_batch=96, native=native).complete(ids, params)
    return [read_completion(tokenizer.decode(completion.ids, inner=True)) for completion in made]


@torch.no_grad()
def mean_token_entropy(model: GPT, rows: Sequence[tuple[list[int], int]]) -> float:
    """Mean entropy in nats of the next-token distribution at every sampled place; rows are (ids, length of prompt)."""
    device = model.lm_head.weight.device
    sums, n = [], 0
    for ids, prompt in rows:
        logits = model(torch.tensor([ids[:-1]]).to(device, non_blocking=True))[0, prompt - 1 :].float()
        logprobs = torch.log_softmax(logits, -1)
        sums.append(-(logprobs.exp() * logprobs).sum())
        n += len(logits)
    return sum(torch.stack(sums).cpu().tolist() if sums else (), 0.0) / max(1, n)
