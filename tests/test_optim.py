"""The optimizer against torch's own AdamW and Muon, against polar factors by SVD, and against hand arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.kernels import load
from stateofgpt.train.optim import MuonAdamW, OptimConfig, orthogonalise, orthogonalised

PLAIN = OptimConfig(weight_decay=0.0, use_muon=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Layered(nn.Module):
    """Matrices of two shapes inside `layers`, and a matrix and a vector outside."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.emb = nn.Parameter(torch.randn(5, 8, generator=g))
        self.gain = nn.Parameter(torch.randn(8, generator=g))
        self.model = nn.Module()
        self.model.layers = nn.ParameterList(
            torch.randn(shape, generator=g) for shape in [(24, 8), (8, 8), (24, 8), (8, 24), (8,)]
        )

    def draw_gradients(self, seed: int, scale: float = 1.0) -> None:
        g = torch.Generator().manual_seed(1000 + seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=g) * scale


def with_spectrum(singular: Tensor, n: int, m: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(n, len(singular), generator=g))[0]
    v = torch.linalg.qr(torch.randn(m, len(singular), generator=g))[0]
    return (u * singular) @ v.mT


def polar(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u @ vh).float()


def fused(stack: Tensor) -> Tensor:
    """As the fused optimizer has it: by our own products, where there are any for such matrices."""
    kernels = load()
    assert kernels is not None
    return orthogonalised(stack.bfloat16(), kernels)


Iterated = Callable[[Tensor], Tensor]
WAYS = pytest.mark.parametrize("iterated", [orthogonalise, fused])

# ------------------------------------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("shape", [(16, 16), (64, 192), (192, 64), (16, 400), (192, 192)])
@pytest.mark.parametrize("decades", [0.0, 0.5, 1.0, 1.5])
@WAYS
def test_singular_values_end_near_one_whatever_they_were(
    iterated: Iterated, shape: tuple[int, int], decades: float
) -> None:
    """The bound is tight on purpose: without the safety factor bfloat16 lets some of these explode."""
    n = min(shape)
    stack = torch.stack([with_spectrum(torch.logspace(-decades, 0, n), *shape, seed=s) for s in range(6)])
    values = torch.linalg.svdvals(iterated(stack).float())
    assert values.max() < 1.16
    # all singular values above 0.003 of the norm (at 192 equal-ratio values over 1.5 decades the least has 0.0055)
    assert values.min() > 0.84


@pytest.mark.parametrize("decades", [3.0, 4.0, 6.0])
@pytest.mark.parametrize("size", [64, 192])
@WAYS
def test_small_singular_values_never_explode(iterated: Iterated, size: int, decades: float) -> None:
    stack = torch.stack([with_spectrum(torch.logspace(-decades, 0, size), size, size, seed=s) for s in range(8)])
    assert torch.linalg.svdvals(iterated(stack).float()).max() < 1.16
    assert torch.linalg.svdvals(iterated(torch.randn(8, 64, 192)).float()).max() < 1.16


def test_the_result_points_along_the_polar_factor_at_any_scale() -> None:
    x = with_spectrum(torch.linspace(0.2, 1.0, 32), 48, 32)
    expected = polar(x)
    for scale in (1e-4, 1.0, 1e5):
        mine = orthogonalise(x[None] * scale)[0].float()
        assert torch.nn.functional.cosine_similarity(mine.flatten(), expected.flatten(), dim=0) > 0.99
    low_rank = orthogonalise(with_spectrum(torch.tensor([1.0, 0.5, 0.2]), 40, 24)[None])[0].float()
    assert (torch.linalg.svdvals(low_rank)[:3] - 1).abs().max() < 0.16


def test_a_zero_gradient_moves_nothing_and_gives_no_nan() -> None:
    assert not orthogonalise(torch.zeros(2, 6, 4)).any()
    model = Layered()
    before = [p.detach().clone() for p in model.parameters()]
    model.draw_gradients(0, scale=0.0)
    MuonAdamW(model.named_parameters(), replace(PLAIN, use_muon=True)).step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_muon_step_is_the_polar_factor_of_nesterov_momentum() -> None:
    """A slow twin, matrix by matrix, with an exact SVD where the optimizer iterates."""
    model = Layered()
    matrices = [p for p in model.model.layers if p.ndim == 2]
    optimizer = MuonAdamW(model.named_parameters(), OptimConfig(muon_lr=0.1, momentum=0.9, weight_decay=0.0))
    momenta = [torch.zeros_like(p) for p in matrices]
    for step in range(4):
        before = [p.detach().clone() for p in matrices]
        model.draw_gradients(step, scale=3.0)
        for p, m, old in zip(matrices, momenta, before, strict=True):
            assert p.grad is not None
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            old -= 0.5 * 0.1 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * polar(0.9 * m + 0.1 * p.grad)
        starts = [p.detach().clone() for p in matrices]
        optimizer.step(0.5)
        for p, expected, start in zip(matrices, before, starts, strict=True):
            assert (p - expected).norm() < 0.16 * (expected - start).norm()


def test_it_walks_beside_torch_s_muon() -> None:
    """torch's iteration has other coefficients (singular values in 0.7-1.2), so ways agree closely and not exactly."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours, theirs = Layered(), Layered()
    matrices = [p for p in theirs.model.layers if p.ndim == 2]
    mine = MuonAdamW(ours.named_parameters(), OptimConfig(muon_lr=0.05, weight_decay=0.0))
    torchs = torch.optim.Muon(matrices, lr=0.05, momentum=0.95, weight_decay=0.0, nesterov=True)
    start = [p.detach().clone() for p in matrices]
    for step in range(10):
        ours.draw_gradients(step)
        theirs.draw_gradients(step)
        mine.step(1.0)
        torchs.step()
    for p, q, s in zip((p for p in ours.model.layers if p.ndim == 2), matrices, start, strict=True):
        a, b = (p - s).flatten(), (q - s).flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.97
        assert 0.85 < a.norm() / b.norm() < 1.25
    buffers = torch.cat([torchs.state[q]["momentum_buffer"].flatten().sort().values for q in matrices])
    stacked = torch.cat([torch.cat([m[i].flatten().sort().values for m in mine.momenta for i in range(len(m))])])
    assert torch.allclose(buffers.sort().values, stacked.sort().values, atol=1e-6)


def test_matrices_stacked_together_move_as_each_would_alone() -> None:
    together = Layered()
    alone = [p.detach().clone() for p in together.model.layers if p.ndim == 2]
    together.draw_gradients(1)
    gradients = [p.grad.clone() for p in together.model.layers if p.ndim == 2 and p.grad is not None]
    MuonAdamW(together.named_parameters(), OptimConfig()).step(1.0)
    for p, g, moved in zip(alone, gradients, (p for p in together.model.layers if p.ndim == 2), strict=True):
        single = nn.Parameter(p)
        single.grad = g
        MuonAdamW([("model.layers.0.w", single)], OptimConfig()).step(1.0)
        assert torch.allclose(single, moved, atol=2e-4)


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else() -> None:
    shape = GPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=48, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    optimizer = MuonAdamW(GPT(shape).named_parameters(), OptimConfig())
    stacked = {name for names in optimizer.stacks for name in names}
    assert len(stacked) == 2 * 7 and all(name.endswith("_proj.weight") for name in stacked)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(optimizer.adam)
    assert not MuonAdamW(GPT(shape).named_parameters(), PLAIN).stacks


def test_in_gpt2_muon_takes_the_hidden_matrices_and_neither_positions_nor_biases() -> None:
    shape = GPTConfig("gpt2", 64, 32, 2, 2, 2, 16, 128, 16)
    optimizer = MuonAdamW(GPT(shape).named_parameters(), OptimConfig())
    stacked = {name for names in optimizer.stacks for name in names}
    assert len(stacked) == 2 * 6 and all(name.endswith("_proj.weight") for name in stacked)
    assert {"model.embed_tokens.weight", "model.embed_positions.weight"} <= set(optimizer.adam)
    assert len(optimizer.adam) == 2 + 2 * (6 + 2 * 2) + 2  # embeddings, biases and norms of the blocks, last norm


# ----------------------------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("eps", [1e-8, 1e-5])
def test_without_decay_it_is_torch_s_adamw(eps: float) -> None:
    ours, theirs = Layered(), Layered()
    mine = MuonAdamW(ours.named_parameters(), replace(PLAIN, lr=0.01, beta1=0.8, beta2=0.97, eps=eps))
    torchs = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.8, 0.97), eps=eps, weight_decay=0.0)
    for step in range(25):
        ours.draw_gradients(step, scale=10.0 ** -(step % 5))
        theirs.draw_gradients(step, scale=10.0 ** -(step % 5))
        for group in torchs.param_groups:
            group["lr"] = 0.01 * (1 - step / 50)
        mine.step(1 - step / 50)
        torchs.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_decay_is_cautious_and_only_on_matrices() -> None:
    """By hand: the first AdamW update is the gradient's sign, so decay acts where weight and gradient agree in sign."""
    w = nn.Parameter(torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]]))
    b = nn.Parameter(torch.tensor([2.0, -2.0]))
    w.grad, b.grad = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0]]), torch.tensor([1.0, 1.0])
    config = OptimConfig(lr=0.1, weight_decay=0.5, eps=0.0, use_muon=False)
    MuonAdamW([("w", w), ("b", b)], config).step(1.0)
    kept = 1 - 0.1 * 0.5
    assert torch.allclose(w, torch.tensor([[2 * kept - 0.1, -2.1, 2.1, -2 * kept + 0.1, -0.1]]))
    assert torch.allclose(b, torch.tensor([1.9, -2.1]))


def test_a_hidden_matrix_decays_where_muon_s_update_agrees_with_it() -> None:
    p = nn.Parameter(torch.eye(4) * 3.0)
    p.grad = torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    MuonAdamW([("model.layers.0.w", p)], OptimConfig(muon_lr=0.1, weight_decay=1.0)).step(1.0)
    assert (p.diag()[:2] < 3.0 - 0.08 - 0.29).all() and (p.diag()[2:] > 3.0 + 0.08).all()


# ----------------------------------------------------------------------------------------------------- going on exactly


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    straight, first = Layered(), Layered()
    config = OptimConfig()
    whole, half = MuonAdamW(straight.named_parameters(), config), MuonAdamW(first.named_parameters(), config)
    for step in range(8):
        straight.draw_gradients(step)
        whole.step(1.0)
    for step in range(4):
        first.draw_gradients(step)
        half.step(1.0)
    saved = {name: tensor.clone() for name, tensor in half.state().items()}
    second = Layered(seed=9)
    second.load_state_dict(first.state_dict())
    rest = MuonAdamW(second.named_parameters(), config)
    rest.load(saved)
    for step in range(4, 8):
        second.draw_gradients(step)
        rest.step(1.0)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(t, rest.state()[name]) for name, t in whole.state().items())


def test_a_factor_of_zero_and_missing_gradients_change_no_weight() -> None:
    model = Layered()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonAdamW(model.named_parameters(), OptimConfig())
    optimizer.zero_grad()
    optimizer.step(1.0)
    model.draw_gradients(0)
    optimizer.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("use_muon", [True, False])
def test_fused_it_takes_the_same_steps(use_muon: bool) -> None:
    """To the rounding of float32 for AdamW; Muon's update is rounded to bfloat16 at another place."""
    kernels = load()
    assert kernels is not None
    config = OptimConfig(lr=0.01, muon_lr=0.05, weight_decay=0.3, use_muon=use_muon)
    plain, fused = Layered(), Layered()
    optimizers = MuonAdamW(plain.named_parameters(), config), MuonAdamW(fused.named_parameters(), config, kernels)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for step in range(6):
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            model.draw_gradients(step)
            optimizer.step(0.7, 0.25)
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        moved = float((p - start[name]).norm())
        assert moved > 0.0 and float((p - q).norm()) < (0.02 if use_muon and p.ndim == 2 else 1e-5) * moved, name
    states = [optimizer.state() for optimizer in optimizers]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-6)
