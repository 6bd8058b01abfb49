"""`sog plan --talk`: the talk's two models, and LLaMA's other sizes, with what each law says of them.

Owns that table and the sentence it teaches. The models are `train.published`'s.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from stateofgpt.report.plots import short
from stateofgpt.train.hardware import gpu
from stateofgpt.train.published import GPT3, LLAMA_65B, LLAMA_65B_DAYS, LLAMA_65B_GPUS, TALK, Published
from stateofgpt.train.scaling import EPOCH, HOFFMANN, HOFFMANN_BIAS, KAPLAN, KAPLAN_BIAS

LAWS = ("kaplan", "chinchilla", "epoch")
HEADS = {"kaplan": "Kaplan 2020", "chinchilla": "Chinchilla 2022", "epoch": "Epoch 2024"}


def losses(model: Published) -> dict[str, float]:
    """Expected loss, nats per token, by each law; Kaplan's counts no embeddings."""
    return {
        "kaplan": KAPLAN.loss(model.non_embedding, model.tokens),
        "chinchilla": HOFFMANN.loss(model.n_params, model.tokens),
        "epoch": EPOCH.loss(model.n_params, model.tokens),
    }


def row(model: Published, utilisation: float) -> dict[str, Any]:
    """A model as JSON. `a100_days` are GPU-days at the stated utilisation; `told` are those of the paper."""
    a100 = gpu("A100")
    told = None
    if model.a100_hours is not None:
        used = model.flops / (model.a100_hours * 3600 * a100.peak)
        told = {"a100_hours": model.a100_hours, "a100_days": model.a100_hours / 24, "utilisation": used}
    return {
        "name": model.name, "layers": model.n_layer, "width": model.width, "heads": model.n_head,
        "vocab_size": model.vocab_size, "context": model.context, "batch_tokens": model.batch_tokens, "lr": model.lr,
        "n_params": model.n_params, "tokens": model.tokens, "tokens_per_parameter": model.tokens / model.n_params,
        "flops": model.flops, "a100_days": model.flops / (a100.peak * utilisation) / 86400, "told": told,
        "losses": losses(model),
    }  # fmt: skip


def lesson() -> str:
    """What the table teaches."""
    big, small = losses(GPT3), losses(LLAMA_65B)
    assert small["epoch"] < big["epoch"] and small["kaplan"] > big["kaplan"]
    return (
        f"Epoch's constants rank LLaMA-65B better ({small['epoch']:.3f} against GPT-3's {big['epoch']:.3f}), as it is: "
        f"a third of the parameters, five times the tokens. Kaplan's rank them the other way round "
        f"({small['kaplan']:.3f} against {big['kaplan']:.3f})."
    )


def talk(utilisation: float, *, as_json: bool) -> None:
    """Print the table, or its JSON."""
    rows = [row(model, utilisation) for model in TALK]
    by = EPOCH.optimum(LLAMA_65B.flops)
    kaplans = KAPLAN.optimum(GPT3.flops)
    days = LLAMA_65B_GPUS * LLAMA_65B_DAYS
    assert LLAMA_65B.a100_hours is not None
    notes = [
        lesson(),
        f"LLaMA-65B's paper: {LLAMA_65B_GPUS:,} A100s for about {LLAMA_65B_DAYS} days, {days:,} GPU-days; its table "
        f"15: {LLAMA_65B.a100_hours:,.0f} GPU-hours, {LLAMA_65B.a100_hours / 24:,.0f} GPU-days. GPT-3 ran on V100s.",
        f"For LLaMA-65B's compute Epoch's law would buy {short(by.n_params)} parameters and {short(by.tokens)} tokens; "
        f"for GPT-3's, Kaplan's would buy {short(kaplans.n_params)} and {short(kaplans.tokens)}: GPT-3.",
        KAPLAN_BIAS,
        HOFFMANN_BIAS,
    ]
    if as_json:
        told = {"utilisation": utilisation, "models": rows, "lesson": lesson(), "notes": notes[1:]}
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(_table(rows, utilisation))
    console.print(f"[bold]{notes[0]}[/bold]")
    for note in notes[1:]:
        console.print(f"[dim]{note}[/dim]")


def _table(rows: list[dict[str, Any]], utilisation: float) -> Table:
    """One column a model: eighteen lines fit any terminal, eighteen columns none."""
    table = Table(title="The talk's models, and what scaling laws say of them")
    table.add_column("")
    for model in rows:
        table.add_column(model["name"], justify="right")

    def told(model: dict[str, Any], key: str, form: str) -> str:
        return format(model["told"][key], form) if model["told"] else "–"

    lines = {
        "layers": [f"{m['layers']}" for m in rows],
        "width": [f"{m['width']:,}" for m in rows],
        "heads": [f"{m['heads']}" for m in rows],
        "vocabulary": [f"{m['vocab_size']:,}" for m in rows],
        "context": [f"{m['context']:,}" for m in rows],
        "batch, tokens": [short(m["batch_tokens"]) for m in rows],
        "learning rate": [f"{m['lr']:.1e}" for m in rows],
        "parameters": [f"{m['n_params'] / 1e9:.1f}B" for m in rows],
        "tokens": [short(m["tokens"]) for m in rows],
        "tokens per parameter": [f"{m['tokens_per_parameter']:.1f}" for m in rows],
        "FLOP (6 N D)": [f"{m['flops']:.2e}" for m in rows],
        f"A100-days at {utilisation:.0%}": [f"{m['a100_days']:,.0f}" for m in rows],
        "A100-days, paper": [told(m, "a100_days", ",.0f") for m in rows],
        "so its utilisation": [told(m, "utilisation", ".0%") for m in rows],
        **{f"loss by {HEADS[law]}": [f"{m['losses'][law]:.3f}" for m in rows] for law in LAWS},
    }
    for name, cells in lines.items():
        table.add_row(name, *cells, end_section=name in ("learning rate", "so its utilisation"))
    return table
