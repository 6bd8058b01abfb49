"""`sog plan`: from minutes, FLOPs, dollars or a size to a plan, as tables in the terminal or as JSON.

Owns what is asked, what is shown and in which words. The numbers are `train.planner`'s, the laws `train.scaling`'s.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stateofgpt.errors import ConfigError
from stateofgpt.model.device import CPU, choose_device
from stateofgpt.report.pages import size
from stateofgpt.report.plots import short
from stateofgpt.report.talk import talk
from stateofgpt.train import dial_gpu, planner
from stateofgpt.train.dial import choose, tokens_within
from stateofgpt.train.hardware import GPUS, UTILISATION, Gpu, gpu
from stateofgpt.train.law_file import LADDER, read_law
from stateofgpt.train.planner import Plan, count, make_plan, shape_for
from stateofgpt.train.scaling import EPOCH, HOFFMANN, HOFFMANN_BIAS, KAPLAN, KAPLAN_BIAS, ChinchillaLaw, KaplanLaw

AnyLaw = ChinchillaLaw | KaplanLaw
BUDGETS = ("minutes", "flops", "dollars", "params")
NAMED: dict[str, tuple[str, AnyLaw]] = {
    "kaplan": ("Kaplan 2020", KAPLAN),
    "chinchilla": ("Chinchilla 2022", HOFFMANN),
    "epoch": ("Epoch 2024", EPOCH),
}
HERE = (2048, 256, 8)  # vocabulary, context and rows of the laptop recipe, whose stage the minutes are for
STAGE_LR = 3e-3  # `train.optim.OptimConfig.lr`; Muon's 0.02 does not depend on the size


@dataclass(frozen=True)
class Asked:
    """A budget that was worked out: the plan, the time where it is known, and how it came about."""

    budget: dict[str, Any]
    plan: Plan
    law: str
    flops: float  # that the laws divide
    rates: dict[str, float] | None = None
    seconds: float | None = None


def plan(options: Namespace) -> None:
    """Print the plan for the one budget among the options."""
    given = [name for name in BUDGETS if getattr(options, name) is not None]
    if options.talk:
        if given:
            raise ConfigError(f"--talk is a table of its own and takes no --{given[0]}; leave one of the two out")
        talk(options.utilisation or UTILISATION, as_json=options.json)
        return
    if len(given) != 1:
        ways = "--minutes N, --flops F, --dollars D --gpu NAME, or --params N (or --talk for the talk's table)"
        raise ConfigError(f"a plan needs one budget, not {' and '.join(given) or 'none'}; give one of {ways}")
    if options.tokens is not None and given != ["params"]:
        raise ConfigError("--tokens goes with --params; with another budget the law decides the tokens")
    laws = _laws(options.law)
    asked = {"minutes": _minutes, "flops": _flops, "dollars": _dollars, "params": _params}[given[0]](options, laws)
    told = _told(asked, laws, options)
    if options.json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        _show(told, asked)


def _laws(named: str) -> dict[str, tuple[str, AnyLaw]]:
    """All laws to compare, the one to go by last. A ladder is named by its file or folder."""
    laws = dict(NAMED)
    if named in laws:
        return {**{k: v for k, v in laws.items() if k != named}, named: laws[named]}
    path = Path(named)
    if not path.exists():
        raise ConfigError(f'--law: "{named}" is neither {", ".join(laws)} nor the {LADDER} of a ladder')
    return {**laws, named: ("this ladder", read_law(path).law)}


# ---------------------------------------------------------------------------------------------------------- the budgets


def _minutes(options: Namespace, laws: dict[str, tuple[str, AnyLaw]]) -> Asked:
    """What this machine can do: the dial's trials, as the pretrain stage makes them."""
    vocab, context, rows = options.vocab_size or HERE[0], options.context or HERE[1], HERE[2]
    name = next(reversed(laws))
    seconds = 60.0 * options.minutes
    device = choose_device()
    if device == CPU:
        choice, within = choose(vocab, context, seconds, rows=rows, law=laws[name][1]), tokens_within
    else:
        choice, filled = dial_gpu.choose(device, vocab, context, seconds, rows=rows, law=laws[name][1])
        rows, within = filled.rows, dial_gpu.tokens_within
    key = f"{choice.config.hidden_size}x{choice.config.num_hidden_layers}"
    tokens = within(seconds, choice.rates[key], choice.compiled)
    made = make_plan(choice.config, tokens, batch=rows * context, lr=STAGE_LR)
    budget = {"minutes": options.minutes, "dtype": choice.dtype, "compiled": choice.compiled, "fused": choice.fused}
    return Asked(budget, made, name, 6.0 * made.n_params * tokens, choice.rates, seconds)


def _flops(options: Namespace, laws: dict[str, tuple[str, AnyLaw]]) -> Asked:
    return _bought({"flops": options.flops}, options.flops, options, laws)


def _dollars(options: Namespace, laws: dict[str, tuple[str, AnyLaw]]) -> Asked:
    if options.gpu is None:
        raise ConfigError(f"--dollars needs --gpu; there are {', '.join(g.name for g in GPUS)}")
    chosen, price = gpu(options.gpu), options.price
    price = chosen.price if price is None else price
    used = options.utilisation or UTILISATION
    hours = options.dollars / price
    budget = {
        "dollars": options.dollars, "gpu": chosen.name, "price_per_hour": price, "utilisation": used,
        "gpu_hours": hours,
    }  # fmt: skip
    return _bought(budget, hours * 3600 * chosen.peak * used, options, laws)


def _bought(budget: dict[str, Any], flops: float, options: Namespace, laws: dict[str, tuple[str, AnyLaw]]) -> Asked:
    """The law's size, and as many tokens as that shape's own FLOPs allow."""
    name = next(reversed(laws))
    config = shape_for(laws[name][1].optimum(flops).n_params, options.vocab_size, options.context)
    return Asked(budget, make_plan(config, flops / planner.train_flops(config)), name, flops)


def _params(options: Namespace, laws: dict[str, tuple[str, AnyLaw]]) -> Asked:
    name, law = next(reversed(laws.items()))
    config = shape_for(options.params, options.vocab_size, options.context)
    tokens = options.tokens if options.tokens is not None else law[1].tokens_for(count(config)[0])
    made = make_plan(config, tokens)
    return Asked({"params": options.params, "tokens": options.tokens}, made, name, 6.0 * made.n_params * tokens)


# ------------------------------------------------------------------------------------------------------- what is told


def _told(asked: Asked, laws: dict[str, tuple[str, AnyLaw]], options: Namespace) -> dict[str, Any]:
    made, config = asked.plan, asked.plan.config
    used = options.utilisation or UTILISATION
    told: dict[str, Any] = {
        "budget": asked.budget,
        "law": asked.law,
        "plan": {
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "feed_forward": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "context": config.max_position_embeddings,
            "n_params": made.n_params,
            "tokens": round(made.tokens),
            "tokens_per_parameter": made.tokens / made.n_params,
            "batch_tokens": made.batch_tokens,
            "steps": made.steps,
            "lr": made.lr,
            "flops": made.flops,
            "seconds": asked.seconds,
            "memory_bytes": {**asdict(made.memory), "total": made.memory.total},
            "disk_bytes": {**asdict(made.disk), "total": made.disk.total},
        },
        "laws": [_choice(key, laws, asked) for key in laws],
        "gpus": [_time(g, made, used, options) for g in GPUS],
        "notes": [KAPLAN_BIAS, HOFFMANN_BIAS],
    }
    if asked.rates is not None:
        told["rates"] = asked.rates
    return told


def _choice(key: str, laws: dict[str, tuple[str, AnyLaw]], asked: Asked) -> dict[str, Any]:
    """What a law would buy with the same FLOPs, by 6 N D, and what every law expects of that and of the plan."""
    name, law = laws[key]
    best = law.optimum(asked.flops)
    n_params, inner = count(asked.plan.config)
    planned = law.loss(inner if isinstance(law, KaplanLaw) else n_params, asked.plan.tokens)
    return {
        "law": key,
        "name": name,
        "n_params": best.n_params,
        "tokens": best.tokens,
        "tokens_per_parameter": best.tokens / best.n_params,
        "losses": {other: each.loss(best.n_params, best.tokens) for other, (_, each) in laws.items()},
        "loss_of_plan": planned,
    }


def _time(g: Gpu, made: Plan, used: float, options: Namespace) -> dict[str, Any]:
    hours = made.flops / (g.peak * used) / 3600
    named = options.gpu is not None and gpu(options.gpu) == g
    price = options.price if options.price is not None and named else g.price
    fewest = max(1, -(-(made.memory.total) // (0.9 * g.memory)))
    return {
        "gpu": g.name, "peak_flops": g.peak, "utilisation": used, "gpu_hours": hours, "price_per_hour": price,
        "dollars": hours * price, "fewest": int(fewest),
    }  # fmt: skip


def _show(told: dict[str, Any], asked: Asked) -> None:
    console = Console(highlight=False)
    p = told["plan"]
    words = ", ".join(f"{key.replace('_', ' ')} {_word(value)}" for key, value in told["budget"].items() if value)
    console.print(f"[bold]Plan[/bold] for {words}, by the law of {dict(_names(told))[told['law']]}")
    table = Table(show_header=False, box=None, pad_edge=False)
    memory, disk = p["memory_bytes"], p["disk_bytes"]
    shape = f"{p['layers']} layers, width {p['width']:,}, {p['heads']} heads, feed-forward {p['feed_forward']:,}"
    rows = [
        ("size", f"{short(p['n_params'])} parameters ({p['n_params']:,})"),
        ("shape", f"{shape}; vocabulary {p['vocab_size']:,}, context {p['context']:,}"),
        ("tokens", f"{short(p['tokens'])}, {p['tokens_per_parameter']:.1f} per parameter"),
        ("batch", f"{short(p['batch_tokens'])} tokens, {p['steps']:,} steps"),
        ("learning rate", f"{p['lr']:.2g} (AdamW), 0.02 (Muon, any size)"),
        ("compute", f"{p['flops']:.3g} FLOP, attention included"),
        ("memory", f"{size(memory['total'])}: weights {size(memory['weights'])}, "
                   f"gradients {size(memory['gradients'])}, optimizer {size(memory['optimizer'])}, "
                   f"activations {size(memory['activations'])} ({memory['rows']} rows at once)"),
        ("disk", f"{size(disk['total'])}: text {size(disk['text'])}, shards {size(disk['shards'])}, checkpoint "
                 f"{size(disk['checkpoint'])}, states to resume {size(disk['resume'])}"),
    ]  # fmt: skip
    if p["seconds"] is not None:
        rows.append(("time", f"{_hours(p['seconds'] / 3600)} of pretraining on this machine"))
    for row in rows:
        table.add_row(f"[dim]{row[0]}[/dim]", row[1])
    console.print(table)
    if asked.rates is not None:
        trials = ", ".join(f"{shape} {short(rate)}" for shape, rate in asked.rates.items())
        console.print(f"[dim]trials here, tokens per second of forward and backward:[/dim] {trials}")
    else:
        console.print(_gpu_table(told))
    console.print(_law_table(told))
    for note in told["notes"]:
        console.print(f"[dim]{note}[/dim]")


def _names(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["law"], row["name"]) for row in told["laws"]]


def _law_table(told: dict[str, Any]) -> Table:
    table = Table(title="The same compute by each law (6 N D); losses in nats per token of each law's own text")
    for head in ("law", "parameters", "tokens", "per parameter"):
        table.add_column(head, justify="left" if head == "law" else "right")
    names = _names(told)
    for _, name in names:
        table.add_column(f"loss by {name}", justify="right")
    for row in told["laws"]:
        losses = [f"{row['losses'][key]:.3f}" for key, _ in names]
        chosen = [row["name"], short(row["n_params"]), short(row["tokens"]), f"{row['tokens_per_parameter']:.1f}"]
        table.add_row(*chosen, *losses)
    p = told["plan"]
    planned = ["this plan", short(p["n_params"]), short(p["tokens"]), f"{p['tokens_per_parameter']:.1f}"]
    table.add_row(*planned, *(f"{row['loss_of_plan']:.3f}" for row in told["laws"]), style="bold")
    return table


def _gpu_table(told: dict[str, Any]) -> Table:
    used = told["gpus"][0]["utilisation"]
    table = Table(title=f"Time and money at {used:.0%} of the peak (prices are round; --price sets one)")
    for head in ("GPU", "dense bf16", "one GPU takes", "$ an hour", "$", "fewest, by memory"):
        table.add_column(head, justify="left" if head == "GPU" else "right")
    for g in told["gpus"]:
        peak, hours = f"{g['peak_flops'] / 1e12:,.0f} TFLOP/s", _hours(g["gpu_hours"])
        table.add_row(g["gpu"], peak, hours, f"{g['price_per_hour']:g}", f"{g['dollars']:,.2f}", f"{g['fewest']:,}")
    return table


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | int):
        return f"{value:g}" if abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def _hours(hours: float) -> str:
    """0.5 -> '30 min', 100 -> '100 h', 30,000 -> '1,250 days'."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 72 else f"{hours / 24:,.0f} days"
