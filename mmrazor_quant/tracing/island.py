"""An island: one module instance whose forward runs a captured graph over its own submodules."""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from mmengine.structures import BaseDataElement
from torch import fx, nn

from .code import code_of, compile_graph
from .errors import CaptureError
from .nodes import has_guards, without_guards
from .untraced import UntracedCall
from .watched import Watched

_ISLAND = '_captured_island'

MAX_PREPARED, MAX_LATER = 8, 64
"""How many graphs of one kind of call are kept: of the first, and of those captured last."""

ENOUGH_SIZES, ENOUGH_GROWTH = 3, 1.5
"""At how many sizes a graph has to come out the same before it is taken to hold for others, in a call not foreseen;
and by how much a dimension has to have grown among these to be taken for free."""

MAX_SIZES = 4096
"""How many input sizes are remembered that a graph does not hold for."""

Recapture = Callable[[nn.Module, tuple, 'dict[str, Any]', 'frozenset[int]'], fx.Graph]
"""``recapture(module, args, kwargs, dynamic)``: the graph for a call, in the module's present training mode."""

Lower = Callable[[fx.Graph], fx.Graph]
"""Makes of a graph the one to run; changes nothing of what is computed."""


@dataclass(frozen=True)
class Signature:
    """How a module is called: the nesting of its arguments and the constants among them.

    Args:
        spec: nesting of ``(args, kwargs)``.
        constants: flattened non-tensor arguments by position, without the dynamic ones; for data samples, what is
            read of them.
        inputs: positions of the tensors and of the numbers that vary between calls (dynamic), in order.
        dynamic: positions of those numbers.
    """

    spec: pytree.TreeSpec
    constants: tuple[tuple[int, Any], ...]
    inputs: tuple[int, ...]
    dynamic: frozenset[int] = frozenset()

    @staticmethod
    def of(args: tuple, kwargs: dict[str, Any], dynamic: frozenset[int] = frozenset()) -> Signature:
        """Returns the signature of a call."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = tuple(i for i, leaf in enumerate(leaves) if i in dynamic or isinstance(leaf, torch.Tensor))
        constants = tuple((i, _constant(leaf)) for i, leaf in enumerate(leaves) if i not in inputs)
        return Signature(spec, constants, inputs, dynamic)

    def watched(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments of a call with stand-ins for data samples, which note what is read of them."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for position, value in self.constants:
            if isinstance(value, Watched):
                leaves[position] = value.stand_in(leaves[position])
        return pytree.tree_unflatten(leaves, spec)

    def note(self, other: Signature) -> None:
        """Adds what was read of data samples in a call of this kind."""
        for (_, own), (_, value) in zip(self.constants, other.constants, strict=True):
            if isinstance(own, Watched):
                own.reads.update(value.reads)

    def copied(self, memo: dict[int, Any]) -> Signature:
        """Returns the signature for a copy of the model: modules among the constants are those of the copy."""
        constants = tuple((i, _copied_constant(value, memo)) for i, value in self.constants)
        return dataclasses.replace(self, constants=constants)

    def accepts(self, leaves: list[Any], spec: pytree.TreeSpec) -> bool:
        """Tells whether flattened arguments fit."""
        if spec != self.spec or not all(_same(leaves[i], value) for i, value in self.constants):
            return False
        # An optional tensor that is not given is a constant of another signature.
        return all(i in self.dynamic or isinstance(leaves[i], torch.Tensor) for i in self.inputs)


@dataclass
class Capture:
    """One graph, and the input sizes that it is known to hold for.

    Args:
        graph: the graph.
        sizes: what :func:`sizes_of` says of the call that was captured, and of others that passed the guards.
        exact: whether it holds for ``sizes`` only: Python code used a size in a way that no guard shows.
        lower: makes the graph that is run; None: it is the graph itself.
        others: sizes that did not pass the guards.
        confirmed: of a call that was not foreseen: sizes at which its graph came out as this one. It holds for others
            as far as these tell.
    """

    graph: fx.Graph
    sizes: set[tuple] = field(default_factory=set)
    exact: bool = False
    lower: Lower | None = None
    others: set[tuple] = field(default_factory=set)
    confirmed: set[tuple] | None = None
    function: Callable | None = None
    guarded: bool = False
    _bare: Callable | None = None

    def __post_init__(self) -> None:
        self.compile()

    def compile(self) -> None:
        """Generates the function that runs the graph."""
        self.function = compile_graph(self._lowered())
        self.guarded, self._bare = has_guards(self.graph), None

    def _lowered(self) -> fx.Graph:
        return self.graph if self.lower is None else self.lower(self.graph)

    def bare_function(self) -> Callable:
        """Returns a function that runs the graph without looking at sizes again."""
        if self._bare is None:
            self._bare = compile_graph(without_guards(self._lowered())) if self.guarded else self.function
        return self._bare

    @property
    def is_general(self) -> bool:
        """Whether the graph holds for all sizes."""
        return not (self.guarded or self.exact or self.confirmed)

    def holds_for(self, module: nn.Module, inputs: list[Any], sizes: tuple) -> bool:
        """Tells whether the graph holds for inputs of sizes not seen before, by running it without data if need be."""
        if self.exact or sizes in self.others or not (self.confirmed is None or _follows(self.confirmed, sizes)):
            return False
        holds = not self.guarded or _passes_guards(self.function, module, inputs)
        if not holds and len(self.others) >= MAX_SIZES:
            self.others.clear()
        (self.sizes if holds else self.others).add(sizes)
        return holds


@dataclass
class Variant:
    """The captures for one signature, by training flag; both flags share what is the same."""

    signature: Signature
    captures: dict[bool, list[Capture]]

    def find(self, module: nn.Module, inputs: list[Any]) -> Capture | None:
        """Returns the capture that holds for the inputs, if there is one."""
        captures = self.captures.get(module.training, ())
        general = next((capture for capture in captures if capture.is_general), None)
        if general is not None or not captures:
            return general
        sizes = sizes_of(inputs)
        known = next((capture for capture in captures if sizes in capture.sizes), None)
        if known is not None:
            return known
        return next((capture for capture in captures if capture.holds_for(module, inputs, sizes)), None)

    def add(self, training: bool, graph: fx.Graph, sizes: tuple, lower: Lower | None) -> Capture:
        """Adds a graph for sizes that none was held to hold for.

        Args:
            training: flag that it was captured under.
            graph: the graph.
            sizes: of the call.
            lower: makes the graph that is run.

        Returns:
            What holds for the call: one of before, where the graph is its graph.
        """
        captures = self.captures.setdefault(training, [])
        twin = next((c for c in captures if c.confirmed and code_of(c.graph) == code_of(graph)), None)
        if twin is not None:
            twin.sizes.add(sizes)
            twin.confirmed.add(sizes)
            return twin
        # Of the same kind, but with another graph: a size is a constant of it, or guards tell them apart.
        for other in captures:
            other.exact, other.confirmed = other.exact or bool(other.confirmed), None
        is_first = not captures
        exact = not is_first and any(c.exact for c in self.unique())
        capture = Capture(graph, {sizes}, exact, lower, confirmed={sizes} if is_first else None)
        captures.append(capture)
        # The first ones are those the model was prepared with.
        del captures[MAX_PREPARED:-MAX_LATER]
        return capture

    def unique(self) -> list[Capture]:
        """Returns the captures, each once."""
        return list({id(c): c for captures in self.captures.values() for c in captures}.values())


@dataclass
class Island:
    """What was captured of one module.

    Args:
        path: name of the module in the model.
        variants: one for every way the module is called.
        resized: whether equality was also seen at a second input size (None: the model takes one size only).
        recapture: makes the graph for a call that no capture holds for.
        lower: makes of each graph the one to run; None: the graph itself.
        entries: paths, below the module, of islands of their own that the graphs call.
    """

    path: str
    variants: list[Variant]
    resized: bool | None = None
    recapture: Recapture | None = None
    lower: Lower | None = None
    entries: frozenset[str] = frozenset()
    _warned: bool = False
    _refused: set[tuple] = field(default_factory=set)
    _prepared: int = 0

    def __post_init__(self) -> None:
        self._prepared = len(self.variants)

    def install(self, module: nn.Module) -> None:
        """Replaces the forward of this one instance; class, parameters, buffers and children stay."""
        vars(module)[_ISLAND] = self
        vars(module)['forward'] = types.MethodType(_island_forward, module)

    @staticmethod
    def of(module: nn.Module) -> Island | None:
        """Returns the island installed on a module, if any."""
        return vars(module).get(_ISLAND)

    @staticmethod
    def uninstall(module: nn.Module) -> None:
        """Gives the module its own forward back."""
        vars(module).pop(_ISLAND, None)
        vars(module).pop('forward', None)

    def graphs(self) -> Iterator[fx.Graph]:
        """Yields every graph of the island once."""
        for variant in self.variants:
            yield from (capture.graph for capture in variant.unique())

    def __deepcopy__(self, memo: dict[int, Any]) -> Island:
        # Graphs name submodules by path and are replaced, never edited, once compiled: copies of a model share them.
        variants = []
        for variant in self.variants:
            copies = {
                id(c): Capture(c.graph, set(c.sizes), c.exact, c.lower, set(c.others), c.confirmed and set(c.confirmed))
                for c in variant.unique()
            }
            captures = {flag: [copies[id(c)] for c in cs] for flag, cs in variant.captures.items()}
            variants.append(Variant(variant.signature.copied(memo), captures))
        twin = Island(self.path, variants, self.resized, self.recapture, self.lower, self.entries)
        twin._prepared = self._prepared
        return twin

    def map_graphs(self, transform: Callable[[fx.Graph], fx.Graph], lower: Lower | None = None) -> None:
        """Replaces every graph.

        Args:
            transform: makes the new graph; must leave its argument as it is.
            lower: makes of the new graphs, and of those captured later, the ones to run; None: nothing.
        """
        self.lower = lower
        for variant in self.variants:
            for capture in variant.unique():
                capture.graph, capture.lower = transform(capture.graph), lower
                capture.compile()

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the captured graph for a call; for one of a new kind or size it captures a graph first."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        variant = next((v for v in self.variants if v.signature.accepts(leaves, spec)), None)
        signature = Signature.of(args, kwargs) if variant is None else variant.signature
        inputs = [leaves[i] for i in signature.inputs]
        capture = None if variant is None else variant.find(module, inputs)
        if capture is None:
            capture = self._capture(module, args, kwargs, signature, variant)
        if capture is None:
            return type(module).forward(module, *args, **kwargs)
        # While TorchScript traces, as for ONNX, sizes are tensors, which guards cannot compare.
        function = capture.bare_function() if torch.jit.is_tracing() else capture.function
        return function(module, *inputs)

    def _capture(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], signature: Signature, variant: Variant | None
    ) -> Capture | None:
        """Captures a call that nothing held for; None where that cannot be done: the call then runs in float."""
        leaves = pytree.tree_leaves((args, kwargs))
        sizes = sizes_of([leaves[i] for i in signature.inputs])
        call = (module.training, str(signature.spec), str(signature.constants), sizes)
        if call in self._refused:
            return None
        try:
            if self.recapture is None:
                raise CaptureError('it was called in another way than when it was captured')
            tried = Signature.of(args, kwargs, signature.dynamic)
            graph = self.recapture(module, *tried.watched(args, kwargs), signature.dynamic)
            signature.note(tried)
        except CaptureError as error:
            self._refused.add(call)
            self._warn(f'a call of {self.path or "the model"} cannot be captured and runs in float: {error}')
            return None
        if variant is None:
            variant = Variant(signature, {})
            self.variants.append(variant)
            del self.variants[self._prepared : -MAX_LATER]
        return variant.add(module.training, graph, sizes, self.lower)

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=4)


def _island_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return vars(self)[_ISLAND].run(self, args, kwargs)


def islands_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of ``model`` that carry an island, by path in the order of ``named_modules``."""
    return {path: module for path, module in model.named_modules() if Island.of(module) is not None}


def sizes_of(inputs: list[Any]) -> tuple:
    """Returns what of the inputs a guard can depend on: shapes, and numbers as they are."""
    # While TorchScript traces, as for ONNX, sizes are tensors, of which no two are equal.
    return tuple(tuple(map(int, value.shape)) if isinstance(value, torch.Tensor) else value for value in inputs)


class _Probe(nn.Module):
    """Runs a captured function over a module; exists because ``functional_call`` wants a module."""

    def __init__(self, target: nn.Module, function: Callable) -> None:
        super().__init__()
        self.target = target
        # What the graph calls and does not contain.
        self.others = nn.ModuleList([m.owner for m in target.modules() if isinstance(m, UntracedCall)])
        self.function = function

    def on_meta(self) -> dict[str, torch.Tensor]:
        """Returns parameters and buffers without data, those of a module that has several names once."""
        return {
            f'{path}.{name}'.lstrip('.'): tensor.to('meta')
            for path, module in self.named_modules()
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }

    def forward(self, *inputs: Any) -> None:
        self.function(self.target, *inputs)


def _passes_guards(function: Callable, module: nn.Module, inputs: list[Any]) -> bool:
    """Runs a captured function on the meta device, where only sizes are computed and nothing has side effects."""
    probe = _Probe(module, function)
    meta = [value.detach().to('meta') if isinstance(value, torch.Tensor) else value for value in inputs]
    try:
        with torch.no_grad():
            # Tied by torch, a module that has several names would not get its own tensors back.
            torch.func.functional_call(probe, probe.on_meta(), tuple(meta), tie_weights=False)
    except Exception:  # a guard, or an operation that does not run without data: capture for this very size
        return False
    return True


def _follows(confirmed: set[tuple], sizes: tuple) -> bool:
    """Tells whether sizes differ from those that a graph was seen at only where these differed, enough of them."""
    if len(confirmed) < ENOUGH_SIZES:
        return False
    seen = [_numbers(each) for each in confirmed]
    own = _numbers(sizes)
    return all(len(numbers) == len(own) for numbers in seen) and all(
        number in column or max(column) >= ENOUGH_GROWTH * min(column)
        for number, *column in zip(own, *seen, strict=True)
    )


def _numbers(sizes: tuple) -> list[Any]:
    """Returns shapes and numbers in a row, with the number of dimensions of each."""
    return [n for size in sizes for n in ((len(size), *size) if isinstance(size, tuple) else (size,))]


def _constant(leaf: Any) -> Any:
    return Watched(type(leaf)) if isinstance(leaf, BaseDataElement) else leaf


def _copied_constant(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Watched):
        return value.copied()
    return copy.deepcopy(value, memo) if isinstance(value, nn.Module) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, Watched):
        return b.accepts(a)
    if a is b:
        return True
    plain = (int, float, str, bool, type(None), torch.dtype, torch.device)
    return isinstance(a, plain) and isinstance(b, plain) and type(a) is type(b) and a == b


__all__ = ['Capture', 'Island', 'Signature', 'Variant', 'islands_of', 'sizes_of']
