"""Kernels in Triton, run by its interpreter on the CPU: the same numbers as torch, and the same tokens in an engine.

Triton is in no build of torch for CPUs. Where it is there, `TRITON_INTERPRET=1 pytest tests/test_paged.py` runs them.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from test_engine import assert_same, make_model, naive_greedy, prompts_of
from test_static import static_engine

from stateofgpt.infer import paged
from stateofgpt.infer.capture import as_it_is
from stateofgpt.infer.engine import Engine
from stateofgpt.infer.sampling import SamplingParams
from stateofgpt.model.gpt import GPTConfig

CPU = torch.device("cpu")
SHAPES = [("qwen3", 4, 2, 8), ("llama", 9, 3, 64), ("gpt2", 2, 2, 20), ("llama", 4, 1, 128)]


def config_of(arch: str, heads: int, kv_heads: int, head_dim: int) -> GPTConfig:
    return GPTConfig(
        arch=arch, hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=48, vocab_size=96, num_hidden_layers=2,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter: Any = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 runs these")
    patched = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patched(tensor, scope)  # whose index numpy 2 refuses: an array of one number is none
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


def test_without_triton_or_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(*SHAPES[0])
    paged.load.cache_clear()
    monkeypatch.setattr(paged, "triton", None)
    assert paged.load(config, torch.bfloat16, CPU) is None

    class Broken:
        @staticmethod
        def next_power_of_2(n: int) -> int:
            raise RuntimeError("no compiler here")

    paged.load.cache_clear()
    monkeypatch.setattr(paged, "triton", Broken)
    with pytest.warns(RuntimeWarning, match="not used here: RuntimeError: no compiler here"):
        assert paged.load(config, torch.bfloat16, CPU) is None
    paged.load.cache_clear()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies no bfloat16
def test_they_agree_with_torch_and_the_check_sees_when_they_do_not(
    shape: tuple[str, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(*shape)
    kernels = paged.Kernels(config, CPU)
    assert paged._agree(kernels, config, dtype, CPU)
    monkeypatch.setattr(paged, "_PROCESSORS", 400)
    assert paged.Kernels(config, CPU).shares(3, 16) == 4  # every chunk by another program
    assert paged._agree(paged.Kernels(config, CPU), config, dtype, CPU)
    attention = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *given: attention(*given) * 1.05)
    assert not paged._agree(kernels, config, dtype, CPU)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("arch,kv_heads", [("qwen3", 2), ("llama", 1), ("gpt2", 4)])
def test_an_engine_with_them_draws_what_the_model_says(arch: str, kv_heads: int) -> None:
    model = make_model(arch, kv_heads)
    engine, decoder = static_engine(model, as_it_is, max_batch=3, speculate=2, prefixes=True)
    decoder.kernels = paged.Kernels(model.config, CPU)
    prompts, lengths = prompts_of(5, 1, 30), [4, 6, 3]
    greedy = [SamplingParams(max_tokens=n, temperature=0.0) for n in lengths]
    for prompt, n, one in zip(prompts, lengths, engine.complete(prompts, greedy), strict=True):
        assert_same(one, naive_greedy(model, prompt, n))
    seeded = [SamplingParams(max_tokens=4, seed=i, top_p=0.9, repetition_penalty=1.2) for i in range(3)]
    found, wanted = engine.complete(prompts, seeded), Engine(model).complete(prompts, seeded)
    assert [one.ids for one in found] == [one.ids for one in wanted]
