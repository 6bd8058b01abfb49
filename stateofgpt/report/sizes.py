"""The chapter on several sizes: their curves in one picture, and the same beginnings as each of them goes on.

Owns what this chapter says and shows; a report has it where a run pretrained more than one size.
"""

from __future__ import annotations

from markupsafe import Markup

from stateofgpt.report import pages
from stateofgpt.report.pages import Section
from stateofgpt.report.plots import Series, line_chart, short
from stateofgpt.report.record import Record, Size, number, points

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def sizes(record: Record) -> Section:
    """Loss by size over the same batches, and the last samples side by side."""
    own = Size("", number(record.part("pretrain").get("n_params")) or 0.0, record.metrics.get("pretrain", []),
               record.samples.get("pretrain", []))  # fmt: skip
    every = [*record.sizes, own]
    names = [f"{short(size.n_params)}" for size in every]
    training, held_out = [], []
    for i, (size, name) in enumerate(zip(every, names, strict=True)):
        colour = f"c-{i % 8 + 1}"
        training.append(Series(name, points(size.metrics, "loss", "tokens"), colour, noisy=True))
        held_out.append(Series(name, points(size.metrics, "val_bpb", "tokens"), colour))
    charts = [
        line_chart(training, title="Training loss, nats per token", x_name="tokens"),
        line_chart(held_out, title="Held-out text, bits per byte", x_name="tokens"),
    ]
    last = [line[-1][1] for line in (series.points for series in held_out) if line]
    order = "a larger one ends lower" if last == sorted(last, reverse=True) else "here a larger one does not end lower"
    finding = (
        f"{' and '.join([', '.join(names[:-1]), names[-1]])} parameters, the same text in the same order: {order}, "
        "and every step of it costs more."
    )
    title = f"{NUMBERS.get(len(every), str(len(every))).capitalize()} sizes, one text"
    body = pages.grid([pages.figure(chart) for chart in charts]) + _last_words(every, names)
    return Section("sizes", title, finding, body, "base")


def _last_words(every: list[Size], names: list[str]) -> Markup:
    """How each size goes on at the end of its training, a row for every beginning."""
    blocks = []
    prompts = list(dict.fromkeys(str(sample.get("prompt", "")) for sample in every[-1].samples))
    for prompt in prompts:
        cards = []
        for size, name in zip(every, names, strict=True):
            own = [sample for sample in size.samples if str(sample.get("prompt", "")) == prompt]
            if own:
                cards.append(pages.card(f"{name} parameters", pages.said(own[-1].get("text", ""), 600)))
        shown = pages.clean(prompt, 160)
        blocks.append(Markup('<h3 class="prompt">{}</h3>').format(f"“{shown}”" if shown.strip() else "From nothing"))
        blocks.append(pages.grid(cards, "cards three"))
    head = Markup("<h3>The same prompts, by size, at the end</h3>")
    return head + Markup("").join(blocks) if blocks else Markup("")
