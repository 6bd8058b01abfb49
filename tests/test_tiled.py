"""Blocks and heads by tiles against the model's own forward and torch's gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_fused import BASE, apart_in_a_row, batch_of, gradients, model_of, no_farther_than_autocast
from torch import Tensor

from stateofgpt.errors import ModelError
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.lora import LoraConfig, add_lora
from stateofgpt.train import fused, tiled
from stateofgpt.train.branches import Branches
from stateofgpt.train.kernels import Kernels, load
from stateofgpt.train.loss import Batch, LanguageModelLoss
from stateofgpt.train.optim import POLAR_STEPS, orthogonalise

WIDE = replace(BASE, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=96)
SHAPES = {
    "qwen3": WIDE,
    "llama": replace(WIDE, arch="llama"),
    "more heads than width": replace(WIDE, num_attention_heads=4, num_key_value_heads=4),
    "shared keys": replace(WIDE, num_attention_heads=4),
    "untied": replace(WIDE, tie_word_embeddings=False, vocab_size=64),
    "an odd vocabulary, one layer": replace(WIDE, num_hidden_layers=1, vocab_size=33),
    "a larger one": replace(WIDE, num_hidden_layers=1, vocab_size=1000),
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load()
    assert found is not None
    if not found.has_tiles(torch.float32):
        pytest.skip("this processor has no AVX-512")
    return found


@pytest.fixture(scope="module")
def in_pairs(kernels: Kernels) -> Kernels:
    if not kernels.has_tiles(torch.bfloat16):
        pytest.skip("this processor has no products of bfloat16")
    return kernels


def with_threads(threads: int, model: GPT, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss and gradients with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss = LanguageModelLoss(fused=True)(model, batch)
        return loss, gradients(model, loss)
    finally:
        torch.set_num_threads(before)


def near(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """All gradients are there, and each is the wanted one."""
    assert got.keys() == wanted.keys()
    size = max(float(g.norm()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm()) <= 3e-5 * float(gradient.norm()) + 5e-7 * size, name


def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "has_tiles", lambda self, dtype: False)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("rows", "length"), [(2, 1), (3, 37), (1, 128), (2, 201)])
@pytest.mark.parametrize("threads", [1, 3])
def test_loss_and_every_gradient_are_the_models(
    kernels: Kernels, name: str, rows: int, length: int, threads: int
) -> None:
    config = SHAPES[name]
    assert tiled.fits_head(kernels, config, torch.float32)
    model, batch = model_of(config), batch_of(config, rows, length)
    theirs = LanguageModelLoss()(model, batch)
    wanted = gradients(model, theirs)
    mine, got = with_threads(threads, model, batch)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    near(got, wanted)


@pytest.mark.parametrize("name", ["qwen3", "llama", "shared keys", "untied", "an odd vocabulary, one layer"])
def test_a_step_without_autograd_leaves_the_models_gradients(kernels: Kernels, name: str) -> None:
    """Of two batches of different shape, one after the other; then once more, into the same memory."""
    model, loss = model_of(SHAPES[name]), LanguageModelLoss(fused=True)
    batches = batch_of(SHAPES[name], 3, 37), batch_of(SHAPES[name], 1, 128, seed=1)
    theirs = [LanguageModelLoss()(model, batch) / 7.0 for batch in batches]
    wanted = {n: g.clone() for n, g in gradients(model, torch.stack(theirs).sum()).items()}
    assert fused.narrow(kernels, model, torch.float32) is not None
    backward = loss.bound(model)
    for _ in range(2):
        model.zero_grad()
        mine = [backward(batch, 7.0) for batch in batches]
        torch.testing.assert_close(mine, [x.detach() for x in theirs], rtol=1e-5, atol=1e-6)
        near({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)


def test_without_autograd_gradients_are_added_to_those_that_are_there(kernels: Kernels) -> None:
    model, batch = model_of(WIDE), batch_of(WIDE, 2, 40)
    backward = LanguageModelLoss(fused=True).bound(model)
    backward(batch, 1.0)
    alone = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for n, p in model.named_parameters():
        p.grad = torch.ones_like(p) if "mlp" in n else None
    backward(batch, 1.0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, alone[n] + ("mlp" in n))


def test_documents_of_a_row_and_frozen_parameters_without_autograd(kernels: Kernels) -> None:
    model, batch = model_of(WIDE), batch_of(WIDE, 2, 150)
    firsts = torch.zeros(2, 150, dtype=torch.int32)
    firsts[0, 70:], firsts[1, 33:] = 70, 33
    batch = replace(batch, firsts=firsts)
    model.model.norm.weight.requires_grad_(False)
    wanted = {n: g.clone() for n, g in gradients(model, LanguageModelLoss()(model, batch)).items()}
    model.zero_grad()
    LanguageModelLoss(fused=True).bound(model)(batch, 1.0)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and "model.norm.weight" not in got
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("token", [-1, WIDE.vocab_size])
@pytest.mark.parametrize("of", ["ids", "targets"])
def test_a_token_that_the_model_does_not_know_is_refused(kernels: Kernels, token: int, of: str) -> None:
    model, batch = model_of(WIDE), batch_of(WIDE, 2, 40)
    getattr(batch, of)[1, 3] = token
    loss = LanguageModelLoss(fused=True)
    with pytest.raises(ModelError, match=f"token {token} .* vocabulary of {WIDE.vocab_size}"):
        loss.bound(model)(batch, 1.0)
    assert all(p.grad is None for p in model.parameters())
    if of == "ids":
        with pytest.raises(ModelError, match=f"token {token} "):
            fused.fused_hidden(kernels, model, batch.ids, torch.float32)


def test_adapters_learn_by_autograd(kernels: Kernels) -> None:
    model, batch = model_of(WIDE), batch_of(WIDE, 2, 40)
    add_lora(model, LoraConfig(r=2), torch.Generator().manual_seed(0))
    assert fused.narrow(kernels, model, torch.float32) is None
    wanted = {n: g.clone() for n, g in gradients(model, LanguageModelLoss()(model, batch)).items()}
    model.zero_grad()
    LanguageModelLoss(fused=True).bound(model)(batch, 1.0)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and any("lora_B" in name for name in got)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["qwen3", "shared keys", "an odd vocabulary, one layer"])
def test_in_bfloat16_it_is_no_farther_from_the_truth_than_autocast(in_pairs: Kernels, name: str) -> None:
    no_farther_than_autocast(SHAPES[name], 3, 67)  # of odd length: pairs of rows are not all full


def test_a_document_does_not_see_the_one_before_it_in_the_row(kernels: Kernels) -> None:
    apart_in_a_row(WIDE, 150, 70)


@pytest.mark.parametrize(("prompt", "answer"), [(30, 20), (40, 100)], ids=["keys side by side", "keys apart"])
def test_branches_of_a_row_have_what_each_text_has_alone(kernels: Kernels, prompt: int, answer: int) -> None:
    """A prompt and two answers in one row; keys that no query of a block sees are left out, where there are many."""
    both, whole = prompt + answer, prompt + 2 * answer
    ids = torch.randint(0, WIDE.vocab_size, (1, whole), generator=torch.Generator().manual_seed(0))
    firsts = torch.tensor([[0] * prompt + [prompt] * answer + [both] * answer], dtype=torch.int32)
    shared = torch.tensor([[0] * prompt + [prompt] * 2 * answer], dtype=torch.int32)
    places = torch.tensor([[*range(both), *range(prompt, both)]])
    model = model_of(WIDE)
    mine = fused.fused_hidden(kernels, model, ids, torch.float32, Branches(places, firsts, shared, both))
    texts = ids[:, :both], torch.cat((ids[:, :prompt], ids[:, both:]), 1)
    one, other = (model.model(text) for text in texts)
    theirs = torch.cat((one, other[:, prompt:]), 1)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    pull = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    got, wanted = gradients(model, (mine * pull).sum()), gradients(model, (theirs * pull).sum())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_threads_give_the_same_bits(kernels: Kernels, dtype: torch.dtype, threads: int) -> None:
    before, model, batch = torch.get_num_threads(), model_of(WIDE), batch_of(WIDE, 5, 90)
    torch.set_num_threads(threads)
    try:
        once, again = (
            gradients(model, fused.fused_loss(kernels, model, batch.ids, batch.targets, batch.weights, dtype))
            for _ in range(2)
        )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize(
    "config",
    [replace(WIDE, hidden_size=2 * tiled.WIDEST), replace(WIDE, intermediate_size=95), replace(WIDE, head_dim=16)],
    ids=["wide", "an odd feed-forward", "narrow heads"],
)
def test_what_tiles_do_not_fit_is_torchs_products(kernels: Kernels, config: GPTConfig) -> None:
    assert not tiled.fits(kernels, config, torch.float32)
    assert tiled.fits_head(kernels, config, torch.float32) == (config.hidden_size == WIDE.hidden_size)
    assert not tiled.fits_head(kernels, replace(WIDE, hidden_size=80), torch.float32)


def test_with_many_threads_only_narrow_blocks_are_tiled(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(WIDE, hidden_size=512, intermediate_size=1536, num_hidden_layers=8)  # 20 million weights
    for threads, tiles in ((1, True), (3, True), (4, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert tiled.fits(kernels, config, torch.float32) is tiles
        assert tiled.fits(kernels, WIDE, torch.float32) and tiled.fits_head(kernels, config, torch.float32)


WIDER = replace(
    WIDE, hidden_size=288, head_dim=64, num_attention_heads=6, num_key_value_heads=3, intermediate_size=576,
    num_hidden_layers=1, vocab_size=2051,
)  # fmt: skip


def set_apart(model: GPT, batch: Batch) -> None:
    """Weights of a trained model's size, so that its logits are too, and targets that it is sure of."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3 if p.ndim == 2 else 1.0)
        batch.targets[:, ::3] = model(batch.ids).argmax(-1)[:, ::3]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_wider_model_has_its_own_losses_and_gradients(kernels: Kernels, threads: int) -> None:
    """More tokens than the head takes together, none of whose numbers is round."""
    model, batch = model_of(WIDER), batch_of(WIDER, 3, 181)
    set_apart(model, batch)
    assert tiled.fits(kernels, WIDER, torch.float32) and WIDER.vocab_size * WIDER.hidden_size > 1 << 19
    theirs = LanguageModelLoss()(model, batch)
    wanted = gradients(model, theirs)
    mine, got = with_threads(threads, model, batch)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    near(got, wanted)


def test_a_wider_model_in_bfloat16_is_no_farther_from_the_truth_than_autocast(in_pairs: Kernels) -> None:
    no_farther_than_autocast(WIDER, 3, 67)


def head_of(
    kernels: Kernels, dtype: torch.dtype, scale: float, targets: Tensor, vocab: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Losses and gradients of x and of the weights, of a head alone: ours, and torch's in float64."""
    generator = torch.Generator().manual_seed(0)
    n = len(targets)
    x, w = torch.randn(n, 64, generator=generator).to(dtype), torch.randn(vocab, 64, generator=generator) * scale
    w, weights, norm = w.to(dtype).float(), torch.rand(n, generator=generator), torch.ones(64)
    losses, dx, dw, _ = kernels.head(x, norm, w, targets, weights, 1e-6, wanted=True)
    exact, head = x.double().requires_grad_(), w.double().requires_grad_()
    h = F.rms_norm(exact, (64,), None, 1e-6)
    rounded = h + (h.detach().to(dtype).double() - h.detach())
    theirs = F.cross_entropy(rounded @ head.t(), targets, reduction="none") * weights
    of_x, of_head = torch.autograd.grad(theirs.sum(), (exact, head))
    return (losses, dx, dw), (theirs.detach(), of_x, of_head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("vocab", [97, 2051])
def test_targets_that_a_head_thinks_impossible_have_their_losses(
    in_pairs: Kernels, dtype: torch.dtype, threads: int, vocab: int
) -> None:
    """Logits of hundreds, most of which lie far above that of the target, which exponentials are relative to."""
    before, targets = torch.get_num_threads(), torch.arange(131) % vocab
    torch.set_num_threads(threads)
    try:
        mine, theirs = head_of(in_pairs, dtype, 20.0, targets, vocab)
    finally:
        torch.set_num_threads(before)
    assert float(theirs[0].max()) > 200
    for near, one, other in zip((1e-4, 1e-2, 1e-2), mine, theirs, strict=True):
        near = near if dtype == torch.float32 else 2e-2
        assert float((one - other).norm()) <= near * float(other.norm())


def test_where_a_head_is_sure_its_gradient_is_the_small_difference_that_it_is(in_pairs: Kernels) -> None:
    """Probabilities of 0.999 in bfloat16, whose steps are 0.004 there: what is left of the target's is not lost."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 64, generator=generator), torch.randn(512, 64, generator=generator) * 0.1
    w[:64] = F.rms_norm(x, (64,)) * 0.2
    x, w = x.bfloat16(), w.bfloat16().float()
    targets = torch.arange(64)
    losses, _, dw, _ = in_pairs.head(x, torch.ones(64), w, targets, torch.ones(64), 1e-6, wanted=True)
    head = w.double().requires_grad_()
    h = F.rms_norm(x.double(), (64,), None, 1e-6).bfloat16().double()
    (of_head,) = torch.autograd.grad(F.cross_entropy(h @ head.t(), targets, reduction="sum"), head)
    assert float(losses.median()) < 0.02
    own, exact = dw[:64], of_head[:64]
    assert float((own - exact).norm()) <= 5e-3 * float(exact.norm())


def test_what_is_no_number_stays_none(kernels: Kernels) -> None:
    x, w = torch.ones(9, 64), torch.zeros(70, 64)
    w[3] = float("nan")
    losses, *_ = kernels.head(x, torch.ones(64), w, torch.arange(9), torch.ones(9), 1e-6, wanted=True)
    assert losses.isnan().all()


def test_a_head_that_is_not_trained_gets_no_gradient(kernels: Kernels) -> None:
    model, batch = model_of(replace(WIDE, tie_word_embeddings=False)), batch_of(WIDE, 2, 40)
    model.lm_head.weight.requires_grad_(False)
    got = gradients(model, LanguageModelLoss(fused=True)(model, batch))
    wanted = gradients(model, LanguageModelLoss()(model, batch))
    assert got.keys() == wanted.keys() and "lm_head.weight" not in got
    assert all(float((got[n] - g).norm()) <= 1e-4 * float(g.norm()) + 1e-6 for n, g in wanted.items())


def test_on_another_processor_torchs_products_give_the_same(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(WIDE), batch_of(WIDE, 2, 100)
    mine = LanguageModelLoss(fused=True)(model, batch).detach()
    as_before(monkeypatch)
    assert not tiled.fits(kernels, WIDE, torch.float32)
    torch.testing.assert_close(mine, LanguageModelLoss(fused=True)(model, batch).detach(), rtol=1e-5, atol=1e-5)


def test_without_gradients_it_is_the_same_loss(kernels: Kernels) -> None:
    model, batch = model_of(WIDE), batch_of(WIDE, 2, 50)
    with torch.no_grad():
        mine = LanguageModelLoss(fused=True)(model, batch)
    torch.testing.assert_close(mine, LanguageModelLoss()(model, batch).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_norm_of_all_gradients_is_torchs(kernels: Kernels, threads: int) -> None:
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (1, 7, 1024, 5000)]
    torch.set_num_threads(threads)
    try:
        mine = kernels.norm(tensors)
    finally:
        torch.set_num_threads(before)
    assert mine == pytest.approx(float(torch.cat(tensors).double().norm()), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (1, 32, 160)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_muons_iteration_is_nearer_to_the_exact_one_than_torchs_in_bfloat16(
    in_pairs: Kernels, shape: tuple[int, int, int], size: float
) -> None:
    """Every matrix by the same polynomials in float64; of any size, and of very different rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(*shape[:2], 1, generator=generator)
    given = (torch.randn(*shape, generator=generator) * rows * size).bfloat16()
    exact = given.double().mT if shape[1] > shape[2] else given.double()
    exact = exact / (exact.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_STEPS:
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * (gram @ gram)) @ exact
    exact = exact.mT if shape[1] > shape[2] else exact
    mine, theirs = in_pairs.polar_(given.clone(), POLAR_STEPS).double(), orthogonalise(given).double()
    assert (mine - exact).norm() <= 0.03 * exact.norm()
    assert (mine - exact).norm() <= (theirs - exact).norm()


def test_muons_iteration_of_nothing_is_nothing(in_pairs: Kernels) -> None:
    assert not in_pairs.polar_(torch.zeros(2, 32, 64).bfloat16(), POLAR_STEPS).any()


def test_gates_far_from_zero_do_what_torch_does(kernels: Kernels) -> None:
    model, batch = model_of(WIDE), batch_of(WIDE, 2, 40)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(300.0 if "gate_proj" in name else 1.0)
    mine, theirs = LanguageModelLoss(fused=True)(model, batch), LanguageModelLoss()(model, batch)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    got, wanted = gradients(model, mine), gradients(model, theirs)
    assert all(float((got[n] - g).norm()) <= 1e-3 * float(g.norm()) + 1e-6 for n, g in wanted.items())
