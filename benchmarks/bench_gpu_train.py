"""Training on a GPU: the peak of its products, tokens per second and their share of it, and time to loss.

    python benchmarks/bench_gpu_train.py [--seconds 480] [--text FILE] [--parts peak rate rate-large loss]

Needs no network. Prints one line of JSON after each part; a part that fails or takes too long says so, and the next one
begins. All parts together take `--seconds`, of which the time to loss gets what the others leave. Every part is a
process of its own.

    peak        bfloat16 products of square matrices, the best of three sizes
    rate        12 layers, 768 wide, context 1,024, vocabulary 50,304: compiled blocks, whole steps with the optimizer,
                at the rows that fill the device and twice as many; share of the measured peak by 6 N D (N: all that
                multiplies, the head included), and by that plus causal attention, 6 layers x width x context
    rate-large  the same for 24 layers, 1,536 wide (0.8B parameters)
    order       `rate` at its best rows without the fixed order of sums: what that costs; only when it is named
    loss        the peer (compiled GPT-2 of transformers, 12 layers, 768 wide, AdamW fused, bfloat16) for some minutes,
                then ours for a third of them, on the same ids: the gate is that ours ends with no higher a loss
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import texts
from gpu_time_to_loss import Task

HERE = Path(__file__).parent
PARTS = ("peak", "rate", "rate-large", "order", "loss")
SHARES = {"peak": 0.04, "rate": 0.16, "rate-large": 0.2, "order": 0.12}  # of all seconds, at most
SHAPES = {"rate": (768, 12), "rate-large": (1536, 24), "order": (768, 12)}
VOCABULARY, CONTEXT, IDS = 50304, 1024, 64_000_000
OURS_SHARE = 1 / 3
PEER_LR = 1e-3


def peak(task: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of products of n x n matrices in bfloat16."""
    import torch

    from stateofgpt.model.device import choose_device, wait

    device = choose_device()
    rates = {}
    for n in task["sizes"]:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(3):
            torch.mm(a, b, out=out)
        wait(device)
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < task["each"]:
            for _ in range(10):
                torch.mm(a, b, out=out)
            wait(device)
            done += 10
        rates[str(n)] = 2.0 * n**3 * done / (time.perf_counter() - start)
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    return {"device": name, "torch": torch.__version__, "peak": max(rates.values()), "by_size": rates}


def rate(task: dict[str, Any], told: Path) -> dict[str, Any]:
    """Tokens per second of whole steps of one shape, at a few numbers of rows."""
    import torch

    from stateofgpt.model.device import choose_device, wait
    from stateofgpt.model.gpt import GPT
    from stateofgpt.train import dial_gpu
    from stateofgpt.train.dial import shape
    from stateofgpt.train.loop import LoopConfig, Trainer
    from stateofgpt.train.loss import Batch, LanguageModelLoss
    from stateofgpt.train.planner import train_flops

    began, device, context = time.perf_counter(), choose_device(), task["context"]
    config = shape(*task["shape"], task["vocab_size"], context)
    if task["rows"] is None:
        filled = dial_gpu.fill_shape(
            config, "bfloat16", context, 4, device, run_seconds=1e6, within=task["seconds"] / 8
        )
        if filled is None:
            raise SystemExit("not a single row fits into memory")
        tries, plain = [filled.rows, 2 * filled.rows], filled.rates
    else:
        tries, plain = [task["rows"]], {}
    model = dial_gpu.blank(config, device)
    trainer = Trainer(model, LoopConfig(exact=task["exact"]))
    loss = LanguageModelLoss("bfloat16", task["compiled"], device=device)
    found: list[dict[str, float]] = []
    n_params, flops, most = GPT.n_params(model), train_flops(config), task["peak"]

    def summed_up(found: list[dict[str, float]], plain: dict[str, float]) -> dict[str, Any]:
        best = max(found, key=lambda x: x["tokens_per_second"])
        inner, whole = (per * best["tokens_per_second"] for per in (6.0 * n_params, flops))
        shares = {"share_6nd": inner / most, "share": whole / most} if most else {}
        about = {"parameters": n_params, "compiled": task["compiled"], "exact": task["exact"], "flops_per_token": flops}
        return {**about, **best, **shares, "tried": found, "plain_by_rows": plain}

    for rows in tries:
        if found and time.perf_counter() - began > task["seconds"] * 0.6:
            break
        ids = torch.randint(0, config.vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0))
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, context))
        try:
            start = time.perf_counter()
            for _ in range(3):
                trainer.step([batch], loss, 0.0)
            wait(device)
            compiling, start, steps = time.perf_counter() - start, time.perf_counter(), 0
            while time.perf_counter() - start < task["each"]:
                trainer.step([batch], loss, 0.0)
                steps += 1
            wait(device)
        except torch.OutOfMemoryError:
            break
        tokens = steps * rows * context / (time.perf_counter() - start)
        memory = torch.cuda.max_memory_allocated() if device != "cpu" else 0
        found.append({"rows": rows, "tokens_per_second": tokens, "first_steps_seconds": compiling, "memory": memory})
        told.write_text(json.dumps(summed_up(found, plain)))  # a part that is cut off has said so much
    return summed_up(found, plain)


def child(script: str, task: dict[str, Any], limit: float) -> dict[str, Any]:
    """One part in a process of its own, with compilers' caches of its own; its result, or `error`."""
    with tempfile.TemporaryDirectory() as work:
        asked, told = Path(work) / "task.json", Path(work) / "result.json"
        asked.write_text(json.dumps(task))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor", "TRITON_CACHE_DIR": f"{work}/triton"}
        start = time.perf_counter()
        command = [sys.executable, str(HERE / script), *([] if script != Path(__file__).name else ["--child"])]
        try:
            done = subprocess.run(
                [*command, str(asked), str(told)], env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            late = {"cut_off_after": limit, "wall": time.perf_counter() - start}
            said = json.loads(told.read_text()) if told.exists() else {"error": f"not done after {limit:.0f} seconds"}
            return {**said, **late}
        wall = time.perf_counter() - start
        if done.returncode or not told.exists():
            return {"error": done.stderr[-1500:] or f"exit status {done.returncode}", "wall": wall}
        return {**json.loads(told.read_text()), "wall": wall}


def loss(options: argparse.Namespace, seconds: float, folder: Path) -> dict[str, Any]:
    """The pair: the peer first, then ours for a share of its time. The gate is in `as_good`."""
    tiny = options.tiny
    vocab, context = (256, 32) if tiny else (VOCABULARY, CONTEXT)
    start = time.perf_counter()
    if options.text is not None:
        corpus = texts.prepare(options.text.read_text(encoding="utf-8"), folder, 300 if tiny else options.vocabulary)
    else:
        corpus = texts.make_up(folder, 40_000 if tiny else IDS, vocab, context)
    vocab = max(corpus.vocab_size, vocab)
    making = time.perf_counter() - start
    asked = options.peer_seconds or max(5.0, (seconds - making - 25.0) / (1.0 + OURS_SHARE))
    theirs = Task("peer", str(folder), asked, 768, 12, 12, context, vocab, options.rows, PEER_LR,
                  compiled=not options.plain)  # fmt: skip
    mine = replace(theirs, side="ours", seconds=asked * OURS_SHARE, width=options.width, layers=options.layers,
                   heads=options.width // 64, lr=3e-3, weight_decay=0.02)  # fmt: skip
    if tiny:
        theirs, mine = (replace(x, width=64, layers=1, heads=1, rows=2, compiled=False) for x in (theirs, mine))
    sides = [child("gpu_time_to_loss.py", asdict(task), task.seconds + 45.0) for task in (theirs, mine)]
    result: dict[str, Any] = {"making_seconds": making, "peer": sides[0], "ours": sides[1]}
    if not any("error" in side for side in sides):
        result["as_good"] = sides[1]["val_loss"] <= sides[0]["val_loss"]
        result["times_as_fast"] = sides[0]["wall"] / sides[1]["wall"]
    return result


def main() -> None:
    """All parts in turn; one line of JSON each."""
    if sys.argv[1:2] == ["--child"]:
        task = json.loads(Path(sys.argv[2]).read_text())
        told = Path(sys.argv[3])
        told.write_text(json.dumps(peak(task) if task["part"] == "peak" else rate(task, told)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[x for x in PARTS if x != "order"])
    parser.add_argument("--text", type=Path, help="for the time to loss, in place of made-up ids")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of byte pairs, with --text")
    parser.add_argument("--rows", type=int, default=32, help="of a step, of both sides of the time to loss")
    parser.add_argument("--width", type=int, default=768, help="of our side")
    parser.add_argument("--layers", type=int, default=12, help="of our side")
    parser.add_argument("--peer-seconds", type=float, help="of the peer's process; default: what the budget leaves")
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the program on a CPU")
    options = parser.parse_args()
    began = time.perf_counter()
    known: dict[str, Any] = {"peak": 0.0, "rows": None}
    for part in options.parts:
        left = options.seconds - (time.perf_counter() - began)
        try:
            result = one(part, options, left, known)
        except (Exception, SystemExit) as failure:  # the next part is to have its time
            result = {"error": f"{type(failure).__name__}: {failure}"}
        known |= {
            name: result[name] for name, of in (("peak", "peak"), ("rows", "rate")) if part == of and name in result
        }
        print(json.dumps({"part": part, **result}), flush=True)


def one(part: str, options: argparse.Namespace, left: float, known: dict[str, Any]) -> dict[str, Any]:
    """What one part says. `left` seconds are there for it and all after it."""
    share, mine = options.seconds * SHARES.get(part, 0.0), Path(__file__).name
    if part == "loss":
        with tempfile.TemporaryDirectory() as folder:
            return loss(options, left, Path(folder))
    if part == "peak":
        sizes = (64, 128) if options.tiny else (4096, 8192, 16384)
        return child(mine, {"part": part, "sizes": sizes, "each": share / 12}, share + 20.0)
    task = {
        "part": part,
        "shape": (64, 1) if options.tiny else SHAPES[part],
        "vocab_size": 256 if options.tiny else VOCABULARY,
        "context": 32 if options.tiny else CONTEXT,
        "seconds": share,
        "each": 0.2 if options.tiny else 5.0,
        "peak": known["peak"],
        "rows": known["rows"] if part == "order" else None,
        "exact": part != "order",
        "compiled": not (options.plain or options.tiny),
    }
    start = time.perf_counter()
    result = child(mine, task, min(left, share + 30.0))
    if "error" in result and task["compiled"]:  # without a compiler there is still something to know
        left -= time.perf_counter() - start
        return {"compiled_error": result["error"], **child(mine, {**task, "compiled": False}, min(left, share))}
    return result


if __name__ == "__main__":
    main()
