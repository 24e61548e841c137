"""Methods that tracing does not look into: each call becomes one opaque node."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

_F = TypeVar('_F', bound=Callable[..., Any])
_MARK = '__mmrazor_untraced__'


class UntracedMethodRegistry:
    """The methods that one tracer keeps opaque, keyed by class and method.

    A method registered for a class is opaque for instances of that class and of its subclasses, overridden or not.
    The registry belongs to its tracer; nothing is shared between two of them. Authors of a model can instead mark a
    method where it is defined, with the decorator :meth:`untraced`.

    Args:
        methods: dotted paths ``package.module.Class.method``.

    Raises:
        ValueError: a path that does not lead to a method, naming the field ``skipped_methods``.

    Example:
        >>> class Head(nn.Module):
        ...     @UntracedMethodRegistry.untraced
        ...     def decode(self, x): ...
    """

    def __init__(self, methods: Iterable[str] = ()) -> None:
        self._methods: set[tuple[type, str]] = set()
        for path in methods:
            self.register(*_resolve(path))

    def register(self, cls: type, name: str) -> None:
        """Makes method ``name`` of ``cls`` and its subclasses opaque."""
        self._methods.add((cls, name))

    @staticmethod
    def untraced(method: _F) -> _F:
        """Decorator: marks a method as opaque for every tracer."""
        setattr(method, _MARK, True)
        return method

    def names_of(self, module: nn.Module) -> set[str]:
        """Returns the names of the methods of ``module`` that are opaque."""
        registered = {name for cls, name in self._methods if isinstance(module, cls)}
        marked = {
            name
            for cls in type(module).__mro__
            for name, member in vars(cls).items()
            if callable(member) and getattr(member, _MARK, False)
        }
        return registered | marked


class UntracedCall(nn.Module):
    """Calls one opaque method of a module; the node in the graph is a call of this.

    Args:
        owner: module whose method it is (not registered as a child: it already lives elsewhere in the model).
        method: name of the method.
    """

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self._owner = (owner,)
        self.method = method

    @property
    def owner(self) -> nn.Module:
        """The module whose method it is."""
        return self._owner[0]

    def calls(self, owner: nn.Module, method: str) -> bool:
        """Tells whether this calls a given method of a given module."""
        return self._owner[0] is owner and self.method == method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner[0]
        return getattr(type(owner), self.method)(owner, *args, **kwargs)

    def extra_repr(self) -> str:
        return f'{type(self._owner[0]).__name__}.{self.method}'


def _resolve(path: str) -> tuple[type, str]:
    """Returns the class and method name that a dotted path names."""
    parts = path.split('.')
    for cut in range(len(parts) - 2, 0, -1):
        module_name = '.'.join(parts[:cut])
        try:
            owner: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(error.name + '.')):
                continue
            raise
        return _class_and_method(owner, parts[cut:], path)
    raise ValueError(f"skipped_methods: {path!r} names no importable module; give 'package.module.Class.method'")


def _class_and_method(owner: Any, names: list[str], path: str) -> tuple[type, str]:
    for name in names[:-1]:
        if not hasattr(owner, name):
            raise ValueError(f'skipped_methods: {path!r}: {getattr(owner, "__name__", owner)!r} has no {name!r}')
        owner = getattr(owner, name)
    method = names[-1]
    if not isinstance(owner, type) or not issubclass(owner, torch.nn.Module):
        raise ValueError(f"skipped_methods: {path!r}: {owner!r} is not a module class; give 'package.Class.method'")
    if not callable(getattr(owner, method, None)):
        known = sorted(n for n, m in vars(owner).items() if callable(m) and not n.startswith('__'))
        raise ValueError(f'skipped_methods: {path!r}: class {owner.__name__} has no method {method!r}; it has {known}')
    return owner, method
