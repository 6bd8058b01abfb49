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

BEGUN_BY = {  # runs of a single stage, by their recipe: what of, and the command
    "votes": ("votes", "sog reward DATA --from MODEL"),
    "prompts": ("prompts", "sog rl PROMPTS --from MODEL --reward MODEL"),
}


def raise_assistant(options: argparse.Namespace) -> None:
    """Every stage of a recipe, then the report."""
    from stateofgpt.recipes import runner

    out = options.out or Path("runs") / options.recipe
    recipe = _load(options, options.recipe)
    runner(options.recipe)(recipe, out)


def run_stage(options: argparse.Namespace) -> None:
    """One stage of a run, with what the run was made with."""
    from stateofgpt.recipes import runner

    out = options.out or Path("runs") / (options.recipe or "laptop")
    here = Run.read(out) if (out / "run.json").is_file() else None
    name = options.recipe or (here.recipe if here else "laptop")
    if here and here.recipe in BEGUN_BY:
        what, command = BEGUN_BY[here.recipe]
        raise ConfigError(f"{out} was made from a file of {what}; `{command} --out {out}` continues it")
    if options.seed is None and here:
        options.seed = here.seed
    recipe = _load(options, name)
    if here and here.recipe == name and options.minutes is None and options.corpus is None and options.start is None:
        try:  # what the run was made with, so that `sog eval --out DIR` needs no repeating of it
            recipe = apply_overrides(from_dict(type(recipe), here.config), options.overrides)
        except ConfigError:
            if options.overrides:
                raise
    runner(name)(recipe, out, only=options.verb)


def reward(options: argparse.Namespace) -> None:
    """A run's reward stage; with a file of votes a reward model from it, or the health of one."""
    only_with_data = ("health", "lora", "layers", "folds", "context", "device", "json")
    if options.data is None:
        for name in only_with_data:
            if getattr(options, name):
                raise ConfigError(f"--{name} needs a file of votes: sog reward DATA ...")
        return run_stage(options)
    if options.recipe is not None or options.corpus is not None or options.overrides:
        name = next(iter(options.overrides), "recipe" if options.recipe is not None else "corpus")
        raise ConfigError(f"--{name} is for a run's own stage and means nothing beside a file of votes")
    if not options.data.exists():
        raise DataError(f"{options.data}: there is no such file")
    if options.health is not None:
        given = {"from": options.start, "out": options.out, "minutes": options.minutes, "seed": options.seed}
        given |= {name: getattr(options, name) for name in ("lora", "layers", "folds", "context")}
        if useless := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"--{useless[0]} is for training, and --health only measures; leave it out")
    from stateofgpt.recipes import votes

    if options.health is not None:
        return votes.health(resolve_model(options.health), options.data, as_json=options.json, device=options.device)
    if options.start is None:
        raise ConfigError("a reward model begins from a model: give --from MODEL (`sog import smollm2` brings one)")
    return votes.train(
        options.data,
        resolve_model(options.start),
        options.out or Path("runs") / f"votes-{options.data.name.split('.')[0]}",
        minutes=options.minutes,
        seed=options.seed or 0,
        as_json=options.json,
        lora=options.lora,
        layers=options.layers,
        folds=options.folds or 5,
        context=options.context or 512,
        device=options.device,
    )


def rl(options: argparse.Namespace) -> None:
    """A run's reinforcement learning; with a file of prompts a policy from a model and a reward model."""
    if options.data is None:
        for name in ("reward", "judge", "context", "device"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name} needs a file of prompts: sog rl PROMPTS ...")
        return run_stage(options)
    if options.recipe is not None or options.corpus is not None:
        name = "recipe" if options.recipe is not None else "corpus"
        raise ConfigError(f"--{name} is for a run's own stage and means nothing beside a file of prompts")
    if not options.data.exists():
        raise DataError(f"{options.data}: there is no such file")
    if options.start is None or options.reward is None:
        raise ConfigError("a policy begins from a model and climbs a reward: give --from MODEL and --reward MODEL")
    from stateofgpt.recipes import prompts

    config = prompts.settings(
        options.data,
        resolve_model(options.start),
        resolve_model(options.reward),
        judge=None if options.judge is None else resolve_model(options.judge),
        context=options.context or 512,
        device=options.device,
        minutes=options.minutes,
        overrides=options.overrides,
    )
    out = options.out or Path("runs") / f"prompts-{options.data.name.split('.')[0]}"
    prompts.train(config, out, options.seed or 0)
    return None


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
    from stateofgpt.infer.transfer import room_on
    from stateofgpt.model.checkpoint import load_model
    from stateofgpt.model.device import choose_device
    from stateofgpt.text.tokenizer import Tokenizer

    device, tokenizer = choose_device(options.device), Tokenizer.load(folder)
    with room_on(device):
        engine = Engine(load_model(folder).to(device), native=True, max_batch=min(options.n, 64))
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
    """A text's tokens and log-probabilities, or how likely a whole file is, as JSON."""
    if (options.text is None) == (options.file is None):
        raise ConfigError("sog logprobs needs either --text or --file, and not both")
    folder = resolve_model(options.model)
    from stateofgpt.eval.likelihood import bits_per_byte, in_parts
    from stateofgpt.infer.engine import Engine
    from stateofgpt.infer.transfer import room_on
    from stateofgpt.model.checkpoint import load_model
    from stateofgpt.model.device import choose_device
    from stateofgpt.text.tokenizer import Tokenizer

    device, tokenizer = choose_device(options.device), Tokenizer.load(folder)
    with room_on(device):
        engine = Engine(load_model(folder).to(device), max_batch=1)
    if options.file is not None:
        text = _text_of(options.file)
        ids = tokenizer.encode(text)
        context = min(options.context, engine.max_context)
        nats = -sum(map(sum, engine.score(list(in_parts(ids, tokenizer.eot, context)))))
        n_bytes = len(text.encode())
        told = {"file": str(options.file), "bytes": n_bytes, "tokens": len(ids), "context": context, "nats": nats}
        print(json.dumps({**told, "bits_per_byte": bits_per_byte(nats, n_bytes)}))
        return
    ids = tokenizer.encode(options.text)
    scores = engine.score([ids])[0] if len(ids) > 1 else []
    print(json.dumps({"ids": ids, "tokens": [tokenizer.token_str(token) for token in ids], "logprobs": scores}))


def _text_of(file: Path) -> str:
    """A file's text, which must be UTF-8: what was put in place of other bytes would be scored, and not the file."""
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    if not text:
        raise DataError(f"{file} is empty; there is nothing to score")
    return text


def chat(options: argparse.Namespace) -> None:
    """A conversation in the terminal."""
    folder = resolve_model(options.model) if options.model else newest_model()
    from stateofgpt.serve.terminal import chat

    chat(
        folder,
        options.feedback or feedback_of(folder),
        options.temperature,
        options.seed,
        options.weights,
        options.device,
    )


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
        "step_s": options.step_limit,
        "device": options.device,
        "weights": options.weights,
        "cache": options.cache,
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

    if options.folder != Path("runs") and not options.folder.is_dir():
        raise DataError(f"{options.folder} is no folder of runs; leave it out for runs/")
    print_tree(options.folder)
