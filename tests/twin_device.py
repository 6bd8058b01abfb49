"""A second device for machines that have none: tensors that are elsewhere for torch, and are computed on the CPU.

Torch keeps one kind of device free for others. Here it is called `twin`: its tensors hold one of the CPU's each, every
operation runs on those, and one on tensors of both devices fails as it does with a GPU (where it may: a CPU's scalar
goes with any device, and a copy is for going across). So what runs on a GPU can be tried where there is none, and must
give the CPU's bits. What it cannot show: kernels of CUDA, compilation, speed, and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "twin"
ACROSS = {"aten::to", "aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by indices of the CPU, too
CAST = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")  # to bfloat16, under autocast
_installed: list[torch.library.Library] = []


class TwinTensor(Tensor):
    """A tensor on the twin; `inner` is where its numbers are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        with torch.inference_mode(False):  # it may be a view of a tensor that is older than the mode
            made: Self = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                layout=inner.layout,
                device=torch.device(NAME, 0),
            )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return TwinTensor(self.inner)

    @data.setter
    def data(self, value: Tensor) -> None:  # torch's own would leave `inner` as it was
        assert isinstance(value, TwinTensor) and value.inner.stride() == self.inner.stride()
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.inner.tolist()  # torch does it for no tensor that is one by Python

    def __repr__(self) -> str:  # type: ignore[override]
        return f"twin({self.inner!r})"


class _Module:
    """What torch asks of `torch.twin`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: object = None) -> None:
        pass  # nothing is ever under way

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)  # what is random is the CPU's

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> str:
    """Make the device known, once in a process; its name."""
    if not _installed:
        _setup_privateuseone_for_python_backend(NAME, _Module())
        anything, named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        anything.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
        anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in CAST:
            named.impl(name, _cast(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
        _installed.extend((anything, named))
    return NAME


@pytest.fixture
def twin() -> Iterator[str]:
    """The twin's name, for a test that moves modules to it."""
    name = install()
    torch.__future__.set_swap_module_params_on_conversion(True)  # else tied weights part when a module is moved
    yield name
    torch.__future__.set_swap_module_params_on_conversion(False)


def _cast(operation: Any) -> Any:
    """Under autocast: its float32 arguments in bfloat16."""

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*tree_map(_narrow, args), **tree_map(_narrow, kwargs))

    return cast


def _narrow(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, on the CPU's tensors; its results are on the device of its arguments, or on the one it names."""
    leaves, spec = tree_flatten((args, kwargs))
    name = func._schema.name
    twins = [x for x in leaves if isinstance(x, TwinTensor)]
    strange = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, TwinTensor) and x.dim() > 0]
    if twins and strange and name not in ACROSS | INDEXED:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found twin:0 and cpu")
    named = next((x for x in leaves if isinstance(x, torch.device)), None)
    here = named.type == "cpu" if named is not None else not twins
    plain = (x.inner if isinstance(x, TwinTensor) else _own(x) for x in leaves)
    inner_args, inner_kwargs = tree_unflatten(list(plain), spec)
    out = func(*inner_args, **{k: v for k, v in inner_kwargs.items() if k != "pin_memory"})
    known = {id(x.inner): x for x in twins}

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known and here:  # for the CPU it had nothing to do, for the twin it is a copy
            return x.clone()
        return known[id(x)] if id(x) in known else x if here else TwinTensor(x)  # known: done in place

    return args[0] if name == "aten::copy_" else tree_map(back, out)


def _own(x: Any) -> Any:
    return torch.device("cpu") if isinstance(x, torch.device) else x
