"""Running a function of tensors through torch's compiler, Inductor, once for all shapes.

Eager, each operation of a formula walks through memory by itself; compiled, there is one walk over it. What is slow is
compiling, so a function is compiled once per number of dimensions and types, on an example made here.

``torch.compile`` would do the same, with checks (guards) before each call, which compile again for each of autocast,
inference mode, views of other tensors, and so on, on none of which the functions depend, and with layers of Python that
take 20 microseconds a call, and several times that where a network's layers have emptied the caches. So the graph is
made, and handed to Inductor, here. In exchange, callers see to it that shapes relate to each other as those of the
example do, and that gradient mode is off.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .layout import is_plain

EAGER_VARIABLE = 'MMRAZOR_QUANT_EAGER'
"""Environment variable: 1 keeps everything in eager."""

MAX_NUMEL = 2**31 - 1
"""Larger tensors would need other code, with 64-bit indices."""

_DEVICES = ('cpu', 'cuda')

Shapes = tuple[tuple[int, ...], ...]


class _Switch:
    """Whether compiled code may be used now.

    Attributes:
        on: Whether at all.
        patience: A function is compiled once it has done this much work in eager: elements times operations. At less
            than a nanosecond each that is around a second, which is what compiling takes at the very least.
        done: The work done in eager, by name of the function. Sums are not the same to the last bit in eager and
            compiled: a process that goes on where another one stopped has to be given what that one had done.
    """

    def __init__(self) -> None:
        self.on = os.environ.get(EAGER_VARIABLE, '0').lower() in ('', '0', 'false', 'off')
        self.patience = 2**30
        self.done: dict[str, int] = {}

    def is_due(self, function: Callable, work: int) -> bool:
        """Note some work for a function; tell whether compiling it has become worthwhile."""
        name = f'{function.__module__}.{function.__qualname__}'
        done = self.done.get(name, 0)
        if done >= self.patience:
            return True
        self.done[name] = done + work
        return False


switch = _Switch()


def usable(x: Tensor, min_numel: int) -> bool:
    """Tell whether a tensor may go to compiled code.

    Args:
        x: The main argument.
        min_numel: Fewer elements are quicker in eager.

    Returns:
        False for few elements, for tensors that stand for others (subclasses, fake tensors, meta device), while the
        caller itself is being traced or compiled, and where eager was asked for.
    """
    return switch.on and min_numel <= x.numel() <= MAX_NUMEL and x.device.type in _DEVICES and is_plain(x)


def run(function: Callable[..., Any], shapes: Shapes, work: int, *tensors: Tensor) -> Any:
    """Call the compiled version of a function once that has become worthwhile. Gradient mode has to be off.

    Args:
        function: See :func:`call`.
        shapes: See :func:`call`.
        work: What this call costs in eager: elements times operations.
        *tensors: The arguments.

    Returns:
        Its result; None if there is no compiled code, not on this machine or not yet: to be done in eager.
    """
    return call(function, shapes, *tensors) if switch.is_due(function, work) else None


def call(function: Callable[..., Any], shapes: Shapes, *tensors: Tensor) -> Any:
    """Call the compiled version of a function, which is compiled now if need be. Gradient mode has to be off.

    Args:
        function: Function of tensors that lives on, without control flow that depends on their sizes.
        shapes: Example shape of each tensor. Equal numbers in it say that sizes are always equal, 1 that a size is
            always 1, and any other number that it varies; the compiler takes it for a typical size.
        *tensors: The arguments.

    Returns:
        Its result; None if compiling does not work on this machine.
    """
    try:
        kinds = tuple([(t.dtype, t.device.type) for t in tensors])
        return _compile(function, shapes, kinds, torch.get_num_threads())(*tensors)
    except Exception as error:
        return _give_up(error)


@functools.cache
def _compile(function: Callable[..., Any], shapes: Shapes, kinds: tuple, threads: int) -> Callable[..., Any]:
    """Compile a function for types and devices; the number of threads is part of the code."""
    # Imported when needed, since it takes a second; not being there is a reason to go on in eager.
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    outputs = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = function(*tensors)
        outputs.append(isinstance(result, tuple))
        return result if outputs[-1] else (result,)

    with torch.inference_mode(False), torch.no_grad():
        examples = [torch.ones(s, dtype=dtype, device=device) for s, (dtype, device) in zip(shapes, kinds)]
        pure = torch.func.functionalize(flat, remove='mutations_and_views')
        graph = make_fx(pure, decomposition_table=select_decomp_table(), tracing_mode='symbolic')(*examples)
        inputs = [node.meta['val'] for node in graph.graph.nodes if node.op == 'placeholder']
        call = compile_fx_inner(graph, inputs).current_callable
    return (lambda *tensors: tuple(call(list(tensors)))) if outputs[-1] else (lambda *tensors: call(list(tensors))[0])


def _give_up(error: Exception) -> None:
    """Go on in eager from now on, and say so."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    switch.on = False
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    print_log(
        f'torch.compile does not work here ({type(error).__name__}: {first_line}), usually for want of a C++ compiler. '
        f'Fake quantization goes on in eager, several times slower. {EAGER_VARIABLE}=1 silences this message.',
        logger='current',
        level=logging.WARNING,
    )
