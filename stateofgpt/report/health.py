"""The health of a reward model, as a chapter of the report and as lines in the terminal.

Owns how it looks and reads. What was measured, and the verdict, come from a run's files as they are (`eval/health.py`
wrote them). Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from stateofgpt.report import pages
from stateofgpt.report.pages import Section, bar, count, decimal, percent
from stateofgpt.report.plots import Series, line_chart
from stateofgpt.report.record import Record, mapping, number, records, sequence

RULES = {
    "chance": "Chance",
    "longer": "Always the longer",
    "shorter": "Always the shorter",
    "first": "Always the first",
}


def health(record: Record) -> Section:
    """Whether the reward model can be trusted; empty words where the run measured nothing of it."""
    result = record.result("reward")
    found = mapping(result.get("health"))
    id_, title = "health", "Can the reward model be trusted?"
    if not found:
        gap = pages.missing("Its health has not been measured.", f"sog reward --health {record.name}:reward VOTES")
        return Section(id_, title, "What it prefers is what a policy becomes.", gap, "reward")
    verdict = mapping(found.get("verdict"))
    finding = f"Verdict: {pages.clean(verdict.get('word', ''), 40)}."
    reasons = [pages.clean(reason, 300) for reason in sequence(verdict.get("reasons"))]
    items = Markup("").join(Markup("<li>{}</li>").format(reason) for reason in reasons)
    body = Markup("<ul>{}</ul>").format(items) + _accuracy(found)
    body += pages.grid([pages.figure(chart) for chart in (_calibration(found), _by_data(result))])
    return Section(
        id_, title, finding, body + _margins(found) + _length(found) + _people(found) + _sizes(result), "reward"
    )


def _accuracy(found: Mapping[str, Any]) -> Markup:
    accuracy = mapping(found.get("accuracy"))
    rows: list[list[object]] = []
    for name, rule in mapping(found.get("baselines")).items():
        value = number(mapping(rule).get("accuracy"))
        rows.append([RULES.get(name, pages.title_of(name)), bar(value, "none", percent(value, 1)), ""])
    value = number(accuracy.get("value"))
    rows.append(["Reward model", bar(value, "reward", percent(value, 1)), _span(accuracy)])
    if (ceiling := number(found.get("ceiling"))) is not None:
        rows.append(["Ceiling: the votes\u2019 own noise", bar(ceiling, "none", percent(ceiling, 1)), ""])
    caption = f"{count(number(found.get('n_pairs')))} pairs of {count(number(found.get('n_prompts')))} prompts"
    return pages.table(["Right on", "", "95% interval"], rows, caption=caption)


def _span(interval: Mapping[str, Any]) -> str:
    low, high = number(interval.get("low")), number(interval.get("high"))
    return "" if low is None or high is None else f"{percent(low, 1)} to {percent(high, 1)}"


def _calibration(found: Mapping[str, Any]) -> Markup:
    curve = records(mapping(found.get("calibration")).get("curve"))
    points = [(number(b.get("confidence")), number(b.get("accuracy"))) for b in curve]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if len(known) < 2:
        return Markup("")
    ends = [known[0][0], known[-1][0]]
    return line_chart(
        [Series("right", known, "c-reward"), Series("sure", [(x, x) for x in ends], "c-none")],
        title="How often it is right, by how sure it is", x_name="its probability for the answer it prefers",
    )  # fmt: skip


def _by_data(result: Mapping[str, Any]) -> Markup:
    rows = [(number(r.get("rankings")), number(r.get("accuracy"))) for r in records(result.get("by_data"))]
    known = [(x, y) for x, y in rows if x and y is not None]
    if len(known) < 2:
        return Markup("")
    return line_chart(
        [Series("accuracy", known, "c-reward")], title="Held-out accuracy by votes learned from", x_name="rankings",
        log_x=True,
    )  # fmt: skip


def _margins(found: Mapping[str, Any]) -> Markup:
    rows: list[list[object]] = []
    for part in records(found.get("by_margin")):
        accuracy = mapping(part.get("accuracy"))
        value = number(accuracy.get("value"))
        rows.append([decimal(number(part.get("margin"))), bar(value, "reward", percent(value, 1)), _span(accuracy),
                     count(number(part.get("n")))])  # fmt: skip
    if not rows:
        return Markup("")
    return pages.table(["Margin", "Right on", "95% interval", "Pairs"], rows, caption="By how clear the case was")


def _length(found: Mapping[str, Any]) -> Markup:
    bias = mapping(found.get("length"))
    rows: list[list[object]] = []
    for key, name in (("longer_better", "the longer"), ("shorter_better", "the shorter")):
        part = mapping(bias.get(key))
        accuracy = mapping(part.get("accuracy"))
        value = number(accuracy.get("value"))
        rows.append([f"The votes preferred {name}", bar(value, "reward", percent(value, 1)), _span(accuracy),
                     count(number(part.get("n")))])  # fmt: skip
    note = (
        f"It takes the longer answer in {percent(number(bias.get('model_takes_longer')))} of pairs, the votes in "
        f"{percent(number(bias.get('people_take_longer')))}; its scores and lengths correlate at "
        f"{decimal(number(bias.get('correlation')))}."
    )
    table = pages.table(["Length", "Right on", "95% interval", "Pairs"], rows, caption="Is it length that it likes?")
    return table + pages.paragraph(note, "note")


def _people(found: Mapping[str, Any]) -> Markup:
    people = mapping(found.get("annotators"))
    model, others = sequence(people.get("model")), sequence(people.get("others"))
    rows = [
        [f"Annotator {i + 1}", percent(number(mine), 1), percent(number(theirs), 1)]
        for i, (mine, theirs) in enumerate(zip(model, others, strict=False))
    ]
    if not rows:
        return Markup("")
    head = ["Agrees with", "Reward model", "Majority of the other annotators"]
    return pages.table(head, rows, caption="Each annotator\u2019s votes, ties left out")


def _sizes(result: Mapping[str, Any]) -> Markup:
    rows = [
        [
            decimal(number(part.get("depth")), 0),
            percent(number(part.get("last")), 1),
            percent(number(part.get("mean")), 1),
        ]
        for part in records(result.get("by_depth"))
    ]
    if not rows:
        return Markup("")
    head = ["Blocks", "Head on the last token", "Head on the mean of tokens"]
    return pages.table(head, rows, caption="Held-out accuracy by depth, trunk frozen")


# --- the terminal ------------------------------------------------------------------------------------------------


def told(found: Mapping[str, Any]) -> list[str]:
    """The health in some lines of plain text."""
    accuracy, verdict = found["accuracy"], found["verdict"]
    lines = [f"{found['n_pairs']:,} pairs of {found['n_prompts']:,} prompts", ""]
    names = {
        "chance": "chance",
        "longer": "always the longer",
        "shorter": "always the shorter",
        "first": "always the first",
    }
    for name, rule in found["baselines"].items():
        lines.append(f"  {names.get(name, name):22} {100 * rule['accuracy']:5.1f} %")
    low, high = 100 * accuracy["low"], 100 * accuracy["high"]
    lines.append(f"  {'reward model':22} {100 * accuracy['value']:5.1f} %  ({low:.1f} to {high:.1f})")
    if found["ceiling"] is not None:
        lines.append(f"  {'ceiling':22} {100 * found['ceiling']:5.1f} %")
    for part in found["by_margin"]:
        value = part["accuracy"]["value"]
        lines.append(f"  {'margin ' + format(part['margin'], '.2f'):22} {100 * value:5.1f} %  of {part['n']:,}")
    lines += ["", f"verdict: {verdict['word']}", *(f"  {reason}" for reason in verdict["reasons"])]
    return lines
