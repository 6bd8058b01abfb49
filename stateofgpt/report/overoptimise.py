"""The picture of over-optimisation: true and proxy reward against distance, the fits, their peaks, and the guards.

Owns what this page says and shows; reads `overoptimise.json` and nothing else. The same file makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stateofgpt.errors import RunError
from stateofgpt.report import pages
from stateofgpt.report.pages import Section, count, decimal, percent
from stateofgpt.report.plots import Point, Series, line_chart
from stateofgpt.rl.overoptimisation import Form, form_at
from stateofgpt.run import Run, read_json, write_atomic

PAGE, NUMBERS = "overoptimise.html", "overoptimise.json"
FORMS: tuple[tuple[Form, str], ...] = (("best_of_n", "Best-of-n"), ("rl", "PPO"))
X_NAME = "d, the root of KL in nats"


def build(root: Path) -> Path:
    """Write `overoptimise.html` of the experiment in `root`; RunError when there is none that is finished."""
    run = Run.read(root)
    if not (root / NUMBERS).is_file():
        raise RunError(f"{root} has no {NUMBERS}; run `sog run overoptimise --out {root}` to its end")
    path = root / PAGE
    write_atomic(path, render(run, read_json(root / NUMBERS)))
    return path


def render(run: Run, told: dict[str, Any]) -> str:
    """The page."""
    proxies: list[dict[str, Any]] = told["proxies"]
    name = run.root.name if run.root.parent.name == "runs" else str(run.root)
    head = Markup('<p class="kicker">State of GPT · over-optimisation, seed {}</p><h1>{}</h1><p class="intro">{}</p>')
    words = (
        f"{len(proxies)} reward models, of {_amounts(proxies)} rankings, each climbed twice: by choosing the best of n "
        f"of {told['samples']} samples on {told['prompts']} held-out prompts, and by PPO with next to no penalty for "
        "distance. The true reward is the simulated labeller’s score without noise, which neither ever saw. Both "
        "are in standard deviations of one sample of the model it began with."
    )
    sections = [_picture(proxies, form, words) for form, words in FORMS]
    sections += [_fits(proxies), _data(proxies), _guards(proxies), _points(proxies)]
    foot = pages.paragraph(f"Made by stateofgpt from {name}. Every number here is in {NUMBERS}.")
    top = head.format(run.seed, "How far a reward can be climbed", words)
    return pages.page("Over-optimisation", top, sections, foot)


def _amounts(proxies: Sequence[dict[str, Any]]) -> str:
    amounts = [count(n) for n in dict.fromkeys(proxy["rankings"] for proxy in proxies)]
    return ", ".join(amounts[:-1]) + f" and {amounts[-1]}" if len(amounts) > 1 else amounts[0]


def _colour(place: int) -> str:
    return f"c-{place % 8 + 1}"


def _name(proxy: dict[str, Any]) -> str:
    return count(proxy["rankings"])


def _picture(proxies: Sequence[dict[str, Any]], form: Form, words: str) -> Section:
    """True reward as dots with the fit as a line, and the reward model's own beside it."""
    true: list[Series] = []
    climbed: list[Series] = []
    for place, proxy in enumerate(proxies):
        points, fit = proxy[form], proxy["fits"][form]
        dots: list[Point] = [(point["d"], point["true"]) for point in points]
        true.append(Series("", dots, _colour(place), dots=True))
        if fit is not None:
            far = max(point["d"] for point in points)
            line = [(x, form_at(form, fit["alpha"], fit["beta"], x)) for x in (far * i / 60 for i in range(61))]
            true.append(Series(_name(proxy), line, _colour(place)))
        own = sorted((point["d"], point["proxy"]) for point in points)
        climbed.append(Series(_name(proxy), own, _colour(place)))
    charts = [
        line_chart(true, title="True reward: dots measured, lines fitted", x_name=X_NAME),
        line_chart(climbed, title="Reward by the reward model itself", x_name=X_NAME),
    ]
    ends = [f"{_name(p)} rankings: at most {_signed(_top(p[form]))}, {_signed(p[form][-1]['true'])} at the end"
            for p in proxies]  # fmt: skip
    finding = f"{words}: the true reward by {'; by '.join(ends)}."
    return Section(form, words, finding, pages.grid([pages.figure(chart) for chart in charts]), "rl")


def _top(points: Sequence[dict[str, Any]]) -> float:
    return max(float(point["true"]) for point in points)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _fits(proxies: Sequence[dict[str, Any]]) -> Section:
    rows: list[list[object]] = []
    for proxy in proxies:
        for form, words in FORMS:
            fit = proxy["fits"][form]
            if fit is None:
                rows.append([f"{words}, {_name(proxy)} rankings", "–", "–", "–", "–", "–"])
                continue
            rows.append([
                f"{words}, {_name(proxy)} rankings",
                f"{decimal(fit['alpha'], 3)} ({_span(fit['alpha_interval'], 2)})",
                f"{decimal(fit['beta'], 3)} ({_span(fit['beta_interval'], 2)})",
                "none" if fit["peak"] is None else _distance(fit["peak"][0]),
                "–" if fit["peak_interval"] is None else " to ".join(map(_distance, fit["peak_interval"])),
                percent(fit["turns"]),
            ])  # fmt: skip
    head = ["", "α", "β", "Turns at, nats", "95% interval", "Resamples that turn"]
    table = pages.table(head, rows, caption="R = d (α − β d) for best-of-n, R = d (α − β log d) for PPO")
    note = (
        "The forms are those of Gao, Schulman and Hilton, 2022. Intervals resample prompts: they are of this reward "
        "model and this run, and say nothing of what another of the same size would do. A peak far beyond the last dot "
        "is the form’s opinion and no measurement."
    )
    return Section("fits", "The fits", _fits_finding(proxies), table + pages.paragraph(note, "note"), "rl")


def _fits_finding(proxies: Sequence[dict[str, Any]]) -> str:
    turned = sum(1 for p in proxies for form, _ in FORMS if (p["fits"][form] or {}).get("peak") is not None)
    return f"Of {2 * len(proxies)} fitted curves {turned} turn downwards at some distance."


def _span(interval: Sequence[float], digits: int) -> str:
    return " to ".join(decimal(value, digits) for value in interval)


def _distance(d: float) -> str:
    """A peak's d as KL in nats; beyond what anybody could go it is only said to be far."""
    return decimal(d * d, 1) if d * d < 1000 else "> 1000"


def _data(proxies: Sequence[dict[str, Any]]) -> Section:
    """What more labels do: accuracy, the best true reward on the way, and what is left of it at the end."""
    rows: list[list[object]] = []
    for proxy in proxies:
        row: list[object] = [f"{_name(proxy)} rankings", percent(proxy["accuracy"], 1)]
        for form, _ in FORMS:
            top = max(proxy[form], key=lambda point: point["true"])
            row += [f"{_signed(top['true'])} at {decimal(top['kl'], 1)}", _signed(proxy[form][-1]["true"])]
        rows.append(row)
    head = ["Labels", "Pairs ordered as the truth", "Best-of-n, best", "at the end", "PPO, best", "at the end"]
    table = pages.table(head, rows, caption="True reward, and the KL in nats at which it was highest")
    first, last = proxies[0], proxies[-1]
    finding = (
        f"From {_name(first)} to {_name(last)} rankings the highest true reward on PPO’s way goes from "
        f"{_signed(_top(first['rl']))} to {_signed(_top(last['rl']))}, and what remains at the end from "
        f"{_signed(first['rl'][-1]['true'])} to {_signed(last['rl'][-1]['true'])}."
    )
    return Section("data", "What more labels do", finding, table, "reward")


def _guards(proxies: Sequence[dict[str, Any]]) -> Section:
    rows: list[list[object]] = []
    stopped = 0
    for proxy in proxies:
        guard, looks = proxy["guard"], proxy["rl"]
        if guard["stopped_at"] is None:
            rows.append([f"{_name(proxy)} rankings", "never", "–", _signed(looks[-1]["true"])])
            continue
        stopped += 1
        kept = next(look for look in looks if look["step"] == guard["kept"])
        rows.append([f"{_name(proxy)} rankings", f"iteration {guard['stopped_at']}",
                     f"{_signed(kept['true'])}, of iteration {kept['step']}", _signed(looks[-1]["true"])])  # fmt: skip
    head = ["PPO against", "The guards stop it", "True reward kept", "True reward without them"]
    finding = f"The guards of an ordinary run would have stopped {stopped} of {len(proxies)} policies."
    why = [f"{_name(p)} rankings: {p['guard']['why']}." for p in proxies if p["guard"]["why"]]
    reasons = [pages.paragraph(sentence, "note") for sentence in why]
    body = pages.table(head, rows, caption="What guards would have done", text_columns=4) + Markup("").join(reasons)
    return Section("guards", "The guards", finding, body, "rl")


def _points(proxies: Sequence[dict[str, Any]]) -> Section:
    tables = [
        pages.table(
            ["n", "KL by formula", "KL of the answers", "True", "±", "Proxy"],
            [
                [
                    count(point["n"]), decimal(point["kl"]), decimal(point["kl_of_answers"]), decimal(point["true"]),
                    decimal(point["true_error"]), decimal(point["proxy"]),
                ]
                for point in proxy["best_of_n"]
            ],
            caption=f"Best-of-n, {_name(proxy)} rankings",
        )
        for proxy in proxies
    ]  # fmt: skip
    note = pages.paragraph(
        "log n − (n − 1)/n is the distance of best-of-n where no two samples are equal. A small model says the same "
        "thing again and again, and choosing among equals moves nothing: the distance of its answers is smaller.",
        "note",
    )
    finding = "Every n, averaged over all subsets of that size."
    return Section("points", "Best-of-n in numbers", finding, Markup("").join(tables) + note, "none")
