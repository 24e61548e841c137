"""Finding the islands of a model: the largest submodules whose forward can be captured and verified."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from mmengine.model import BaseModel
from torch import fx, nn

from .code import code_of
from .errors import CaptureError, UnrecordedValueError
from .island import Capture, Island, Signature, Variant, sizes_of
from .nodes import EXTRAS
from .recorder import Call, Example, Recording, record
from .state import preserved, seeded
from .tracer import LEAF_TYPES, CustomTracer

LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
"""Modules with weights that can be quantized."""


@dataclass
class Findings:
    """What the search found.

    Args:
        islands: the islands by module path.
        failures: why a module is not an island, by path.
        called: paths of the layers that the examples ran, in the order of their first call.
        training_only: paths of the modules that ran in training and never in eval.
    """

    islands: dict[str, Island] = field(default_factory=dict)
    failures: dict[str, CaptureError] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    training_only: list[str] = field(default_factory=list)


def find_islands(model: nn.Module, examples: list[Example], tracer: CustomTracer) -> Findings:
    """Captures and verifies, from the top of the model downwards; nothing is installed yet.

    A submodule that is also called from outside of the island it belongs to (branches of a head that a decoder calls)
    becomes an island of its own, which the other one's graph calls. Modules that run in training only (auxiliary
    heads, teachers) are not looked into: nothing of them is deployed.

    Args:
        model: the float model. Its buffers, parameters, training flags and the random state are left as they are.
        examples: functions that run the model, in train and eval, on an example; the first is captured, the others
            (another batch and image size) only verify. One that returns False could not run the model to the end.
        tracer: the tracer to capture with.

    Returns:
        The islands, and the reason for every module that was tried and is not one.
    """
    findings = Findings()
    frontier = [name for name, _ in model.named_children()]
    if type(model).forward is not nn.Module.forward and _is_plain_module(model):
        frontier = ['']
    while frontier:
        recording = record(model, frontier, examples, LAYER_TYPES)
        findings.called = findings.called or recording.layers
        frontier = [f'{path}.{name}'.lstrip('.') for path in frontier
                    for name in _look_into(findings, model, path, recording, tracer)]  # fmt: skip
    return findings


def _look_into(
    findings: Findings, model: nn.Module, path: str, recording: Recording, tracer: CustomTracer
) -> list[str]:
    """Captures one candidate; returns the paths, below it, of what is to be tried next."""
    module = model.get_submodule(path)
    if not has_layers(module):
        return []
    if recording.is_of_training_only(path):
        findings.training_only.append(path)
        return []
    entries = [entry[len(path) :].lstrip('.') for entry in recording.entries[path]]
    if _capture_into(findings, model, path, recording.calls[path], tracer, frozenset(entries)):
        return entries
    return [name for name, _ in module.named_children()]


def has_layers(module: nn.Module) -> bool:
    """Tells whether a module is, or contains, a layer with weights to quantize."""
    return any(isinstance(m, LAYER_TYPES) for m in module.modules())


def _is_plain_module(model: nn.Module) -> bool:
    """A module without OpenMMLab's loss and predict modes may be one island as a whole."""
    return not isinstance(model, BaseModel) and not hasattr(model, 'predict')


def _capture_into(
    findings: Findings, model: nn.Module, path: str, calls: list[Call], tracer: CustomTracer, entries: frozenset[str]
) -> bool:
    module = model.get_submodule(path)
    try:
        findings.islands[path] = capture_island(model, path, calls, tracer, entries)
    except CaptureError as error:
        findings.failures[path] = error
        module._modules.pop(EXTRAS, None)
        return False
    return True


def capture_island(
    model: nn.Module, path: str, calls: list[Call], tracer: CustomTracer, entries: frozenset[str] = frozenset()
) -> Island:
    """Captures one module under both training flags and verifies it on every recorded call.

    Args:
        model: the whole model (its ``train`` decides the training flags of the module's children).
        path: path of the module.
        calls: recorded calls of the module.
        tracer: the tracer to capture with.
        entries: paths, below the module, of submodules that are called from outside of it too; the graphs call them.

    Returns:
        The island, not installed.

    Raises:
        CaptureError: the module cannot be captured, or what was captured differs from the module.
    """
    module = model.get_submodule(path)
    _check_called(module, calls, entries)
    variants: list[Variant] = []
    for call in (c for c in calls if c.example == 0):
        if any(_accepts(variant.signature, call) for variant in variants):
            continue
        others = [c for c in calls if c.example != 0]
        signature = Signature.of(call.args, call.kwargs, _dynamic_positions(call, others))
        variant = Variant(signature, {})
        checks = [call, *(c for c in calls if c is not call and _accepts(signature, c))]
        for training in (False, True):
            with preserved(model):
                model.train(training)
                for check in checks:
                    # What was read of data samples meanwhile may differ in this one.
                    if _accepts(signature, check):
                        _capture_and_verify(module, variant, check, tracer, entries)
        _share(variant)
        variants.append(variant)
    resized = any(c.example != 0 for c in calls) or None
    return Island(path, variants, resized, functools.partial(capture_graph, tracer, entries=entries), entries=entries)


def _check_called(module: nn.Module, calls: list[Call], entries: frozenset[str]) -> None:
    if not calls:
        raise CaptureError('its forward is not called')
    if not any(call.example == 0 for call in calls):
        raise CaptureError('it is not called on the first example')
    layers = layer_paths(module)
    if all(any(f'{layer}.'.startswith(f'{entry}.') for entry in entries) for layer in layers):
        raise CaptureError('all its layers are called from outside of its forward')


def _capture_and_verify(
    module: nn.Module, variant: Variant, call: Call, tracer: CustomTracer, entries: frozenset[str]
) -> None:
    """Sees to it that a variant has a graph for a call, under the module's present flag, that equals the module."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    inputs = [leaves[i] for i in variant.signature.inputs]
    capture = variant.find(module, inputs)
    if capture is not None and _difference(module, capture, variant.signature.inputs, call) is None:
        return
    if capture is not None:
        # Made for other sizes, it is wrong for these without a guard to say so.
        capture.exact, capture.sizes = True, capture.sizes - {sizes_of(inputs)}
    args, kwargs = variant.signature.watched(*_copied(call))
    graph = capture_graph(tracer, module, args, kwargs, variant.signature.dynamic, entries)
    capture = Capture(graph, {sizes_of(inputs)}, any(c.exact for c in variant.unique()))
    variant.captures.setdefault(module.training, []).append(capture)
    difference = _difference(module, capture, variant.signature.inputs, call)
    if difference is not None:
        raise CaptureError(difference)


def _share(variant: Variant) -> None:
    """Makes both training flags use one capture where they have the same code."""
    for capture in variant.captures.get(False, []):
        for i, other in enumerate(variant.captures.get(True, [])):
            if code_of(capture.graph) == code_of(other.graph):
                capture.sizes |= other.sizes
                variant.captures[True][i] = capture


def capture_graph(
    tracer: CustomTracer,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    dynamic: frozenset[int],
    entries: frozenset[str] = frozenset(),
) -> fx.Graph:
    """Captures one call; a submodule that makes tensors no torch function shows (a custom op) stays one opaque call.

    Args:
        tracer: the tracer to capture with.
        module: module in the training mode to capture.
        args: positional arguments; not changed.
        kwargs: keyword arguments; not changed.
        dynamic: positions of numbers that vary between calls.
        entries: paths of submodules that are called, not looked into.

    Returns:
        The graph.

    Raises:
        CaptureError: the call cannot be captured.
    """
    opaque = entries
    while True:
        copies = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
        try:
            with preserved(module):
                # A copy: an island that this graph calls may have to capture a new size on the way.
                used = copy.copy(tracer)
                graph = used.capture(module, *copies, dynamic, opaque)
            _check_written_out(module, graph, Call(args, kwargs, 0), dynamic, used.written_out)
            return graph
        except UnrecordedValueError as error:
            if not error.scope or error.scope in opaque:
                raise
            opaque = opaque | {error.scope}
        except CaptureError:
            raise
        except Exception as error:  # whatever the module's own code raises on traced values
            raise CaptureError(f'{type(error).__name__}: {error}') from error


def _check_written_out(
    module: nn.Module, graph: fx.Graph, call: Call, dynamic: frozenset[int], scopes: list[str]
) -> None:
    """Runs a graph on other values, where it has numbers of unknown origin: constants go on being right there."""
    if not scopes:
        return
    values = pytree.tree_map_only(
        torch.Tensor, lambda t: t * 1.25 + 0.125 if t.is_floating_point() else t, (call.args, call.kwargs)
    )
    other = Call(*values, 0)
    inputs = Signature.of(other.args, other.kwargs, dynamic).inputs
    difference = _difference(module, Capture(graph), inputs, other)
    if difference is not None:
        raise UnrecordedValueError(
            f'a number that no recorded operation produced is used in {scopes[0]!r}: {difference}', scopes[0]
        )


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
