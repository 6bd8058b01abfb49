"""What a GPU does with a recorded step, done by the CPU: the same operations on the same memory, and no Python.

Every operation of a step is written down as torch runs it. Played again, each computes from the tensors it was given
then and puts its result where it was put then; whatever the program would have looked up anew, a number, a list, a
tensor that has taken another's place, is what it was. A step that is right when it is played has nothing but memory
between its input and its output, as CUDA's graphs need it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stateofgpt.infer.capture import Step


class _Writing(TorchDispatchMode):
    def __init__(self, script: list[Any]) -> None:
        super().__init__()
        self.script = script

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if "item" in func._schema.name or "nonzero" in func._schema.name:
            raise RuntimeError(f"{func} waits for the device, which a recorded step cannot")
        memory = {x.untyped_storage().data_ptr() for x in given}
        if func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in memory for x in made):
            self.script.append((func, args, kwargs or {}, made))  # not what only looks at memory in another way
        return out


class Recorder:
    """A `Capture` that counts: how many steps were recorded, how often each was played."""

    def __init__(self) -> None:
        self.recorded, self.played = 0, 0

    def __call__(self, step: Step) -> Step:
        script: list[Any] = []
        for _ in range(2):
            step()
        with _Writing(script):
            step()
        assert script
        self.recorded += 1

        def play() -> None:
            self.played += 1
            for func, args, kwargs, made in script:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, new in zip(made, again, strict=True):
                    if new is not old and new.data_ptr() != old.data_ptr():
                        old.copy_(new)

        return play
