"""The scalar heads, against a loop that reads one text at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel, ValueModel, last_real

PAD = 3
CONFIG = GPTConfig(
    vocab_size=97, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=10, intermediate_size=56, max_position_embeddings=32,
)  # fmt: skip


GPT2 = replace(CONFIG, arch="gpt2", num_key_value_heads=4)


def some_gpt(seed: int = 0, config: GPTConfig = CONFIG) -> GPT:
    gpt = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.3, generator=generator)
    return gpt.eval()


def texts(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 97, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["qwen3", "gpt2"])
def test_a_reward_does_not_depend_on_the_padding_or_on_the_company(config: GPTConfig) -> None:
    model = RewardModel(some_gpt(config=config), PAD)
    rows = texts((3, 11, 7, 1))
    alone = torch.stack([model(torch.tensor([row]))[0] for row in rows])
    assert torch.allclose(model(padded(rows, 11)), alone, atol=1e-5)
    assert torch.allclose(model(padded(rows, 20)), alone, atol=1e-5)


def test_a_reward_is_read_at_the_last_token_that_is_no_padding() -> None:
    gpt = some_gpt()
    model = RewardModel(gpt, PAD)
    rows = texts((5, 9))
    hidden = gpt.hidden(padded(rows, 12))
    by_hand = torch.stack([hidden[0, 4] @ model.score.weight[0], hidden[1, 8] @ model.score.weight[0]])
    assert torch.allclose(model(padded(rows, 12)), by_hand, atol=1e-5)
    assert last_real(torch.tensor([[5, PAD, 6, PAD], [PAD, PAD, PAD, PAD], [1, 2, 4, 5]]), PAD).tolist() == [2, 0, 3]


def test_the_head_starts_with_std_one_over_sqrt_of_width_plus_one() -> None:
    config = GPTConfig(
        vocab_size=8, hidden_size=4096, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=2, intermediate_size=2, max_position_embeddings=4,
    )  # fmt: skip
    wide = GPT(config)
    std = RewardModel(wide, 0, torch.Generator().manual_seed(3)).score.weight.std().item()
    assert abs(std * 4097**0.5 - 1) < 0.05


def test_making_a_head_leaves_the_global_random_state_alone() -> None:
    gpt = some_gpt()
    before = torch.get_rng_state()
    reward = RewardModel(gpt, PAD)
    ValueModel(gpt)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(reward.score.weight, RewardModel(gpt, PAD).score.weight)


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["qwen3", "gpt2"])
def test_values_are_causal_and_the_last_one_is_the_reward(config: GPTConfig) -> None:
    reward = RewardModel(some_gpt(config=config), PAD)
    value = ValueModel(reward)
    row = texts((9,))[0]
    values = value(torch.tensor([row]))
    assert values.shape == (1, 9)
    assert torch.allclose(values[0, -1], reward(torch.tensor([row]))[0], atol=1e-5)
    assert torch.allclose(value(torch.tensor([row[:4]]))[0], values[0, :4], atol=1e-5)


def test_state_names_are_those_of_sequence_classification() -> None:
    names = set(RewardModel(some_gpt(), PAD).state_dict())
    assert "score.weight" in names and "model.embed_tokens.weight" in names
    assert not [name for name in names if name.startswith("lm_head") or name.endswith(".bias")]


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["qwen3", "gpt2"])
def test_a_reward_model_learns_which_token_is_good(config: GPTConfig) -> None:
    model = RewardModel(some_gpt(config=config), PAD)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    good, bad = padded([[5, 6, 10], [8, 10]], 4), padded([[5, 6, 11], [8, 11]], 4)
    for _ in range(30):
        loss = -torch.nn.functional.logsigmoid(model(good) - model(bad)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert bool((model(good) > model(bad)).all())
