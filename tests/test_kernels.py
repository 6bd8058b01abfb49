"""The fused kernels against torch, in both precisions, on odd shapes; and how they are compiled and kept."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stateofgpt import native
from stateofgpt.model.gpt import rotate
from stateofgpt.train import kernels as module
from stateofgpt.train.kernels import Kernels, load

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
PRECISIONS = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load()
    assert found is not None, "a C compiler with OpenMP is among what the tests need"
    return found


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Equal relative to the size of what is compared, as products of rounded numbers are."""
    difference = (mine.float() - theirs.float()).abs().max()
    assert difference <= TOLERANCE[dtype] * (theirs.float().abs().max() + 1e-6), float(difference)


def reference(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The same numbers in float32, ready to take gradients: what torch computes with them is the truth."""
    return [t.detach().float().requires_grad_() for t in tensors]


@PRECISIONS
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 64), (33, 130)])
def test_rmsnorm_and_its_gradients_are_torchs(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, dy, residual = (drawn(*shape, seed=i, dtype=dtype) for i in range(3))
    gain = drawn(shape[1], seed=3) + 1.0
    y, rstd = kernels.rmsnorm(x, gain, 1e-5)
    dx, dgain = kernels.rmsnorm_backward(dy, x, gain, rstd, residual)
    x_, gain_ = reference(dtype, x, gain)
    y_ = F.rms_norm(x_, (shape[1],), gain_, 1e-5)
    y_.backward(dy.float())
    close(y, y_, dtype)
    close(dx, x_.grad + residual.float(), dtype)  # type: ignore[operator]
    close(dgain, gain_.grad, dtype)  # type: ignore[arg-type]


@PRECISIONS
@pytest.mark.parametrize("sizes", [(2, 5, 4, 2, 16), (1, 1, 1, 1, 2), (3, 33, 2, 2, 64)])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rotation_of_queries_and_keys_are_the_models(
    kernels: Kernels, sizes: tuple[int, int, int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    B, T, H, K, D = sizes
    qkv = drawn(B * T, (H + 2 * K) * D, dtype=dtype)
    gains = drawn(H + K, D, seed=1) + 1.0 if normed else None
    angles = torch.outer(torch.arange(T), 100.0 ** -(torch.arange(0, D, 2) / D))
    tables = angles.cos().contiguous(), angles.sin().contiguous(), None
    q, k, v, rstd = kernels.rope(qkv, gains, tables, sizes, 1e-6)

    (qkv_,) = reference(dtype, qkv)
    gains_ = gains.clone().requires_grad_() if gains is not None else None
    heads = qkv_.view(B, T, H + 2 * K, D)
    turned = heads[:, :, : H + K]
    if gains_ is not None:
        turned = F.rms_norm(turned, (D,), None, 1e-6) * gains_
    turned = rotate(turned.transpose(1, 2), torch.cat((tables[0],) * 2, -1), torch.cat((tables[1],) * 2, -1))
    theirs = turned[:, :H], turned[:, H:], heads[:, :, H + K :].transpose(1, 2)
    for mine, truth in zip((q, k, v), theirs, strict=True):
        close(mine, truth, dtype)

    grads = tuple(drawn(*t.shape, seed=5 + i, dtype=dtype) for i, t in enumerate((q, k, v)))
    torch.autograd.backward(theirs, [g.float() for g in grads])
    dqkv, dgains = kernels.rope_backward(grads, qkv, gains, tables, rstd, sizes)  # type: ignore[arg-type]
    close(dqkv, qkv_.grad, dtype)  # type: ignore[arg-type]
    if gains_ is not None:
        close(dgains, gains_.grad, dtype)  # type: ignore[arg-type]


@PRECISIONS
@pytest.mark.parametrize("gap", [0, 2])
def test_softmax_sees_what_is_shared_and_has_no_column_for_what_nobody_sees(
    kernels: Kernels, gap: int, dtype: torch.dtype
) -> None:
    """Two rows of eight tokens: the first three or two are a prompt, and the last three queries are in its branches."""
    heads, start, rows, T = 2, 5, 3, 8
    firsts = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 7], [0, 0, 2, 2, 2, 5, 6, 6]], dtype=torch.int32)
    shared = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3], [0, 0, 2, 2, 2, 2, 2, 2]], dtype=torch.int32)
    keys = torch.tensor([0, 1, 2, *range(3 + gap, T)])
    scores = drawn(2 * heads, rows, len(keys), dtype=dtype, scale=5.0)
    (scores_,) = reference(dtype, scores)
    query = torch.arange(start, start + rows)[:, None]
    own = (keys >= firsts[:, start:, None]) & (keys <= query)
    seen = (own | (keys < shared[:, start:, None])).repeat_interleave(heads, 0)
    theirs = torch.softmax((scores_ * 0.5).masked_fill(~seen, -torch.inf), -1)
    kernels.softmax_(scores, firsts, start, heads, 0.5, shared, gap)
    close(scores, theirs, dtype)
    assert not scores[~seen].any()

    grad = drawn(2 * heads, rows, len(keys), seed=1, dtype=dtype)
    theirs.backward(grad.float())
    kernels.softmax_backward_(scores, grad, start - gap, 0.5)
    close(grad, scores_.grad, dtype)  # type: ignore[arg-type]


@PRECISIONS
def test_rotation_by_positions_is_that_of_the_tables_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    sizes = B, T, H, K, D = 2, 6, 2, 1, 8
    qkv = drawn(B * T, (H + 2 * K) * D, dtype=dtype)
    angles = torch.outer(torch.arange(9), 100.0 ** -(torch.arange(0, D, 2) / D))
    tables = angles.cos().contiguous(), angles.sin().contiguous()
    positions = torch.tensor([[0, 1, 2, 3, 2, 3], [4, 5, 8, 0, 1, 2]])
    q, k, v, rstd = kernels.rope(qkv, None, (*tables, positions), sizes, 1e-6)
    dqkv, _ = kernels.rope_backward((q, k, v), qkv, None, (*tables, positions), rstd, sizes)
    close(dqkv, qkv.float(), dtype)  # turned back by the same angles
    for b, t in ((0, 4), (1, 2), (1, 5)):
        at = int(positions[b, t])
        row = qkv.view(B, T, -1)[b, t].view(1, -1)
        alone = kernels.rope(row, None, (*(x[at : at + 1].contiguous() for x in tables), None), (1, 1, H, K, D), 1e-6)
        assert torch.equal(q[b, :, t], alone[0][0, :, 0]) and torch.equal(k[b, :, t], alone[1][0, :, 0])


@PRECISIONS
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_softmax_sees_the_past_of_its_own_document_alone(
    kernels: Kernels, start: int, documents: bool, dtype: torch.dtype
) -> None:
    B, heads, rows = 2, 3, 5
    width = start + rows
    scores = drawn(B * heads, rows, width, dtype=dtype, scale=5.0)
    firsts = torch.tensor([[0, 0, 0, 3, 3, 3, 6, 6, 8], [0] * 9], dtype=torch.int32) if documents else None
    (scores_,) = reference(dtype, scores)
    query = torch.arange(start, start + rows)[:, None]
    seen = (torch.arange(width) <= query).expand(B, rows, width)
    if firsts is not None:
        seen = seen & (torch.arange(width) >= firsts[:, start : start + rows, None])
    theirs = torch.softmax((scores_ * 0.5).masked_fill(~seen.repeat_interleave(heads, 0), -torch.inf), -1)
    kernels.softmax_(scores, firsts, start, heads, 0.5)
    close(scores, theirs, dtype)
    assert not scores[~seen.repeat_interleave(heads, 0)].any()

    grad = drawn(B * heads, rows, width, seed=1, dtype=dtype)
    theirs.backward(grad.float())
    kernels.softmax_backward_(scores, grad, start, 0.5)
    close(grad, scores_.grad, dtype)  # type: ignore[arg-type]


@PRECISIONS
@pytest.mark.parametrize("n", [1, 37])
def test_swiglu_and_its_gradient_are_torchs(kernels: Kernels, n: int, dtype: torch.dtype) -> None:
    x, dout = drawn(n, 2 * 45, dtype=dtype, scale=3.0), drawn(n, 45, seed=1, dtype=dtype)
    (x_,) = reference(dtype, x)
    theirs = F.silu(x_[:, :45]) * x_[:, 45:]
    theirs.backward(dout.float())
    close(kernels.swiglu(x), theirs, dtype)
    close(kernels.swiglu_backward(dout, x), x_.grad, dtype)  # type: ignore[arg-type]


@PRECISIONS
def test_cross_entropy_leaves_its_gradient_where_the_logits_were(kernels: Kernels, dtype: torch.dtype) -> None:
    logits, targets = drawn(19, 70, dtype=dtype, scale=8.0), torch.arange(19) * 3
    weights = torch.rand(19, generator=torch.Generator().manual_seed(1))
    weights[4] = 0.0
    (logits_,) = reference(dtype, logits)
    theirs = F.cross_entropy(logits_, targets, reduction="none") * weights
    theirs.sum().backward()
    kept = logits.clone()
    close(kernels.cross_entropy_(kept, targets, weights, with_gradient=False), theirs, dtype)
    assert torch.equal(kept, logits)
    close(kernels.cross_entropy_(logits, targets, weights, with_gradient=True), theirs, dtype)
    close(logits, logits_.grad, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -87.5, -200.0, 88.0, float("nan"), -float("inf")])
def test_extreme_logits_do_what_torch_does(kernels: Kernels, value: float) -> None:
    logits = torch.tensor([[0.0, value, -3.0]])
    theirs = F.cross_entropy(logits, torch.tensor([0]), reduction="none")
    mine = kernels.cross_entropy_(logits.clone(), torch.tensor([0]), torch.ones(1), with_gradient=False)
    torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_rounding_to_bfloat16_is_torchs_to_the_bit(kernels: Kernels) -> None:
    """swiglu with a gate so large that silu(gate) = gate = 1 would be: out = up * gate, rounded once."""
    gate, up = torch.full((1, 4096), 128.0), torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    x = torch.cat((gate, up), 1).bfloat16()
    assert torch.equal(kernels.swiglu(x), (x[:, 4096:].float() * 128.0).bfloat16())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_threads_give_the_same_bits(kernels: Kernels, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, dy = drawn(101, 64), drawn(101, 64, seed=1)
        _, rstd = kernels.rmsnorm(x, torch.ones(64), 1e-6)
        once, again = (kernels.rmsnorm_backward(dy, x, torch.ones(64), rstd, dy) for _ in range(2))
        assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
        close(once[1], (dy * x * rstd[:, None]).sum(0), torch.float32)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache; what was loaded before is forgotten, before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load.cache_clear()
    yield tmp_path / "stateofgpt"
    load.cache_clear()


@pytest.mark.slow
def test_it_is_compiled_once_and_nothing_else_is_left(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load() is not None
    (made,) = fresh.iterdir()
    load.cache_clear()
    run = subprocess.run
    commands: list[list[str]] = []

    def listen(command: list[str], **settings: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return run(command, **settings)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(native.subprocess, "run", listen)
    assert load() is not None and list(fresh.iterdir()) == [made]
    assert [command[1:] for command in commands] == [["--version"]]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["no compiler", "it fails", "no OpenMP", "wrong numbers", "no home", "no place"])
def test_where_it_cannot_be_compiled_there_are_no_kernels(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "no compiler":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    elif why == "it fails":
        monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-no-such-flag-exists"))
    elif why == "no OpenMP":
        monkeypatch.setattr(native, "openmp", lambda: None)
    elif why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif why == "no place":
        fresh.parent.joinpath("file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(fresh.parent / "file"))
    else:
        monkeypatch.setattr(Kernels, "swiglu", lambda self, x: x[:, : x.shape[1] // 2])
    assert load() is None
