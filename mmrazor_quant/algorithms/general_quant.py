"""The algorithm: an OpenMMLab model whose convolutions, linear layers and matrix products are quantized."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from torch import nn

from mmrazor_quant.algorithms.distillation import Distillation
from mmrazor_quant.codebases import build_examples, has_modes
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.engine.checkpoint import check_checkpoint, check_checkpoint_matches
from mmrazor_quant.fake_quants.learned import LearnedFakeQuantize
from mmrazor_quant.fake_quants.saved import ABSENT
from mmrazor_quant.graph.channel_clip import follow_state_dict
from mmrazor_quant.graph.layers import BATCH_NORM_TYPES
from mmrazor_quant.observers import RangeObserver
from mmrazor_quant.registry import MODELS
from mmrazor_quant.tracing.report import CaptureReport

_PREFIX = 'architecture.'


@MODELS.register_module()
class GeneralQuant(BaseModel):
    """Wraps a model and quantizes it in place.

    The architecture keeps its class, its submodules, their paths and the names of its parameters; the state dict of
    this model is that of the float model with the quantization parameters beside it, so that a float checkpoint
    loads into it as it is.

    Args:
        architecture: config of the model, or the built model: an OpenMMLab model with its modes ``loss``, ``predict``
            and ``tensor``, or any module (which has no loss, and so cannot be trained by mmengine's loops).
        quantizer: config of the quantizer, or the built quantizer.
        data_preprocessor: config for the architecture's data preprocessor where it names none (mmengine passes the
            one at the top of a config).
        input_shape: shape (channels, height, width) of an example image to capture with; None: what the model says,
            else common sizes.
        float_checkpoint: path of a float checkpoint to load before quantization.
        distillation: arguments of :class:`.distillation.Distillation` beside the teacher, which is the float model
            (with ``float_checkpoint``, or a built one): in training its outputs are a target. None: they are not.
        init_cfg: mmengine's initialisation config.

    Raises:
        TypeError: an architecture that is neither a config nor a module, or an unknown field.
        FileNotFoundError: no file at ``float_checkpoint``.
        ValueError: a field of the quantizer, an input shape that the model does not run on, or a ``float_checkpoint``
            that is damaged or of another model.

    Example:
        >>> model = dict(
        ...     _delete_=True,
        ...     type='mmrazor.GeneralQuant',
        ...     architecture=_base_.model,
        ...     quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=dict(w_qscheme=dict(bit=4))),
        ... )
    """

    def __init__(
        self,
        architecture: Mapping[str, Any] | nn.Module,
        quantizer: Mapping[str, Any] | Any = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] | None = None,
        float_checkpoint: str | None = None,
        distillation: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            hint = 'a config that inherits a float model needs _delete_=True in model'
            raise TypeError(f'model: GeneralQuant has no field {", ".join(sorted(unknown))}; {hint}')
        if distillation is not None and float_checkpoint is None and not isinstance(architecture, nn.Module):
            raise ValueError(
                'model.float_checkpoint: got None, allowed with model.distillation: a float checkpoint, whose weights '
                'the teacher gets'
            )
        quantizer = _build_quantizer(quantizer)
        architecture = _build_architecture(architecture, data_preprocessor)
        has_preprocessor = hasattr(architecture, 'data_preprocessor')
        super().__init__(None if has_preprocessor else data_preprocessor, init_cfg)
        if has_preprocessor:
            del self._modules['data_preprocessor']
        self.quantizer, self.architecture = quantizer, architecture
        self.float_checkpoint = float_checkpoint
        if float_checkpoint is not None:
            _load_float(self.architecture, float_checkpoint)
        self.distillation = None if distillation is None else _build_distillation(self.architecture, distillation)
        self.findings, self.inserted = self.quantizer.prepare(
            self.architecture, build_examples(self.architecture, input_shape)
        )
        # Not every observer of torch or of a user can forget what it saw.
        observers = {path: _observer(quantizer) for path, quantizer in self._quantizers()}
        self._fresh = {p: copy.deepcopy(o) for p, o in observers.items() if not isinstance(o, RangeObserver)}
        self.register_buffer('quant_calibrated', torch.zeros(1, dtype=torch.uint8))
        self.register_state_dict_post_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.register_load_state_dict_pre_hook(_follow)
        self.register_load_state_dict_post_hook(_take_over)
        self.unmatched: dict[str, str] = {}
        self.set_quant_state(False, False, False, False)
        print_log(f'Quantized model:\n{self.capture_report().table()}', logger='current')

    # -- an OpenMMLab model ----------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # Hooks and tools reach for parts of the model (model.backbone, model.bbox_head, ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'architecture':
                raise
            return getattr(self.architecture, name)

    def forward(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the architecture.

        Args:
            inputs: images.
            *args: the architecture's further arguments, such as the data samples.
            **kwargs: the same by name, and ``mode``: ``loss``, ``predict`` or ``tensor``. A module without modes is
                given the inputs alone.

        Raises:
            TypeError: mode ``loss`` of a module without modes.
        """
        wants_loss = 'loss' in (args[1:2] or (kwargs.get('mode'),))
        if wants_loss and self.training and self.distillation is not None and has_modes(self.architecture):
            return self.distillation.losses(self.architecture, inputs, *args, **kwargs)
        if has_modes(self.architecture):
            return self.architecture(inputs, *args, **kwargs)
        if wants_loss:
            raise TypeError(
                f"architecture: mode 'loss' wanted of a {type(self.architecture).__name__}, which has no modes; "
                'derive it from mmengine.model.BaseModel'
            )
        return self.architecture(inputs)

    def init_weights(self) -> None:
        """Initialises the architecture, unless its weights came from ``float_checkpoint``."""
        if self.float_checkpoint is None:
            super().init_weights()

    # -- state of the quantizers -----------------------------------------------------------------------------------

    def weight_quantizers(self) -> Iterator[tuple[str, FakeQuantizeBase]]:
        """Yields path and module of every weight quantizer."""
        for site in self.inserted.weights:
            yield site.quantizer, self.architecture.get_submodule(site.quantizer)

    def act_quantizers(self) -> Iterator[tuple[str, FakeQuantizeBase]]:
        """Yields path and module of every activation quantizer."""
        for path in self.inserted.activations:
            yield path, self.architecture.get_submodule(path)

    def _quantizers(self) -> Iterator[tuple[str, FakeQuantizeBase]]:
        yield from self.weight_quantizers()
        yield from self.act_quantizers()

    def set_quant_state(
        self,
        weight_observer: bool | None = None,
        weight_fake_quant: bool | None = None,
        act_observer: bool | None = None,
        act_fake_quant: bool | None = None,
    ) -> None:
        """Switches observers and fake quantizers on or off.

        Args:
            weight_observer: whether weight ranges follow the weights; None leaves it.
            weight_fake_quant: whether weights are quantized; None leaves it.
            act_observer: whether activation ranges are observed; None leaves it.
            act_fake_quant: whether activations are quantized; None leaves it.
        """
        for quantizers, observer, fake_quant in (
            (self.weight_quantizers(), weight_observer, weight_fake_quant),
            (self.act_quantizers(), act_observer, act_fake_quant),
        ):
            for _, quantizer in quantizers:
                if observer is not None:
                    quantizer.enable_observer(observer)
                if fake_quant is not None:
                    quantizer.enable_fake_quant(fake_quant)

    @torch.no_grad()
    def observe_weights(self) -> None:
        """Computes the qparams of all weights, with batch norms folded in, from their present values.

        Raises:
            ValueError: NaN or Inf in a weight, naming its quantizer.
        """
        for site in self.inserted.weights:
            quantizer = self.architecture.get_submodule(site.quantizer)
            self._reset(site.quantizer, quantizer)
            _observer(quantizer)(site.value(self.architecture))
            _compute(site.quantizer, quantizer)

    def compute_act_qparams(self) -> None:
        """Computes the qparams of all activations from what their observers saw.

        Raises:
            ValueError: NaN, Inf or no data at all, naming the quantizer.
        """
        for path, quantizer in self.act_quantizers():
            _compute(path, quantizer)

    def reset_observers(self) -> None:
        """Forgets what all observers saw."""
        for path, quantizer in self._quantizers():
            self._reset(path, quantizer)

    def _reset(self, path: str, quantizer: FakeQuantizeBase) -> None:
        observer = _observer(quantizer)
        if isinstance(observer, RangeObserver):
            observer.reset()
        else:
            vars(observer).update(copy.deepcopy(vars(self._fresh[path])))
            observer.to(quantizer.scale.device)

    @property
    def is_calibrated(self) -> bool:
        """Whether the quantization parameters are set (by calibration, training, or a quantized checkpoint)."""
        return bool(self.quant_calibrated.item())

    def mark_calibrated(self) -> None:
        """Records, in the state dict too, that the quantization parameters are set."""
        self.quant_calibrated.fill_(1)

    def freeze_bn(self, frozen: bool = True) -> None:
        """Lets batch norms use and keep their running statistics, or learn from the batch again."""
        for module in self.architecture.modules():
            if isinstance(module, BATCH_NORM_TYPES):
                module.train(self.training and not frozen)

    # -- results ---------------------------------------------------------------------------------------------------

    def capture_report(self) -> CaptureReport:
        """Returns which islands were captured and which layers are outside."""
        return CaptureReport.of(self.architecture, self.findings)

    def quantizable_report(self) -> list[dict[str, Any]]:
        """Returns the rows of the capture report."""
        return self.capture_report().rows()

    def convert(self) -> nn.Module:
        """Returns a copy of the architecture with baked weights and explicit quantize/dequantize operations.

        Raises:
            RuntimeError: the model is not calibrated.
        """
        return self.quantizer.convert(self._quantized_copy('convert'))

    def bake(self) -> nn.Module:
        """Returns a copy of the architecture with baked weights whose activation quantizers are the modules they were.

        Raises:
            RuntimeError: the model is not calibrated.
        """
        return self.quantizer.bake(self._quantized_copy('bake'))

    def _quantized_copy(self, action: str) -> nn.Module:
        if not self.is_calibrated:
            raise RuntimeError(f'{action}: the model is not calibrated; run PTQ, QAT, or load a quantized checkpoint')
        model = copy.deepcopy(self)
        model.set_quant_state(False, True, False, True)
        return model.architecture


def _build_quantizer(quantizer: Any) -> Any:
    if quantizer is None:
        quantizer = dict(type='mmrazor.CustomQuantizer')
    if isinstance(quantizer, Mapping):
        return MODELS.build(quantizer)
    if not callable(getattr(quantizer, 'prepare', None)):
        raise TypeError(f'quantizer: a config or a quantizer wanted, got {type(quantizer).__name__}')
    return quantizer


def _build_architecture(
    architecture: Mapping[str, Any] | nn.Module, data_preprocessor: Mapping[str, Any] | None
) -> nn.Module:
    if isinstance(architecture, Mapping):
        architecture = copy.deepcopy(architecture)
        if data_preprocessor is not None and _takes_preprocessor(architecture):
            architecture.setdefault('data_preprocessor', data_preprocessor)
        architecture = MODELS.build(architecture)
    if not isinstance(architecture, nn.Module):
        raise TypeError(f'architecture: a config or a torch.nn.Module wanted, got {type(architecture).__name__}')
    return architecture


def _build_distillation(architecture: nn.Module, config: Mapping[str, Any]) -> Distillation:
    try:
        return Distillation(architecture, **config)
    except TypeError as error:
        raise TypeError(f'model.distillation: got {dict(config)!r}: {error}') from error


def _takes_preprocessor(architecture: Mapping[str, Any]) -> bool:
    """Tells whether what a config names is an mmengine model; any other module has no preprocessor."""
    kind = architecture.get('type')
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(architecture.get('_scope_')) as registry:
            kind = registry.get(kind)
    return not isinstance(kind, type) or issubclass(kind, BaseModel)


def _load_float(architecture: nn.Module, path: str) -> None:
    field = 'float_checkpoint'
    check_checkpoint(path, field)
    checkpoint = load_checkpoint(architecture, path, map_location='cpu')
    try:
        check_checkpoint_matches(checkpoint, architecture)
    except ValueError as error:
        raise ValueError(f'{field}: {path}: {error}') from error


def _observer(quantizer: FakeQuantizeBase) -> nn.Module:
    """Returns the observer (torch's own fake quantizer keeps it as ``activation_post_process``)."""
    return quantizer.activation_post_process


def _compute(path: str, quantizer: FakeQuantizeBase) -> None:
    try:
        _check_observed(_observer(quantizer))
        if hasattr(quantizer, 'compute_qparams'):
            quantizer.compute_qparams()
        else:
            scale, zero_point = quantizer.calculate_qparams()
            quantizer.scale.resize_(scale.shape).copy_(scale)
            quantizer.zero_point.resize_(zero_point.shape).copy_(zero_point)
        if not bool(torch.isfinite(quantizer.scale).all()):
            raise ValueError(f'the scale is {quantizer.scale.tolist()}')
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def _check_observed(observer: nn.Module) -> None:
    """Refuses what torch's own observers turn into some scale or other; those of this package refuse it themselves."""
    low, high = getattr(observer, 'min_val', None), getattr(observer, 'max_val', None)
    if isinstance(observer, RangeObserver) or not isinstance(low, torch.Tensor) or not isinstance(high, torch.Tensor):
        return
    if low.numel() == 0 or bool((low > high).any()):
        raise ValueError('no data were observed')
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise ValueError('the observed data contain NaN or infinite values')


def _strip_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Names the architecture's entries as the float model does."""
    _rename(state_dict, prefix + _PREFIX, prefix)


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {prefix + name for name, _ in module.named_buffers(recurse=False)}
    # Of a module without modes the preprocessor is not the architecture's, but this model's.
    own_children = tuple(f'{prefix}{name}.' for name in module._modules)
    for key in [k for k in state_dict if k.startswith(prefix) and k not in own]:
        if not key.startswith(own_children):
            state_dict[prefix + _PREFIX + key[len(prefix) :]] = state_dict.pop(key)


def _follow(module: GeneralQuant, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Has the architecture the modules that the checkpoint, named as the architecture's by now, has entries for."""
    follow_state_dict(module.architecture, state_dict, prefix + _PREFIX)


def _take_over(module: GeneralQuant, incompatible: Any) -> None:
    """Finds out which quantizers a checkpoint has set; unless it is all or none of them, the model is uncalibrated."""
    quantizers, missing = dict(module._quantizers()), set(incompatible.missing_keys)
    absent = {path for path in quantizers if f'{_PREFIX}{path}.scale' in missing}
    if absent == quantizers.keys() and 'quant_calibrated' in missing:  # a float checkpoint
        module.unmatched = {}
        own = tuple(name for name, _ in module.named_buffers(recurse=False))
        _forgive(incompatible.missing_keys, (*(f'{_PREFIX}{path}.' for path in quantizers), *own))
        return
    found = {path: getattr(quantizer, 'mismatch', None) for path, quantizer in quantizers.items()}
    reasons = {path: found[path] or ABSENT for path in quantizers if found[path] or path in absent}
    module.unmatched = reasons
    if not module.is_calibrated:
        return
    if reasons:
        module.quant_calibrated.zero_()
        path, reason = next(iter(reasons.items()))
        print_log(
            f'The quantization parameters of the checkpoint do not fit this model, which has to be calibrated anew: '
            f'{len(reasons)} of {len(quantizers)} quantizers differ; {path}: {reason}',
            logger='current',
            level=logging.WARNING,
        )
        return
    for path, quantizer in quantizers.items():
        if isinstance(quantizer, LearnedFakeQuantize) and quantizer.was_plain:
            quantizer.set_qparams(quantizer.scale.detach().clone(), quantizer.zero_point.clone())
            _forgive(incompatible.missing_keys, (f'{_PREFIX}{path}.',))


def _forgive(missing: list[str], prefixes: tuple[str, ...]) -> None:
    missing[:] = [key for key in missing if not key.startswith(prefixes)]


def _rename(state_dict: dict[str, Any], old: str, new: str) -> None:
    for key in [k for k in state_dict if k.startswith(old)]:
        state_dict[new + key[len(old) :]] = state_dict.pop(key)
