"""Forms of models from nothing: as large as the papers' formulas say, and only combinations that there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from stateofgpt.errors import CheckpointError, ConfigError
from stateofgpt.model.convert import from_huggingface, to_huggingface
from stateofgpt.model.form import Form
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.dial import SHAPES, shape


def parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).n_params()


@pytest.mark.parametrize(("width", "layers"), SHAPES)
def test_gpt2_has_the_parameters_that_its_blocks_add_up_to(width: int, layers: int) -> None:
    block = 12 * width**2 + 13 * width  # 4 C^2 of attention, 8 C^2 of feed-forward; biases 4 C + 5 C, two norms 4 C
    expected = (1024 + 128) * width + layers * block + 2 * width
    assert parameters(Form("gpt2").shape(width, layers, 1024, 128)) == expected
    assert parameters(Form("gpt2", tied=False).shape(width, layers, 1024, 128)) == expected + 1024 * width


@pytest.mark.parametrize(("width", "layers"), SHAPES)
def test_a_llama_is_a_qwen3_without_the_norms_of_queries_and_keys(width: int, layers: int) -> None:
    qwen, llama = (parameters(Form(arch).shape(width, layers, 1024, 128)) for arch in ("qwen3", "llama"))  # type: ignore[arg-type]
    assert qwen - llama == layers * 2 * 64
    if width // 64 % 2 == 0:
        grouped = parameters(Form("llama", kv_heads=width // 128).shape(width, layers, 1024, 128))
        assert llama - grouped == layers * 2 * width * width // 2  # half of the keys' and the values' matrices
    biased = parameters(Form("llama", biases=True).shape(width, layers, 1024, 128))
    assert biased - llama == layers * (4 * width + 2 * 3 * width + width)


def test_every_form_that_is_made_is_written_and_read_back_as_it_is() -> None:
    made = 0
    for arch, tied, kv_heads, biases in itertools.product(
        ("qwen3", "llama", "gpt2"), (True, False), (None, 1, 2, 3, 5), (None, True, False)
    ):
        try:
            form = Form(arch, tied, kv_heads, biases)  # type: ignore[arg-type]
        except ConfigError:
            assert arch == "gpt2" and (kv_heads is not None or biases is False)
            continue
        for width in (64, 100, 128, 192, 200, 320, 384):
            if form.misfit(width):
                with pytest.raises(ConfigError, match=f"{width}"):
                    form.shape(width, 2, 320, 64)
                continue
            config = form.shape(width, 2, 320, 64)
            try:
                raw = to_huggingface(config, "causal", bos=0, eos=[1], pad=2)
            except CheckpointError as failure:  # it would show only after training
                pytest.fail(f"{form}, {width}: {failure}")
            assert from_huggingface(raw, "config.json").config == config
            made += 1
    assert made > 100


def test_the_usual_form_is_the_one_that_there_was() -> None:
    assert shape(192, 5, 2048, 256) == GPTConfig(
        vocab_size=2048, hidden_size=192, num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=3,
        head_dim=64, intermediate_size=576, max_position_embeddings=256,
    )  # fmt: skip
