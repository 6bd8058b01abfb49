"""The report's middle, in the talk's order: base-model tricks, finetuning, the reward model, reinforcement learning.

Owns what these chapters say and show. Knows nothing about files (`record`) or HTML (`pages`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stateofgpt.report import guards, pages
from stateofgpt.report.pages import Section, bar, count, decimal, percent, probability
from stateofgpt.report.plots import Series, line_chart
from stateofgpt.report.record import MODELS, Record, mapping, number, records, sequence, share_right

MANNERS = (("direct", "m1"), ("steps", "m2"), ("tool", "m3"))
TALKS_QUESTION = "How many times as many people live in California as in Alaska?"
EDGE = 0.08  # share of a run's updates that counts as its beginning and its end
_TURN = re.compile(r"<\|im_start\|>(system|user|assistant|tool)\n(.*?)<\|im_end\|>", re.DOTALL)
TRICKS = {"bare": "Bare question", "few_shot": "Few-shot", "fake_transcript": "Fake transcript"}


def _overall(skills: Mapping[str, Any], among: Sequence[str] | None = None) -> float | None:
    """Share right over all skills (or some), each skill counting the same."""
    counted = [value for skill, value in skills.items() if among is None or skill in among]
    shares = [share for value in counted if (share := share_right(value)) is not None]
    return sum(shares) / len(shares) if shares else None


# --- base model tricks -------------------------------------------------------------------------------------------


def base_tricks(record: Record) -> Section:
    """What a base model can be prompted into."""
    tricks = {name: mapping(value) for name, value in mapping(record.result("eval").get("base_tricks")).items()}
    id_, title = "base", "Base models can be tricked into assistants"
    if not tricks:
        gap = pages.missing("The base model has not been measured.", f"sog eval --out {record.name}")
        return Section(id_, title, "A base model completes documents; it does not answer questions.", gap, "base")
    names = [name for name in TRICKS if name in tricks] + [name for name in tricks if name not in TRICKS]
    rows: list[list[object]] = []
    for skill in _skill_names(tricks.values()):
        shares = [share_right(tricks[name].get(skill)) for name in names]
        rows.append([pages.title_of(skill), *(bar(share, "base") for share in shares)])
    overall = {name: _overall(tricks[name]) for name in names}
    rows.append([Markup("<strong>All, each the same</strong>"), *(bar(overall[name], "base") for name in names)])
    head = ["Right answers", *(TRICKS.get(name, pages.title_of(name)) for name in names)]
    finding = (
        f"Asked outright it is right on {percent(overall.get('bare'))} of the skills’ questions; "
        f"after a few solved examples on {percent(overall.get('few_shot'))}; inside a made-up transcript of a human "
        f"and a helpful assistant on {percent(overall.get('fake_transcript'))}."
    )
    return Section(
        id_, title, finding, pages.table(head, rows, caption="The same weights, prompted three ways"), "base"
    )


def _skill_names(answers: Any) -> list[str]:
    return list(dict.fromkeys(skill for skills in answers for skill in skills))


# --- finetuning --------------------------------------------------------------------------------------------------


def finetuning(record: Record) -> Section:
    """Loss on demonstrations, and what the finetuned model says."""
    id_, title = "sft", "Supervised finetuning"
    if not record.metrics.get("sft"):
        gap = pages.missing("No model has been finetuned.", f"sog sft --out {record.name}")
        return Section(id_, title, "Ideal answers, imitated.", gap, "sft")
    charts = pages.grid(
        [
            pages.figure(_curves(record, "sft", "Loss on the assistant’s tokens", ("loss", "training", "c-none", True),
                                 ("val_loss", "held out", "c-sft", False))),
            pages.figure(_curves(record, "sft", "Learning rate", ("lr", "lr", "c-sft", False), low=0.0)),
        ]
    )  # fmt: skip
    held_out = record.curve("sft", "val_loss")
    finding = "The same model and the same loss on a small set of ideal answers, counted on the assistant’s tokens only"
    finding += f": held-out loss {decimal(held_out[0][1])} to {decimal(held_out[-1][1])}." if len(held_out) > 1 else "."
    kept = record.samples.get("sft", [])
    last = max((number(sample.get("step")) or 0.0 for sample in kept), default=0.0)
    cards = [
        pages.card(pages.clean(sample.get("prompt", sample.get("question", "")), 200),
                   pages.said(sample.get("text", sample.get("answer", "")), 500))
        for sample in kept if (number(sample.get("step")) or 0.0) == last
    ][:6]  # fmt: skip
    examples = Markup("<h3>After finetuning</h3>") + pages.grid(cards, "cards three") if cards else Markup("")
    shown = [_demonstration(text) for text in sequence(record.result("sft").get("examples"))[:4]]
    ideal = (
        Markup("<h3>Ideal answers to learn from</h3>") + pages.grid(shown, "cards two") if any(shown) else Markup("")
    )
    return Section(id_, title, finding, charts + ideal + examples, "sft")


def _demonstration(text: object) -> Markup:
    """A demonstration as it is on the wire, turn by turn; what the loss counts is set in the colour of finetuning."""
    turns = _TURN.findall(text) if isinstance(text, str) else []
    parts = [
        Markup('<div class="turn {}"><b>{}</b>{}</div>').format(role, role, pages.said(said, 500))
        for role, said in turns
    ]
    return Markup('<div class="card">{}</div>').format(Markup("").join(parts)) if parts else Markup("")


def _curves(
    record: Record, stage: str, title: str, *lines: tuple[str, str, str, bool], low: float | None = None,
    high: float | None = None,
) -> Markup:  # fmt: skip
    """One chart of several metrics of a stage: (key, name, colour, noisy)."""
    series = [Series(name, record.curve(stage, key), colour, noisy) for key, name, colour, noisy in lines]
    return line_chart(series, title=title, x_name="step", y_low=low, y_high=high)


# --- the reward model --------------------------------------------------------------------------------------------


def reward(record: Record) -> Section:
    """Accuracy on held-out pairs beside what the labeller's noise allows, and rankings as examples."""
    result = record.part("reward")
    id_, title = "reward", "Reward modelling"
    if not result and not record.metrics.get("reward"):
        gap = pages.missing("No reward model has been trained.", f"sog reward --out {record.name}")
        return Section(id_, title, "Judging is easier than writing.", gap, "reward")
    accuracy, ceiling = number(result.get("pair_accuracy")), number(result.get("ceiling"))
    correlation, n = number(result.get("rank_correlation")), number(result.get("n"))
    finding = f"Of two held-out answers it prefers the one the labeller preferred {percent(accuracy, 1)} of the time"
    finding += f" (chance is 50%; the labeller’s own noise allows {percent(ceiling, 1)})." if ceiling else "."
    if (apart := mapping(result.get("apart"))) and number(apart.get("n")):
        share, longer = percent(number(apart.get("accuracy")), 1), percent(number(apart.get("longer")), 1)
        finding += f" Where one answer is clearly better, it sees which on {share} (taking the longer one: {longer})."
    rows: list[list[object]] = [
        ["Chance", bar(0.5, "none")],
        ["Reward model", bar(accuracy, "reward", percent(accuracy, 1))],
        ["Ceiling: the labeller’s noise", bar(ceiling, "none", percent(ceiling, 1))],
    ]
    table = pages.table(["Held-out pairs right", ""], rows, caption="Reward model and ceiling", text_columns=2)
    note = f"{count(n)} held-out comparisons" if n else ""
    note += f"; mean rank correlation within a prompt {decimal(correlation)}" if correlation is not None else ""
    charts = pages.grid(
        [
            pages.figure(_curves(record, "reward", "Ranking loss", ("loss", "loss", "c-reward", True))),
            pages.figure(_curves(record, "reward", "Pairs ranked right", ("accuracy", "training", "c-none", True),
                                 ("val_accuracy", "held out", "c-reward", False))),
        ]
    )  # fmt: skip
    shown = [_ranking(example) for example in records(record.result("reward").get("examples"))[:4]]
    examples = Markup("<h3>Answers, ranked</h3>") + Markup("").join(shown) if shown else Markup("")
    body = table + (pages.paragraph(note + ".", "note") if note else Markup("")) + charts + examples
    return Section(id_, title, finding, body, "reward")


def _ranking(example: dict[str, Any]) -> Markup:
    """One prompt's answers, best reward first, with the true score and the labeller's rank."""
    answers = sorted(records(example.get("completions")), key=lambda a: -(number(a.get("score")) or 0.0))
    scores = [number(answer.get("score")) or 0.0 for answer in answers]
    span = max(scores) - min(scores) if scores else 0.0
    rows: list[list[object]] = []
    for answer, score in zip(answers, scores, strict=True):
        share = (score - min(scores)) / span if span else 0.5
        rows.append([
            pages.said(answer.get("text", ""), 400),
            bar(0.04 + 0.96 * share, "reward", f"{score:+.2f}".replace("-", "−")),
            decimal(number(answer.get("true_score"))),
            decimal(number(answer.get("rank")), 0),
        ])  # fmt: skip
    head = ["Answer", "Reward", "True score", "Labeller’s rank"]
    prompt = pages.clean(example.get("prompt", ""), 240)
    return pages.table(head, rows, caption=prompt or "A prompt")


# --- reinforcement learning --------------------------------------------------------------------------------------


def _how(algorithm: str, verified: bool, began: str) -> str:
    """By what the policy learned, in words."""
    if algorithm == "ppo" and not verified:
        return f"PPO against the reward model, held near {began} by a KL penalty"
    if algorithm in ("dpo", "ipo", "kto"):
        return f"{algorithm.upper()} on ranked answers, without sampling"
    names = {"dr_grpo": "Dr. GRPO", "best_of_n": "Finetuning on the best of n", "rejection": "Rejection sampling"}
    name = names.get(algorithm, pages.clean(algorithm, 20).upper())
    return f"{name} against {'answers known to be right' if verified else 'the reward model'}"


def _gain(result: Mapping[str, Any]) -> str:
    """What came of it on held-out prompts, by the true score, or where people's prompts have none by who judged."""
    names, who = ("true_sft", "true_rl"), "the true score, which it never saw,"
    if "score_before" in result:
        alone = str(mapping(result.get("guards")).get("judge", "nobody")).startswith("nobody")
        names, who = (
            ("score_before", "score_after"),
            "its reward" if alone else "the score of a judge, which it never saw,",
        )
    before, after, p = (number(result.get(key)) for key in (*names, "p_value"))
    if before is None or after is None:
        return ""
    told = f": {who} goes from {decimal(before, 3)} to {decimal(after, 3)} on held-out prompts"
    return told + (f" (paired test, p\u00a0{probability(p)})" if p is not None else "")


def reinforcement(record: Record) -> Section:
    """Reward, truth, distance, entropy and length as training goes on, and the manners it taught."""
    id_, title = "rl", "Reinforcement learning"
    if not record.metrics.get("rl"):
        gap = pages.missing("No policy has been trained.", f"sog rl --out {record.name}")
        return Section(id_, title, "Tokens that scored well become likelier.", gap, "rl")
    result = record.part("rl")
    verified = result.get("reward") == "verified"
    began = "the SFT model" if "sft" in record.order else "the model it began with"
    finding = _how(str(result.get("algorithm", "ppo")), verified, began) + _gain(result) + "."
    if stopped := pages.clean(result.get("stopped") or "", 200).rstrip("."):
        finding += f" It stopped early: {stopped}."
    if given_up := pages.clean(result.get("given_up") or "", 200).rstrip("."):
        finding += f" Its last policy was given up: {given_up}."
    charts = [
        ("Reward: share of right answers" if verified else "Reward by the reward model", "proxy_reward"),
        ("True score", "true_score"),
        (f"KL to {began}, nats", "kl"),
        ("Entropy, nats per token", "entropy"),
        ("Tokens per answer", "length"),
    ]
    figures = [pages.figure(_curves(record, "rl", name, (key, name, "c-rl", True))) for name, key in charts]
    figures.append(pages.figure(_manner_chart(record)))
    return Section(id_, title, finding, _manners(record) + pages.grid(figures) + guards.looks(record), "rl")


def _manner_chart(record: Record) -> Markup:
    lines = [(f"share_{name}", name, f"c-{colour}", False) for name, colour in MANNERS]
    return _curves(record, "rl", "How plain arithmetic is answered, share", *lines, low=0.0, high=1.0)


def _manners(record: Record) -> Markup:
    """Two stacked bars: how plain arithmetic was answered before training and after it.

    On held-out prompts if the stage measured that, else over the first and the last updates.
    """
    result = record.result("rl")
    ends: list[list[tuple[str, float, str]]] = [[], []]
    measured = all(number(mapping(result.get(side)).get("share_direct")) is not None for side in ("before", "after"))
    for name, colour in MANNERS:
        values = [y for _, y in record.curve("rl", f"share_{name}")]
        edge = max(1, round(len(values) * EDGE))
        for end, side, part in zip(ends, ("before", "after"), (values[:edge], values[-edge:]), strict=True):
            mean = sum(part) / len(part) if part else 0.0
            held_out = number(mapping(result.get(side)).get(f"share_{name}")) or 0.0
            end.append((name, held_out if measured else mean, colour))
    if not any(share for _, share, _ in ends[0] + ends[1]):
        return Markup("")
    names = ("SFT, before", "RL, after") if measured else ("First updates", "Last updates")
    rows = [[name, pages.stacked(end)] for name, end in zip(names, ends, strict=True)]
    table = pages.table(["Plain arithmetic", ""], rows, caption="How plain arithmetic is answered", text_columns=2)
    words = {"direct": "direct guess", "steps": "written steps", "tool": "calculator"}
    return table + pages.legend((words[name], colour) for name, colour in MANNERS)


# --- three models ------------------------------------------------------------------------------------------------


def skills(record: Record) -> Section:
    """Every skill of every model on held-out questions, and the same questions answered by all."""
    measured = {name: mapping(value) for name, value in record.part("skills").items()}
    id_, title = "skills", "What each model can do"
    if not measured:
        gap = pages.missing("No model has been examined.", f"sog eval --out {record.name}")
        return Section(id_, title, "The same held-out questions for every model.", gap)
    models = [name for name in MODELS if name in measured] + [name for name in measured if name not in MODELS]
    cells = []
    for skill in _skill_names(measured.values()):
        bars = [bar(share_right(measured[name].get(skill)), pages.colour_of(name)) for name in models]
        cells.append(pages.card(pages.title_of(skill), Markup("").join(bars), "skill"))
    n = max((number(mapping(v).get("n")) or 0 for skills_ in measured.values() for v in skills_.values()), default=0)
    common = [skill for skill in _skill_names(measured.values()) if all(skill in measured[name] for name in models)]
    parts = [f"{pages.model_name(name)} {percent(_overall(measured[name], common))}" for name in models]
    finding = (
        f"Held-out questions answered right, over the {len(common)} skills that all were asked: {', '.join(parts)}."
    )
    key = pages.legend((pages.model_name(name), pages.colour_of(name)) for name in models)
    note = pages.paragraph(f"Up to {count(n)} questions a skill{_how_base_was_asked(record, measured)}.", "note")
    body = key + pages.grid(cells, "skills") + note + _examples(record, models)
    return Section(id_, title, finding, body)


def _how_base_was_asked(record: Record, measured: Mapping[str, Any]) -> str:
    tricks = mapping(record.result("eval").get("base_tricks"))
    same = [name for name, value in tricks.items() if value == measured.get("base") and name in TRICKS]
    return f"; the base model by {TRICKS[same[-1]].lower()}" if same else ""


def examples_of(record: Record) -> list[dict[str, Any]]:
    """The questions all models answered: the talk's own first, then those whose answers differ, tool calls first."""

    def rank(place: int, example: dict[str, Any]) -> tuple[bool, bool, bool, int, int]:
        answers = [str(answer) for answer in mapping(example.get("answers")).values()]
        tools = any("→" in answer or "<tool_call>" in answer for answer in answers)
        talks = str(example.get("question", "")) == TALKS_QUESTION
        return not talks, len(set(answers)) < 2, not tools, place % 2, place  # a skill has two, side by side

    found = [e for e in records(record.result("eval").get("examples")) if len(mapping(e.get("answers"))) > 1]
    order = sorted(range(len(found)), key=lambda i: rank(i, found[i]))
    return [found[i] for i in order]


def _examples(record: Record, models: Sequence[str]) -> Markup:
    blocks = [question_block(example, models) for example in examples_of(record)[1:7]]  # the first is on the title page
    if not blocks:
        return Markup("")
    note = pages.paragraph("Questions on which the models differ come first.", "note")
    return Markup("<h3>The same question, every model</h3>") + note + Markup("").join(blocks)


def question_block(example: dict[str, Any], models: Sequence[str]) -> Markup:
    """A question and the models' answers side by side."""
    answers = mapping(example.get("answers"))
    order = [name for name in models if name in answers] + [name for name in answers if name not in models]
    cards = [
        pages.card(pages.tag(name), pages.said(answers[name], 500), f"c-{pages.colour_of(name)}") for name in order
    ]
    question = Markup('<h4 class="question">{}</h4>').format(pages.clean(example.get("question", ""), 300))
    return question + pages.grid(cards, "cards three")


def names_of(value: object) -> list[str]:
    """The strings in a list."""
    return [pages.clean(name, 40) for name in sequence(value) if isinstance(name, str)]
