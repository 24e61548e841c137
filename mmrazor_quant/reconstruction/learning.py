"""Learning one unit: the rounding of its weights, and the steps of its activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from mmrazor_quant.fake_quants import LearnedFakeQuantize, QDropFakeQuantize

from .adam import FlatAdam
from .samples import Group, Values, chunks
from .settings import Settings
from .weights import RoundedWeights, Weight

FULL_CHUNK = 64
"""Samples in a piece of a pass over all of them."""


@dataclass
class UnitData:
    """A unit and what it is learned from.

    Args:
        functions: For each group, the unit as a function of its inputs that gives a tuple of its outputs.
        groups: The samples.
        quantized: For each group, inputs as the quantized network in front gives them.
        floating: The same as the float network gives them; None where they are not mixed in.
        targets: Outputs of the float unit for the float inputs.
        importance: Weights of the squared errors, for each target by the shape of a sample; None: all the same.
        weights: Weights to learn the rounding of.
        quantizers: Activation quantizers of the unit that no earlier unit has.
    """

    functions: list[Callable[..., tuple[Any, ...]]]
    groups: list[Group]
    quantized: list[list[Values]]
    floating: list[list[Values]] | None
    targets: list[Values]
    importance: list[dict[tuple[int, ...], Tensor]] | None
    weights: list[Weight]
    quantizers: list[nn.Module]


class _Drops:
    """Random booleans: made of a pool of random bytes, from a random place on, which costs next to nothing.

    Attributes:
        probability: Share of true ones, a multiple of 1/256.
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        self.probability, self.generator = probability, generator
        self._pool: Tensor | None = None

    def like(self, x: Tensor) -> Tensor:
        """Give booleans of the shape and strides of a dense tensor, true with the probability."""
        if self._pool is None or self._pool.numel() < 2 * x.numel():
            self._pool = torch.randint(256, (2 * x.numel(),), generator=self.generator, dtype=torch.uint8).to(x.device)
        start = int(torch.randint(self._pool.numel() - x.numel(), (1,), generator=self.generator))
        taken = self._pool[start : start + x.numel()] < round(256 * self.probability)
        return taken.as_strided(x.shape, x.stride())


class _Steps:
    """Adam for the few steps of activations, each with a rate relative to its value."""

    def __init__(self, quantizers: list[nn.Module]) -> None:
        learned = [q for q in quantizers if isinstance(q, LearnedFakeQuantize)]
        self.parameters = [p for q in learned for p in q.learned_parameters()]
        flat = torch.cat([p.detach().reshape(-1) for p in self.parameters]) if self.parameters else torch.empty(0)
        self._start, self._adam = flat, FlatAdam(torch.zeros_like(flat))
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def grad(self) -> Tensor:
        """Give the gradients in one piece, and take them off the parameters."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return torch.cat([g.reshape(-1) for g in grads])

    @torch.no_grad()
    def step(self, grad: Tensor, rate: float) -> None:
        """Do a step."""
        changed = self._start + self._adam.step(grad, rate) * self._start.abs()
        for parameter, part in zip(self.parameters, changed.split([p.numel() for p in self.parameters])):
            parameter.copy_(part.reshape(parameter.shape))

    def close(self) -> None:
        """Have the parameters take no gradients any more."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)


class _Batches:
    """Random batches over all samples: each group by turns as often as it has samples, its samples in random order."""

    def __init__(self, groups: list[Group], size: int, generator: torch.Generator) -> None:
        self.groups, self.size, self.generator = groups, size, generator
        self._counts = torch.tensor([float(group.count) for group in groups])
        self._orders: list[Tensor] = [torch.empty(0, dtype=torch.long) for _ in groups]

    def draw(self) -> tuple[int, Tensor]:
        """Draw a group and the numbers of some of its samples."""
        several = len(self.groups) > 1
        group = int(torch.multinomial(self._counts, 1, generator=self.generator)) if several else 0
        size = min(self.size, self.groups[group].count)
        order = self._orders[group]
        if len(order) < size:
            order = torch.randperm(self.groups[group].count, generator=self.generator)
        self._orders[group] = order[size:]
        return group, order[:size]


class Learner:
    """Learns one unit.

    Args:
        data: The unit.
        settings: How.
        seed: Seed of all that is random.
    """

    def __init__(self, data: UnitData, settings: Settings, seed: int) -> None:
        self.data, self.settings = data, settings
        self.undecided = 0.0
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def loss(self) -> float:
        """Give the loss over all samples: the mean squared error relative to the mean square of the targets."""
        error, total = 0.0, 0.0
        for number, group in enumerate(self.data.groups):
            for rows in chunks(group, FULL_CHUNK):
                outputs = self.data.functions[number](*(v.read(number, rows) for v in self.data.quantized[number]))
                for output, target in zip(outputs, self.data.targets):
                    wanted = target.read(number, rows)
                    error += (output - wanted).square_().sum(dtype=torch.float64).item()
                    total += wanted.square_().sum(dtype=torch.float64).item()
        sums = torch.tensor([error, total], dtype=torch.float64)
        all_reduce(sums)
        return (sums[0] / sums[1].clamp(min=1e-30)).item()

    @torch.enable_grad()
    def run(self) -> None:
        """Learn; the quantizers end with the learned integers and steps."""
        settings = self.settings
        self._batches = _Batches(self.data.groups, settings.batch_size, self.generator)
        self._drops = _Drops(settings.drop_prob, self.generator)
        self._factors = self._factor()
        dropping = [q for q in self.data.quantizers if isinstance(q, QDropFakeQuantize) and settings.drop_prob > 0]
        learned = self.data.quantizers if settings.act_lr > 0 else []
        joint = settings.act_stage == 'joint'
        try:
            for quantizer in dropping:
                quantizer.drop_by(self._drops.like)
            self._learn(self.data.weights, learned if joint else [])
            if not joint:
                self._learn([], learned)
        finally:
            for quantizer in dropping:
                quantizer.drop_by(None)
            for weight in self.data.weights:
                weight.quantizer.stand_in(None)

    def _learn(self, learned_weights: list[Weight], learned_quantizers: list[nn.Module]) -> None:
        """Do all iterations for some weights and quantizers."""
        weights = RoundedWeights(learned_weights) if learned_weights else None
        steps = _Steps(learned_quantizers)
        if weights is None and not steps.parameters:
            return
        for iteration in range(self.settings.iters):
            if weights is not None:
                weights.grad.zero_()
            schedule = self.settings.schedule(iteration)
            self._drops.probability = schedule.drop
            self._backward(*self._batches.draw())
            of_steps = self._reduced(weights, steps)
            if weights is not None:
                weights.step(*schedule.of_weights())
            if steps.parameters:
                steps.step(of_steps, schedule.act_rate)
        steps.close()
        if weights is not None:
            self.undecided = weights.undecided()
            weights.finish()

    def _factor(self) -> list[float]:
        """What turns sums of squared errors over a sample into a loss: 1 is the square of the target."""
        factors = []
        for target in self.data.targets:
            total = torch.zeros(2, dtype=torch.float64)
            for number, group in enumerate(self.data.groups):
                rows = slice(0, min(group.count, FULL_CHUNK))
                total += torch.tensor([target.read(number, rows).square().sum().item(), rows.stop], dtype=torch.float64)
            all_reduce(total)
            factors.append((total[1] / total[0].clamp(min=1e-30)).item())
        return factors

    def _backward(self, number: int, which: Tensor) -> None:
        data = self.data
        inputs = [values.read(number, which) for values in data.quantized[number]]
        if data.floating is not None:
            floating = [values.read(number, which) for values in data.floating[number]]
            inputs = [_mixed(q, f, self._drops) for q, f in zip(inputs, floating)]
        outputs = data.functions[number](*inputs)
        taken = [i for i, output in enumerate(outputs) if output.requires_grad]
        if not taken:
            return
        grads = []
        for i in taken:
            grad = outputs[i].detach() - data.targets[i].read(number, which)
            if data.importance is not None and i < len(data.importance):
                grad *= data.importance[i].get(tuple(grad.shape[1:]), 1.0)
            grads.append(grad.mul_(2.0 * self._factors[i] / len(which)))
        torch.autograd.backward([outputs[i] for i in taken], grads)

    def _reduced(self, weights: RoundedWeights | None, steps: _Steps) -> Tensor | None:
        """Average all gradients over the processes; returns those of the steps."""
        of_steps = steps.grad() if steps.parameters else None
        if get_world_size() > 1:
            parts = [*([weights.grad] if weights is not None else []), *([of_steps] if steps.parameters else [])]
            flat = torch.cat(parts)
            all_reduce(flat, 'mean')
            for part, averaged in zip(parts, flat.split([len(part) for part in parts])):
                part.copy_(averaged)
        return of_steps


def _mixed(quantized: Any, floating: Any, drops: _Drops) -> Any:
    if not isinstance(quantized, Tensor) or not quantized.is_floating_point():
        return quantized
    return torch.where(drops.like(quantized), floating, quantized)
