"""Devices: which there are, and that a training step on another one is the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from twin_device import twin

from stateofgpt.errors import ConfigError
from stateofgpt.model.device import choose_device, wait
from stateofgpt.model.gpt import GPT, GPTConfig
from stateofgpt.train.loop import LoopConfig, Trainer
from stateofgpt.train.loss import Batch, LanguageModelLoss
from stateofgpt.train.optim import OptimConfig

__all__ = ["twin"]


def small() -> GPT:
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 16}
    model = GPT(GPTConfig(**shape, **heads))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_without_a_gpu_the_device_is_the_cpu_and_others_are_refused_by_name(twin: str) -> None:
    if not torch.cuda.is_available():
        assert choose_device() == "cpu"
        with pytest.raises(ConfigError, match="'cuda:3' is not on this machine"):
            choose_device("cuda:3")
    assert choose_device("cpu") == "cpu"
    assert choose_device(twin) == choose_device(f"{twin}:0") == twin
    for wrong in ("gpu", "meta", "twin:1", "mps", ""):
        with pytest.raises(ConfigError, match="device"):
            choose_device(wrong)


def test_every_device_but_the_cpu_is_waited_for(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.get_device_module(twin), "synchronize", waited.append)
    for device in ("cpu", twin, torch.device(twin, 0)):
        wait(device)
    assert waited == [twin, torch.device(twin, 0)]


def test_the_twin_tells_tensors_of_two_devices_apart(twin: str) -> None:
    there = torch.ones(2, 2).to(twin)
    assert there.device.type == twin and (there + 1).device.type == twin and there.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.Linear(2, 2)(there)


@pytest.mark.parametrize(("dtype", "muon"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_a_training_step_on_another_device_is_that_of_the_cpu(dtype: str, muon: bool, twin: str) -> None:
    ids = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))
    batch = Batch.of(ids[:, :-1].numpy().copy(), ids[:, 1:].numpy().copy(), begins=7)
    ends = []
    for device in ("cpu", twin):
        model = small().to(device)
        config = LoopConfig(optim=OptimConfig(use_muon=muon))
        trainer, loss = Trainer(model, config), LanguageModelLoss(dtype, device=device)  # type: ignore[arg-type]
        with sdpa_kernel(SDPBackend.MATH):  # which a device has without kernels of its own
            told = [trainer.step([batch, batch], loss, 1.0) for _ in range(3)]
        ends.append((told, {n: t.cpu() for n, t in trainer.tensors().items()}))
    for here, there in zip(ends[0][0], ends[1][0], strict=True):
        if dtype == "bfloat16":  # what is cast differs from device to device
            assert here["loss"] == pytest.approx(there["loss"], rel=0.02)
        else:
            # sums are in another order, and Muon's iteration in bfloat16 makes more of it
            assert here == pytest.approx(there, rel=1e-3 if muon else 1e-6)
    for name, t in ends[0][1].items():
        off = torch.linalg.vector_norm((t - ends[1][1][name]).float())
        assert dtype == "bfloat16" or off <= (0.05 if muon else 1e-3) * torch.linalg.vector_norm(t.float()), name
