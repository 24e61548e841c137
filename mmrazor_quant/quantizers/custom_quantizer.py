"""The quantizer: captures a model, folds its batch norms, inserts fake quantizers, converts the result."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from mmrazor_quant.arguments import check_flag
from mmrazor_quant.backends import BACKENDS
from mmrazor_quant.backends.rules import RESIDUAL, Rules
from mmrazor_quant.codebases import Example
from mmrazor_quant.fake_quants import DynamicFakeQuantize, FakeQuantize
from mmrazor_quant.graph.convert import baked_parameters, convert_graph, convert_weights
from mmrazor_quant.graph.decompose import decompose_attention
from mmrazor_quant.graph.fold import find_foldable, fold
from mmrazor_quant.graph.insert import Inserted, MakeQuantizer, Plan, insert
from mmrazor_quant.graph.lower import lower
from mmrazor_quant.graph.multihead import decompose_multihead
from mmrazor_quant.graph.sites import Site, find_sites
from mmrazor_quant.observers import RangeObserver
from mmrazor_quant.registry import MODELS, TASK_UTILS
from mmrazor_quant.tracing.finder import Findings, capture_graph, find_islands
from mmrazor_quant.tracing.island import Island, islands_of

from .qconfig import QConfig, TensorConfig


@MODELS.register_module()
class CustomQuantizer:
    """Quantizes a model as a ``qconfig`` and a backend's table say.

    Args:
        qconfig: see :class:`QConfig`; None for 8-bit weights per channel and 8-bit activations per tensor.
        is_qat: whether weights will be trained (kept for the configs of the RFC; both ways prepare the same model).
        skipped_methods: dotted paths of methods that tracing keeps opaque.
        backend: name of the table that says where quantizers go.
        quantize_add: whether the inputs of additions of two tensors are quantized too, where the backend leaves it
            open.
        bn_folding: statistics that batch norms are folded into weights with while they learn: ``'running'`` ones, or
            those of the ``'batch'`` (Jacob et al. 2018, with each layer computed twice). Frozen ones and evaluation
            always use the running ones.
        quantize_bias: whether biases, and what folded batch norms leave of them, are quantized to int32 with the
            product of the scales of input and weight, as integer arithmetic needs them. Always, where the backend
            does so.
        tracer: config of the tracer.

    Raises:
        ValueError: a field that is unknown or that the backend cannot run.
    """

    def __init__(
        self,
        qconfig: Mapping[str, Any] | None = None,
        is_qat: bool = True,
        skipped_methods: Iterable[str] = (),
        backend: str = 'academic',
        quantize_add: bool = False,
        bn_folding: str = 'running',
        quantize_bias: bool = False,
        tracer: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ValueError(f'quantizer.backend: one of {sorted(BACKENDS)} wanted, got {backend!r}')
        self.rules = BACKENDS[backend]
        add = check_flag('quantizer.quantize_add', quantize_add)
        self.kinds = set(self.rules.quantized) | ({'add'} if add else set())
        self.qconfig = QConfig({} if qconfig is None else qconfig)
        self.fold_batch = _check_bn_folding(bn_folding) == 'batch'
        self.quantize_bias = check_flag('quantizer.quantize_bias', quantize_bias) or self.rules.quantize_bias
        for config in self.qconfig.all_tensor_configs():
            # Unknown types and arguments show before the model is captured.
            quantizer = config.build()
            self.rules.limits(config.kind).check(config.scheme, f'{config.field}_qscheme', backend)
            if config.kind == 'a':
                _check_dynamic(quantizer, config, self.rules)
            else:
                _check_weight_axis(config, self.rules, self.quantize_bias)
            if self.quantize_bias and config.kind == 'a':
                _check_bias_input(quantizer, config)
        self.is_qat = is_qat
        tracer = dict(tracer or dict(type='mmrazor.CustomTracer'))
        skipped = [skipped_methods] if isinstance(skipped_methods, str) else list(skipped_methods or ())
        self.tracer = TASK_UTILS.build({**tracer, 'skipped_methods': skipped})

    def __deepcopy__(self, memo: dict[int, Any]) -> CustomQuantizer:
        # It holds nothing of a model; copies of a model (EMA, convert) share it.
        return self

    def prepare(self, model: nn.Module, examples: list[Example]) -> tuple[Findings, Inserted]:
        """Captures the islands of ``model`` in place, folds them and inserts fake quantizers.

        Args:
            model: the float architecture; its parameters and their names stay.
            examples: inputs that the model runs on.

        Returns:
            What was captured, and the quantizers inserted.

        Raises:
            ValueError: nothing of the model could be captured, or an override of the qconfig matches no layer.
        """
        findings = find_islands(model, [example.run for example in examples], self.tracer)
        if not findings.islands:
            reasons = '; '.join(f'{path}: {error}' for path, error in findings.failures.items())
            raise ValueError(f'architecture: no module with layers to quantize could be captured. {reasons}')
        inserted = Inserted()
        self.qconfig.start_matching()
        shared = _shared_modules(model, list(findings.islands))
        for path, island in findings.islands.items():
            module = model.get_submodule(path)
            plan = Plan(
                self.fuse(island, module, shared), self.fold_batch, self.quantize_bias,
                residual_only=self.rules.add_inputs == RESIDUAL, quantize_results=self.rules.quantize_results,
                every_result=self.rules.every_result,
                is_last=not findings.called or f'{findings.called[-1]}.'.startswith(f'{path}.' if path else ''),
            )  # fmt: skip
            island.map_graphs(
                functools.partial(
                    _insert, root=module, prefix=path, make=self._maker(model, path, findings.called),
                    inserted=inserted, plan=plan,
                ),
                functools.partial(lower, root=module),
            )  # fmt: skip
            island.recapture = functools.partial(self._recapture, plan, island.entries)
            island.install(module)
        self.qconfig.check_matched(findings.called)
        return findings, inserted

    def fuse(self, island: Island, module: nn.Module, shared: frozenset[nn.Module] = frozenset()) -> dict[str, str]:
        """Takes fused attention apart and folds batch norms, in the graphs of one island.

        Args:
            island: what was captured of the module.
            module: the module.
            shared: modules that other islands use too; nothing is folded into them.

        Returns:
            The folded pairs of layer and batch norm.
        """
        island.map_graphs(lambda graph: _decompose(graph, module))
        pairs = find_foldable(list(island.graphs()), module)
        pairs = {
            layer: norm for layer, norm in pairs.items() if not {*map(module.get_submodule, (layer, norm))} & shared
        }
        island.map_graphs(lambda graph: fold(graph, module, pairs))
        return pairs

    def _recapture(
        self,
        plan: Plan,
        entries: frozenset[str],
        module: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        dynamic: frozenset[int],
    ) -> fx.Graph:
        """Makes the graph for a call of a new kind or size, with the quantizers that there are."""
        graph = capture_graph(self.tracer, module, args, kwargs, dynamic, entries)
        graph = fold(_decompose(graph, module), module, plan.folded)
        unseen = {s.owner for s in find_sites(graph, module) if s.kind in self.kinds} - {
            path.rpartition('.')[0] for path in plan.seen
        }
        if unseen:
            warnings.warn(
                f'the example inputs did not reach {", ".join(sorted(unseen))}; quantization leaves it in float',
                stacklevel=2,
            )
        return insert(graph, module, '', lambda *_: None, Inserted(), plan)

    def convert(self, model: nn.Module) -> nn.Module:
        """Returns a copy of a prepared model with batch norms and quantized weights baked in.

        Activations are quantized and dequantized by explicit operations; no fake quantizer is left in the graphs.

        Args:
            model: prepared architecture, calibrated or trained.
        """
        return _converted(model, explicit=True)

    def bake(self, model: nn.Module) -> nn.Module:
        """Returns a copy as :meth:`convert` does, but with the activation quantizers left as they are.

        Args:
            model: prepared architecture, calibrated or trained.
        """
        return _converted(model, explicit=False)

    def _maker(self, model: nn.Module, prefix: str, layers: list[str]) -> MakeQuantizer:
        def make(site: Site, kind: str, shape: tuple[int, ...], axis: int) -> nn.Module | None:
            if site.kind not in self.kinds:
                return None
            path = f'{prefix}.{site.owner}'.strip('.')
            config = self.qconfig.resolve(path, model.get_submodule(path), site.kind, _orders(path, layers))[kind]
            if config is None:
                return None
            scheme = config.scheme
            if kind == 'w' and scheme.is_per_channel and not config.has_axis:
                scheme = dataclasses.replace(scheme, ch_axis=axis)
            quantizer = config.build(scheme)
            quantizer.config = (config.fake_quant, config.observer, scheme)
            if scheme.is_per_channel and hasattr(quantizer, 'set_channels'):
                quantizer.set_channels(_channels(shape, scheme.ch_axis, path, config.field))
            _tell_role(quantizer, is_weight=kind == 'w' and (site.weight is None or site.weight.op == 'get_attr'))
            parameter = next(model.parameters(), None)
            return quantizer if parameter is None else quantizer.to(parameter.device)

        return make


def _check_bn_folding(value: Any) -> str:
    if value not in ('running', 'batch'):
        raise ValueError(f"quantizer.bn_folding: got {value!r}, allowed: 'running', 'batch'")
    return value


def _check_dynamic(quantizer: nn.Module, config: TensorConfig, rules: Rules) -> None:
    is_dynamic = isinstance(quantizer, DynamicFakeQuantize)
    field, where = f'{config.field}_fake_quant', f"allowed with quantizer.backend='{rules.name}'"
    if is_dynamic not in rules.is_dynamic:
        allowed = 'mmrazor.DynamicFakeQuantize' if rules.is_dynamic == (True,) else 'static ones'
        raise ValueError(f'{field}.type: got {type(quantizer).__name__}, {where}: {allowed}')
    if is_dynamic and quantizer.share not in rules.shares:
        raise ValueError(f'{field}.share: got {quantizer.share!r}, {where}: {", ".join(map(repr, rules.shares))}')


def _check_weight_axis(config: TensorConfig, rules: Rules, quantize_bias: bool) -> None:
    if not (config.has_axis and config.scheme.is_per_channel):
        return
    got = f'{config.field}_qscheme.ch_axis: got {config.scheme.ch_axis}, allowed with'
    if not rules.any_weight_axis:
        raise ValueError(f"{got} quantizer.backend='{rules.name}': to leave it out (the output channels)")
    if quantize_bias:
        raise ValueError(
            f'{got} quantizer.quantize_bias: to leave it out (an integer bias has the scales of the output channels)'
        )


def _check_bias_input(quantizer: nn.Module, config: TensorConfig) -> None:
    if config.scheme.is_per_channel:
        raise ValueError(
            f'{config.field}_qscheme.is_per_channel: got True, allowed with quantizer.quantize_bias: False '
            '(an integer bias needs one scale of the input)'
        )
    if isinstance(quantizer, DynamicFakeQuantize):
        raise ValueError(
            f'{config.field}_fake_quant.type: got DynamicFakeQuantize, allowed with quantizer.quantize_bias: '
            'static ones (an integer bias is made before there is an input)'
        )


def _channels(shape: tuple[int, ...], axis: int, path: str, field: str) -> int:
    if axis >= len(shape):
        raise ValueError(
            f'{field}_qscheme.ch_axis: got {axis}, allowed for {path}, whose tensor has {len(shape)} dimensions: '
            f'0 to {len(shape) - 1}'
        )
    return shape[axis]


def _tell_role(quantizer: nn.Module, is_weight: bool) -> None:
    """Tells a fake quantizer where the samples are, and its observer whether processes see different data."""
    if isinstance(quantizer, FakeQuantize):
        quantizer.batch_axis = None if is_weight else 0
        if isinstance(quantizer.activation_post_process, RangeObserver):
            quantizer.activation_post_process.is_joint = not is_weight


def _shared_modules(model: nn.Module, islands: list[str]) -> frozenset[nn.Module]:
    """Returns the modules that are part of more than one island, those of an island inside another counted once."""
    parts = {path: set(model.get_submodule(path).modules()) for path in islands}
    for outer in islands:
        for inner in islands:
            if inner != outer and f'{inner}.'.startswith(f'{outer}.' if outer else ''):
                parts[outer] = parts[outer] - parts[inner]
    counts = Counter(module for modules in parts.values() for module in modules)
    return frozenset(module for module, count in counts.items() if count > 1)


def _insert(graph: fx.Graph, **kwargs: Any) -> fx.Graph:
    return insert(copy.deepcopy(graph), **kwargs)


def _orders(path: str, layers: list[str]) -> frozenset[str]:
    found = {'first'} if layers and path == layers[0] else set()
    return frozenset(found | ({'last'} if layers and path == layers[-1] else set()))


def _converted(model: nn.Module, explicit: bool) -> nn.Module:
    model = copy.deepcopy(model).eval()
    for quantizer in model.modules():
        if isinstance(quantizer, FakeQuantize):
            quantizer.settle()
    for module in islands_of(model).values():
        island = Island.of(module)
        graphs = list(island.graphs())
        baked = baked_parameters(graphs, module)
        island.map_graphs(functools.partial(convert_graph, root=module, baked=baked, explicit=explicit))
        convert_weights(graphs, module, baked)
        island.recapture = functools.partial(_recapture_converted, island.recapture, baked, explicit)
    return model


def _recapture_converted(
    recapture: Callable[..., fx.Graph], baked: dict[str, str], explicit: bool, module: nn.Module, *call: Any
) -> fx.Graph:
    return convert_graph(recapture(module, *call), module, baked, explicit)


def _decompose(graph: fx.Graph, module: nn.Module) -> fx.Graph:
    return decompose_attention(decompose_multihead(graph, module))
