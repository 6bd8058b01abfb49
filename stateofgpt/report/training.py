"""The report's first half, in the talk's order: the pipeline, the mixture, tokens, pretraining, and its lesson.

Owns what these chapters say and show. Knows nothing about files (`record`) or HTML (`pages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from stateofgpt.report import pages
from stateofgpt.report.pages import Section, bar, count, decimal, duration, percent, size
from stateofgpt.report.plots import Series, line_chart, short
from stateofgpt.report.record import Record, mapping, number
from stateofgpt.train.scaling import EPOCH, KAPLAN, PUBLISHED

LLAMA_MIXTURE = (  # arXiv 2302.13971, table 1: dataset, sampling proportion, epochs, disk size
    ("CommonCrawl", 0.67, 1.10, "3.3 TB"),
    ("C4", 0.15, 1.06, "783 GB"),
    ("GitHub", 0.045, 0.64, "328 GB"),
    ("Wikipedia", 0.045, 2.45, "83 GB"),
    ("Books", 0.045, 2.23, "85 GB"),
    ("ArXiv", 0.025, 1.06, "92 GB"),
    ("StackExchange", 0.02, 1.03, "78 GB"),
)
TOKENIZED_TEXT = """How many times as many people live in California as in Alaska?
39538223 / 733391 = 53.9

def greet(name):
    return f"Hello, {name}!"

Tokenization turns any text into integers and back: naïve café, 数, 🙂."""
SNAPSHOTS, MOST_SNAPSHOTS = 4, 5  # where there are more than the second, the first


# --- the slide ---------------------------------------------------------------------------------------------------


def pipeline(record: Record) -> Section:
    """The slide of the talk, filled in from this run."""
    columns = [_pretraining(record), _finetuning(record), _reward(record), _reinforcement(record)]
    rows = ("Dataset", "Algorithm", "Model", "Notes")
    body = Markup("").join(
        Markup('<div class="stage c-{}"><h3>{}</h3>{}</div>').format(
            colour,
            name,
            Markup("").join(
                Markup('<div class="cell"><b>{}</b><p>{}</p><p class="talk">{}</p></div>').format(row, here, talk)
                for row, (here, talk) in zip(rows, cells, strict=True)
            ),
        )
        for name, colour, cells in columns
    )
    finding = Markup(
        "The talk’s slide, with this run’s numbers where the talk has those of its day <i>(in italics)</i>."
    )
    return Section("pipeline", "The pipeline", finding, Markup('<div class="slide">{}</div>').format(body))


Column = tuple[str, str, list[tuple[str, str]]]


def _time(record: Record, stage: str) -> str:
    seconds = record.wall_seconds().get(stage)
    return f"{duration(seconds)} on this machine" if seconds is not None else "not run yet"


def _pretraining(record: Record) -> Column:
    sources, trained = record.sources(), record.part("pretrain")
    documents = sum(number(source.get("documents")) or 0 for source in sources)
    tokens = number(trained.get("tokens"))
    n_params = number(trained.get("n_params"))
    return "Pretraining", "base", [
        (f"{count(documents)} documents of {len(sources)} sources" if sources else "–",
         "Raw internet: trillions of words, low quality, large quantity"),
        ("Language modelling: predict the next token" + (f", {count(tokens)} times" if tokens else ""),
         "Language modelling: predict the next token"),
        (f"Base model, {count(n_params)} parameters" if n_params else "Base model", "Base model"),
        (_time(record, "pretrain"), "1000s of GPUs, months; GPT, LLaMA, PaLM"),
    ]  # fmt: skip


def _finetuning(record: Record) -> Column:
    result = record.result("sft")
    n = number(result.get("conversations"))
    return "Supervised finetuning", "sft", [
        (f"{count(n)} demonstrations" if n else "Demonstrations",
         "10–100K ideal answers written by contractors: low quantity, high quality"),
        ("Language modelling, on the assistant’s tokens only", "Language modelling: predict the next token"),
        ("SFT model, from the base model", "SFT model, initialised from base"),
        (_time(record, "sft"), "1–100 GPUs, days; Vicuna-13B"),
    ]  # fmt: skip


def _reward(record: Record) -> Column:
    result = record.part("reward")
    pairs, prompts = number(result.get("n_pairs")), number(result.get("n_prompts"))
    labeller = "the simulated labeller" if result.get("simulated", True) else "people"
    accuracy = number(result.get("pair_accuracy"))
    return "Reward modelling", "reward", [
        (f"{count(pairs)} pairs of answers to {count(prompts)} prompts, judged by {labeller}" if pairs else "Rankings",
         "100K–1M comparisons written by contractors"),
        ("Ranking: of two answers, the preferred one gets the higher reward",
         "Binary classification: predict rewards consistent with preferences"),
        ("Reward model, from the SFT model" + (f": {percent(accuracy)} of pairs right" if accuracy else ""),
         "RM model, initialised from SFT"),
        (_time(record, "reward"), "1–100 GPUs, days"),
    ]  # fmt: skip


def _reinforcement(record: Record) -> Column:
    result = record.result("rl")
    n = number(result.get("iterations"))
    kl = number(record.part("rl").get("kl"))
    return "Reinforcement learning", "rl", [
        (f"Prompts, fresh ones in each of {count(n)} rounds" if n else "Prompts",
         "10–100K prompts written by contractors"),
        ("PPO: generate tokens that maximise the reward, near the SFT model", "Reinforcement learning"),
        ("RL model, from SFT, scored by the reward model" + (f"; {decimal(kl)} nats from SFT" if kl else ""),
         "RL model, initialised from SFT, uses the RM"),
        (_time(record, "rl"), "1–100 GPUs, days; ChatGPT, Claude"),
    ]  # fmt: skip


# --- the mixture -------------------------------------------------------------------------------------------------


def source_colour(record: Record, name: str) -> str:
    """The colour of a source, the same in its table and its curve."""
    names = [str(source.get("name")) for source in record.sources()]
    return str(names.index(name) % 8 + 1) if name in names else "none"


def mixture(record: Record) -> Section:
    """The table of sources beside LLaMA's."""
    sources = record.sources()
    theirs = pages.table(
        ["Dataset", "Share", "Epochs", "Disk size"],
        [[name, bar(part, "none", percent(part, 1)), decimal(n), disk] for name, part, n, disk in LLAMA_MIXTURE],
        caption="LLaMA, 2023",
    )  # fmt: skip
    if not sources:
        gap = pages.missing("No mixture has been collected.", f"sog collect --out {record.name}")
        return Section("mixture", "The data mixture", "What the model reads, by source.", gap + theirs, "base")
    rows = []
    for source in sources:
        share = number(source.get("share"))
        shown = share if share is not None else number(source.get("weight"))
        dot = Markup('<span class="tag c-{}">{}</span>')
        colour = source_colour(record, str(source.get("name")))
        rows.append([
            dot.format(colour, pages.title_of(str(source.get("name")))),
            bar(shown, colour, percent(shown, 1)),
            decimal(number(source.get("epochs"))),
            size(number(source.get("bytes"))),
        ])  # fmt: skip
    ours = pages.table(["Dataset", "Share", "Epochs", "Disk size"], rows, caption="This run")
    total = sum(number(source.get("bytes")) or 0 for source in sources)
    documents = sum(number(source.get("documents")) or 0 for source in sources)
    drawn = "all of one source" if len(sources) == 1 else f"drawn from {len(sources)} sources by weight"
    finding = (
        f"{count(documents)} documents, {size(total)}, {drawn}: "
        "the share is that of the tokens trained on, the epochs how often each source was read."
    )
    body = pages.grid([ours, theirs], "pair") + pages.more(
        "Every source in full, and what cleaning dropped", _full(sources)
    )
    return Section("mixture", "The data mixture", finding, body, "base")


def _full(sources: Sequence[dict[str, Any]]) -> Markup:
    rows = []
    for source in sources:
        dropped = mapping(source.get("dropped"))
        reasons = ", ".join(f"{count(number(n))} {pages.title_of(why)}" for why, n in dropped.items() if n)
        rows.append([
            pages.title_of(str(source.get("name"))), reasons or "nothing", decimal(number(source.get("weight")), 3),
            count(number(source.get("documents"))), count(number(source.get("tokens"))),
        ])  # fmt: skip
    head = ["Source", "Documents dropped", "Weight", "Documents", "Tokens"]
    return pages.table(head, rows, caption="Sources", text_columns=2)


# --- tokens ------------------------------------------------------------------------------------------------------


def tokenization(record: Record) -> Section:
    """A text coloured by token, its ids, and how many bytes a token holds."""
    facts = record.part("tokenizer")
    rate = facts.get("bytes_per_token")
    by_source = {k: v for k, x in mapping(rate).items() if (v := number(x)) is not None}
    mean = number(rate) or number(by_source.get("all")) or number(by_source.get("total"))
    vocabulary = number(facts.get("vocab_size")) or (record.tokenizer.vocab_size if record.tokenizer else None)
    if record.tokenizer is None:
        gap = pages.missing("No tokenizer has been trained.", f"sog tokenize --out {record.name}")
        return Section("tokens", "Tokenization", "How text becomes integers.", gap, "base")
    text, ids, n = _coloured(record)
    finding = (
        f"A lossless translation of text into integers below {count(vocabulary)}, learned from the mixture"
        + (f"; a token holds {decimal(mean)} bytes on average." if mean else ".")
        + f" The text below is {n} tokens for {len(TOKENIZED_TEXT.encode())} bytes."
    )
    body = Markup('<div class="pair tokens"><div class="text">{}</div><div class="ids">{}</div></div>').format(
        text, ids
    )
    if len(by_source) > 1:
        longest = max(by_source.values())
        rows = [[pages.title_of(k), bar(v / longest if longest else None, source_colour(record, k), decimal(v))]
                for k, v in by_source.items()]  # fmt: skip
        body += pages.more(
            "Bytes per token, by source", pages.table(["Source", "Bytes per token"], rows, caption="Rates")
        )
    return Section("tokens", "Tokenization", finding, body, "base")


def _coloured(record: Record) -> tuple[Markup, Markup, int]:
    assert record.tokenizer is not None
    spans: list[Markup] = []
    numbers: list[Markup] = []
    ids = record.tokenizer.encode(TOKENIZED_TEXT)
    group: list[int] = []  # tokens that are pieces of one character are shown together
    for token in ids:
        group.append(token)
        try:
            shown = record.tokenizer.decode_bytes(group, inner=bool(spans)).decode("utf-8")
        except UnicodeDecodeError:
            continue
        colour, told = len(spans) % 5, " ".join(map(str, group))
        span = Markup('<span class="t{}" title="{}">{}</span>')
        spans.append(span.format(colour, f"token {told}", shown.replace("\n", "↵\n")))
        numbers.append(Markup('<span class="t{}">{}</span>').format(colour, told))
        group = []
    return Markup("").join(spans), Markup(" ").join(numbers), len(ids)


# --- pretraining -------------------------------------------------------------------------------------------------


def pretraining(record: Record) -> Section:
    """Loss curves, and what the model wrote as it learned."""
    trained = record.part("pretrain")
    start, end = number(trained.get("val_bpb_start")), number(trained.get("val_bpb"))
    if not record.metrics.get("pretrain"):
        gap = pages.missing("No model has been pretrained.", f"sog pretrain --out {record.name}")
        return Section("pretraining", "Pretraining", "Predicting the next token, millions of times.", gap, "base")
    finding = "Held-out text costs " + (
        f"{decimal(end)} bits per byte, down from {decimal(start)}"
        if start and end
        else f"{decimal(end)} bits per byte"
    )
    tokens, rate = number(trained.get("tokens")), number(trained.get("tokens_per_second"))
    finding += f" after {count(tokens)} tokens" if tokens else ""
    finding += f" at {count(rate)} tokens per second." if rate else "."
    charts = pages.grid([_chart(c) for c in (_loss_chart(record), _bits_chart(record))])
    return Section("pretraining", "Pretraining", finding, charts + _samples(record), "base")


def _chart(svg: Markup) -> Markup:
    return pages.figure(svg)


def _loss_chart(record: Record) -> Markup:
    points = record.curve("pretrain", "loss", "tokens") or record.curve("pretrain", "loss")
    series = [Series("training", points, "c-base", noisy=True)]
    return line_chart(series, title="Training loss, nats per token", x_name="tokens")


def _bits_chart(record: Record) -> Markup:
    keys = sorted({key for line in record.metrics["pretrain"] for key in line if key.startswith("val_bpb_")})
    series = []
    for key in keys:
        name = key.removeprefix("val_bpb_")
        points = record.curve("pretrain", key, "tokens") or record.curve("pretrain", key)
        series.append(Series(pages.title_of(name), points, f"c-{source_colour(record, name)}"))
    if not series:
        points = record.curve("pretrain", "val_bpb", "tokens") or record.curve("pretrain", "val_bpb")
        series = [Series("held out", points, "c-base")]
    return line_chart(series, title="Held-out text, bits per byte", x_name="tokens")


def _samples(record: Record) -> Markup:
    kept = record.samples.get("pretrain", [])
    prompts = list(dict.fromkeys(str(sample.get("prompt", "")) for sample in kept))
    steps = sorted({number(sample.get("step")) or 0.0 for sample in kept})
    if len(steps) > MOST_SNAPSHOTS:  # more of the beginning, where more happens
        last = len(steps) - 1
        chosen = sorted({round(last * (i / (SNAPSHOTS - 1)) ** 1.6) for i in range(SNAPSHOTS)})
        steps = [steps[i] for i in chosen]
    blocks = []
    for prompt in prompts:
        cards = []
        for sample in kept:
            step = number(sample.get("step")) or 0.0
            if str(sample.get("prompt", "")) == prompt and step in steps:
                tokens = number(sample.get("tokens"))
                head = f"{short(tokens)} tokens" if tokens is not None else f"step {short(step)}"
                cards.append(pages.card(head if step else "before training", pages.said(sample.get("text", ""), 420)))
        shown = pages.clean(prompt, 160)
        blocks.append(Markup('<h3 class="prompt">{}</h3>').format(f"“{shown}”" if shown.strip() else "From nothing"))
        blocks.append(pages.grid(cards, "cards four"))
    if not blocks:
        return Markup("")
    head = Markup("<h3>The same prompts, as the model learns</h3>")
    return head + Markup("").join(blocks)


# --- the lesson --------------------------------------------------------------------------------------------------


def lesson(record: Record) -> Section:
    """Why LLaMA, the smaller model trained longer, is the better one, and what that means for this run."""
    rows: list[list[object]] = []
    for name in ("GPT-3 175B", "LLaMA-65B"):
        model = PUBLISHED[name]
        n, d = model.n_params, model.tokens
        kaplan, epoch = KAPLAN.loss(n, d), EPOCH.loss(n, d)
        rows.append([name, short(n), short(d), decimal(d / n, 1), decimal(kaplan, 3), decimal(epoch, 3)])
    trained = record.part("pretrain")
    n_params, tokens = number(trained.get("n_params")), number(trained.get("tokens"))
    if n_params and tokens and n_params > 0 and tokens > 0:
        rows.append(["This run", short(n_params), short(tokens), decimal(tokens / n_params, 1), "–", "–"])
    head = ["Model", "Parameters", "Tokens", "Tokens per parameter", "Loss by Kaplan, 2020", "Loss by Epoch, 2024"]
    body = pages.table(head, rows, caption="Scaling laws")
    note = "Predicted loss, nats per token. The laws were fitted far above this run’s size and with other tokenizers."
    finding = (
        "The smaller model trained on more tokens is the better one. The law of 2020 ranks the two the other way "
        "round; Epoch AI’s refit of the Chinchilla law gets it right."
    )
    return Section("lesson", "A smaller model, trained longer", finding, body + pages.paragraph(note, "note"), "base")
