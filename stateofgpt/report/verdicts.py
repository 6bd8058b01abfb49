"""The report's end, in the talk's order: the price in diversity, the leaderboard, the tree, the cost, and how to go on.

Owns what these chapters say and show. Knows nothing about files (`record`) or HTML (`pages`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from stateofgpt.report import pages
from stateofgpt.report.assistants import names_of
from stateofgpt.report.pages import Section, bar, count, decimal, duration, percent, size
from stateofgpt.report.plots import ticks
from stateofgpt.report.record import MODELS, Record, mapping, number, records
from stateofgpt.report.tree import tree_svg

STAGE_WORDS = {
    "collect": ("Collect text", "base"), "tokenize": ("Tokenize", "base"), "pretrain": ("Pretrain", "base"),
    "sft": ("Finetune", "sft"), "reward": ("Reward model", "reward"), "rl": ("Reinforcement learning", "rl"),
    "eval": ("Evaluate", "none"), "arena": ("Arena", "none"),
}  # fmt: skip


# --- entropy and names -------------------------------------------------------------------------------------------


def diversity(record: Record) -> Section:
    """Next-token entropy and a hundred invented names, model by model."""
    measured = {name: mapping(value) for name, value in record.part("diversity").items()}
    id_, title = "diversity", "Entropy, and a hundred names"
    if not measured:
        gap = pages.missing("Diversity has not been measured.", f"sog eval --out {record.name}")
        return Section(id_, title, "What alignment costs.", gap)
    models = [name for name in MODELS if name in measured] + [name for name in measured if name not in MODELS]
    highest = max((number(measured[name].get("entropy")) or 0.0 for name in models), default=0.0)
    rows: list[list[object]] = []
    for name in models:
        row, colour = measured[name], pages.colour_of(name)
        entropy = number(row.get("entropy"))
        relative = entropy / highest if entropy is not None and highest else None
        shares = [bar(number(row.get(key)), colour) for key in ("distinct", "new", "plausible")]
        rows.append([pages.tag(name), bar(relative, colour, decimal(entropy)), *shares, count(number(row.get("n")))])
    head = ["Model", "Entropy, nats per token", "Distinct", "New", "Plausible", "Names"]
    table = pages.table(head, rows, caption="Invented names: distinct, not in the training data, and passable as names")
    lists = [_names(name, names_of(measured[name].get("names"))) for name in models]
    if not any(lists):
        told = {name: mapping(mapping(record.result("eval").get("diversity")).get(name)) for name in models}
        lists = [_names(name, names_of(told[name].get("names"))) for name in models]
    return Section(
        id_, title, _diversity_finding(measured), table + _variety(record) + pages.grid(lists, "cards three")
    )


def _variety(record: Record) -> Markup:
    """How different answers are: to one prompt asked again, and to different prompts."""
    measured = {name: mapping(value) for name, value in record.part("variety").items()}
    models = [name for name in MODELS if name in measured] + [name for name in measured if name not in MODELS]
    if not models:
        return Markup("")
    keys = ("prompt_distinct", "prompt_ngrams", "prompt_self_bleu", "across_ngrams", "across_self_bleu")
    rows = [
        [
            pages.tag(name),
            decimal(number(measured[name].get("entropy"))),
            *(bar(number(measured[name].get(key)), pages.colour_of(name), decimal(number(measured[name].get(key))))
              for key in keys),
        ]
        for name in models
    ]  # fmt: skip
    head = ["Model", "Entropy, nats per token", "One prompt: different", "n-grams", "self-BLEU", "All prompts: n-grams",
            "self-BLEU"]  # fmt: skip
    first = measured[models[0]]
    note = (
        f"{count(number(first.get('answers')))} answers at temperature 1 to each of "
        f"{count(number(first.get('prompts')))} held-out prompts. n-grams are the different ones over how many chance "
        "would give a text of that length; self-BLEU is 1 where all answers say the same."
    )
    table = pages.table(head, rows, caption="How different answers are, to one prompt and to different ones")
    return table + pages.paragraph(note, "note")


def _diversity_finding(measured: dict[str, dict[str, Any]]) -> str:
    parts = [
        f"{pages.model_name(name)} {decimal(entropy)}" for name in MODELS
        if (entropy := number(measured.get(name, {}).get("entropy"))) is not None
    ]  # fmt: skip
    lead = f"Entropy of the next token, in nats: {', '.join(parts)}. " if parts else ""
    told = [
        f"{pages.model_name(name)} {percent(distinct)}"
        for name in MODELS
        if (distinct := number(measured.get(name, {}).get("distinct"))) is not None
    ]
    names = f"Of the names each invented, so many are different ones: {', '.join(told)}. " if told else ""
    return lead + names + "The talk’s advice is to ask a base model for more things like these."


def _names(model: str, names: Sequence[str]) -> Markup:
    """The names as they came; a name that came before is struck through, an answer without a name left out."""
    asked = len(names)
    names = [name for name in names if name.strip()]
    if not names:
        return Markup("")
    seen: Counter[str] = Counter()
    items = []
    for name in names:
        key = " ".join(name.split()).casefold()
        items.append(Markup("<s>{}</s>" if seen[key] else "<span>{}</span>").format(name))
        seen[key] += 1
    head = pages.tag(model) + Markup(" <span>{} of {} different</span>").format(len(seen), asked)
    body = Markup('<div class="names">{}</div>').format(Markup(" ").join(items))
    return pages.card(head, body, f"c-{pages.colour_of(model)}")


# --- the leaderboard ---------------------------------------------------------------------------------------------


def leaderboard(record: Record) -> Section:
    """Ratings with intervals, who beats whom, and some battles."""
    rows = record.leaderboard()
    id_, title = "arena", "The leaderboard"
    if not rows:
        gap = pages.missing("No battles have been fought.", f"sog arena --out {record.name}")
        return Section(id_, title, "Blind pairwise battles, Bradley–Terry ratings.", gap)
    battles = sum(number(row.get("battles")) or 0 for row in rows) / 2
    order = ", then ".join(pages.model_name(str(row.get("model"))) for row in rows)
    finding = f"{count(battles)} blind battles on held-out prompts put {order}."
    result = record.result("arena")
    note = "Bradley–Terry ratings, mean 1000, 400 points are odds of ten to one; the line is the 95% interval."
    if any("group" in row for row in rows):
        note += " No chain of battles connects all models: compare ratings within a group only."
    body = _board(rows) + pages.paragraph(note, "note") + _win_rates(mapping(result.get("win_rates")), rows)
    fights = [_battle(example) for example in _in_turn(records(result.get("examples")))[:6]]
    examples = Markup("<h3>Battles</h3>") + Markup("").join(fights) if fights else Markup("")
    return Section(id_, title, finding, body + examples)


def _board(rows: Sequence[dict[str, Any]]) -> Markup:
    lows = [number(row.get("low")) or number(row.get("rating")) or 0.0 for row in rows]
    highs = [number(row.get("high")) or number(row.get("rating")) or 0.0 for row in rows]
    margin = max((max(highs) - min(lows)) * 0.06, 10.0)
    left, right = min(lows) - margin, max(highs) + margin

    def at(value: float) -> float:
        return 100 * (value - left) / (right - left)

    marks = Markup("").join(
        Markup('<u style="--x:{:.2f}%">{:.0f}</u>').format(at(value), value) for value in ticks(left, right, 4)
    )
    cells: list[list[object]] = []
    for i, (row, low, high) in enumerate(zip(rows, lows, highs, strict=True)):
        rating = number(row.get("rating")) or 0.0
        colour = pages.colour_of(str(row.get("model")))
        interval = Markup(
            '<div class="interval c-{c}"><i style="--x:{x:.2f}%;--w:{w:.2f}%"></i><b style="--x:{m:.2f}%"></b>'
        )
        drawn = interval.format(c=colour, x=at(low), w=at(high) - at(low), m=at(rating)) + Markup("</div>")
        span = f"{decimal(low, 0)} – {decimal(high, 0)}"
        name = pages.tag(str(row.get("model")))
        cells.append([name, decimal(rating, 0), drawn, span, count(number(row.get("battles")))])
        if i == len(rows) - 1:
            cells.append(["", "", Markup('<div class="scale" aria-hidden="true">{}</div>').format(marks), "", ""])
    return pages.table(["Model", "Rating", "", "95% interval", "Battles"], cells, caption="Leaderboard")


def _win_rates(rates: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Markup:
    names = [str(row.get("model")) for row in rows]
    if not rates:
        return Markup("")
    cells: list[list[object]] = []
    for name in names:
        against = mapping(rates.get(name))
        shares = [number(against.get(other)) for other in names]
        cells.append([pages.tag(name), *("" if other == name else bar(share, pages.colour_of(name))
                                         for other, share in zip(names, shares, strict=True))])  # fmt: skip
    head = ["Share of battles won", *(f"against {pages.model_name(name)}" for name in names)]
    return pages.table(head, cells, caption="Win rates, ties as half")


def _in_turn(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The battles with the pairs of models taking turns."""
    met: Counter[frozenset[str]] = Counter()
    turns = []
    for place, example in enumerate(examples):
        pair = frozenset((str(example.get("model_a")), str(example.get("model_b"))))
        turns.append((met[pair], place))
        met[pair] += 1
    return [examples[place] for _, place in sorted(turns)]


def _battle(example: dict[str, Any]) -> Markup:
    winner = str(example.get("winner"))
    cards = []
    for side in ("a", "b"):
        model = str(example.get(f"model_{side}", side))
        verdict = {"tie": "tie", side: "wins"}.get(winner, "")
        head = pages.tag(model) + (Markup(' <em class="verdict">{}</em>').format(verdict) if verdict else Markup(""))
        kind = f"c-{pages.colour_of(model)}" + (" won" if winner == side else "")
        cards.append(pages.card(head, pages.said(example.get(f"answer_{side}", ""), 500), kind))
    question = Markup('<h4 class="question">{}</h4>').format(pages.clean(example.get("prompt", ""), 300))
    return question + pages.grid(cards, "cards two")


# --- the tree, the cost, the way on ------------------------------------------------------------------------------


def family(record: Record) -> Section:
    """Which model came from which."""
    id_, title = "tree", "The tree of models"
    if not record.nodes:
        gap = pages.missing("There is no checkpoint yet.", f"sog run {record.recipe} --out {record.name}")
        return Section(id_, title, "Every checkpoint names its parents.", gap)
    finding = "Every checkpoint names its parents: a solid line carries weights on, a dashed one advice."
    drawing = Markup('<div class="scroll" role="region" aria-label="Tree of models" tabindex="0">{}</div>')
    return Section(id_, title, finding, pages.figure(drawing.format(tree_svg(record.nodes))))


def cost(record: Record) -> Section:
    """Time per stage, memory, and the machine."""
    seconds = record.wall_seconds()
    id_, title = "cost", "What it cost"
    told = mapping(record.summary.get("wall_seconds"))
    total = number(told.get("total")) or sum(seconds.values())
    asked, memory = number(record.summary.get("minutes_asked")), number(record.summary.get("peak_memory_bytes"))
    finding = f"{duration(total)} in all" + (f", {decimal(asked, 0)} minutes asked for" if asked else "")
    finding += f"; {size(memory)} of memory at the peak." if memory else "."
    longest = max(seconds.values(), default=0.0)
    rows: list[list[object]] = []
    for stage, value in seconds.items():
        name, colour = STAGE_WORDS[stage]
        share = value / total if total else None
        rows.append([name, bar(value / longest if longest else None, colour, duration(value)), percent(share)])
    table = pages.table(["Stage", "Wall time", "Share"], rows, caption="Time by stage")
    machine = mapping(record.summary.get("machine"))
    facts = Markup("").join(
        Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(pages.title_of(key), _fact(key, value))
        for key, value in machine.items()
    )
    about = Markup('<h3>The machine</h3><dl class="facts">{}</dl>').format(facts) if facts else Markup("")
    return Section(id_, title, finding, table + about)


def _fact(key: str, value: object) -> str:
    amount = number(value)
    if amount is not None and "bytes" in key:
        return size(amount)
    if amount is not None:
        return f"{amount:,.4g}" if amount != int(amount) else f"{amount:,.0f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return pages.clean(value, 200)


def onward(record: Record) -> Section:
    """Commands to go on with."""
    name = record.name
    minutes = number(record.summary.get("minutes_asked")) or 10
    if "rl" not in record.order:
        return _onward_from_text(record, minutes)
    commands = [
        ("Talk to it in the terminal", f"sog chat {name}:rl"),
        ("Or on a page, where every answer has a thumb", f"sog serve {name}:rl"),
        ("Let the thumbs raise the next one", f"sog improve {name}"),
        ("See all models and where they come from", "sog runs"),
        ("Give it more time", f"sog run {record.recipe} --minutes {4 * minutes:.0f} --out runs/longer"),
        ("Raise one on your own text", f"sog run {record.recipe} --corpus PATH --out runs/mine"),
        (
            "Use it elsewhere: it is a Hugging Face model",
            f'AutoModelForCausalLM.from_pretrained("{name}/rl/checkpoint")',
        ),
    ]
    return _commands("The loop goes on: people use it, say what was good, and that trains the next one.", commands)


def _onward_from_text(record: Record, minutes: float) -> Section:
    """The same where the recipe ends before there is an assistant."""
    stage = next((name for name in ("sft", "pretrain") if name in record.order), None)
    commands = [("See all models and where they come from", "sog runs")]
    if stage:
        commands.insert(0, ("Let it go on with a text", f'sog sample {record.name}:{stage} --prompt "O "'))
    again = f"sog run {record.recipe} --corpus PATH --minutes {4 * minutes:.0f} --out runs/longer"
    commands.append(("Give it more time, or another text", again))
    commands.append(("Raise an assistant on that text", "sog run laptop --corpus PATH --out runs/mine"))
    return _commands("A base model goes on with a text. An assistant takes the other stages.", commands)


def _commands(finding: str, commands: Sequence[tuple[str, str]]) -> Section:
    rows = Markup("").join(
        Markup("<li>{}<pre><code>{}</code></pre></li>").format(why, pages.clean(command, 300))
        for why, command in commands
    )
    return Section("onward", "How to go on", finding, Markup('<ul class="commands">{}</ul>').format(rows))
