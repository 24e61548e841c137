"""An island: one module instance whose forward runs a captured graph over its own submodules."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

_ISLAND = '_captured_island'


@dataclass(frozen=True)
class Signature:
    """How a module is called: the nesting of its arguments and the constants among them.

    Args:
        spec: nesting of ``(args, kwargs)``.
        constants: flattened non-tensor arguments by position, without the dynamic ones.
        inputs: positions of the tensors and of the numbers that vary between calls (dynamic), in order.
    """

    spec: pytree.TreeSpec
    constants: tuple[tuple[int, Any], ...]
    inputs: tuple[int, ...]

    @staticmethod
    def of(args: tuple, kwargs: dict[str, Any], dynamic: frozenset[int] = frozenset()) -> Signature:
        """Returns the signature of a call."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = tuple(i for i, leaf in enumerate(leaves) if i in dynamic or isinstance(leaf, torch.Tensor))
        constants = tuple((i, leaf) for i, leaf in enumerate(leaves) if i not in inputs)
        return Signature(spec, constants, inputs)

    def accepts(self, leaves: list[Any], spec: pytree.TreeSpec) -> bool:
        """Tells whether flattened arguments fit."""
        return spec == self.spec and all(_same(leaves[i], value) for i, value in self.constants)


@dataclass
class Variant:
    """The graphs for one signature, by training flag; both flags share one graph where it is the same."""

    signature: Signature
    graphs: dict[bool, fx.Graph]
    functions: dict[bool, Callable] = field(default_factory=dict)

    def compile(self) -> None:
        """Generates the functions that run the graphs."""
        compiled = {id(graph): compile_graph(graph) for graph in self.graphs.values()}
        self.functions = {training: compiled[id(graph)] for training, graph in self.graphs.items()}

    def unique_graphs(self) -> list[fx.Graph]:
        """Returns the graphs, each once."""
        return list({id(graph): graph for graph in self.graphs.values()}.values())


@dataclass
class Island:
    """What was captured of one module.

    Args:
        path: name of the module in the model.
        variants: one for every way the module is called.
        resized: whether equality was also seen at a second input size (None: the model takes one size only).
    """

    path: str
    variants: list[Variant]
    resized: bool | None = None
    _warned: bool = False

    def install(self, module: nn.Module) -> None:
        """Replaces the forward of this one instance; class, parameters, buffers and children stay."""
        for variant in self.variants:
            variant.compile()
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
            yield from variant.unique_graphs()

    def __deepcopy__(self, memo: dict[int, Any]) -> Island:
        # Graphs name submodules by path and are replaced, never edited, once compiled: copies of a model share them.
        return Island(self.path, [copy.copy(v) for v in self.variants], self.resized)

    def map_graphs(self, transform: Callable[[fx.Graph], fx.Graph]) -> None:
        """Replaces every graph by ``transform(graph)``, which must leave its argument as it is."""
        for variant in self.variants:
            new = {id(graph): transform(graph) for graph in variant.unique_graphs()}
            variant.graphs = {training: new[id(graph)] for training, graph in variant.graphs.items()}

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the captured graph for a call; a call unlike any that was captured runs the class's own forward."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for variant in self.variants:
            if variant.signature.accepts(leaves, spec):
                inputs = [leaves[i] for i in variant.signature.inputs]
                return variant.functions[module.training](module, *inputs)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f'{self.path} is called with arguments unlike those it was captured with; such calls run in float',
                stacklevel=3,
            )
        return type(module).forward(module, *args, **kwargs)


def _island_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return vars(self)[_ISLAND].run(self, args, kwargs)


def compile_graph(graph: fx.Graph) -> Callable:
    """Returns a function ``forward(module, *inputs)`` that runs a graph over the submodules of ``module``."""
    code = graph.python_code('self')
    namespace = dict(code.globals)
    exec(compile(code.src, '<captured forward>', 'exec'), namespace)
    return namespace['forward']


def islands_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of ``model`` that carry an island, by path in the order of ``named_modules``."""
    return {path: module for path, module in model.named_modules() if Island.of(module) is not None}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    plain = (int, float, str, bool, type(None), torch.dtype, torch.device)
    return isinstance(a, plain) and isinstance(b, plain) and type(a) is type(b) and a == b
