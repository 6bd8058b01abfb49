"""Rollouts: every tensor entry belongs to the token it is said to belong to, tools and padding or not."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stateofgpt.assistant.session import Session, Turn
from stateofgpt.assistant.tools import Toolbox
from stateofgpt.infer.engine import Engine, Event, SamplingParams
from stateofgpt.infer.score import score
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import ValueModel
from stateofgpt.rl.packed import parts_of, together
from stateofgpt.rl.rollout import (
    Rollouts,
    _placed,
    drawn_logprobs,
    policy_logprobs,
    rollouts_of,
    sampled_logprobs,
    values,
)
from stateofgpt.text.chat import ChatFormat, Message, ToolCall
from stateofgpt.text.tokenizer import Tokenizer
from stateofgpt.train import fused
from stateofgpt.train.loss import Way

TOKENIZER = Tokenizer.train(iter(["What is 12 + 30? calculator expression arguments name tool user"] * 20), 300)
CHAT = ChatFormat(TOKENIZER)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small_model(seed: int = 0) -> GPT:
    model = GPT(GPTConfig(
        vocab_size=320, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=12, intermediate_size=32, max_position_embeddings=250,
    ))  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.25, generator=g)
    return model


class Scripted:
    """A source of tokens that says what it is told to: so tools are called when a test wants them to be."""

    max_context = 250

    def __init__(self, script: list[int]) -> None:
        self.script, self.live = deque(script), False

    def add(self, prompt: Sequence[int], params: SamplingParams, *, hold: bool = False) -> int:
        self.live = True
        return 0

    def extend(self, request: int, ids: Sequence[int]) -> None:
        self.live = True

    def cancel(self, request: int) -> None:
        self.live = False

    def events(self, requests: Iterable[int]) -> Iterator[Event]:
        while self.live:
            token = self.script.popleft()
            self.live = token != TOKENIZER.im_end
            yield Event(0, token, -1.0, None if self.live else "stop")


def tool_turn() -> tuple[Turn, list[int]]:
    """A turn with two tool calls, and the ids its model drew, in order."""
    drawn: list[int] = []
    for message in (
        Message("assistant", "Let me see.", (ToolCall("calculator", {"expression": "12 + 30"}),)),
        Message("assistant", "", (ToolCall("calculator", {"expression": "42 * 2"}),)),
        Message("assistant", "It is 84."),
    ):
        rendered = CHAT.render((message,))
        drawn += [i for i, learned in zip(rendered.ids, rendered.loss_mask, strict=True) if learned]
    session = Session(Scripted(drawn), CHAT, Toolbox())
    return session.converse([(Message("user", "What is 12 + 30, twice?"),)])[0], drawn


def plain_turns(model: GPT, n: int = 5) -> list[Turn]:
    session = Session(Engine(model, max_batch=8), CHAT, None)
    asked = [(Message("user", "What is " + "12 + " * i + "30?"),) for i in range(n)]
    return session.converse(asked, SamplingParams(max_tokens=17, seed=3))


def test_masked_targets_are_what_the_model_drew_and_nothing_else() -> None:
    turn, drawn = tool_turn()
    assert [m.role for m in turn.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    others = plain_turns(small_model())
    rollouts = rollouts_of([*others, turn], TOKENIZER.pad)
    for row, t in enumerate([*others, turn]):
        found = rollouts.targets[row][rollouts.mask[row] > 0].tolist()
        assert found == [i for i, m in zip(t.ids, t.mask, strict=True) if m]
        whole = [*t.prompt_ids, *t.ids]
        assert rollouts.ids[row].tolist() == whole + [TOKENIZER.pad] * (rollouts.ids.shape[1] - len(whole))
    assert found == drawn
    assert rollouts.mask.shape == rollouts.inputs.shape == rollouts.targets.shape


def test_the_mask_is_that_of_the_rendered_conversation() -> None:
    turn, _ = tool_turn()
    rendered = CHAT.render((Message("user", "What is 12 + 30, twice?"), *turn.messages))
    rollouts = rollouts_of([turn], TOKENIZER.pad)
    length = len(turn.prompt_ids) + len(turn.ids)
    assert rendered.ids[:length] == rollouts.ids[0, :length].tolist()
    assert rendered.loss_mask[1:length] == rollouts.mask[0, : length - 1].long().tolist()
    assert not rollouts.mask[0, length - 1 :].any()


def test_log_probabilities_are_those_the_engine_drew_with() -> None:
    """Off by one anywhere and this fails: engine and trainer compute the same numbers by different code."""
    model = small_model()
    turns = plain_turns(model)
    rollouts = rollouts_of(turns, TOKENIZER.pad)
    logprobs, entropy = policy_logprobs(model, rollouts, Way())
    for row, turn in enumerate(turns):
        at = rollouts.mask[row] > 0
        assert logprobs[row][at].tolist() == pytest.approx(turn.logprobs, abs=1e-4)
        scored = torch.tensor(score(model, [[*turn.prompt_ids, *turn.ids]])[0])
        assert logprobs[row][at].tolist() == pytest.approx(scored[at[: len(scored)]].tolist(), abs=1e-4)
        assert (logprobs[row][~at] == 0).all()
    assert (entropy >= 0).all() and (entropy <= math.log(320) + 1e-4).all()


@pytest.mark.parametrize("fused", [False, True])
def test_training_finds_the_log_probabilities_of_the_rollout_tools_or_not(fused: bool) -> None:
    """Within 1e-4 in float32, so that a rollout's need not be computed again."""
    model = small_model()
    called = tool_turn()[0]
    scored = score(model, [[*called.prompt_ids, *called.ids]])[0][len(called.prompt_ids) - 1 :]
    known = [logprob if drawn else 0.0 for logprob, drawn in zip(scored, called.mask, strict=True)]
    turns = [*plain_turns(model), replace(called, logprobs=known)]
    rollouts = rollouts_of(turns, TOKENIZER.pad)
    drawn = drawn_logprobs(turns, rollouts)
    logprobs, _ = policy_logprobs(model, rollouts, Way(fused=fused))
    assert (drawn - logprobs).abs().max() < 1e-4 and not drawn[rollouts.mask == 0].any()
    assert (drawn != 0).sum() == rollouts.mask.sum()


def test_values_are_of_the_state_before_the_token() -> None:
    model = ValueModel(small_model())
    rollouts = rollouts_of([tool_turn()[0], *plain_turns(small_model())], TOKENIZER.pad)
    found = values(model, rollouts, Way())
    for row in (0, 3):
        drawn = rollouts.sampled[row].nonzero().flatten().tolist()
        t = drawn[len(drawn) // 2]
        alone = model(rollouts.ids[row : row + 1, : t + 1])[0, -1]
        assert found[row, t].item() == pytest.approx(alone.item(), abs=1e-4)


def test_some_rows_are_those_rows_without_their_common_padding() -> None:
    model = small_model()
    turns = [tool_turn()[0], *plain_turns(model)]
    rollouts = rollouts_of(turns, TOKENIZER.pad)
    part = rollouts.rows(torch.tensor([3, 1]))
    longest = max(len(turns[i].prompt_ids) + len(turns[i].ids) for i in (3, 1))
    assert part.ids.shape == (2, longest) and part.mask.shape == (2, longest - 1)
    assert part.mask.sum() == rollouts.mask[[3, 1]].sum()
    whole, _ = policy_logprobs(model, rollouts, Way())
    trimmed, _ = policy_logprobs(model, part, Way())
    assert torch.allclose(trimmed, whole[[3, 1], : longest - 1], atol=1e-4)


def test_rows_in_which_nothing_was_drawn_do_no_harm() -> None:
    none = Rollouts.of(torch.tensor([[5, 6, 7, 3], [8, 9, 3, 3]]), torch.zeros(2, 3))
    part = none.rows(torch.tensor([1]))
    assert part.ids.shape == (1, 2) and not part.mask.any()
    assert policy_logprobs(small_model(), part, Way())[0].isfinite().all()


def test_bfloat16_is_near() -> None:
    model = small_model()
    rollouts = rollouts_of(plain_turns(model, 2), TOKENIZER.pad)
    exact, near = (policy_logprobs(model, rollouts, Way(d))[0] for d in ("float32", "bfloat16"))  # type: ignore[arg-type]
    assert near.dtype == torch.float32 and (exact - near).abs()[rollouts.mask > 0].mean() < 0.1


def test_through_the_fused_kernels_it_is_the_same_numbers_and_gradients() -> None:
    model = small_model()
    rollouts = rollouts_of([tool_turn()[0], *plain_turns(model)], TOKENIZER.pad)
    plain, fused = (policy_logprobs(model, rollouts, Way(fused=f)) for f in (False, True))
    for mine, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(logprobs.sum(), list(model.parameters())) for logprobs, _ in (plain, fused)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max() + 1.0))


def siblings(model: GPT, per_prompt: int = 7, long: int = 20) -> list[Turn]:
    """Turns of which several answer the same, two of them with a tool between, and one that answers alone; the prompts
    are of different lengths and so are the answers."""
    session = Session(Engine(model, max_batch=8), CHAT, None)
    asked = [(Message("user", "What is " + "12 + " * n + "30?"),) for n in (long, 1, 7)]
    turns = [
        turn
        for i, lengths in enumerate([range(3, 3 + 11 * per_prompt, 11), range(1, 1 + per_prompt), [9]])
        for n in lengths
        for turn in session.converse([asked[i]], SamplingParams(max_tokens=n, seed=n))
    ]
    return [*turns, *[tool_turn()[0]] * 2]


def through(model: GPT | ValueModel, rollouts: Rollouts, way: Way) -> tuple[Tensor, dict[str, Tensor]]:
    """What is found in the sampled places, and the gradients of a weighted sum of it."""
    if isinstance(model, ValueModel):
        found = values(model, rollouts, way)
    else:
        found = sampled_logprobs(model, rollouts, way)
    model.zero_grad()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(7)) * rollouts.mask
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("order", ["side by side", "mixed"])
def test_answers_to_one_prompt_in_one_row_give_what_each_gives_alone(valued: bool, order: str) -> None:
    """Log-probabilities or values, and every gradient, against rows that are apart and the plain forward pass."""
    turns = siblings(small_model())
    if order == "mixed":
        turns = [turns[i] for i in torch.randperm(len(turns), generator=torch.Generator().manual_seed(1)).tolist()]
    model = ValueModel(small_model()) if valued else small_model()
    shared = rollouts_of(turns, TOKENIZER.pad)
    placed = _placed(model, shared, Way(fused=True))
    assert placed is not None and 2 * placed.packed.ids.numel() < shared.mask.numel()
    assert max(gap for *_, gap in placed.packed.branches.blocks(fused.BLOCK)) > 0  # keys that nobody sees are left out
    found, got = through(model, shared, Way(fused=True))
    truth, wanted = through(model, rollouts_of(turns, TOKENIZER.pad, together=False), Way())
    assert torch.allclose(found, truth, atol=1e-4)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-5, name


@pytest.mark.parametrize("tokens", [None, 1, 90, 10**6])
def test_parts_hold_every_row_once_and_no_more_than_they_may(tokens: int | None) -> None:
    rng = random.Random(4)
    same = [rng.randrange(6) for _ in range(40)]
    prompts = [3 + 4 * number for number in same]
    lengths = [n + rng.randint(1, 30) for n in prompts]
    parts = parts_of(lengths, prompts, same, 6, tokens)
    assert sorted(row for part in parts for row in part) == list(range(40))
    for part in parts:
        rows = [[0] * lengths[i] for i in part]
        of_part = [torch.tensor([x[i] for i in part]) for x in (prompts, lengths)]
        held = together(rows, [same[i] for i in part], *of_part).packed.ids.numel()
        alone = len({same[i] for i in part}) == 1
        assert len(part) == 1 or (len(part) <= 6 or alone if tokens is None else held <= tokens)
    assert len(parts) == {1: 40, 10**6: 1}.get(tokens or 0, len(parts))


def test_rows_that_are_to_be_apart_stay_apart() -> None:
    turns = siblings(small_model(), per_prompt=2, long=3)
    apart = rollouts_of(turns, TOKENIZER.pad, together=False)
    assert _placed(small_model(), apart, Way(fused=True)) is None
    assert _placed(small_model(), rollouts_of(turns, TOKENIZER.pad), Way()) is None
