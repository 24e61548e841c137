"""Finding the islands of a model: the largest submodules whose forward can be captured and verified."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from mmengine.model import BaseModel
from torch import fx, nn

from .errors import CaptureError, UnrecordedValueError
from .island import Capture, Island, Signature, Variant, sizes_of
from .nodes import EXTRAS
from .state import preserved, seeded
from .tracer import LEAF_TYPES, CustomTracer

LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
"""Modules with weights that can be quantized."""


@dataclass(frozen=True)
class Call:
    """One recorded call of a module.

    Args:
        args: detached copies of the positional arguments.
        kwargs: detached copies of the keyword arguments.
        example: which example it belongs to; 0 is the one captured, the others are for verification.
    """

    args: tuple
    kwargs: dict[str, Any]
    example: int


@dataclass
class Findings:
    """What the search found.

    Args:
        islands: the islands by module path.
        failures: why a module is not an island, by path.
        called: paths of the layers that the examples ran, in the order of their first call.
    """

    islands: dict[str, Island] = field(default_factory=dict)
    failures: dict[str, CaptureError] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)


def find_islands(model: nn.Module, examples: list[Callable[[], None]], tracer: CustomTracer) -> Findings:
    """Captures and verifies, from the top of the model downwards; nothing is installed yet.

    Args:
        model: the float model. Its buffers, parameters, training flags and the random state are left as they are.
        examples: functions that run the model, in train and eval, on an example; the first is captured, the others
            (another batch and image size) only verify.
        tracer: the tracer to capture with.

    Returns:
        The islands, and the reason for every module that was tried and is not one.
    """
    findings = Findings()
    frontier = [name for name, _ in model.named_children()]
    if type(model).forward is not nn.Module.forward and _is_plain_module(model):
        frontier = ['']
    while frontier:
        layers = {n for n, m in model.named_modules() if isinstance(m, LAYER_TYPES)} if not findings.called else set()
        calls, ran = _record(model, [*frontier], layers, examples)
        findings.called += ran
        following: list[str] = []
        for path in frontier:
            module = model.get_submodule(path)
            if has_layers(module) and not _capture_into(findings, model, path, calls[path], tracer):
                following += [f'{path}.{name}' if path else name for name, _ in module.named_children()]
        frontier = following
    return findings


def has_layers(module: nn.Module) -> bool:
    """Tells whether a module is, or contains, a layer with weights to quantize."""
    return any(isinstance(m, LAYER_TYPES) for m in module.modules())


def _is_plain_module(model: nn.Module) -> bool:
    """A module without OpenMMLab's loss and predict modes may be one island as a whole."""
    return not isinstance(model, BaseModel) and not hasattr(model, 'predict')


def _capture_into(findings: Findings, model: nn.Module, path: str, calls: list[Call], tracer: CustomTracer) -> bool:
    module = model.get_submodule(path)
    if not calls:
        findings.failures[path] = CaptureError('its forward is not called')
        return False
    try:
        findings.islands[path] = capture_island(model, path, calls, tracer)
    except CaptureError as error:
        findings.failures[path] = error
    if path in findings.islands:
        return True
    module._modules.pop(EXTRAS, None)
    return False


def _record(
    model: nn.Module, paths: list[str], layers: set[str], examples: list[Callable[[], None]]
) -> tuple[dict[str, list[Call]], list[str]]:
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    ran: dict[str, None] = {}
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        current = [0]
        for path in paths:
            hook = model.get_submodule(path).register_forward_pre_hook(
                _recorder(calls[path], current), with_kwargs=True
            )
            stack.callback(hook.remove)
        for path in layers:
            hook = model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: ran.setdefault(path)
            )
            stack.callback(hook.remove)
        for index, example in enumerate(examples):
            current[0] = index
            with torch.no_grad():
                example()
    return calls, list(ran)


def _recorder(calls: list[Call], current: list[int]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        signature = Signature.of(args, kwargs)
        if not any(c.example == current[0] and _matches(Signature.of(c.args, c.kwargs), signature) for c in calls):
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
            calls.append(Call(args, kwargs, current[0]))

    return hook


def _matches(a: Signature, b: Signature) -> bool:
    return a.spec == b.spec and a.inputs == b.inputs and _equal_constants(a, b)


def _equal_constants(a: Signature, b: Signature) -> bool:
    try:
        return a.constants == b.constants
    except RuntimeError:  # objects whose comparison is not a bool
        return False


def capture_island(model: nn.Module, path: str, calls: list[Call], tracer: CustomTracer) -> Island:
    """Captures one module under both training flags and verifies it on every recorded call.

    Args:
        model: the whole model (its ``train`` decides the training flags of the module's children).
        path: path of the module.
        calls: recorded calls of the module.
        tracer: the tracer to capture with.

    Returns:
        The island, not installed.

    Raises:
        CaptureError: the module cannot be captured, or what was captured differs from the module.
    """
    module = model.get_submodule(path)
    variants = []
    for call in (c for c in calls if c.example == 0):
        others = [c for c in calls if c.example != 0]
        signature = Signature.of(call.args, call.kwargs, _dynamic_positions(call, others))
        variant = Variant(signature, {})
        checks = [call, *(c for c in others if _accepts(signature, c))]
        for training in (False, True):
            with preserved(model):
                model.train(training)
                for check in checks:
                    _capture_and_verify(module, variant, check, tracer)
        _share(variant)
        variants.append(variant)
    if not variants:
        raise CaptureError('it is not called on the first example')
    resized = any(c.example != 0 for c in calls) or None
    return Island(path, variants, resized, functools.partial(capture_graph, tracer))


def _capture_and_verify(module: nn.Module, variant: Variant, call: Call, tracer: CustomTracer) -> None:
    """Sees to it that a variant has a graph for a call, under the module's present flag, that equals the module."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    inputs = [leaves[i] for i in variant.signature.inputs]
    capture = variant.find(module, inputs)
    if capture is not None and _difference(module, capture, variant.signature.inputs, call) is None:
        return
    if capture is not None:
        # Made for other sizes, it is wrong for these without a guard to say so.
        capture.exact, capture.sizes = True, capture.sizes - {sizes_of(inputs)}
    args, kwargs = _copied(call)
    graph = capture_graph(tracer, module, args, kwargs, variant.signature.dynamic)
    capture = Capture(graph, {sizes_of(inputs)}, exact=capture is not None)
    variant.captures.setdefault(module.training, []).append(capture)
    difference = _difference(module, capture, variant.signature.inputs, call)
    if difference is not None:
        raise CaptureError(difference)


def _share(variant: Variant) -> None:
    """Makes both training flags use one capture where they have the same code."""
    for capture in variant.captures.get(False, []):
        for i, other in enumerate(variant.captures.get(True, [])):
            if _code(capture.graph) == _code(other.graph):
                capture.sizes |= other.sizes
                variant.captures[True][i] = capture


def capture_graph(
    tracer: CustomTracer, module: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic: frozenset[int]
) -> fx.Graph:
    """Captures one call; a submodule that makes tensors no torch function shows (a custom op) stays one opaque call.

    Args:
        tracer: the tracer to capture with.
        module: module in the training mode to capture.
        args: positional arguments; not changed.
        kwargs: keyword arguments; not changed.
        dynamic: positions of numbers that vary between calls.

    Returns:
        The graph.

    Raises:
        CaptureError: the call cannot be captured.
    """
    opaque: frozenset[str] = frozenset()
    while True:
        copies = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
        try:
            with preserved(module):
                return tracer.capture(module, *copies, dynamic, opaque)
        except UnrecordedValueError as error:
            if not error.scope or error.scope in opaque:
                raise
            opaque = opaque | {error.scope}
        except CaptureError:
            raise
        except Exception as error:  # whatever the module's own code raises on traced values
            raise CaptureError(f'{type(error).__name__}: {error}') from error


def _copied(call: Call) -> tuple[tuple, dict[str, Any]]:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, (call.args, call.kwargs))


def _difference(module: nn.Module, capture: Capture, inputs: tuple[int, ...], call: Call) -> str | None:
    """Returns how a captured forward differs from the module's own on a call, in outputs or buffers; None if not."""

    def eager() -> Any:
        args, kwargs = _copied(call)
        return type(module).forward(module, *args, **kwargs)

    def captured() -> Any:
        leaves = pytree.tree_leaves(_copied(call))
        return capture.function(module, *[leaves[i] for i in inputs])

    expected, expected_buffers, assigned = _run(module, eager)
    if assigned:
        return f'its forward assigns attributes, which a graph cannot: {", ".join(assigned)}'
    try:
        found, buffers, _ = _run(module, captured)
    except Exception as error:  # a graph that does not run is as wrong as one that differs
        return f'the captured forward fails: {type(error).__name__}: {error}'
    if not equal(expected, found):
        return "the captured forward's output differs from that of the module's own"
    if not equal(expected_buffers, buffers):
        return "the captured forward does not update the module's buffers as its own does"
    return None


def _run(module: nn.Module, function: Callable) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """Returns output and buffers after a run, and the attributes that it assigned."""
    with torch.no_grad(), preserved(module) as state, seeded():
        output = function()
        return output, {name: buffer.clone() for name, buffer in module.named_buffers()}, state.assigned()


def equal(a: Any, b: Any) -> bool:
    """Tells whether two nested outputs are equal bit for bit (NaN equals NaN)."""
    a_leaves, a_spec = pytree.tree_flatten(a)
    b_leaves, b_spec = pytree.tree_flatten(b)
    return a_spec == b_spec and all(map(_equal_leaf, a_leaves, b_leaves))


def _equal_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return a is b or bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b) or ((a == b) | (a.isnan() & b.isnan())).all())


def _dynamic_positions(call: Call, others: list[Call]) -> frozenset[int]:
    """Positions of numbers that change with the input size: inputs of the graph instead of constants."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    found: set[int] = set()
    for other in others:
        other_leaves, other_spec = pytree.tree_flatten((other.args, other.kwargs))
        if other_spec == spec:
            found |= {
                i
                for i, (a, b) in enumerate(zip(leaves, other_leaves))
                if type(a) in (int, float) and type(a) is type(b) and a != b
            }
    return frozenset(found)


def _accepts(signature: Signature, call: Call) -> bool:
    return signature.accepts(*pytree.tree_flatten((call.args, call.kwargs)))


def _code(graph: fx.Graph) -> str:
    return graph.python_code('self').src


def layer_paths(model: nn.Module) -> list[str]:
    """Returns the paths of all layers with weights to quantize."""
    inner = {f'{n}.' for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    layers = (n for n, m in model.named_modules() if isinstance(m, LAYER_TYPES))
    return [n for n in layers if not any(n.startswith(prefix) for prefix in inner)]


__all__ = [
    'LAYER_TYPES',
    'LEAF_TYPES',
    'Call',
    'Findings',
    'capture_island',
    'equal',
    'find_islands',
    'has_layers',
    'layer_paths',
]
