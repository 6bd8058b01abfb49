"""The head in parts: against torch's cross-entropy of all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twin_device import twin

from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train import head
from stateofgpt.train.loss import Batch, LanguageModelLoss

__all__ = ["twin"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def drawn(rows: int = 37, width: int = 24, vocab: int = 90) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    return h.requires_grad_(), weight.requires_grad_(), targets, torch.rand(rows, generator=g).round(decimals=1)


def whole(h: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(h @ weight.t(), targets, reduction="none") * weights).sum()


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * 0.37, of)  # a step divides the loss, so what comes back is not 1


@pytest.mark.parametrize("rows", [1, 5, 19, 37, 100])
def test_loss_and_gradients_are_those_of_all_logits_at_once(rows: int) -> None:
    h, weight, targets, weights = drawn()
    expected, got = whole(h, weight, targets, weights), head.in_parts(h, weight, targets, weights, rows)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, theirs in zip(gradients(got, h, weight), gradients(expected, h, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_torch_is() -> None:
    h, weight, targets, weights = drawn(rows=200)
    truth = gradients(whole(h, weight, targets, weights), h, weight)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(
            (F.cross_entropy(F.linear(h, weight).float(), targets, reduction="none") * weights).sum(), h, weight
        )
    mine = gradients(head.in_parts(h.bfloat16(), weight, targets, weights, 64), h, weight)
    for true, own, other in zip(truth, mine, theirs, strict=True):
        assert (own - true).norm() <= 1.2 * (other - true).norm() + 1e-4 * true.norm()


def test_only_what_is_wanted_is_computed() -> None:
    h, weight, targets, weights = drawn()
    asked: list[tuple[bool, bool]] = []

    def watched(*given: object) -> object:
        asked.append((bool(given[4]), bool(given[5])))
        return head.part(*given)  # type: ignore[arg-type]

    frozen = weight.detach()
    (of_hidden,) = gradients(head.in_parts(h, frozen, targets, weights, 10, watched), h)  # type: ignore[arg-type]
    torch.testing.assert_close(of_hidden, gradients(whole(h, weight, targets, weights), h)[0])
    with torch.no_grad():
        held_out = head.in_parts(h, weight, targets, weights, 10, watched)  # type: ignore[arg-type]
    assert asked == [(True, False)] * 4 + [(False, False)] * 4
    assert held_out.item() == pytest.approx(whole(h, weight, targets, weights).item(), rel=1e-6)


def test_parts_are_alike_and_hold_no_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch, twin: str) -> None:
    there = torch.device(twin)
    assert head.rows_at_once(1 << 30, 1 << 16, torch.device("cpu")) is None
    assert head.rows_at_once(4096, 50304, there) == 4096
    assert head.rows_at_once(32768, 50304, there) == 8192 and head.MOST_LOGITS >= 8192 * 50304
    assert head.rows_at_once(32768 + 64, 50304, there) == 8208
    monkeypatch.setattr(head, "MOST_LOGITS", 10)
    assert head.rows_at_once(1000, 50304, there) == 250


def test_a_model_elsewhere_has_the_loss_it_has_here_whatever_the_parts(
    monkeypatch: pytest.MonkeyPatch, twin: str
) -> None:
    monkeypatch.setattr(head, "MOST_LOGITS", 1)
    monkeypatch.setattr(head, "LEAST_ROWS", 5)
    config = GPTConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=16, max_position_embeddings=16)  # fmt: skip
    ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    batch = Batch.of(ids[:, :-1].numpy().copy(), ids[:, 1:].numpy().copy(), begins=7)
    found: list[tuple[float, Tensor]] = []
    for device in ("cpu", twin):
        model = GPT(config)
        model.init_weights(torch.Generator().manual_seed(0))
        model.to(device)
        loss = LanguageModelLoss(device=device)(model, batch)
        loss.backward()
        grad = model.lm_head.weight.grad
        assert grad is not None
        found.append((loss.item(), grad.cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
