"""The picture of a ladder: its curves, the fitted law, what the law leaves over, and what it would buy.

Owns what this page says and shows; reads the ladder's folder and nothing else. The same folder makes the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stateofgpt.errors import RunError
from stateofgpt.report import pages
from stateofgpt.report.pages import Section, decimal, percent
from stateofgpt.report.plots import Point, Series, line_chart, short
from stateofgpt.run import Run, read_json, write_atomic
from stateofgpt.run.files import read_lines
from stateofgpt.train.law_file import CONSTANTS, LADDER
from stateofgpt.train.scaling import EPOCH, ChinchillaLaw

PAGE = "ladder.html"
SYMBOLS = dict(zip(CONSTANTS, ("E, the floor", "A", "B", "α, of size", "β, of tokens"), strict=True))
BUDGETS = (1e13, 1e14, 1e15, 1e16)


def build(root: Path) -> Path:
    """Write `ladder.html` of the ladder in `root`; RunError when there is none that is finished."""
    run = Run.read(root)
    if not (root / LADDER).is_file():
        raise RunError(f"{root} has no {LADDER}; run `sog ladder --out {root}` to its end")
    path = root / PAGE
    write_atomic(path, render(run, read_json(root / LADDER)))
    return path


def render(run: Run, told: dict[str, Any]) -> str:
    """The page."""
    rungs: list[dict[str, Any]] = told["rungs"]
    law = ChinchillaLaw(*(told["law"][name] for name in CONSTANTS))
    sizes = list(dict.fromkeys(rung["size"] for rung in rungs))
    name = run.root.name if run.root.parent.name == "runs" else str(run.root)
    head = Markup('<p class="kicker">State of GPT · ladder, seed {}</p><h1>{}</h1><p class="intro">{}</p>').format(
        run.seed,
        "A scaling law of this machine’s own",
        f"{len(sizes)} sizes, each trained over {len(rungs) // len(sizes)} numbers of tokens on one order of data: "
        f"vocabulary {told['vocab_size']:,}, context {told['context']}.",
    )
    sections = [
        _curves(run, rungs, sizes, told),
        _law(rungs, sizes, law),
        _residuals(rungs, sizes, told),
        _constants(told),
        _buys(law),
        _rungs(rungs),
    ]
    foot = pages.paragraph(f"Made by stateofgpt from {name}. Every number here is in {LADDER}.")
    return pages.page("A ladder", head, sections, foot)


def _colour(sizes: Sequence[str], size: str) -> str:
    return f"c-{sizes.index(size) % 8 + 1}"


def _word(rungs: Sequence[dict[str, Any]], size: str) -> str:
    return short(next(rung["n_params"] for rung in rungs if rung["size"] == size))


def _curves(run: Run, rungs: Sequence[dict[str, Any]], sizes: Sequence[str], told: dict[str, Any]) -> Section:
    series = []
    for size in sizes:
        longest = max((rung for rung in rungs if rung["size"] == size), key=lambda rung: rung["tokens"])
        lines = read_lines(run.root / "rungs" / longest["name"] / "metrics.jsonl")
        points = [(line["tokens"], line["loss"]) for line in lines if line.get("loss") is not None]
        series.append(Series(_word(rungs, size), points, _colour(sizes, size), noisy=True))
    chart = line_chart(series, title="Training loss, nats per token, of each size’s longest run", x_name="tokens")
    finding = "Every size learns fast, then slower and slower. A larger one makes more of the same tokens, at a price."
    return Section("curves", "The curves", finding, pages.grid([pages.figure(chart)]), "base")


def _law(rungs: Sequence[dict[str, Any]], sizes: Sequence[str], law: ChinchillaLaw) -> Section:
    """Held-out loss at each rung's end as dots, the law as lines, against tokens and against parameters."""
    by_tokens: list[Series] = []
    for size in sizes:
        own = [rung for rung in rungs if rung["size"] == size]
        n_params = own[0]["n_params"]
        span = _between([rung["tokens"] for rung in own])
        by_tokens.append(Series(_word(rungs, size), [(d, law.loss(n_params, d)) for d in span], _colour(sizes, size)))
        dots = [(float(rung["tokens"]), float(rung["loss"])) for rung in own]
        by_tokens.append(Series("", dots, _colour(sizes, size), dots=True))
    by_size: list[Series] = []
    of_size = [sorted((r for r in rungs if r["size"] == size), key=lambda r: r["tokens"]) for size in sizes]
    for place, own in enumerate(zip(*of_size, strict=True)):
        colour, parts = f"c-{place % 8 + 1}", round(own[0]["tokens"] / of_size[0][0]["tokens"])
        fitted = [(float(rung["n_params"]), float(rung["fitted"])) for rung in own]
        by_size.append(Series(f"{parts} part{'s' if parts > 1 else ''} of tokens", fitted, colour))
        dots = [(float(rung["n_params"]), float(rung["loss"])) for rung in own]
        by_size.append(Series("", dots, colour, dots=True))
    charts = [
        line_chart(by_tokens, title="Held-out loss by tokens, a line a size", x_name="tokens", log_x=True),
        line_chart(by_size, title="Held-out loss by size, a line a length", x_name="parameters", log_x=True),
    ]
    finding = (
        f"The loss of N parameters after D tokens is near {law.irreducible:.3g} + {law.a_scale:.3g} / N^{law.a:.2f} + "
        f"{law.b_scale:.3g} / D^{law.b:.2f} nats per token: dots are measured, lines the law."
    )
    return Section("law", "The law", finding, pages.grid([pages.figure(chart) for chart in charts]), "base")


def _between(values: Sequence[float], n: int = 40) -> list[float]:
    low, high = math.log(min(values)), math.log(max(values))
    return [math.exp(low + (high - low) * i / (n - 1)) for i in range(n)]


def _residuals(rungs: Sequence[dict[str, Any]], sizes: Sequence[str], told: dict[str, Any]) -> Section:
    tokens = [float(rung["tokens"]) for rung in rungs]
    zero: list[Point] = [(min(tokens), 0.0), (max(tokens), 0.0)]
    series = [Series("", zero, "c-none")]
    for size in sizes:
        dots = [(float(rung["tokens"]), 100 * rung["residual"]) for rung in rungs if rung["size"] == size]
        series.append(Series("", dots, _colour(sizes, size), dots=True))
    chart = line_chart(series, title="Measured over fitted loss, percent", x_name="tokens", log_x=True)
    names = pages.legend([(_word(rungs, size), _colour(sizes, size).removeprefix("c-")) for size in sizes])
    finding = f"The law is off by {percent(told['rms_residual'], 2)} of the loss, as a root mean square."
    return Section("residuals", "What it leaves over", finding, pages.grid([pages.figure(chart)]) + names, "base")


def _constants(told: dict[str, Any]) -> Section:
    rows = []
    for name in CONSTANTS:
        low, high = told["intervals"][name]
        rows.append(
            [SYMBOLS[name], f"{told['law'][name]:.4g}", f"{low:.4g} to {high:.4g}", f"{getattr(EPOCH, name):g}"]
        )
    table = pages.table(["Constant", "This ladder", "95 % interval", "Epoch 2024"], rows, caption="Constants")
    doubt = told["doubt"]
    finding = (
        f"This law is not for extrapolating: {doubt}. The dial stays with Epoch’s constants."
        if doubt
        else "Both exponents are known well enough to go by: the dial takes this law for runs that lie beside it."
    )
    note = "Epoch’s constants are of another tokenizer, other text and models a thousand times larger."
    return Section("constants", "The constants", finding, table + pages.paragraph(note, "note"), "base")


def _buys(law: ChinchillaLaw) -> Section:
    rows = []
    for flops in BUDGETS:
        ours, theirs = law.optimum(flops), EPOCH.optimum(flops)
        cells = [(best.n_params, best.tokens) for best in (ours, theirs)]
        rows.append([f"{flops:.0e}", *(short(value) for pair in cells for value in pair), decimal(ours.loss)])
    head = ["FLOP", "Parameters", "Tokens", "Parameters by Epoch", "Tokens by Epoch", "Expected loss"]
    table = pages.table(head, rows, caption="The best split of a budget, by 6 N D")
    finding = "What the law would buy: the further a line is from the rungs, the less it is worth."
    return Section("buys", "What it would buy", finding, table, "base")


def _rungs(rungs: Sequence[dict[str, Any]]) -> Section:
    rows = [
        [
            rung["size"], short(rung["n_params"]), short(rung["tokens"]), decimal(rung["val_bpb"], 3),
            decimal(rung["loss"], 3), decimal(rung["fitted"], 3), percent(rung["residual"], 2), decimal(rung["epochs"]),
        ]
        for rung in rungs
    ]  # fmt: skip
    head = ["Shape", "Parameters", "Tokens", "Bits per byte", "Nats per token", "Fitted", "Residual", "Most epochs"]
    finding = "Held-out loss at the end of every run."
    return Section("rungs", "The rungs", finding, pages.table(head, rows, caption="Rungs"), "base")
