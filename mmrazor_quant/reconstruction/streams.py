"""Running a model up to an island, with the islands before it replaced by what they gave before."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from mmrazor_quant.tracing.island import Capture, Island, Variant

from .cache import ActivationCache
from .samples import Call

Step = Callable[[Any], Any]
"""Runs the model on a calibration batch."""


class _Stopped(Exception):
    """Ends the forward of a model whose rest is of no interest."""


class Tap(Island):
    """An island that hands its calls on to a function."""

    def __init__(self, island: Island, on_call: Callable[..., Any]) -> None:
        super().__init__(island.path, island.variants, island.resized, island.recapture)
        self.island, self.on_call = island, on_call

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.on_call(self.island, module, args, kwargs)


@dataclass
class Survey:
    """How an island is called.

    Args:
        counts: How often each batch calls it, by number of the batch.
        kinds: What graphs serve the calls, as an ordered set.
    """

    counts: Counter[int] = field(default_factory=Counter)
    kinds: dict[int, None] = field(default_factory=dict)


class Stream:
    """The forwards of one state of the model, float or quantized, over all calibration batches.

    Args:
        step: Runs the model on a batch.
        batches: The batches.
        islands: The modules with an island, by path.
        cache: Where the inputs of calls are kept.
    """

    def __init__(self, step: Step, batches: list[Any], islands: dict[str, nn.Module], cache: ActivationCache) -> None:
        self.step, self.batches, self.islands, self.cache = step, batches, islands, cache
        self._outputs: dict[str, dict[tuple[int, int], Any]] = {}

    def survey(self) -> dict[str, Survey]:
        """Run all batches once; gives what islands they call, in the order of the first calls."""
        surveys: dict[str, Survey] = {}
        for number, batch in enumerate(self.batches):

            def note(path, island, module, args, kwargs, batch=number) -> Any:
                survey = surveys.setdefault(path, Survey())
                survey.counts[batch] += 1
                output = island.run(module, args, kwargs)
                found = find_capture(island, module, args, kwargs)
                if found is not None:
                    survey.kinds[id(found[0])] = None
                return output

            self._run(dict.fromkeys(self.islands, note), batch)
        return surveys

    def calls(self, path: str, counts: Counter[int], serves: Callable[[int], bool]) -> list[Call]:
        """Run up to an island and collect its calls.

        Args:
            path: The island.
            counts: How often each batch calls it.
            serves: Tells by its kind whether a call is wanted.

        Returns:
            The calls of all batches, without those that no graph holds for.
        """
        found: list[Call] = []
        for number, batch in enumerate(self.batches):
            if not counts[number]:
                continue
            numbers: dict[str, int] = defaultdict(int)
            count = counts[number]

            def collect(path, island, module, args, kwargs, batch=number, numbers=numbers, count=count) -> Any:
                call = self._call(island, module, args, kwargs, (batch, numbers[path]))
                numbers[path] += 1
                if call is not None and serves(call.kind):
                    found.append(call)
                if numbers[path] == count:
                    raise _Stopped
                return island.run(module, args, kwargs)

            def replay(path, island, module, args, kwargs, batch=number, numbers=numbers) -> Any:
                key = (batch, numbers[path])
                numbers[path] += 1
                known = self._outputs[path].get(key)
                return island.run(module, args, kwargs) if known is None else known()

            self._run({path: collect, **dict.fromkeys(self._outputs, replay)}, batch)
        return found

    def _call(self, island: Island, module: nn.Module, args: tuple, kwargs: dict[str, Any], key: tuple[int, int]):
        found = find_capture(island, module, args, kwargs)
        if found is None:
            return None
        capture, inputs = found
        return Call(*key, [self.cache.copy(x) if isinstance(x, torch.Tensor) else x for x in inputs], id(capture))

    def finish(self, path: str, outputs: dict[tuple[int, int], Callable[[], Any]]) -> None:
        """Have an island give known outputs from now on.

        Args:
            path: The island.
            outputs: By batch and number of the call, what makes its output.
        """
        self._outputs[path] = outputs

    @torch.no_grad()
    def _run(self, handlers: dict[str, Callable[..., Any]], batch: Any) -> None:
        originals = {path: Island.of(self.islands[path]) for path in handlers}
        try:
            for path, handler in handlers.items():
                Tap(originals[path], _bound(handler, path)).install(self.islands[path])
            self.step(batch)
        except _Stopped:
            pass
        finally:
            for path, island in originals.items():
                island.install(self.islands[path])


def _bound(handler: Callable[..., Any], path: str) -> Callable[..., Any]:
    return lambda *call: handler(path, *call)


def find_capture(island: Island, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Find the variant and capture that serve a call, and the inputs of its graph; None: it runs in float."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    variant: Variant | None = next((v for v in island.variants if v.signature.accepts(leaves, spec)), None)
    if variant is None:
        return None
    inputs = [leaves[i] for i in variant.signature.inputs]
    capture: Capture | None = variant.find(module, inputs)
    return None if capture is None else (capture, inputs)
