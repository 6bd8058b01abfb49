"""The optimizer: Muon for hidden matrices, AdamW for everything else.

Muon (Jordan et al. 2024) orthogonalises the momentum of each weight matrix by a Newton-Schulz iteration. Matrices of
one shape are stacked and iterated together, because at the widths of small models one batched product is several times
cheaper than a loop. AdamW follows arXiv 1711.05101. Weight decay is cautious (arXiv 2411.16085): it acts only where the
update and the weight agree in sign. Knows no stage, no schedule and no data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stateofgpt.train.kernels import Kernels

# Quintic steps towards the polar factor: the first five of Polar Express (arXiv 2505.16932, Algorithm 1 and its code).
POLAR_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# All steps but the last see their input divided by this, as in the paper: each polynomial explodes just above the
# interval it was made for, and bfloat16 rounds singular values past it (without: up to 1266, measured on 192 x 192).
SAFETY = 1.01
POLAR_STEPS = (
    *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_COEFFICIENTS[:-1]),
    POLAR_COEFFICIENTS[-1],
)


LARGEST = 1536  # rows or columns of a matrix that one thread iterates alone: no larger one was measured


@dataclass(frozen=True)
class OptimConfig:
    """Rates of both optimizers; `lr` is AdamW's, `muon_lr` Muon's. Rates are multiplied by the schedule's factor."""

    lr: float = 3e-3
    muon_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.02
    use_muon: bool = True


def orthogonalise(stack: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack [n, rows, columns], in bfloat16.

    Singular values of at least 0.003 of the matrix's norm end within 0.85 and 1.15; smaller ones stay below that.
    """
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_STEPS:
        gram = x @ x.mT
        x = torch.baddbmm(x, b * gram + c * (gram @ gram), x, beta=a)
    return x.mT if tall else x


def orthogonalised(update: Tensor, kernels: Kernels) -> Tensor:
    """The same of `update` [n, rows, columns] in bfloat16, which may be overwritten; by products of our own where the
    processor has them for such matrices."""
    rows, columns = update.shape[-2:]
    small = max(rows, columns) <= LARGEST and rows % 32 == columns % 32 == 0
    return kernels.polar_(update, POLAR_STEPS) if small and kernels.has_tiles(update.dtype) else orthogonalise(update)


class MuonAdamW:
    """One optimizer over the named parameters of a model, with a state that is a flat dict of tensors.

    A parameter that takes no gradient (`requires_grad` is False) has no part in it: no state, and no step.

    With `kernels` everything but the matrix products of the iteration is one pass over each tensor. On another device
    than the CPU, AdamW goes over all tensors of a kind with each operation: there a call costs more than a small
    tensor.
    """

    def __init__(
        self, params: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, kernels: Kernels | None = None
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.step_count = 0
        self.params = {n: p for n, p in params if p.requires_grad}
        hidden = {n: p for n, p in self.params.items() if p.ndim == 2 and ".layers." in n and config.use_muon}
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, p in hidden.items():
            groups.setdefault(tuple(p.shape), []).append(name)
        self.stacks = list(groups.values())
        self.weights = [self._stack(names) for names in self.stacks]
        self.momenta = [torch.zeros_like(weights) for weights in self.weights]
        self.adam = [n for n in self.params if n not in hidden]
        self.first = {n: torch.zeros_like(self.params[n]) for n in self.adam}
        self.second = {n: torch.zeros_like(self.params[n]) for n in self.adam}

    def _stack(self, names: list[str]) -> Tensor:
        """The named matrices as one tensor [n, rows, columns] whose slices they are from now on."""
        stack = torch.stack([self.params[n].detach() for n in names])
        for name, weights in zip(names, stack, strict=True):
            self.params[name].data = weights
        return stack

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()
    def step(self, factor: float, scale: float = 1.0) -> None:
        """Apply the gradients that stand in `.grad`, each times `scale`, with both learning rates times `factor`."""
        self.step_count += 1
        for names, weights, momentum in zip(self.stacks, self.weights, self.momenta, strict=True):
            self._muon(names, weights, momentum, factor, scale)
        if self.params and next(iter(self.params.values())).device.type != "cpu":
            for has_decay in (True, False):
                self._adamw_together([n for n in self.adam if (self.params[n].ndim == 2) == has_decay], factor, scale)
            return
        if self.kernels is not None:
            self._adamw_fused(self.kernels, factor, scale)
            return
        for name in self.adam:
            self._adamw(name, factor, scale)

    def _muon(self, names: list[str], weights: Tensor, momentum: Tensor, factor: float, scale: float) -> None:
        params = [self.params[n] for n in names]
        grads = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in params])
        rows, columns = grads.shape[-2:]
        lr = self.config.muon_lr * factor * max(1.0, rows / columns) ** 0.5
        if self.kernels is not None:
            update = self.kernels.muon_momentum(grads, momentum, self.config.momentum, scale)
            self.kernels.muon_apply(weights, orthogonalised(update, self.kernels), lr, self.config.weight_decay)
            return
        momentum.lerp_(grads.mul_(scale), 1.0 - self.config.momentum)
        update = orthogonalise(grads.lerp_(momentum, self.config.momentum)).float()
        self._decay(weights, update, lr)
        weights.sub_(update, alpha=lr)

    def _adamw(self, name: str, factor: float, scale: float) -> None:
        p, c, t = self.params[name], self.config, self.step_count
        if p.grad is None:
            return
        m, v = self.first[name], self.second[name]
        p.grad.mul_(scale)
        m.lerp_(p.grad, 1.0 - c.beta1)
        v.mul_(c.beta2).addcmul_(p.grad, p.grad, value=1.0 - c.beta2)
        update = (m / (1.0 - c.beta1**t)) / ((v / (1.0 - c.beta2**t)).sqrt_().add_(c.eps))
        if p.ndim == 2:
            self._decay(p, update, c.lr * factor)
        p.sub_(update, alpha=c.lr * factor)

    def _adamw_fused(self, kernels: Kernels, factor: float, scale: float) -> None:
        """`_adamw` of all parameters in one pass."""
        c, t = self.config, self.step_count
        learning = [(n, self.params[n], grad) for n in self.adam if (grad := self.params[n].grad) is not None]
        params, grads = [p for _, p, _ in learning], [grad.contiguous() for _, _, grad in learning]
        firsts, seconds = ([of[n] for n, _, _ in learning] for of in (self.first, self.second))
        decays = [c.weight_decay if p.ndim == 2 else 0.0 for p in params]
        rates = (c.lr * factor, c.beta1, c.beta2, c.eps, 1.0 - c.beta1**t, 1.0 - c.beta2**t, scale)
        kernels.adamw(params, grads, firsts, seconds, decays, rates)

    def _adamw_together(self, names: list[str], factor: float, scale: float) -> None:
        """`_adamw` of parameters that all are matrices, or none of which is."""
        c, t = self.config, self.step_count
        held = [(n, self.params[n], self.params[n].grad) for n in names]
        learning = [(n, p, grad) for n, p, grad in held if grad is not None]
        if not learning:
            return
        params: list[Tensor] = [p for _, p, _ in learning]
        grads = [grad for _, _, grad in learning]
        firsts, seconds = ([of[n] for n, _, _ in learning] for of in (self.first, self.second))
        torch._foreach_mul_(grads, scale)
        torch._foreach_lerp_(firsts, grads, 1.0 - c.beta1)
        torch._foreach_mul_(seconds, c.beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1.0 - c.beta2)
        updates = torch._foreach_div(firsts, 1.0 - c.beta1**t)
        spread = torch._foreach_div(seconds, 1.0 - c.beta2**t)
        torch._foreach_sqrt_(spread)
        torch._foreach_add_(spread, c.eps)
        torch._foreach_div_(updates, spread)
        if params[0].ndim == 2 and c.weight_decay:
            agree = torch._foreach_mul(updates, params)
            torch._foreach_sign_(agree)
            torch._foreach_clamp_min_(agree, 0.0)
            torch._foreach_addcmul_(params, params, agree, -c.lr * factor * c.weight_decay)
        torch._foreach_add_(params, updates, alpha=-c.lr * factor)

    def _decay(self, p: Tensor, update: Tensor, lr: float) -> None:
        if self.config.weight_decay:
            p.sub_(p * (update * p > 0), alpha=lr * self.config.weight_decay)

    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs to go on exactly, as named tensors."""
        tensors = {f"muon.{i}": m for i, m in enumerate(self.momenta)}
        tensors |= {f"first.{n}": m for n, m in self.first.items()}
        tensors |= {f"second.{n}": v for n, v in self.second.items()}
        tensors["step_count"] = torch.tensor(self.step_count)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state made by `state` on a model of the same shape."""
        for name, mine in self.state().items():
            if name != "step_count":
                mine.copy_(tensors[name])
        self.step_count = int(tensors["step_count"])
