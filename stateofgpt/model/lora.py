"""Low-rank adaptation: a frozen model, and beside some of its matrices a product of two thin ones that learns.

Owns: which linear layers are adapted, the adapted layer, merging, and the names of what is trained (those of PEFT's
files). Knows nothing of files, optimizers or architectures: it meets `nn.Linear` modules by name. An adapted layer
keeps its own weight under the name it had, so whatever reads the model's weights still finds them; who computes with
`weight` itself instead of calling the layer asks `effective_weight`.

Sources: LoRA (arXiv 2106.09685, section 4.1: h = W x + (alpha / r) B A x, B begins at zero), rank-stabilised scaling
(2312.03732: alpha / sqrt(r)). A begins as PEFT's does, uniform within 1 / sqrt(fan_in).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateofgpt.errors import ConfigError, ModelError

PREFIX = "base_model.model."  # what PEFT puts before the name a parameter has in the base model
HEADS = ("score",)  # new on a reward or value model, so trained whole: PEFT's `modules_to_save`
_READ_AS_WEIGHTS = ("lm_head", *HEADS)  # the loss and the engine take the matrix of these, not the layer


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how. `r` is the rank, `alpha` the update's strength: it is scaled by `scale`.

    `target_modules` are names as in PEFT: a layer is meant when its dotted name is one of them or ends in ".NAME".
    `dropout` acts on the input of A, and only where a gradient is computed.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora r is {self.r}, must be at least 1")
        if not 0.0 < self.alpha < math.inf:
            raise ConfigError(f"lora alpha is {self.alpha}, must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora dropout is {self.dropout}, must be at least 0 and below 1")
        if not self.target_modules:
            raise ConfigError("lora target_modules is empty; name at least one linear layer, for example q_proj")
        for name in self.target_modules:
            if not re.fullmatch(r"\w+(\.\w+)*", name):
                raise ConfigError(f"lora target_modules has {name[:80]!r}, expected a layer's name, for example q_proj")

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Linear):
    """A linear layer with a frozen weight [out, in] and an update scale * B A of rank r; B [out, r], A [r, in].

    Takes over the weight and bias of `base` (no copy). The forward pass is W x + scale * B (A x), so neither the
    product B A nor a gradient of W is ever made; after `merge` it is W x alone, with B A inside W.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = _empty(config.r, base.in_features, like=base.weight)
        self.lora_B = _empty(base.out_features, config.r, like=base.weight)
        bound = base.in_features**-0.5  # kaiming_uniform_ with a = sqrt(5)
        start = torch.empty(self.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.weight.copy_(start)
            self.lora_B.weight.zero_()
        self.lora_dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.scale = config.scale
        self._unmerged: Tensor | None = None  # the weight before merging
        self.off = False  # for a while: W x alone

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self._unmerged is not None or self.off:
            return y
        if self.lora_dropout is not None and torch.is_grad_enabled():
            x = self.lora_dropout(x)
        update: Tensor = self.lora_B(self.lora_A(x))
        return y + update * self.scale

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        self._unmerged = self.weight.detach().clone()
        self.weight.addmm_(self.lora_B.weight, self.lora_A.weight, alpha=self.scale)

    @torch.no_grad()
    def unmerge(self) -> None:
        assert self._unmerged is not None
        self.weight.copy_(self._unmerged)
        self._unmerged = None


def _empty(rows: int, columns: int, like: Tensor) -> nn.Linear:
    # By way of "meta": a new layer must not draw from the global generator, which a resumed run would find elsewhere.
    layer = nn.Linear(columns, rows, bias=False, device="meta", dtype=like.dtype)
    return layer.to_empty(device=like.device)


# -------------------------------------------------------------------------------------------------------------- adding


def targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """The layers of `model` that `config` means, by their dotted names, in the model's order.

    Raises ConfigError when a name means nothing, means something other than a linear layer, or means a head;
    ModelError when the model is adapted already.
    """
    if adapters(model):
        raise ModelError("the model has adapters already; save it as a checkpoint, which merges them, and adapt that")
    found: dict[str, nn.Linear] = {}
    unused = set(config.target_modules)
    for name, module in model.named_modules():
        meant = {t for t in config.target_modules if name == t or name.endswith(f".{t}")}
        unused -= meant
        if not meant:
            continue
        if not isinstance(module, nn.Linear):
            raise ConfigError(f"lora cannot adapt {name}, a {type(module).__name__}; it adapts {_adaptable(model)}")
        if name in _READ_AS_WEIGHTS:
            raise ConfigError(f"lora cannot adapt the head {name}; it adapts {_adaptable(model)}")
        found[name] = module
    if unused:
        raise ConfigError(f"the model has no layer {sorted(unused)[0]!r}; lora can adapt {_adaptable(model)}")
    return found


def _adaptable(model: nn.Module) -> str:
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in _READ_AS_WEIGHTS)
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "nothing"


def add_lora(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze `model` and put adapters beside the layers that `config` names; the model computes what it did before.

    What learns from now on is A, B and, on a reward or value model, the head. A trunk shared with another model is
    adapted there too. Raises what `targets` raises, before anything has changed.
    """
    chosen = targets(model, config)
    model.requires_grad_(False)
    for name, linear in chosen.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoraLinear(linear, config, generator))
    for _, head in _heads(model):
        head.requires_grad_(True)


def _heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, head) for name, head in model.named_children() if name in HEADS]


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers, by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns: the parameters that take a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_factor(name: str) -> bool:
    """Whether a parameter of this name is an A or a B."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


# ------------------------------------------------------------------------------------------------------------- merging


def effective_weight(linear: nn.Linear) -> Tensor:
    """The matrix [out, in] that `linear` multiplies by: its weight, with the update of an adapter that is not off."""
    if isinstance(linear, LoraLinear) and not linear.merged and not linear.off:
        return torch.addmm(linear.weight, linear.lora_B.weight, linear.lora_A.weight, alpha=linear.scale)
    return linear.weight


def merge(model: nn.Module) -> None:
    """Add every update into its weight, so that the model is as fast as it was without. A copy of each weight is kept.

    A merged model is for use, not for training: its A and B are out of the computation. Raises ModelError when there
    is nothing to merge or it is merged already.
    """
    for layer in _all(model, merged=False):
        layer.merge()
    _let_learn(model, False)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every weight is, bit for bit, the base's again."""
    for layer in _all(model, merged=True):
        layer.unmerge()
    _let_learn(model, True)


def _all(model: nn.Module, *, merged: bool) -> list[LoraLinear]:
    layers = list(adapters(model).values())
    if not layers:
        raise ModelError("the model has no adapters; add_lora adds them")
    if any(layer.merged != merged for layer in layers):
        raise ModelError(f"the model's adapters are {'not ' if merged else 'already '}merged into its weights")
    return layers


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what it did before it was adapted: a reference without a second copy of its weights.

    A head that is trained whole has no base to go back to. A model without adapters is left alone. Raises ModelError
    when they are merged, because the base is then not at hand.
    """
    layers = list(adapters(model).values())
    if any(layer.merged for layer in layers):
        raise ModelError("the model's adapters are merged into its weights, so they cannot be switched off; unmerge it")
    before = [layer.off for layer in layers]
    try:
        for layer in layers:
            layer.off = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.off = was


def _let_learn(model: nn.Module, yes: bool) -> None:
    for name, p in model.named_parameters():
        if is_factor(name):
            p.requires_grad_(yes)


# --------------------------------------------------------------------------------------------------------------- state


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` as a model without adapters would have it: updates are inside the weights.

    Of a model without adapters it is its `state_dict()`.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in adapters(model).items():
        state[f"{name}.weight"] = effective_weight(layer).detach()
    return {name: tensor for name, tensor in state.items() if not is_factor(name)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All that was trained, under PEFT's names: every A and B, and a whole head. The tensors are the model's own."""
    if not adapters(model):
        raise ModelError("the model has no adapters; add_lora adds them")
    state = {name: p.detach() for name, p in model.named_parameters() if is_factor(name)}
    state |= {f"{head}.{name}": p.detach() for head, module in _heads(model) for name, p in module.named_parameters()}
    return {PREFIX + name: tensor for name, tensor in state.items()}


def expected_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `lora_state_dict` will have once `config` has been added to `model`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in targets(model, config).items():
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (config.r, linear.in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (linear.out_features, config.r)
    for head, module in _heads(model):
        shapes |= {f"{PREFIX}{head}.{name}": tuple(p.shape) for name, p in module.named_parameters()}
    return shapes
