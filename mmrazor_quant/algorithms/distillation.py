"""A loss that keeps a quantized model near the float one it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

NAME = 'loss_distill'
"""Name of the loss."""


def divergence(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student's classes from the teacher's (Hinton et al. 2015, section 2).

    Args:
        found: Logits of the student, classes in dimension 1.
        wanted: Those of the teacher, the same shape.
        temperature: What both are divided by; the result is multiplied by its square.

    Returns:
        The mean over all but the classes.
    """
    logs = (F.log_softmax(x.float() / temperature, dim=1) for x in (found, wanted))
    return F.kl_div(*logs, reduction='none', log_target=True).sum(1).mean() * temperature**2


def squared_error(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean squared difference, for outputs that are no classes.

    Args:
        found: Output of the student, any shape.
        wanted: That of the teacher, the same shape.
        temperature: Without meaning.

    Returns:
        The mean over all values.
    """
    return F.mse_loss(found.float(), wanted.float())


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {'kl': divergence, 'mse': squared_error}


class Distillation:
    """The float model as a teacher of its quantized copy.

    In training both run on the same batch, the float one in eval mode and without gradients, and a loss compares what
    one module of each gives. It is added to those of the model (Esser et al. 2020, section 3.5, for LSQ).

    Args:
        teacher: Float model; becomes a copy of its own, which no state dict and no optimizer knows of.
        module: Path of the module whose outputs are compared, such as ``'head'``: one that the model calls in mode
            ``loss``. Of nested outputs all floating-point tensors are compared, and the losses added up.
        loss: ``'kl'`` for logits with classes in dimension 1, ``'mse'`` for anything else.
        weight: Factor of the loss.
        temperature: Of ``'kl'``.

    Raises:
        ValueError: A module that there is not, an unknown loss, or a factor that is not positive.
    """

    def __init__(
        self, teacher: nn.Module, module: str, loss: str = 'kl', weight: float = 1.0, temperature: float = 1.0
    ) -> None:
        field = 'model.distillation'
        if not isinstance(module, str) or module not in dict(teacher.named_modules()):
            known = ', '.join(name for name, _ in teacher.named_children())
            raise ValueError(f'{field}.module: got {module!r}, allowed: modules of the architecture, such as {known}')
        if loss not in LOSSES:
            raise ValueError(f'{field}.loss: got {loss!r}, allowed: {", ".join(map(repr, LOSSES))}')
        for name, value in dict(weight=weight, temperature=temperature).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f'{field}.{name}: got {value!r}, allowed: numbers above 0')
        self.module, self.loss, self.weight, self.temperature = module, LOSSES[loss], weight, temperature
        self._teacher = copy.deepcopy(teacher).requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        # A copy of the model, as for an average of its weights, has the same teacher.
        return self

    def losses(self, student: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Run both models; returns the losses of the student, that of the distillation among them.

        Args:
            student: The quantized model, in training.
            inputs: Images.
            *args: Further arguments of both forwards, which ask for mode ``loss``.
            **kwargs: The same by name.

        Raises:
            ValueError: The module is not called, or its outputs differ in number or shape.
        """
        # Some models write into their samples.
        copies = copy.deepcopy((args, kwargs))
        with _outputs(student, self.module) as found:
            losses = dict(student(inputs, *args, **kwargs))
        teacher = self._teacher.to(next(student.parameters()).device).eval()
        with _outputs(teacher, self.module) as wanted, torch.no_grad():
            teacher(inputs, *copies[0], **copies[1])
        shapes = [[x.shape for x in each] for each in (found, wanted)]
        if not found or shapes[0] != shapes[1]:
            raise ValueError(
                f'model.distillation.module: got {self.module!r}, whose outputs in mode loss are {shapes[0]} and, in '
                f'the float model, {shapes[1]}; allowed: modules that the model calls, with outputs of equal shapes'
            )
        pairs = zip(found, wanted, strict=True)
        losses[NAME] = self.weight * sum(self.loss(one, other, self.temperature) for one, other in pairs)
        return losses


@contextmanager
def _outputs(model: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """Collects the floating-point tensors that a module gives."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        leaves = pytree.tree_leaves(output)
        found.extend(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())

    handle = model.get_submodule(path).register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
