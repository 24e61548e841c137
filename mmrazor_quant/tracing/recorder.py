"""Recording how the modules of a model are called while it runs on its examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from .island import Signature, sizes_of
from .state import preserved

MAX_SIZES = 4
"""How many calls of one kind and of different input sizes are kept of one example."""


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

    def matches(self, signature: Signature) -> bool:
        """Tells whether a call has this signature, sizes aside."""
        own = Signature.of(self.args, self.kwargs)
        return own.spec == signature.spec and own.inputs == signature.inputs and _equal_constants(own, signature)

    def sizes(self) -> tuple:
        """Returns the sizes of the tensors among the arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return sizes_of([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])


@dataclass
class Recording:
    """What was seen of some modules (the candidates) and of all layers.

    Args:
        calls: the calls of each candidate, by path.
        entries: of each candidate, its submodules that were called while its own forward was not running.
        layers: paths of the layers in the order of their first calls.
        evaluated: the candidates that ran in eval.
        complete: whether all examples ran in eval to the end.
    """

    calls: dict[str, list[Call]]
    entries: dict[str, list[str]]
    layers: list[str] = field(default_factory=list)
    evaluated: set[str] = field(default_factory=set)
    complete: bool = True

    def is_of_training_only(self, path: str) -> bool:
        """Tells whether a candidate ran in training and never in eval."""
        return self.complete and bool(self.calls[path]) and path not in self.evaluated


Example = Callable[[], 'bool | None']
"""Runs the model in train and eval; returns False where it could not run it in eval to the end."""


def record(
    model: nn.Module, candidates: list[str], examples: list[Example], layer_types: tuple[type, ...]
) -> Recording:
    """Runs a model on its examples and records the calls of some of its modules.

    Args:
        model: the model; it is left as it was.
        candidates: paths of modules, none of which contains another.
        examples: run the model.
        layer_types: the modules whose order of calls is recorded.
    """
    recording = Recording({path: [] for path in candidates}, {path: [] for path in candidates})
    recorder = _Recorder(model, recording, layer_types)
    with preserved(model), recorder.installed():
        for index, example in enumerate(examples):
            recorder.example = index
            with torch.no_grad():
                recording.complete &= example() is not False
    recording.layers = list(recorder.ran)
    return recording


class _Recorder:
    """Stands in for the forwards of a model's modules, and keeps the stack of those that are running.

    The forwards, not hooks: heads of mmdet are run as ``head.forward(x)``, too, which calls no hook.
    """

    def __init__(self, model: nn.Module, recording: Recording, layer_types: tuple[type, ...]) -> None:
        self.model, self.recording, self.layer_types = model, recording, layer_types
        self.example = 0
        self.ran: dict[str, None] = {}
        self.running: list[nn.Module] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Sees all calls while the block runs."""
        replaced: list[tuple[nn.Module, Any]] = []
        owners = self._owners()
        try:
            for path, module in self.model.named_modules():
                if module in owners or isinstance(module, self.layer_types):
                    replaced.append((module, vars(module).get('forward')))
                    vars(module)['forward'] = self._forward(path, module, owners.get(module, []))
            yield
        finally:
            for module, forward in replaced:
                if forward is None:
                    del vars(module)['forward']
                else:
                    vars(module)['forward'] = forward

    def _owners(self) -> dict[nn.Module, list[str]]:
        """Returns, for each module with layers in it, the candidates that contain it."""
        owners: dict[nn.Module, list[str]] = {}
        for path in self.recording.calls:
            for module in self.model.get_submodule(path).modules():
                if any(isinstance(m, self.layer_types) for m in module.modules()):
                    owners.setdefault(module, []).append(path)
        return owners

    def _forward(self, path: str, module: nn.Module, owners: list[str]) -> Callable:
        original = module.forward
        candidates = [self.model.get_submodule(owner) for owner in owners]
        inside = {part for candidate in candidates for part in candidate.modules()}

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if isinstance(module, self.layer_types):
                self.ran.setdefault(path)
            if module in candidates:
                self._record(owners[candidates.index(module)], args, kwargs)
            elif owners and inside.isdisjoint(self.running):
                self._add_entry(path, owners[0])
            self.running.append(module)
            try:
                return original(*args, **kwargs)
            finally:
                self.running.pop()

        return forward

    def _add_entry(self, path: str, owner: str) -> None:
        if path not in self.recording.entries[owner]:
            self.recording.entries[owner].append(path)

    def _record(self, path: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.model.training:
            self.recording.evaluated.add(path)
        signature = Signature.of(args, kwargs)
        calls = self.recording.calls[path]
        alike = [c for c in calls if c.example == self.example and c.matches(signature)]
        call = Call(args, kwargs, self.example)
        if len(alike) < MAX_SIZES and call.sizes() not in [c.sizes() for c in alike]:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
            calls.append(Call(args, kwargs, self.example))


def _equal_constants(a: Signature, b: Signature) -> bool:
    try:
        return a.constants == b.constants
    except RuntimeError:  # objects whose comparison is not a bool
        return False
