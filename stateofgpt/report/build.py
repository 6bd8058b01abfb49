"""`sog report`: a run's folder in, one HTML file out that opens anywhere, with no network and no script.

Owns the order of the chapters, the head and the foot of the page. What is in them is in `training`, `assistants` and
`verdicts`. It reads only what the run wrote, so it can be built at any time, also while the run is at work, and the
same folder always makes the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from stateofgpt.report import assistants, health, overoptimise, pages, sizes, training, verdicts
from stateofgpt.report.pages import count, decimal, duration
from stateofgpt.report.record import MODELS, Record, mapping, number
from stateofgpt.run import Run, write_atomic

CHAPTERS = (
    training.pipeline,
    training.mixture,
    training.tokenization,
    training.pretraining,
    training.lesson,
    assistants.base_tricks,
    assistants.finetuning,
    assistants.reward,
    health.health,
    assistants.reinforcement,
    assistants.skills,
    verdicts.diversity,
    verdicts.leaderboard,
    verdicts.family,
    verdicts.cost,
    verdicts.onward,
)

NEEDS: dict[object, str] = {  # chapters about a stage: left out where the recipe has none such
    training.pipeline: "rl",
    assistants.base_tricks: "eval",
    assistants.finetuning: "sft",
    assistants.reward: "reward",
    health.health: "reward",
    assistants.reinforcement: "rl",
    assistants.skills: "eval",
    verdicts.diversity: "eval",
    verdicts.leaderboard: "arena",
}


GOALS = {
    "collect": "a mixture", "tokenize": "tokens", "pretrain": "a base model", "sft": "a finetuned model",
    "reward": "a reward model",
} | dict.fromkeys(("rl", "eval", "arena"), "reinforcement learning from human feedback")  # fmt: skip
LAST_FIGURE = {True: "from text to assistant", False: "from text to model"}
OVEROPTIMISE = "overoptimise"  # a recipe with a page of its own


def build(run_dir: Path) -> Path:
    """Write `report.html` of the run in `run_dir` and return its path. RunError if there is no run."""
    run = Run.read(run_dir)
    if run.recipe == OVEROPTIMISE:
        return overoptimise.build(run_dir)
    path = run.report_path
    write_atomic(path, render(Record.read(run_dir)))
    return path


def render(record: Record) -> str:
    """The page."""
    title = _title(record)
    chapters = [chapter for chapter in CHAPTERS if NEEDS.get(chapter, record.order[0]) in record.order]
    if _of_votes(record):
        chapters = [health.health, verdicts.family]
    if _of_prompts(record):
        chapters = [assistants.reinforcement, verdicts.family]
    if record.sizes:
        chapters.insert(chapters.index(training.pretraining) + 1, sizes.sizes)
    return pages.page(title, _head(record, title), [chapter(record) for chapter in chapters], _foot(record))


def _of_votes(record: Record) -> bool:
    """Whether the run is a reward model made of a file of votes, with no stage before it."""
    return record.order == ("reward",)


def _of_prompts(record: Record) -> bool:
    """Whether the run is a policy made of a file of prompts, with no stage before it."""
    return record.order == ("rl",)


def _total(record: Record) -> float:
    told = number(mapping(record.summary.get("wall_seconds")).get("total"))
    return told if told is not None else sum(record.wall_seconds().values())


def _title(record: Record) -> str:
    total = _total(record)
    if _of_votes(record):
        return "A reward model, made of people’s votes"
    if _of_prompts(record):
        return "A policy, trained on people’s prompts"
    what, made = ("An assistant", "raised") if "sft" in record.order else ("A base model", "trained")
    if not (record.leaderboard() if "arena" in record.order else record.result(record.order[-1])):
        return f"{what} in the making"
    if total < 90:
        return f"{what}, {made} in {total:.0f} seconds"
    return f"{what}, {made} in " + (f"{total / 60:.0f} minutes" if total < 5400 else f"{total / 3600:.1f} hours")


def _head(record: Record, title: str) -> Markup:
    trained, machine = record.part("pretrain"), mapping(record.summary.get("machine"))
    cores = number(machine.get("cores")) or number(machine.get("cpu_count"))
    where = f" on {cores:.0f} CPU cores" if cores else ""
    pipeline = "the training pipeline" if "rl" in record.order else "the beginning of the training pipeline"
    intro = (
        f"From raw text to {GOALS[record.order[-1]]}{where}: {pipeline} of Andrej "
        "Karpathy’s talk “State of GPT”, run for real, with the talk’s pictures made from this run."
    )
    if _of_votes(record):
        intro = "From votes on pairs of answers to a model that predicts them, and what of that can be trusted."
    if _of_prompts(record):
        intro = "From prompts and a reward model to a policy that earns more of it, and how far it went for that."
    time = "in all" if len(record.order) == 1 else LAST_FIGURE["rl" in record.order]
    figures = [
        (count(number(trained.get("n_params"))), "parameters"),
        (count(number(trained.get("tokens"))), "tokens read"),
        (decimal(number(trained.get("val_bpb"))), "bits per byte, held out"),
        (duration(_total(record)) if record.seconds or record.summary else "–", time),
    ]
    cells = Markup("").join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(n, v) for v, n in figures if v != "–")
    examples = assistants.examples_of(record)
    first = Markup("")
    if examples:
        lead = Markup('<p class="kicker">One question, the models of this run</p>')
        first = Markup('<div class="hero">{}</div>').format(lead + assistants.question_block(examples[0], MODELS))
    return Markup(
        '<p class="kicker">State of GPT · {}</p><h1>{}</h1><p class="intro">{}</p><dl class="figures">{}</dl>{}'
    ).format(f"recipe {record.recipe}, seed {record.seed}", title, intro, cells, first)


def _foot(record: Record) -> Markup:
    words = (
        f"Made by stateofgpt from the run {record.name} (recipe {record.recipe}, seed {record.seed}). Every number "
        "here is in its summary.json, result.json, metrics.jsonl and samples.jsonl."
    )
    if not record.problems:
        return pages.paragraph(words)
    items = Markup("").join(Markup("<li>{}</li>").format(pages.clean(problem, 300)) for problem in record.problems)
    return pages.paragraph(words) + Markup("<p>Not everything could be read:</p><ul>{}</ul>").format(items)
