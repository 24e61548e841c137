"""The one place for what depends on the versions of torch, mmengine, mmdet, mmdeploy and numpy underneath.

* :data:`FakeQuantizeBase`, :data:`UniformQuantizationObserverBase`: torch moves these from ``torch.ao.quantization``
  to torchao; the rest of the package imports them from here.
* :func:`allow_mmengine_checkpoints`: lets ``torch.load(weights_only=True)``, torch's default, read what mmengine
  writes, without giving the protection away.
* :func:`intercepted_autograd_functions`, :func:`intercepted_fallbacks`: show custom operations and what stands in for
  them to the tracer, for as long as a trace takes.
* :func:`alias_registry_module`: lets mmengine find the registries of the scope ``mmrazor`` in this package.
* :func:`show_codebase_to_mmdeploy`: lets mmdeploy find its codebase ``mmrazor`` in this package.
* :func:`let_ssd_heads_predict`: gives the head of SSD, in mmdet 3.3, the attribute that its ``predict`` asks for.

:func:`allow_mmengine_checkpoints`, :func:`alias_registry_module` and :func:`show_codebase_to_mmdeploy` run when
:mod:`mmrazor_quant` is imported, :func:`let_ssd_heads_predict` when a first model of mmdet is prepared.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pickle import UnpicklingError
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

try:
    from torch.ao.quantization.fake_quantize import FakeQuantizeBase
    from torch.ao.quantization.observer import UniformQuantizationObserverBase
except ImportError:  # torch has announced the removal of torch.ao.quantization; its twin lives in torchao
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

__all__ = [
    'CPU_FALLBACKS',
    'FakeQuantizeBase',
    'UniformQuantizationObserverBase',
    'alias_registry_module',
    'allow_mmengine_checkpoints',
    'intercepted_autograd_functions',
    'intercepted_fallbacks',
    'let_ssd_heads_predict',
    'show_codebase_to_mmdeploy',
]

_HISTORY_BUFFER_STATISTICS = {
    'min': HistoryBuffer.min,
    'max': HistoryBuffer.max,
    'mean': HistoryBuffer.mean,
    'current': HistoryBuffer.current,
}


def _history_buffer_getattr(owner: object, name: str) -> FunctionType:
    """Stand in for ``builtins.getattr`` in mmengine's checkpoints.

    Pickle protocol 2, which torch uses, writes a method such as ``HistoryBuffer.min`` as a call
    ``getattr(HistoryBuffer, 'min')``. Allowing the real ``getattr`` would let a checkpoint reach any attribute of any
    allowed class, and from there anything.

    Args:
        owner: What the checkpoint wants an attribute of.
        name: Name of the attribute.

    Returns:
        The statistics method of :class:`mmengine.logging.HistoryBuffer`.

    Raises:
        UnpicklingError: For anything but HistoryBuffer's own statistics methods.
    """
    if owner is HistoryBuffer and type(name) is str and name in _HISTORY_BUFFER_STATISTICS:
        return _HISTORY_BUFFER_STATISTICS[name]
    raise UnpicklingError(
        f'refused: the checkpoint asks for attribute {name!r} of {owner!r}; only '
        f"{sorted(_HISTORY_BUFFER_STATISTICS)} of mmengine's HistoryBuffer are allowed"
    )


def _numpy_globals() -> list:
    """List the globals that pickled numpy scalars, arrays and dtypes refer to.

    numpy 2 renamed ``numpy.core`` to ``numpy._core``; checkpoints written under either have to load. Pickled dtypes
    are rebuilt through ``numpy.dtype`` into one of the classes of ``numpy.dtypes``. The object dtype is left out: an
    array of it carries pickled objects of its own.

    Returns:
        Classes, and functions with the name that they carry in a checkpoint.
    """
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = {type(np.dtype(code)) for code in np.typecodes['All'] if code != 'O'}
    functions = [
        (getattr(multiarray, name), f'{module}.{name}')
        for name in ('scalar', '_reconstruct')
        for module in ('numpy._core.multiarray', 'numpy.core.multiarray')
    ]
    return [np.ndarray, (np.dtype, 'numpy.dtype'), *functions, *dtypes]


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's own checkpoints.

    Their message hub holds :class:`mmengine.logging.HistoryBuffer` objects with numpy arrays and with references to
    their statistics methods; none of it is allowed by default, so that resuming would fail.
    """
    import _codecs

    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_buffer_getattr, 'builtins.getattr'),
            (_codecs.encode, '_codecs.encode'),
            *_numpy_globals(),
        ]
    )


def alias_registry_module() -> None:
    """Let mmengine import ``mmrazor.registry`` when the package ``mmrazor`` is not installed.

    mmengine takes the name of a scope for the name of a package and imports ``<scope>.registry`` whenever that scope
    is the default one; where it cannot, it warns on each build that ``mmrazor`` should be installed. Where MMRazor
    itself is installed nothing is aliased.
    """
    if importlib.util.find_spec('mmrazor') is None:
        from mmrazor_quant import registry

        sys.modules.setdefault('mmrazor.registry', registry)


class _CodebaseOfMMDeploy(MetaPathFinder, Loader):
    """Finds what mmdeploy imports for a codebase ``mmrazor``; importing it imports what registers the codebase."""

    names = ('mmdeploy.codebase.mmrazor', 'mmdeploy.codebase.mmrazor.deploy')

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        # mmdeploy also checks that there is a package of that name, which nobody else should be told.
        is_asked_by_mmdeploy = fullname == 'mmrazor' and 'mmdeploy' in sys.modules
        return ModuleSpec(fullname, self, is_package=True) if fullname in self.names or is_asked_by_mmdeploy else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        importlib.import_module('mmrazor_quant.backends.mmdeploy')


def show_codebase_to_mmdeploy() -> None:
    """Let mmdeploy find its codebase ``mmrazor``, which it takes all models ``mmrazor.*`` for, in this package.

    mmdeploy wants a package ``mmrazor`` to be installed, and imports ``mmdeploy.codebase.mmrazor.deploy``, which it
    does not have. A finder, Python's own way to extend imports, is asked last; the package behind it,
    :mod:`mmrazor_quant.backends.mmdeploy`, is imported when mmdeploy asks for it, and not before.
    """
    if not any(isinstance(finder, _CodebaseOfMMDeploy) for finder in sys.meta_path):
        sys.meta_path.append(_CodebaseOfMMDeploy())


class _NoneUnlessSet:
    """A class attribute of modules that is None for those without one of their own, be it a value or a submodule."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: torch.nn.Module | None, owner: type) -> Any:
        # A plain None would hide a submodule of this name: torch looks for those only after the class.
        return None if instance is None else instance._modules.get(self.name)


def let_ssd_heads_predict() -> None:
    """Give the heads of SSD and SSDLite a ``loss_cls``, where mmdet does not: its ``predict`` would fail without.

    In mmdet 3.3, ``predict`` of all dense heads asks the classification loss how to make scores; ``SSDHead``, whose
    loss is a function, has none, and gets a None that is asked in vain.
    """
    from mmdet.models import SSDHead

    if not hasattr(SSDHead, 'loss_cls'):
        SSDHead.loss_cls = _NoneUnlessSet('loss_cls')


@contextmanager
def intercepted_autograd_functions(handler: Callable[..., Any]) -> Iterator[None]:
    """Sends every call of a custom ``torch.autograd.Function`` to a handler while the block runs.

    Such calls are the one way to compute with tensors that torch's function modes do not see. A trace that ran their
    ``forward`` would record what it does and lose the ``backward`` that belongs to it. mmcv's modules keep many as
    globals (``roi_align = RoIAlignFunction.apply``), bound before the block began: these are replaced too.

    Args:
        handler: Called as ``handler(function, apply, args, kwargs)`` with the function's class and its real ``apply``.
    """
    original = torch.autograd.Function.__dict__['apply']

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return handler(cls, original.__get__(None, cls), args, kwargs)

    bound = [(namespace, name, namespace[name]) for namespace, name in _bound_applies(len(sys.modules))]
    torch.autograd.Function.apply = classmethod(apply)
    for namespace, name, method in bound:
        namespace[name] = MethodType(apply, method.__self__)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original
        for namespace, name, method in bound:
            namespace[name] = method


@functools.lru_cache(maxsize=1)
def _bound_applies(modules: int) -> list[tuple[dict[str, Any], str]]:
    """Finds the globals that are some autograd function's bound ``apply``; ``modules`` are loaded."""
    return [
        (vars(module), name)
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, '__dict__', {}).items())
        # Not isinstance: it asks some values for their class, which are lazy or warn.
        if type(value) is MethodType
        and isinstance(value.__self__, type)
        and issubclass(value.__self__, torch.autograd.Function)
        and value.__name__ == 'apply'
    ]


CPU_FALLBACKS = (('mmcv.ops.multi_scale_deform_attn', 'multi_scale_deformable_attn_pytorch'),)
"""Module and name of functions that stand in, on the CPU, for a custom operation, and read the data of tensors."""


@contextmanager
def intercepted_fallbacks(handler: Callable[..., Any]) -> Iterator[None]:
    """Sends every call of a function of :data:`CPU_FALLBACKS` to a handler while the block runs.

    They are to a graph what the custom operation is on other devices: one call.

    Args:
        handler: Called as ``handler(function, args, kwargs)``.
    """
    found = [(vars(sys.modules[module]), name) for module, name in CPU_FALLBACKS if module in sys.modules]
    originals = [(namespace, name, namespace[name]) for namespace, name in found if name in namespace]

    def intercepted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: handler(function, args, kwargs)

    for namespace, name, function in originals:
        namespace[name] = intercepted(function)
    try:
        yield
    finally:
        for namespace, name, function in originals:
            namespace[name] = function


allow_mmengine_checkpoints()
alias_registry_module()
show_codebase_to_mmdeploy()
