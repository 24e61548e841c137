"""The tracer: symbolic, but every symbol carries the value it has on an example input."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx import Node
from torch.overrides import is_tensor_method_or_property

from mmrazor_quant.compat import intercepted_autograd_functions, intercepted_fallbacks
from mmrazor_quant.registry import TASK_UTILS

from .assertions import check_holds, is_asserting
from .data_dependence import LENGTH_FROM_SIZE, READS_DATA, depends_on_data
from .errors import CaptureError, DataDependentError, UnrecordedValueError
from .nested import attribute_tensors, is_number, is_plain, leaves, rebuild
from .nodes import EXTRAS, AutogradCall, check_size, extras_of, node_name
from .recording import RecordingMode
from .untraced import UntracedCall, UntracedMethodRegistry
from .values import DeviceValue, FloatValue, IntValue, TensorValue, UnknownNumber, node_of, plain_scalar

LEAF_TYPES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.MultiheadAttention,
)
"""Modules (and subclasses with a forward of their own) that stay one node: they are what is quantized or folded."""


@TASK_UTILS.register_module()
class CustomTracer(fx.Tracer):
    """Captures ``forward`` of a module as one graph over its own submodules.

    Args:
        skipped_methods: dotted paths of methods that become one opaque call each.

    Raises:
        ValueError: a skipped method that does not exist.
    """

    def __init__(self, skipped_methods: Iterable[str] = ()) -> None:
        super().__init__()
        self.untraced = UntracedMethodRegistry(skipped_methods)
        self.written_out: list[str] = []
        self._start((), {}, frozenset(), frozenset())

    def _start(self, args: tuple, kwargs: dict, dynamic: frozenset[int], opaque: frozenset[str]) -> None:
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._dynamic = dynamic
        self._opaque = opaque
        self._values: dict[Node, Any] = {}
        self._tainted: set[Node] = set()
        self._guarded: set[Node] = set()
        self._comparisons: set[tuple] = set()
        self._known_tensors: dict[int, torch.Tensor] = {}
        self._registered: dict[int, str] = {}
        self._foreign_paths: set[str] = set()
        self._evaluating = False

    def capture(
        self,
        root: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        dynamic: frozenset[int] = frozenset(),
        opaque: frozenset[str] = frozenset(),
    ) -> fx.Graph:
        """Traces ``root.forward(*args, **kwargs)``.

        Args:
            root: module to trace, in the training mode that is to be captured.
            args: example positional arguments, any nesting of tensors and constants.
            kwargs: example keyword arguments.
            dynamic: positions, among the flattened arguments, of numbers that vary between calls; the other
                non-tensors are constants of the graph.
            opaque: paths of submodules that are not looked into.

        Returns:
            The graph; its placeholders are the tensors (and dynamic numbers) of the flattened arguments, in order.
            ``written_out`` has the paths of submodules that use a tensor of one element that no recorded operation
            made: a number written out, ``torch.Tensor([1e4])``, which is a constant of the graph, or one computed in
            a way that torch does not show, which must not be.

        Raises:
            CaptureError: ``forward`` cannot be one graph; ``DataDependentError`` where it branches on tensor data.
        """
        self._start(args, kwargs, dynamic, opaque)
        self.written_out = []
        self._known_tensors = {id(tensor): tensor for tensor in attribute_tensors(root)}
        self._registered = {id(t): name for name, t in (*root.named_parameters(), *root.named_buffers())}
        try:
            functions = intercepted_autograd_functions(self._autograd_function)
            fallbacks = intercepted_fallbacks(self._fallback)
            with torch.enable_grad(), self._untraced_methods(root), functions, fallbacks, RecordingMode(self):
                graph = self.trace(root)
            return _remove_unused(graph, self._values)
        finally:
            self._start((), {}, frozenset(), frozenset())
            # fx keeps the modules and proxies of the last trace on the tracer
            self.root, self.tensor_attrs = nn.Module(), {}

    # -- extension points of torch.fx ------------------------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Makes a placeholder of every tensor and dynamic number of the flattened example arguments."""
        positions = [i for i, leaf in enumerate(self._leaves) if i in self._dynamic or isinstance(leaf, torch.Tensor)]
        inputs = [self.create_proxy('placeholder', f'input_{i}', (), {}) for i in positions]

        def flat_forward(*flat_inputs: Any) -> Any:
            flat = list(self._leaves)
            for position, value in zip(positions, flat_inputs):
                flat[position] = value
            args, kwargs = pytree.tree_unflatten(flat, self._spec)
            return root_fn(self.root, *args, **kwargs)

        return flat_forward, inputs

    def path_of_module(self, mod: nn.Module) -> str:
        """Returns the path of a submodule; a module from elsewhere in the model is called through a stand-in."""
        path = self.submodule_paths.get(mod) if self.submodule_paths else None
        return self._foreign(mod) if path is None else path

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers, opaque modules and torch.nn's childless modules are nodes; all else is traced through."""
        if module_qualified_name in self._opaque or isinstance(m, (*LEAF_TYPES, UntracedCall)):
            return True
        if module_qualified_name in self._foreign_paths:
            return True
        return super().is_leaf_module(m, module_qualified_name) and next(m.children(), None) is None

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a module plainly while a node is evaluated, and records it otherwise."""
        if self._evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        """Parameters and buffers become ``get_attr`` nodes, except while a node is evaluated."""
        name = self._registered.get(id(attr_val))
        if self._evaluating or name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy('get_attr', name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Lowers what appears as an argument; refuses tensors that no recorded operation produced."""
        node = node_of(a)
        if node is not None:
            return node
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, torch.Size):
            return tuple(self.create_arg(item) for item in a)
        if isinstance(a, torch.Tensor):
            name = self._registered.get(id(a))
            return self._constant(a) if name is None else self.create_node('get_attr', name, (), {})
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            raise CaptureError(f'a {type(a).__name__} is passed to a recorded operation') from error

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple,
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable | None = None,
    ) -> Any:
        """Records a node, runs it once on the example's values, and returns its value carrying the node."""
        node_args, node_kwargs = self.create_arg(tuple(args)), self.create_arg(dict(kwargs))
        value = self._evaluate(kind, target, args, kwargs)
        node = self.create_node(kind, target, node_args, node_kwargs, name, type_expr)
        if any(arg in self._tainted for arg in node.all_input_nodes) or depends_on_data(node, value, self._values):
            self._tainted.add(node)
        return self._wrap(node, value)

    # -- values ----------------------------------------------------------------------------------------------------

    def is_tainted(self, node: Node) -> bool:
        """Tells whether a node's Python value, or its shape, was computed from tensor data."""
        return node in self._tainted

    def guard(self, node: Node, expected: Any) -> None:
        """Notes that Python code went on with the example's value of a node: a check in the graph.

        Raises:
            DataDependentError: the value was computed from tensor data.
        """
        if node in self._tainted:
            raise DataDependentError(f'Python code goes on with a value computed from tensor data ({node.name})')
        if node not in self._guarded:
            self._guarded.add(node)
            self.create_node('call_function', check_size, (node, expected), {})

    def guard_comparison(self, operation: Callable, left: Any, right: Any, answer: bool) -> None:
        """Notes that Python code branched on a comparison of numbers."""
        arguments = (self.create_arg(left), self.create_arg(right))
        if any(isinstance(a, Node) and a in self._tainted for a in arguments):
            raise DataDependentError(f'a value computed from tensor data is compared ({arguments[0]})')
        key = (operation, *arguments)
        if key not in self._comparisons:
            self._comparisons.add(key)
            self.guard(self.create_node('call_function', operation, arguments, {}), answer)

    def record(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Records a call of a torch function or tensor method that has traced values among its arguments."""
        name = func.__name__
        if name == '__bool__' and is_asserting():
            return self._assertion(args[0])
        if name in READS_DATA:
            raise DataDependentError(f'Tensor.{name} reads the data of {_describe(args[0])}')
        if name == '__get__':
            return self.create_proxy('call_function', getattr, (args[0], func.__self__.__name__), {})
        if name == '__set__' or name == '__delete__':
            raise CaptureError(f'an attribute of a traced tensor is assigned: {func.__self__.__name__}')
        if name == '__len__':
            return self._length(args[0])
        if name in ('__getitem__', '__setitem__'):
            return self.create_proxy('call_function', getattr(operator, name.strip('_')), args, kwargs)
        if is_tensor_method_or_property(func):
            return self.create_proxy('call_method', name, args, kwargs)
        return self.create_proxy('call_function', func, args, kwargs)

    def run_constant(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a torch function without traced arguments: a factory is recorded, the rest is constant folding."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        with self._evaluation():
            value = func(*args, **kwargs)
        produced = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if not produced:
            return value
        if not tensors and is_plain((args, kwargs)):
            node = self.create_node('call_function', func, self.create_arg(tuple(args)), self.create_arg(dict(kwargs)))
            return self._wrap(node, value)
        if all(id(t) in self._known_tensors or id(t) in self._registered for t in tensors):
            self._known_tensors.update((id(t), t) for t in produced)
        return value

    def _assertion(self, tensor: Any) -> bool:
        """Leaves an assertion about data in the graph."""
        answer = bool(self._values[tensor.node])
        self.create_node('call_function', check_holds, (tensor.node, answer), {})
        return answer

    def _length(self, tensor: Any) -> int:
        length = len(self._values[tensor.node])
        node = self.create_node('call_function', len, (tensor.node,), {})
        if self.is_tainted(tensor.node):
            self._tainted.add(node)
        self.guard(node, length)
        return length

    def _evaluate(self, kind: str, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        args, kwargs = self._plain(args), self._plain(kwargs)
        with self._evaluation():
            if kind == 'placeholder':
                return self._leaves[int(target.rsplit('_', 1)[1])]
            if kind == 'get_attr':
                return operator.attrgetter(target)(self.root)
            if kind == 'call_module':
                return self.root.get_submodule(target)(*args, **kwargs)
            if kind == 'call_method':
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        before, self._evaluating = self._evaluating, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._evaluating = before

    @property
    def evaluating(self) -> bool:
        """True while a node runs on the example's values."""
        return self._evaluating

    def _plain(self, value: Any) -> Any:
        """Replaces traced values, in any nesting, by the example's."""
        if isinstance(value, TensorValue):
            return self._values[value.node]
        if isinstance(value, slice):
            return slice(self._plain(value.start), self._plain(value.stop), self._plain(value.step))
        if isinstance(value, dict):
            return {key: self._plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return rebuild(value, [self._plain(item) for item in value])
        return plain_scalar(value)

    def _wrap(self, node: Node, value: Any) -> Any:
        """Returns ``value`` carrying ``node``; containers are taken apart into their items."""
        self._values[node] = value
        if isinstance(value, torch.Tensor):
            node.meta['shape'] = tuple(value.shape)
            if not torch.is_grad_enabled() and node.op not in ('placeholder', 'get_attr'):
                node = self._without_gradient(node, value)
            return TensorValue.wrap(value, node)
        if isinstance(value, bool):
            if node in self._tainted:
                raise DataDependentError(f'a bool computed from tensor data ({node.name}) is used in Python')
            return value
        if isinstance(value, (int, float)) and node in self._tainted:
            return UnknownNumber(value, node, self)
        if isinstance(value, int):
            return IntValue(value, node, self)
        if isinstance(value, float):
            return FloatValue(value, node, self)
        if isinstance(value, torch.device):
            return DeviceValue(value, node, self)
        if isinstance(value, (tuple, list)):
            if node.op in ('call_function', 'call_method') and node_name(node) in LENGTH_FROM_SIZE:
                self.guard(self.create_node('call_function', len, (node,), {}), len(value))
            items = [self._item(node, i, item) for i, item in enumerate(value)]
            # torch.Size takes ints only, which a number computed from data is not.
            return tuple(items) if node in self._tainted and isinstance(value, torch.Size) else rebuild(value, items)
        if isinstance(value, dict):
            return {key: self._item(node, key, item) for key, item in value.items()}
        if value is None or isinstance(value, (torch.dtype, torch.layout, torch.memory_format, str)):
            return value
        raise CaptureError(f'{node.format_node()} returns a {type(value).__name__}')

    def _without_gradient(self, node: Node, value: torch.Tensor) -> Node:
        """Appends what a ``no_grad`` block of the traced code does to a tensor made in it."""
        detached = self.create_node('call_method', 'detach', (node,), {})
        detached.meta['shape'] = node.meta['shape']
        self._values[detached] = value
        if node in self._tainted:
            self._tainted.add(detached)
        return detached

    def _item(self, parent: Node, key: Any, value: Any) -> Any:
        node = self.create_node('call_function', operator.getitem, (parent, key), {})
        if parent in self._tainted:
            self._tainted.add(node)
        return self._wrap(node, value)

    def _autograd_function(self, function: type, apply: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._evaluating or not any(node_of(leaf) is not None for leaf in leaves((args, kwargs))):
            return apply(*args, **kwargs)
        return self.create_proxy('call_function', AutogradCall(function), args, kwargs)

    def _fallback(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._evaluating or not any(node_of(leaf) is not None for leaf in leaves((args, kwargs))):
            return function(*args, **kwargs)
        return self.create_proxy('call_function', function, args, kwargs)

    # -- constants and opaque calls --------------------------------------------------------------------------------

    def _constant(self, tensor: torch.Tensor) -> Node:
        """Stores a tensor that does not depend on the input as a non-persistent buffer beside the module."""
        if id(tensor) not in self._known_tensors:
            scope = next(reversed(self.module_stack.values()), ('', None))[0]
            if tensor.numel() != 1:
                raise UnrecordedValueError(
                    f'a tensor of shape {tuple(tensor.shape)} that no recorded operation produced '
                    f'is used in {scope or "it"!r}',
                    scope,
                )
            self.written_out.append(scope)
        extras = extras_of(self.root)
        for name, buffer in extras.named_buffers(recurse=False):
            if buffer is tensor:
                return self.create_node('get_attr', f'{EXTRAS}.{name}', (), {})
        name = f'constant_{len(list(extras.buffers(recurse=False)))}'
        extras.register_buffer(name, tensor, persistent=False)
        return self.create_node('get_attr', f'{EXTRAS}.{name}', (), {})

    @contextmanager
    def _untraced_methods(self, root: nn.Module) -> Iterator[None]:
        """Diverts opaque methods, on the instances below ``root`` only and only while it is traced."""
        diverted: list[tuple[nn.Module, str]] = []
        try:
            for path, module in list(root.named_modules()):
                for name in self.untraced.names_of(module) - {'forward'}:
                    if name not in vars(module):
                        vars(module)[name] = self._opaque_method(root, module, path, name)
                        diverted.append((module, name))
                if 'forward' in self.untraced.names_of(module):
                    self._opaque = self._opaque | {path}
            yield
        finally:
            for module, name in diverted:
                del vars(module)[name]

    def _foreign(self, module: nn.Module) -> str:
        """Returns the path of a call of a module that is not below the root; it keeps its place in the model."""
        extras = extras_of(self.root)
        known = (n for n, m in extras.named_children() if isinstance(m, UntracedCall) and m.calls(module, '__call__'))
        name = next(known, None)
        if name is None:
            name = f'module_{sum(isinstance(m, UntracedCall) for m in extras.children())}'
            extras.add_module(name, UntracedCall(module, '__call__'))
        self._foreign_paths.add(f'{EXTRAS}.{name}')
        return f'{EXTRAS}.{name}'

    def _opaque_method(self, root: nn.Module, owner: nn.Module, path: str, name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._evaluating:
                return getattr(type(owner), name)(owner, *args, **kwargs)
            child = '_'.join([*path.split('.'), name]) if path else name
            extras = extras_of(root)
            if child not in extras._modules:
                extras.add_module(child, UntracedCall(owner, name))
                self.submodule_paths = {m: n for n, m in root.named_modules()}
            return self.create_proxy('call_module', f'{EXTRAS}.{child}', args, kwargs)

        return call


def _describe(value: Any) -> str:
    node = node_of(value)
    return repr(node.name) if node is not None else type(value).__name__


def _remove_unused(graph: fx.Graph, values: dict[Node, Any]) -> fx.Graph:
    """Removes reads of attributes, items and sizes that nothing uses; whatever computes a tensor stays."""
    for node in reversed(list(graph.nodes)):
        reads = node.op == 'get_attr' or node.target in (getattr, operator.getitem)
        computes = node.op in ('call_function', 'call_method') and not isinstance(values.get(node), torch.Tensor)
        sizes = computes and is_number(values.get(node))
        if not node.users and (reads or sizes):
            graph.erase_node(node)
    return graph
