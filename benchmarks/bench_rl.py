"""Completions per second of policy optimisation: GRPO, ours against trl's trainer with the generation of transformers.

    python benchmarks/bench_rl.py [--pairs 5] [--updates 4] [--prompts 16 --samples 4 --tokens 64]
                                  [--ends 0.03 --part 1024] [--dtype float32,bfloat16] [--plain] [--torch-engine]
                                  [--device cuda]

One Qwen3 shape of about ten million parameters with random weights, one tokenizer, the same prompts, samples, most
tokens and number of updates, a reward that costs nothing (the share of digits in the answer), a reference model, one
update per batch, Adam. With `--dtype bfloat16` both sides train in it (the peer's own default) over float32 weights;
with two, ours trains in the first and the peer in the second. Gate first: both sides find the same log-probabilities
for the same ids within 1e-4 in float32. Then, in turn, a few iterations of each; the first one of each is not counted.
What an iteration of ours spends on drawing, on scoring (reward, reference and log-probabilities) and on training is
told apart; of the peer, what its trainer spends on drawing and scoring together, and on the rest. An untrained model
hardly ever ends a turn, so that nearly all answers have the most tokens there may be; with `--ends` it is made to end
its turn after about that share of tokens, as answers of a trained model are of many lengths, and learns next to
nothing, or it would unlearn that. The mean is told for both.
`--part` lets ours update in parts of like length (`rl.ppo.part_tokens`). `--device` puts both sides on a GPU, where
ours draws in bfloat16 if it trains in it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pairs
import torch
from twins import stir

from stateofgpt.assistant.session import Session, Turn
from stateofgpt.data.skills import Problem, final_text
from stateofgpt.infer.engine import Engine, SamplingParams
from stateofgpt.model.checkpoint import load_model, save_checkpoint
from stateofgpt.model.device import CPU, wait
from stateofgpt.model.form import Form
from stateofgpt.model.gpt import GPT
from stateofgpt.rl.group import GroupConfig, GroupOptimization
from stateofgpt.rl.optimization import UpdateConfig
from stateofgpt.rl.rollout import policy_logprobs, rollouts_of
from stateofgpt.rl.scoring import VerifiedScorer
from stateofgpt.text.chat import ChatFormat, Conversation, Message
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train.loop import LoopConfig
from stateofgpt.train.loss import Way
from stateofgpt.train.optim import OptimConfig

LR, KL = 1e-5, 0.04
WORDS = ["What", "is", "the", "answer", "Say", "a", "word", "or", "two", "about", "it"]
NO_LR = 1e-9  # where turns end by the one number that all tokens share, the first step of 1e-5 unlearns it
Sides = dict[str, Any]


def digits(text: str) -> float:
    """The share of digits in a text."""
    return sum(c.isdigit() for c in text) / max(1, len(text))


def question(i: int, words: int = 0) -> Conversation:
    """Prompt number i, after some made-up words of its own to read."""
    drawn = random.Random(f"words {i}").choices(WORDS, k=words)
    return (Message("user", " ".join([*drawn, f"What is {137 * i + 12} + {59 * i + 7}?"])),)


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """A checkpoint that both sides load."""
    words = (f"What is {i} + {i * i}? The answer is {i + i * i}. Say a word or two about it." for i in range(3000))
    tokenizer = Tokenizer.train(words, options.vocab)
    vocab, longest = -(-max(options.vocab, tokenizer.vocab_size) // 64) * 64, options.tokens + 64 + 2 * options.words
    model = GPT(Form(tied=not options.ends).shape(options.width, options.layers, vocab, longest))
    model.init_weights(torch.Generator().manual_seed(0))
    stir(model, 0.02)
    if options.ends:
        end_with(model, ChatFormat(tokenizer).end, options.ends)
    save_checkpoint(folder, model, tokenizer=tokenizer, stage="sft", run="bench", parents=[], metrics={})


@torch.no_grad()
def end_with(model: GPT, end: int, share: float) -> None:
    """Let the model end its turn after about `share` of all tokens, whatever they are: the first of its hidden numbers
    is the same for every token, and nothing but the end's logit looks at it."""
    model.model.embed_tokens.weight[:, 0] = model.model.embed_tokens.weight.std()
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[end] = 0.0
    ids = torch.randint(model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(2))
    hidden = model.model(ids)
    others = model.lm_head(hidden).logsumexp(-1).mean()
    odds = torch.tensor(share / (1.0 - share))
    model.lm_head.weight[end, 0] = (others + odds.log()) / hidden[..., 0].mean()


class Ours:
    """Iterations of this project's GRPO."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.chat = ChatFormat(Tokenizer.load(folder))
        self.device = options.device
        policy = load_model(folder).to(self.device)
        adam = LoopConfig(optim=OptimConfig(lr=options.lr, beta2=0.999, weight_decay=0.0, use_muon=False))
        self.learner = GroupOptimization(
            "grpo",
            policy,
            load_model(folder).to(self.device),
            VerifiedScorer(self._score, end_id=self.chat.end),
            UpdateConfig(epochs=1, minibatches=1, policy=adam, part_tokens=options.part),
            GroupConfig(kl_loss=KL),
            group=options.samples,
            max_tokens=options.tokens,
            pad_id=self.chat.tokenizer.pad,
            way=Way(options.ours, fused=not options.plain and self.device == CPU, device=self.device),
            logprobs="engine" if options.ours == "float32" else "training",
        )
        self.learner.scores = self._scores  # type: ignore[method-assign]
        precision: dict[str, Any] = {"dtype": torch.float32} if options.ours == "float32" else {}  # else the usual one
        batch, native = options.prompts * options.samples, not options.torch_engine
        engine = Engine(policy, max_batch=batch, native=native, **precision)
        self.session = Session(engine, self.chat)

    def _score(self, problem: Problem, messages: Conversation) -> float:
        return digits(final_text(messages))

    def _scores(self, turns: Sequence[Turn], problems: Sequence[Problem | None] = ()) -> torch.Tensor:
        """Of answers that did not end too: the peer scores them all."""
        return torch.tensor([digits(final_text(turn.messages)) for turn in turns])

    def draw(self, i: int) -> list[Turn]:
        """The answers of iteration i."""
        self.session.engine.refresh()  # type: ignore[attr-defined]
        asked = [question(i * self.options.prompts + p, self.options.words) for p in range(self.options.prompts)]
        params = SamplingParams(max_tokens=self.options.tokens, temperature=1.0, seed=i)
        return self.session.converse([q for q in asked for _ in range(self.options.samples)], params)

    def run(self, updates: int) -> Sides:
        """Seconds of every iteration but the first, split."""
        spent: dict[str, list[float]] = {"generating": [], "scoring": [], "training": []}
        lengths = []
        for i in range(updates + 1):
            marks = [time.perf_counter()]
            turns = self.draw(i)
            marks.append(time.perf_counter())
            experience, watched = self.learner.experience(turns)
            marks.append(time.perf_counter())
            self.learner.update(experience, torch.Generator().manual_seed(i), 1.0, watched["kl"])
            wait(self.device)
            marks.append(time.perf_counter())
            if i:
                for name, start, end in zip(spent, marks, marks[1:], strict=False):
                    spent[name].append(end - start)
                lengths.append(watched["length"])
        return {"seconds": sum(map(sum, spent.values())), "length": fmean(lengths),
                "split": {name: sum(values) for name, values in spent.items()}}  # fmt: skip


def theirs(folder: Path, options: argparse.Namespace, updates: int) -> Sides:
    """The same by trl's GRPOTrainer, between the ends of its first and its last step."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            self.ends.append(time.perf_counter())

    lengths: list[float] = []

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(fmean(map(len, completion_ids)))
        return [digits(c[-1]["content"]) for c in completions]

    asked = [
        {"prompt": [{"role": "user", "content": question(i, options.words)[0].content}]}
        for i in range((updates + 1) * options.prompts)
    ]
    # with a fingerprint, so that none is made: datasets 5.2 cannot make one of a table of pyarrow 26
    rows = Dataset(InMemoryTable(pyarrow.Table.from_pylist(asked)), fingerprint="questions")
    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=options.prompts * options.samples,
            num_generations=options.samples,
            max_completion_length=options.tokens,
            max_steps=updates + 1,
            learning_rate=options.lr,
            beta=KL,
            loss_type="grpo",
            temperature=1.0,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=options.theirs == "bfloat16",
            use_cpu=options.device == CPU,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            logging_steps=10**6,
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        clock = Clock()
        clock.ends = []
        trainer = GRPOTrainer(
            model, reward, args, rows, processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[clock],
        )  # fmt: skip
        drawing: list[float] = []
        inner = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            start = time.perf_counter()
            made = inner(inputs)
            drawing.append(time.perf_counter() - start)
            return made

        trainer._generate_and_score_completions = timed
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[0]
    both = sum(drawing[1:])
    return {"seconds": seconds, "length": fmean(lengths[1:]),
            "split": {"generating and scoring": both, "training": seconds - both}}  # fmt: skip


@torch.no_grad()
def gate(folder: Path, options: argparse.Namespace) -> None:
    """Both sides, and our engine, find the same log-probabilities."""
    from transformers import AutoModelForCausalLM

    ours = Ours(folder, argparse.Namespace(**{**vars(options), "ours": "float32"}))
    turns = ours.draw(0)[:8]
    rollouts = rollouts_of(turns, ours.chat.tokenizer.pad).to(ours.learner.device)
    mine, _ = policy_logprobs(ours.learner.policy, rollouts, ours.learner.way)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(ours.device)
    logits = peer(input_ids=rollouts.inputs).logits.log_softmax(-1)
    found = logits.gather(-1, rollouts.targets[..., None])[..., 0]
    apart = float(((mine - found) * rollouts.mask).abs().max())
    drawn = max(
        abs(a - b)
        for row, t in enumerate(turns)
        for a, b in zip(mine[row].cpu()[rollouts.sampled[row]].tolist(), t.logprobs, strict=True)
    )
    print(f"gate: log-probabilities {apart:.1e} from transformers', {drawn:.1e} from the engine's", flush=True)
    if max(apart, drawn) > 1e-4:
        raise SystemExit("the sides do not compute the same")


def told(name: str, side: Sides, completions: int) -> str:
    """One line about one side."""
    parts = ", ".join(f"{part} {seconds / side['seconds']:.0%}" for part, seconds in side["split"].items())
    return f"{name} {completions / side['seconds']:.2f} completions per second ({parts}; {side['length']:.0f} tokens)"


def main() -> None:
    """Gate, then pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = {
        "pairs": 5,
        "updates": 4,
        "prompts": 16,
        "samples": 4,
        "tokens": 64,
        "words": 0,
        "width": 320,
        "layers": 7,
        "vocab": 2048,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ends", type=float, default=0.0, help="share of tokens after which a turn ends")
    parser.add_argument("--part", type=int, help="tokens of answers that ours updates together")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16, or ours and the peer's")
    parser.add_argument("--plain", action="store_true", help="without the fused kernels")
    parser.add_argument("--torch-engine", action="store_true", help="ours draws by torch's operations")
    parser.add_argument("--device", default=CPU, help="where both sides are (default cpu)")
    options = parser.parse_args()
    options.lr = NO_LR if options.ends else LR
    options.ours, options.theirs = (options.dtype.split(",") * 2)[:2]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        prepare(folder, options)
        gate(folder, options)
        n_params = load_model(folder).n_params()
        completions = options.updates * options.prompts * options.samples
        mine: list[Sides] = []
        peer: list[Sides] = []
        for number in range(options.pairs):
            mine.append(Ours(folder, options).run(options.updates))
            peer.append(theirs(folder, options, options.updates))
            ratio = peer[-1]["seconds"] / mine[-1]["seconds"]
            both = f"{told('ours', mine[-1], completions)}; {told('trl', peer[-1], completions)}"
            print(f"{number + 1}: {both}; {ratio:.2f} times", flush=True)
    ratios = [p["seconds"] / m["seconds"] for m, p in zip(mine, peer, strict=True)]
    print(f"{pairs.spread(ratios)} times the completions per second, {n_params / 1e6:.1f}M parameters")
    result = {
        "ratio": median(ratios),
        "ratios": ratios,
        "ours": [completions / m["seconds"] for m in mine],
        "trl": [completions / p["seconds"] for p in peer],
        "split": {name: median(m["split"][name] / m["seconds"] for m in mine) for name in mine[0]["split"]},
        "split_trl": {name: median(p["split"][name] / p["seconds"] for p in peer) for name in peer[0]["split"]},
        "n_params": n_params,
    }
    print(json.dumps({"machine": pairs.machine(), "asked": vars(options), **result}))


if __name__ == "__main__":
    main()
