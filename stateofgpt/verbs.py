"""What each verb of the command line does once its words are read.

Owns: from options to a call of the module that does the work, and what a one-line verb prints. Knows nothing of how
words are parsed. Nothing heavy is imported before a verb asks for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stateofgpt.config import apply_overrides, from_dict, suggestion
from stateofgpt.errors import ConfigError, DataError
from stateofgpt.run import Run, feedback_of, newest_model, resolve_model, resolve_run


def raise_assistant(options: argparse.Namespace) -> None:
    """Every stage of a recipe, then the report."""
    from stateofgpt.recipes.pipeline import execute

    out = options.out or Path("runs") / options.recipe
    execute(_load(options, options.recipe), out)


def run_stage(options: argparse.Namespace) -> None:
    """One stage of a run, with what the run was made with."""
    from stateofgpt.recipes.pipeline import execute

    out = options.out or Path("runs") / (options.recipe or "laptop")
    here = Run.read(out) if (out / "run.json").is_file() else None
    name = options.recipe or (here.recipe if here else "laptop")
    if options.seed is None and here:
        options.seed = here.seed
    recipe = _load(options, name)
    if here and here.recipe == name and options.minutes is None and options.corpus is None and options.start is None:
        try:  # what the run was made with, so that `sog eval --out DIR` needs no repeating of it
            recipe = apply_overrides(from_dict(type(recipe), here.config), options.overrides)
        except ConfigError:
            if options.overrides:
                raise
    execute(recipe, out, only=options.verb)


def _load(options: argparse.Namespace, name: str) -> Any:
    from stateofgpt.recipes import load, names

    if name not in names():
        known = suggestion(name, names()) or f"; there are {', '.join(names())}"
        raise ConfigError(f'there is no recipe "{name}"{known}')
    corpus = tuple(options.corpus or ())
    for path in corpus:
        if not path.exists():
            raise DataError(f"--corpus {path}: there is no such file or folder")
    model = None if options.start is None else resolve_model(options.start)
    asked = {"minutes": options.minutes, "seed": options.seed or 0, "corpus": corpus, "overrides": options.overrides}
    return load(name, model=model, **asked)


def report(options: argparse.Namespace) -> None:
    """The report of a run."""
    from stateofgpt.report.build import build

    print(build(resolve_run(options.run)))


def plan(options: argparse.Namespace) -> None:
    """What a budget buys."""
    from stateofgpt.report.plan import plan

    plan(options)


def ladder(options: argparse.Namespace) -> None:
    """A law from a grid of small models."""
    from stateofgpt.recipes.ladder import climb

    climb(options)


def sample(options: argparse.Namespace) -> None:
    """Continuations of a prompt."""
    folder = resolve_model(options.model)
    from stateofgpt.infer.engine import Engine, SamplingParams
    from stateofgpt.model.checkpoint import load_model
    from stateofgpt.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    engine = Engine(load_model(folder), native=True)
    prompt = [tokenizer.eot, *tokenizer.encode(options.prompt)]
    params = [
        SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed + number,
            stop_ids=tokenizer.stops,
        )
        for number in range(options.n)
    ]
    for number, completion in enumerate(engine.complete([prompt] * options.n, params)):
        if options.n > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} of {options.n}")
        print(options.prompt + tokenizer.decode(completion.ids, inner=True))


def logprobs(options: argparse.Namespace) -> None:
    """A text's tokens and log-probabilities, as JSON."""
    folder = resolve_model(options.model)
    from stateofgpt.infer.engine import Engine
    from stateofgpt.model.checkpoint import load_model
    from stateofgpt.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    engine = Engine(load_model(folder))
    ids = tokenizer.encode(options.text)
    scores = engine.score([ids])[0] if len(ids) > 1 else []
    print(json.dumps({"ids": ids, "tokens": [tokenizer.token_str(token) for token in ids], "logprobs": scores}))


def chat(options: argparse.Namespace) -> None:
    """A conversation in the terminal."""
    folder = resolve_model(options.model) if options.model else newest_model()
    from stateofgpt.serve.terminal import chat

    chat(folder, options.feedback or feedback_of(folder), options.temperature, options.seed)


def serve(options: argparse.Namespace) -> None:
    """The page and the API."""
    folders = [resolve_model(model) for model in options.model] or [newest_model()]
    from stateofgpt.serve.config import Config
    from stateofgpt.serve.process import serve

    feedback = options.feedback or feedback_of(folders[0]) or Path("feedback.sqlite")
    given = {
        "max_answers": options.max_answers,
        "max_connections": options.max_connections,
        "drain_s": options.drain,
        "names": tuple(name.lower() for name in options.name) if options.name else None,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    serve(folders, feedback, Config(host=options.host, port=options.port, **chosen), options.keys)


def keys(options: argparse.Namespace) -> None:
    """The keys of a server."""
    from stateofgpt.serve.keys import Key, new_key, read_keys, remove_key

    if options.deed == "list":
        for key in read_keys(options.keys).values():
            limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
            told = [f"{limit} {what} a minute" for what, limit in limits.items() if limit]
            told += [f"{key.concurrent} at once"] if key.concurrent else []
            print(f"{key.name}: {', '.join(told) or 'no limits'}{', admin' if key.admin else ''}")
        return
    if options.holder is None:
        raise ConfigError(f"say whose key: `sog keys {options.deed} NAME`")
    if options.deed == "remove":
        remove_key(options.keys, options.holder)
        print(f"{options.holder} is no longer in {options.keys}")
        return
    made = Key(
        options.holder,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
        concurrent=options.concurrent,
        admin=options.admin,
    )
    print(new_key(options.keys, made))


def improve(options: argparse.Namespace) -> None:
    """The next assistant from the thumbs."""
    run = resolve_run(options.run)
    from stateofgpt.stages.improve import improve

    improve(run, minutes=options.minutes, seed=options.seed)


def bring(options: argparse.Namespace) -> None:
    """A model from elsewhere."""
    from stateofgpt.interchange.source import import_model

    print(import_model(options.source, options.out, tokenizer=options.tokenizer, dtype=options.dtype))


def tree(options: argparse.Namespace) -> None:
    """The tree of models."""
    from stateofgpt.report.tree import print_tree

    print_tree(options.folder)
