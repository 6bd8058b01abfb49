"""A saved folder opened by transformers computes what we compute: a checkpoint is a Hugging Face model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stateofgpt.infer.engine import Engine
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.model import layout
from stateofgpt.model.checkpoint import load_model, load_reward, save_checkpoint
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.model.heads import RewardModel
from stateofgpt.model.rotary import RopeScaling
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
    "qwen3, one head, one layer": GPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=32, intermediate_size=40, max_position_embeddings=24,
    ),
    "qwen3, biased, stretched": GPTConfig(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, max_position_embeddings=200, attention_bias=True,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 50),
    ),
    "llama, biased": GPTConfig(
        arch="llama", vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, intermediate_size=64, max_position_embeddings=40, attention_bias=True, mlp_bias=True,
    ),
    "llama, stretched": GPTConfig(  # a quarter of the context is what it was made for
        arch="llama", vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=64, max_position_embeddings=512, rope_theta=500.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 128), tie_word_embeddings=False,
    ),
    "gpt2": GPTConfig(
        arch="gpt2", vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16, intermediate_size=256, max_position_embeddings=48, rms_norm_eps=1e-5,
    ),
    "gpt2, odd sizes, untied": GPTConfig(
        arch="gpt2", vocab_size=321, hidden_size=45, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
        head_dim=15, intermediate_size=77, max_position_embeddings=33, tie_word_embeddings=False,
    ),
    "gpt2, one head, one layer": GPTConfig(
        arch="gpt2", vocab_size=320, hidden_size=24, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=24, intermediate_size=96, max_position_embeddings=24, rms_norm_eps=1e-5,
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


def there(model: GPT, folder: Path, tokenizer: Tokenizer) -> torch.nn.Module:
    """The same weights in transformers, by way of a saved folder."""
    save_checkpoint(folder, model, tokenizer=tokenizer, stage="sft", run="test")
    theirs: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return theirs.eval()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("length", [None, 1], ids=["whole", "one token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_every_gradient_are_those_of_transformers(
    shape: str, length: int | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = random_model(SHAPES[shape])
    theirs = there(model, tmp_path / "c", tokenizer)
    ids = some_ids(model.config)[:, :length]
    targets = ids.roll(-1, dims=1)
    logits, expected = model(ids), theirs(ids).logits
    assert difference(logits, expected) <= 1e-4
    losses = [torch.nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten()) for x in (logits, expected)]
    assert difference(losses[0], losses[1]) <= 1e-4
    for loss in losses:
        loss.backward()
    compare_gradients(model, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_padded_on_the_right_with_a_mask_give_the_same_loss_and_gradients(
    shape: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = random_model(SHAPES[shape])
    theirs = there(model, tmp_path / "c", tokenizer)
    ids = some_ids(model.config)
    T = ids.shape[1]
    real = torch.arange(T) < torch.tensor([T, T // 2, 1])[:, None]
    mask = real[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    labels = ids.masked_fill(~real, -100)
    expected = theirs(ids, attention_mask=real.long(), labels=labels).loss
    logits = model(ids, mask)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert difference(loss, expected) <= 1e-4
    loss.backward()
    expected.backward()
    compare_gradients(model, theirs)


def compare_gradients(model: GPT, theirs: torch.nn.Module) -> None:
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(own) == len(list(model.parameters()))
    ours = layout.to_file(model.config, own)
    compared = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert set(ours) == set(compared)
    largest = max(float(g.abs().max()) for g in compared.values())
    for name, gradient in compared.items():
        # relative to the tensor's own gradients; those that are zero but for rounding (a key's bias turns no softmax)
        # have no scale of their own, and are held against the model's
        assert float((ours[name] - gradient).abs().max()) <= 1e-4 * max(float(gradient.abs().max()), 1e-5 * largest), (
            name
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_writes_with_the_probabilities_that_transformers_gives(
    shape: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = random_model(SHAPES[shape])
    theirs = there(model, tmp_path / "c", tokenizer)
    room = model.config.max_position_embeddings
    prompts = [row[:n].tolist() for row, n in zip(some_ids(model.config), (1, room // 2, room - 2), strict=True)]
    found = Engine(model, max_batch=2).complete(prompts, SamplingParams(max_tokens=room, seed=1))
    for prompt, one in zip(prompts, found, strict=True):
        assert len(prompt) + len(one.ids) == room
        with torch.no_grad():
            logprobs = theirs(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        assert (torch.tensor(one.logprobs) - expected).abs().max() <= 1e-4


CONFIGS = {"qwen3": "Qwen3", "llama": "Llama", "gpt2": "GPT2"}


def made_there(config: GPTConfig, head: str) -> torch.nn.Module:
    """A model that transformers made and initialised by itself."""
    known = {k: v for k, v in vars(config).items() if k not in ("arch", "rope_theta", "rope_scaling")}
    if config.arch == "gpt2":
        known = {
            "vocab_size": config.vocab_size, "n_embd": config.hidden_size, "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads, "n_inner": config.intermediate_size,
            "n_positions": config.max_position_embeddings, "layer_norm_epsilon": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
        }  # fmt: skip
    else:
        rope = (
            {"rope_type": "default"}
            if config.rope_scaling is None
            else {"rope_type": "llama3", **vars(config.rope_scaling)}
        )
        known["rope_parameters"] = {"rope_theta": config.rope_theta, **rope}
    torch.manual_seed(3)
    name = CONFIGS[config.arch]
    theirs = getattr(transformers, f"{name}{head}")(
        getattr(transformers, f"{name}Config")(pad_token_id=3, num_labels=1, **known)
    )
    with torch.no_grad():  # as they come, biases and gains are all alike
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    whole: torch.nn.Module = theirs.eval()
    return whole


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "wide heads" not in shape])
def test_a_folder_written_by_transformers_loads_here_whole_and_in_shards(shape: str, tmp_path: Path) -> None:
    ours = SHAPES[shape]
    if ours.arch == "gpt2":
        theirs = made_there(ours, "LMHeadModel")
    else:
        theirs = made_there(ours, "ForCausalLM")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ids = some_ids(ours)
    for folder in ("one", "shards", "bfloat16"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        loaded = load_model(tmp_path / folder)
        assert loaded.config == ours
        with torch.no_grad():
            assert (loaded(ids).log_softmax(-1) - again(ids).logits.log_softmax(-1)).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", ["qwen3, biased, stretched", "llama, biased", "gpt2"])
def test_a_reward_model_written_by_transformers_loads_here(shape: str, tmp_path: Path) -> None:
    ours = SHAPES[shape]
    theirs = made_there(ours, "ForSequenceClassification")
    theirs.save_pretrained(tmp_path / "r", max_shard_size="20KB")
    ids = some_ids(ours)
    ids[0, 5:] = 3
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 3).long()).logits[:, 0]
        assert (load_reward(tmp_path / "r")(ids) - expected).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["qwen3", "llama", "gpt2"])
def test_transformers_reads_the_tokenizer_and_the_chat_template(
    shape: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    save_checkpoint(tmp_path / "c", random_model(SHAPES[shape]), tokenizer=tokenizer, stage="sft", run="test")
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


@pytest.mark.parametrize("shape", ["qwen3", "llama", "gpt2"])
def test_transformers_generates_what_our_own_greedy_loop_writes(
    shape: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = random_model(SHAPES[shape])
    save_checkpoint(tmp_path / "c", model, tokenizer=tokenizer, stage="sft", run="test")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    stops = theirs.generation_config.eos_token_id
    assert set(stops) == {tokenizer.im_end, tokenizer.eot}
    ids = some_ids(SHAPES[shape], batch=1)[:, :5]
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    with torch.no_grad():
        while ids.shape[1] < 25 and ids[0, -1] not in stops:
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert ids.tolist() == expected.tolist()
