"""The values that flow through a forward while it is traced.

Each one *is* an ordinary value (a tensor, an int, a float, a device string), taken from the example input, and
carries the graph node that produced it. Code under trace can therefore ask ``isinstance``, and whatever reaches a
torch function is recorded by its node instead of being burnt into the graph. Branching on a size leaves a guard in
the graph: it holds for the inputs that branch in the same way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node, Proxy

if TYPE_CHECKING:
    from .tracer import CustomTracer


class TensorValue(torch.Tensor):
    """A tensor of the example run together with its node. It shares storage with the example's tensor."""

    node: Node

    @staticmethod
    def wrap(value: torch.Tensor, node: Node) -> TensorValue:
        """Returns ``value`` viewed as a ``TensorValue`` of ``node`` (no copy)."""
        tensor = value.detach().as_subclass(TensorValue)
        tensor.node = node
        return tensor

    # Outside the recording mode (a value that escaped the trace) it behaves like a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl


class _Scalar(Proxy):
    """What scalar values share: arithmetic is recorded; comparisons are answered from the example, and guarded."""

    # The recording mode sees every call; a torch function attribute would make torch take the scalar for a tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl

    def _init_node(self, node: Node, tracer: CustomTracer) -> None:
        self.node = node
        self.tracer = tracer

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.plain()!r}, node={self.node.name})'

    def __deepcopy__(self, memo: dict) -> Any:
        return self

    def __format__(self, spec: str) -> str:
        return format(self.plain(), spec)

    def plain(self) -> Any:
        """Returns the example's value as an ordinary Python object."""
        raise NotImplementedError

    def _concrete(self) -> Any:
        """Returns the example's value for use in Python; the graph then holds for inputs that give the same one."""
        self.tracer.guard(self.node, self.plain())
        return self.plain()

    def _compare(self, operation: Callable[[Any, Any], bool], other: Any) -> bool:
        answer = operation(self.plain(), plain_scalar(other))
        if isinstance(other, (int, float, _Number)):
            self.tracer.guard_comparison(operation, self, other, bool(answer))
        return answer

    def __bool__(self) -> bool:
        return bool(self._concrete())

    def __hash__(self) -> int:
        return hash(self._concrete())

    def __eq__(self, other: object) -> bool:
        return self._compare(operator.eq, other)

    def __ne__(self, other: object) -> bool:
        return self._compare(operator.ne, other)

    def __lt__(self, other: Any) -> bool:
        return self._compare(operator.lt, other)

    def __le__(self, other: Any) -> bool:
        return self._compare(operator.le, other)

    def __gt__(self, other: Any) -> bool:
        return self._compare(operator.gt, other)

    def __ge__(self, other: Any) -> bool:
        return self._compare(operator.ge, other)


class _Number(_Scalar):
    def __round__(self, ndigits: int | None = None) -> Any:
        return self.tracer.create_proxy('call_function', round, (self,) if ndigits is None else (self, ndigits), {})


class IntValue(_Number, int):
    """An integer, typically a size."""

    def __new__(cls, value: int, node: Node, tracer: CustomTracer) -> IntValue:
        self = int.__new__(cls, value)
        self._init_node(node, tracer)
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def plain(self) -> int:
        return int.__int__(self)

    def __int__(self) -> int:
        return self._concrete()

    def __index__(self) -> int:
        return self._concrete()

    def __float__(self) -> float:
        return float(self._concrete())


class FloatValue(_Number, float):
    """A float, typically the quotient of two sizes."""

    def __new__(cls, value: float, node: Node, tracer: CustomTracer) -> FloatValue:
        self = float.__new__(cls, value)
        self._init_node(node, tracer)
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def plain(self) -> float:
        return float.__float__(self)

    def __float__(self) -> float:
        return self._concrete()

    def __int__(self) -> int:
        return int(self._concrete())


class UnknownNumber(_Number):
    """A number computed from tensor data: arithmetic is recorded, whatever needs its value is refused."""

    def __init__(self, value: float, node: Node, tracer: CustomTracer) -> None:
        self._value = value
        self._init_node(node, tracer)

    def plain(self) -> float:
        return self._value

    def __index__(self) -> int:
        return self._concrete()

    __int__ = __float__ = __index__

    def __format__(self, spec: str) -> str:
        return format(self._concrete(), spec)


class DeviceValue(_Scalar, str):
    """The device of a tensor; a string, so that torch's factories accept it, that follows the input at run time."""

    def __new__(cls, value: torch.device, node: Node, tracer: CustomTracer) -> DeviceValue:
        self = str.__new__(cls, str(value))
        self._init_node(node, tracer)
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def plain(self) -> torch.device:
        return torch.device(str.__str__(self))

    @property
    def type(self) -> str:
        return self.plain().type

    @property
    def index(self) -> int | None:
        return self.plain().index

    def __str__(self) -> str:
        return str.__str__(self)


def plain_scalar(value: Any) -> Any:
    """Returns the ordinary Python object behind a scalar value; anything else as it is."""
    return value.plain() if isinstance(value, _Scalar) else value


def node_of(value: Any) -> Node | None:
    """Returns the node that produced ``value``, or None for an ordinary object."""
    return value.node if isinstance(value, (TensorValue, _Scalar)) else None
