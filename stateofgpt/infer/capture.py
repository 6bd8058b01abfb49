"""A step that is recorded once and then played again: CUDA's graphs.

Owns: how a step whose shapes and memory never change is recorded on a GPU, and that this happens to one step at a time
in a process, as torch asks. Knows nothing of what is computed.

A step of a small model is five hundred small kernels. Launched one by one from Python they take milliseconds, most of
them waiting for the next launch; a graph launches all of them at once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], None]
_WARM_UP = 2  # runs before the recording, in which libraries choose kernels and take their workspaces
_alone = threading.Lock()  # torch: only one capture may be under way in a process


class Capture(Protocol):
    """Makes of a step what does the same again, on the same memory."""

    def __call__(self, step: Step) -> Step: ...


def as_it_is(step: Step) -> Step:
    """For devices without graphs: the step itself."""
    return step


class CudaGraphs:
    """Records steps on one GPU; their passing memory is one pool, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        with _alone, torch.cuda.device(self._device):
            ours, theirs = self._stream, torch.cuda.current_stream()
            ours.wait_stream(theirs)
            with torch.cuda.stream(ours):
                for _ in range(_WARM_UP):
                    step()
            theirs.wait_stream(ours)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: what other engines' threads do meanwhile is no fault of this recording
                with torch.cuda.graph(graph, pool=self._pool, stream=ours, capture_error_mode="thread_local"):
                    step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of a step, it runs without: {error}", RuntimeWarning, stacklevel=2)
                return step
            finally:
                torch.cuda.set_stream(theirs)  # a recording that breaks off leaves its own behind
        return graph.replay
