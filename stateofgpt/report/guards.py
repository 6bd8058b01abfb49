"""What the guards of reinforcement learning saw: the looks at held-out prompts, as pictures and a sentence.

Owns this part of the chapter on reinforcement learning. Knows nothing about files (`record`) or HTML (`pages`).
"""

from __future__ import annotations

from markupsafe import Markup

from stateofgpt.report import pages
from stateofgpt.report.pages import count, decimal, percent
from stateofgpt.report.plots import Series, line_chart
from stateofgpt.report.record import Record, mapping, number


def looks(record: Record) -> Markup:
    """Reward and judge on the same held-out prompts, look by look; nothing where there was no look."""
    told = mapping(record.result("rl").get("guards"))
    others = "SFT’s" if "sft" in record.order else "the first model’s"
    charts = [
        line_chart(
            [
                Series("reward model", record.curve("rl", "held_out_reward"), "c-reward"),
                Series("judge", record.curve("rl", "held_out_score"), "c-rl"),
            ],
            title="Held-out prompts: reward and judge",
            x_name="step",
        ),
        line_chart(
            [Series("share won", record.curve("rl", "held_out_won"), "c-rl")],
            title=f"Held-out answers better than {others}, ties as half",
            x_name="step",
            y_low=0.0,
            y_high=1.0,
        ),
    ]
    figures = pages.grid([pages.figure(chart) for chart in charts])
    if not figures:
        return Markup("")
    words = ""
    if number(told.get("looks")):
        words = (
            f"{count(number(told.get('looks')))} looks at {count(number(told.get('prompts')))} prompts that no stage "
            f"trains on, judged by {pages.clean(told.get('judge', ''), 200)}: best at iteration "
            f"{count(number(told.get('best_step')))} with {decimal(number(told.get('score_best')))}, "
            f"{decimal(number(told.get('score_last')))} at the last, where {percent(number(told.get('won_last')))} of "
            f"the answers were better than {others}."
        )
    head = Markup("<h3>What the guards saw</h3>")
    return head + figures + (pages.paragraph(words, "note") if words else Markup(""))
