"""Training on another device than the CPU: pretraining and finetuning there give what they give here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import twin_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from twin_device import twin

from stateofgpt.data.batches import PretrainBatches
from stateofgpt.data.demonstrations import DemonstrationConfig
from stateofgpt.errors import ConfigError, RunError
from stateofgpt.model.checkpoint import load_model
from stateofgpt.model.gpt import GPT
from stateofgpt.run import Run
from stateofgpt.stages import collect, decision, pretrain, sft, sizes, tokenize
from stateofgpt.stages.way import way_of
from stateofgpt.train import loop
from stateofgpt.train.guard import SpikeConfig
from stateofgpt.train.loop import LoopConfig, Trainer, fit
from stateofgpt.train.loss import Batch, LanguageModelLoss
from stateofgpt.train.optim import MuonAdamW, OptimConfig
from stateofgpt.train.state import TrainState

__all__ = ["twin"]

ADAMW = OptimConfig(use_muon=False)  # Muon's iteration in bfloat16 makes much of the last bit


@pytest.fixture(autouse=True)
def _one_way() -> Iterator[None]:
    """One thread, and the attention that the twin has."""
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenized")
    (folder / "text.txt").write_text(
        "\n\n".join(f"The lamp of door {i} sings to river {i * 7 % 13}." for i in range(60))
    )
    talk = [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": "The river of door 7."}]
    (folder / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    with Run.open(folder / "run", "tiny", {}, 0) as run:
        own = collect.Config(sources=(), corpus=(str(folder / "text.txt"),), corpus_weight=1.0, most_characters=256,
                             fewest_corpus_bytes=1, validation_share=0.2)  # fmt: skip
        collect.run(own, run)
        tokenize.run(tokenize.Config(vocab_size=300), run)
    return folder


def base(device: str | None, **changes: Any) -> pretrain.Config:
    small: dict[str, Any] = {
        "steps": 6, "width": 64, "layers": 1, "context": 64, "rows": 4, "sample_at": (), "eval_at": (0, 1),
        "eval_tokens": 64, "dtype": "float32", "fused": False, "compiled": False, "device": device,
        "loop": LoopConfig(optim=ADAMW, save_every_s=-1.0, average_share=0.5),
    }  # fmt: skip
    return pretrain.Config(**{**small, **changes})


def tuned(folder: Path, **changes: Any) -> sft.Config:
    return sft.Config(
        steps=4, rows=2, validation_rows=2, files=(str(folder / "talk.jsonl"),), files_share=1.0,
        data=DemonstrationConfig(dialogue_share=0.0), loop=LoopConfig(optim=ADAMW, save_every_s=-1.0), **changes,
    )  # fmt: skip


def begun(tokenized: Path, folder: Path) -> Run:
    shutil.copytree(tokenized / "run", folder)
    return Run.open(folder, "tiny", {}, 0)


def weights(run: Run, stage: str) -> dict[str, Tensor]:
    return dict(load_model(run.root / stage / "checkpoint").named_parameters())


def assert_alike(a: dict[str, Tensor], b: dict[str, Tensor], share: float) -> None:
    for name, t in a.items():
        assert torch.linalg.vector_norm(t - b[name]) <= share * torch.linalg.vector_norm(t), name


def told(run: Run, stage: str) -> list[dict[str, Any]]:
    clocks = ("time", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in clocks} for line in run.stage(stage).metrics()]


@pytest.mark.slow
def test_pretraining_and_finetuning_elsewhere_give_what_they_give_here(
    tokenized: Path, tmp_path: Path, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def trainer(model: GPT, *given: Any) -> Trainer:
        trained.append(model.lm_head.weight.device.type)
        return Trainer(model, *given)

    for stage in (pretrain, sft):
        monkeypatch.setattr(stage, "Trainer", trainer)
    with begun(tokenized, tmp_path / "here") as here, begun(tokenized, tmp_path / "there") as there:
        for run, device in ((here, "cpu"), (there, twin)):
            pretrain.run(base(device), run)
            sft.run(tuned(tokenized), run)
        assert trained == ["cpu", "cpu", twin, twin]
        plans = [run.stage("pretrain").decided("plan") for run in (here, there)]
        assert plans[1] == {**plans[0], "device": twin} and "device" not in plans[0]
        assert way_of(here).device == "cpu" and way_of(there).device == twin
        for stage in ("pretrain", "sft"):
            mine, theirs = told(here, stage), told(there, stage)
            assert len(mine) == len(theirs) >= 5
            for a, b in zip(mine, theirs, strict=True):
                assert a == pytest.approx(b, rel=1e-4)
            assert_alike(weights(here, stage), weights(there, stage), 1e-3)
        assert told(there, "sft")[-1]["conversations"] >= 8


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.slow
@pytest.mark.parametrize("muon", [True, False])
def test_a_run_elsewhere_that_was_killed_ends_with_the_same_bits(
    muon: bool, tokenized: Path, tmp_path: Path, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    loop = LoopConfig(optim=OptimConfig(use_muon=muon), save_every_s=-1.0, average_share=0.5)
    for die in (None, 6):
        with begun(tokenized, tmp_path / f"run{die}") as run:
            if die is not None:
                plain, reads = PretrainBatches.rows, []

                def rows(self: PretrainBatches, first: int, n: int, plain: Any = plain, reads: Any = reads) -> Any:
                    reads.append(first)
                    if len(reads) == 6:  # while the fifth step is made: the average of the last three has begun
                        raise Stopped
                    return plain(self, first, n)

                with monkeypatch.context() as patched, pytest.raises(Stopped):
                    patched.setattr(PretrainBatches, "rows", rows)
                    pretrain.run(base(twin, loop=loop), run)
                assert TrainState(run.stage("pretrain").resume_dir).latest() is not None
            pretrain.run(base(twin, loop=loop), run)
            ends.append(((run.root / "pretrain/checkpoint/model.safetensors").read_bytes(), told(run, "pretrain")))
    assert ends[0] == ends[1]


def test_a_run_for_a_device_that_is_not_here_says_so_in_one_sentence(tokenized: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has it")
    with begun(tokenized, tmp_path / "run") as run:
        plan = {**decision.plan_new(base("cpu"), 300, tmp_path), "device": "cuda"}
        run.stage("pretrain").decide("plan", lambda: plan)
        for go_on in (lambda: pretrain.run(base(None), run), lambda: way_of(run)):
            with pytest.raises(RunError, match=r"this run computes on cuda.* no such device.*--out") as refused:
                go_on()
            assert "\n" not in str(refused.value)


def test_kernels_of_the_cpu_are_refused_elsewhere_and_not_left_out_in_silence(twin: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--pretrain.fused true is the CPU's, and this run trains on {twin}"):
        decision.plan_new(base(twin, fused=True), 300, tmp_path)
    assert decision.plan_new(base(twin, fused=False), 300, tmp_path)["fused"] is False


def test_what_is_not_set_leaves_plan_and_configuration_as_they_were(tmp_path: Path) -> None:
    plan = decision.plan_new(base("cpu"), 300, tmp_path)
    assert list(plan) == ["model", "dtype", "compiled", "fused", "rates"]
    with Run.open(tmp_path / "run", "r", {"pretrain": {"rows": 8}}, 0):
        pass
    with Run.open(tmp_path / "run", "r", {"pretrain": {"rows": 8, "device": None, "loop": {"exact": None}}}, 0):
        pass  # a run of an earlier version goes on


@pytest.mark.slow
def test_with_seconds_the_rows_of_a_step_are_those_that_fill_the_device(
    tokenized: Path, tmp_path: Path, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fill_shape(*given: Any, **also: Any) -> decision.dial_gpu.Filled:
        asked.append((given[2:], also))
        return decision.dial_gpu.Filled(2, 100.0, {"2": 100.0, "4": 101.0})

    monkeypatch.setattr(decision.dial_gpu, "fill_shape", fill_shape)
    with begun(tokenized, tmp_path / "run") as run:
        result = pretrain.run(base(twin, seconds=1.5, steps=None, context=16, rows=4), run)
    assert asked == [((16, 4, twin), {"run_seconds": 1.5, "within": pytest.approx(0.09)})]
    assert result["plan"]["rows"] == 2 and result["plan"]["rates_by_rows"] == {"2": 100.0, "4": 101.0}
    assert result["tokens"] == result["steps"] * 2 * 16 and result["steps"] >= 20


@pytest.mark.slow
def test_smaller_sizes_go_where_the_largest_goes(tokenized: Path, tmp_path: Path, twin: str) -> None:
    with begun(tokenized, tmp_path / "run") as run:
        sizes.run(base(twin, width=128, steps=2, sizes=2, prompts=("The",)), run)
        (smaller,) = (path.parent.name for path in (run.root / "pretrain").glob("*/result.json"))
        plans = [run.inside(name).decided("plan") for name in (f"pretrain/{smaller}", "pretrain")]
    assert [plan["device"] for plan in plans] == [twin, twin] and not plans[0]["fused"]


# ------------------------------------------------------------------------------------------------------------- one step


def tiny(device: str, seed: int = 0) -> GPT:
    from stateofgpt.train.dial import shape

    model = GPT(shape(64, 2, 64, 16))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(device)


def drawn(seed: int) -> Batch:
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed)).numpy()
    return Batch.of(ids[:, :-1].copy(), ids[:, 1:].copy(), begins=3)


def test_a_step_asks_its_device_for_numbers_once(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, loss = Trainer(tiny(twin), LoopConfig()), LanguageModelLoss(device=twin)
    batches = [drawn(i).to(twin) for i in range(3)]
    trainer.step(batches, loss, 1.0)
    plain, waits = twin_device._run, []

    def watched(func: Any, args: Any, kwargs: Any) -> Any:
        out = plain(func, args, kwargs)
        if isinstance(args[0] if args else None, twin_device.TwinTensor) and (
            (not isinstance(out, Tensor) and func._schema.name == "aten::_local_scalar_dense")
            or (isinstance(out, Tensor) and out.device.type == "cpu")
        ):  # fmt: skip
            waits.append(func._schema.name)
        return out

    monkeypatch.setattr(twin_device, "_run", watched)
    trainer.step(batches, loss, 1.0)
    assert len(waits) == 1


def test_a_batch_knows_its_weight_before_it_leaves(twin: str) -> None:
    batch = drawn(0)
    gone = batch.to(twin)
    assert gone.known == batch.weight == gone.weight == 32.0 and batch.known is None
    assert gone.to(twin) is not batch and gone.ids.device.type == twin and gone.firsts is not None


def test_adamw_over_all_tensors_at_once_is_adamw_over_each(twin: str) -> None:
    ends = []
    for device in ("cpu", twin):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False)).to(device)
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        optimizer = MuonAdamW(model.named_parameters(), OptimConfig(weight_decay=0.3))
        for step in range(4):
            for i, p in enumerate(model.parameters()):
                p.grad = None if i == 1 and step == 2 else torch.randn(p.shape, generator=g).to(device)
                if i == 1 and step == 2:
                    torch.randn(p.shape, generator=g)
            optimizer.step(0.5, 0.7)
        ends.append([p.detach().cpu() for p in model.parameters()] + [t.cpu() for t in optimizer.state().values()])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["note", "skip", "lower", "roll_back"])
def test_batches_that_are_made_ahead_are_those_that_are_asked_for(
    policy: Any, twin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, made = [], []
    spikes = SpikeConfig(policy=policy, window=8, spread=1e-6, norm=0.5)  # a loss that rises is a spike

    def batches(step: int) -> Sequence[Batch]:
        made.append(step)
        return [drawn(step)]

    for name in ("ahead", "in time"):
        trainer, loss = Trainer(tiny(twin), LoopConfig(optim=ADAMW, spikes=spikes)), LanguageModelLoss(device=twin)
        seen: list[tuple[int, dict[str, float]]] = []
        state, log = TrainState(tmp_path / name), lambda step, metrics, seen=seen: seen.append((step, metrics))
        fit(trainer, batches, loss, steps=12, factor=lambda _: 30.0, state=state, callbacks=(log,))
        ends.append(seen)
        assert made[0] == 0 and made[-1] == 11 and (policy == "roll_back" or made == [*range(12)])
        made.clear()
        monkeypatch.setattr(loop._Fit, "_look_ahead", lambda self, step: None)
    assert ends[0] == ends[1] and (policy == "roll_back" or ends[0][-1][0] == 12)
    assert policy == "roll_back" or any("spike" in metrics for _, metrics in ends[0])


def test_what_a_device_cannot_add_in_one_order_is_told_and_done_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(batch)
        if len(calls) == 1:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but ...\nmore")
        return LanguageModelLoss()(model, batch)

    trainer = Trainer(tiny("cpu"), LoopConfig())
    first = trainer.step([drawn(0)], loss, 1.0)
    assert first == Trainer(tiny("cpu"), LoopConfig()).step([drawn(0)], LanguageModelLoss(), 1.0)
    trainer.step([drawn(0)], loss, 1.0)
    assert len(calls) == 3 and "without a fixed order of sums" in capsys.readouterr().err

    def broken(model: Any, batch: Any) -> Tensor:
        raise RuntimeError("something else")

    failing: Callable[[], Any] = lambda: trainer.step([drawn(0)], broken, 1.0)  # noqa: E731
    with pytest.raises(RuntimeError, match="something else"):
        failing()
