"""How a step is recorded on a GPU, with the GPU played: what is asked of torch, in which order, and when it fails."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stateofgpt.infer.capture import CudaGraphs


class FakeCuda:
    """What `CudaGraphs` uses of `torch.cuda`; `told` is all that happened, with the stream on which it did."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.now = "theirs"
        self.fails: Exception | None = None
        self.streams = {"theirs": self._stream("theirs")}

    def _stream(self, name: str) -> Any:
        return types.SimpleNamespace(name=name, wait_stream=lambda other: self.told.append((name, "after", other.name)))

    def Stream(self) -> Any:
        return self.streams.setdefault("ours", self._stream("ours"))

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self) -> Any:
        return self.streams[self.now]

    def set_stream(self, stream: Any) -> None:
        self.now = stream.name

    def device(self, device: torch.device) -> Any:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def CUDAGraph(self) -> Any:
        return types.SimpleNamespace(replay=lambda: self.told.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream.name, capture_error_mode) == ("pool", "ours", "thread_local")
        self.now = stream.name
        self.told.append("begin")
        yield
        if self.fails is not None:
            raise self.fails  # and leaves the stream as it is
        self.told.append("end")
        self.now = "theirs"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_a_step_runs_twice_on_the_stream_of_the_recording_before_it_is_recorded(cuda: FakeCuda) -> None:
    capture = CudaGraphs(torch.device("cuda"))
    replay = capture(lambda: cuda.told.append(f"step on {cuda.now}"))
    step = "step on ours"
    assert cuda.told == [("ours", "after", "theirs"), step, step, ("theirs", "after", "ours"), "begin", step, "end"]
    replay()
    assert cuda.told[-1] == "replay" and cuda.told.count(step) == 3 and cuda.now == "theirs"


def test_a_step_that_cannot_be_recorded_runs_without_and_says_so(cuda: FakeCuda) -> None:
    capture = CudaGraphs(torch.device("cuda"))
    cuda.fails = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(RuntimeWarning, match="runs without: operation not permitted"):
        replay = capture(lambda: cuda.told.append(cuda.now))
    replay()
    assert cuda.told[-1] == "theirs" and "replay" not in cuda.told


def test_where_memory_ends_nothing_is_hidden(cuda: FakeCuda) -> None:
    cuda.fails = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(torch.device("cuda"))(lambda: None)
    assert cuda.now == "theirs"
