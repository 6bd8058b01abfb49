"""A saved folder opened by transformers computes what we compute: a checkpoint is a Hugging Face model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stateofgpt.model.checkpoint import load_model, load_reward, save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel
from stateofgpt.text.chat import ChatFormat, Message, ToolCall
from stateofgpt.text.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

SHAPES = {
    "qwen3": GPTConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16, intermediate_size=96, max_position_embeddings=48,
    ),
    "qwen3, grouped, odd sizes, untied": GPTConfig(
        vocab_size=321, hidden_size=50, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=14, intermediate_size=77, max_position_embeddings=33, rope_theta=50000.0, tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    ),
    "qwen3, one key-value head": GPTConfig(
        vocab_size=400, hidden_size=48, num_hidden_layers=1, num_attention_heads=5, num_key_value_heads=1,
        head_dim=32, intermediate_size=64, max_position_embeddings=40, rope_theta=1e6,
    ),
    "llama": GPTConfig(
        arch="llama", vocab_size=333, hidden_size=60, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        head_dim=10, intermediate_size=91, max_position_embeddings=40,
    ),
    "llama, wide heads, untied": GPTConfig(
        arch="llama", vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, intermediate_size=48, max_position_embeddings=40, tie_word_embeddings=False, rope_theta=500.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["What is 4729 + 386? It is 5115. " * 20, "user assistant tool system"]), 300)


def random_model(config: GPTConfig) -> GPT:
    """Every weight drawn at random, gains and zero-initialised projections too, so that each one matters."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.3 if p.ndim == 1 else 0.15, generator=generator)
    return model.eval()


def some_ids(config: GPTConfig, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randint(4, config.vocab_size, (batch, config.max_position_embeddings), generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_gives_the_same_log_probabilities(shape: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = random_model(SHAPES[shape])
    save_checkpoint(tmp_path / "c", model, tokenizer=tokenizer, stage="sft", run="test")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = some_ids(SHAPES[shape])
    with torch.no_grad():
        expected = theirs.eval()(ids).logits.log_softmax(-1)
        assert expected.std() > 0.3  # a model that says the same everywhere would prove nothing
        assert (model(ids).log_softmax(-1) - expected).abs().max() <= 1e-4
        assert (load_model(tmp_path / "c")(ids).log_softmax(-1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_gives_the_same_rewards(shape: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = RewardModel(random_model(SHAPES[shape]), tokenizer.pad)
    save_checkpoint(tmp_path / "r", model, tokenizer=tokenizer, stage="reward", run="test")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "r").eval()
    ids = some_ids(SHAPES[shape], batch=4)
    for row, length in enumerate((1, 9, 20)):
        ids[row, length:] = tokenizer.pad
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != tokenizer.pad).long()).logits[:, 0]
        assert (model(ids) - expected).abs().max() <= 1e-4
        assert (load_reward(tmp_path / "r")(ids) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", ["qwen3, grouped, odd sizes, untied", "llama"])
def test_a_folder_written_by_transformers_loads_here(shape: str, tmp_path: Path) -> None:
    ours = SHAPES[shape]
    known = {k: v for k, v in vars(ours).items() if k != "arch"}
    name = {"qwen3": "Qwen3", "llama": "Llama"}[ours.arch]
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**known)).eval()
    theirs.save_pretrained(tmp_path / "one")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ids = some_ids(ours)
    for folder in ("one", "shards"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        with torch.no_grad():
            assert (load_model(tmp_path / folder)(ids) - again(ids).logits).abs().max() <= 1e-4


def test_transformers_reads_the_tokenizer_and_the_chat_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_checkpoint(tmp_path / "c", random_model(SHAPES["qwen3"]), tokenizer=tokenizer, stage="sft", run="test")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    assert theirs("What is 4729 + 386?\n é漢")["input_ids"] == tokenizer.encode("What is 4729 + 386?\n é漢")
    named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert named == (tokenizer.eot, tokenizer.im_end, tokenizer.pad)
    call = ToolCall("calculator", {"expression": "4729 + 386"})
    spoken = (
        Message("system", "Be brief."), Message("user", "What is 4729 + 386?"), Message("assistant", "", (call,)),
        Message("tool", "5115"), Message("assistant", "It is 5115."), Message("user", "Thanks"),
    )  # fmt: skip
    messages = [
        {
            "role": m.role,
            "content": m.content,
            "tool_calls": [{"function": {"name": c.name, "arguments": c.arguments}} for c in m.tool_calls],
        }
        for m in spoken
    ]
    rendered = ChatFormat(tokenizer).render(spoken, add_generation_prompt=True).ids
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == rendered


def test_transformers_generates_what_our_own_greedy_loop_writes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = random_model(SHAPES["qwen3"])
    save_checkpoint(tmp_path / "c", model, tokenizer=tokenizer, stage="sft", run="test")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    stops = theirs.generation_config.eos_token_id
    assert set(stops) == {tokenizer.im_end, tokenizer.eot}
    ids = some_ids(SHAPES["qwen3"], batch=1)[:, :5]
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    with torch.no_grad():
        while ids.shape[1] < 25 and ids[0, -1] not in stops:
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert ids.tolist() == expected.tolist()
