"""What a user's ``qconfig`` says: how weights and activations are quantized, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmrazor_quant.arguments import require
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.fake_quants.build import build_fake_quant
from mmrazor_quant.qscheme import QScheme

FLOAT = 'float'
FIELDS = ('w_observer', 'a_observer', 'w_fake_quant', 'a_fake_quant', 'w_qscheme', 'a_qscheme')
MATCHERS = ('name', 'type', 'order')
ORDERS = ('first', 'last')

_DEFAULTS: dict[str, Any] = dict(
    w_observer=dict(type='mmrazor.MinMaxObserver'),
    a_observer=dict(type='mmrazor.EMAMinMaxObserver'),
    w_fake_quant=dict(type='mmrazor.FakeQuantize'),
    a_fake_quant=dict(type='mmrazor.FakeQuantize'),
    w_qscheme=dict(bit=8, is_symmetry=True, is_per_channel=True),
    a_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=False),
)


@dataclass(frozen=True)
class TensorConfig:
    """How one kind of tensor is quantized.

    Args:
        observer: config of the observer.
        fake_quant: config of the fake quantizer.
        scheme: bits, symmetry, granularity.
        field: where in the user's config it stands, for messages, such as ``qconfig.w``.
        kind: ``'w'`` for weights, ``'a'`` for activations.
        has_axis: whether the config names the dimension of the channels.
    """

    observer: dict[str, Any]
    fake_quant: dict[str, Any]
    scheme: QScheme
    field: str
    kind: str
    has_axis: bool = False

    def build(self, scheme: QScheme | None = None) -> FakeQuantizeBase:
        """Builds the fake quantizer.

        Args:
            scheme: scheme to use instead, with the channel axis of a layer.
        """
        return build_fake_quant(self.fake_quant, self.observer, scheme or self.scheme, self.field, self.kind)


class QConfig:
    """A parsed ``qconfig``.

    Args:
        cfg: dict with ``qtype='affine'``, ``w_observer``, ``a_observer``, ``w_fake_quant``, ``a_fake_quant``,
            ``w_qscheme``, ``a_qscheme`` (a dict, or ``'float'``) and ``overrides``: a list of dicts, each with one or
            more of ``name`` (pattern of module paths), ``type`` (class name of a layer, or ``'matmul'``, ``'einsum'``,
            ``'add'``) and ``order`` (``'first'`` or ``'last'`` layer), and any of the fields above. A scheme in an
            override changes only the entries that it names, as one of the base does to the default. Later overrides
            win.

    Raises:
        ValueError: an unknown field or value, naming it.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        require(isinstance(cfg, Mapping), 'qconfig', cfg, 'a dict')
        cfg = dict(cfg)
        qtype = cfg.pop('qtype', 'affine')
        if qtype != 'affine':
            raise ValueError(f"qconfig.qtype: 'affine' is what is supported, got {qtype!r}")
        self.overrides = [_override(item, i) for i, item in enumerate(_list(cfg.pop('overrides', [])))]
        self._base = _merge(_DEFAULTS, _known(cfg, 'qconfig'))
        self._matched: set[int] = set()
        self.all_tensor_configs()

    def all_tensor_configs(self) -> list[TensorConfig]:
        """Returns the configs of the base and of each override on it."""
        places = [(self._base, 'qconfig')]
        places += [(_merge(self._base, o), f'qconfig.overrides[{i}]') for i, o in enumerate(self.overrides)]
        configs = [config for fields, where in places for config in self._tensor_configs(fields, where).values()]
        return [config for config in configs if config is not None]

    def resolve(
        self, name: str, module: nn.Module, kind: str, orders: frozenset[str] = frozenset()
    ) -> dict[str, TensorConfig | None]:
        """Returns how one site is quantized.

        Args:
            name: path of the layer, or of the module in whose forward a function is called.
            module: that module.
            kind: kind of the site (``layer``, ``functional``, ``matmul``, ``einsum``, ``add``).
            orders: which of ``first`` and ``last`` the layer is.

        Returns:
            ``{'w': ..., 'a': ...}``, None where the tensor stays float.
        """
        merged, field = self._base, 'qconfig'
        for i, override in enumerate(self.overrides):
            if _matches(override, name, module, kind, orders):
                self._matched.add(i)
                merged, field = _merge(merged, override), f'qconfig.overrides[{i}]'
        return self._tensor_configs(merged, field)

    def start_matching(self) -> None:
        """Forgets which overrides applied to the layers of another model."""
        self._matched.clear()

    def check_matched(self, layers: list[str]) -> None:
        """Raises ValueError for an override that applied to nothing since :meth:`start_matching`.

        Args:
            layers: paths of the layers there were, for the message.
        """
        for i, override in enumerate(self.overrides):
            if i not in self._matched:
                what = {key: override[key] for key in MATCHERS if key in override}
                shown = ', '.join(layers[:8]) + (', ...' if len(layers) > 8 else '')
                raise ValueError(f'qconfig.overrides[{i}]: {what} matches no quantizable layer; there are: {shown}')

    @staticmethod
    def _tensor_configs(fields: Mapping[str, Any], where: str) -> dict[str, TensorConfig | None]:
        return {kind: _tensor_config(fields, kind, where) for kind in ('w', 'a')}


def _tensor_config(fields: Mapping[str, Any], kind: str, where: str) -> TensorConfig | None:
    scheme = fields[f'{kind}_qscheme']
    if scheme == FLOAT:
        return None
    if not isinstance(scheme, Mapping):
        raise ValueError(f"{where}.{kind}_qscheme: a dict or 'float' wanted, got {scheme!r}")
    # Unless told otherwise, the channels of activations are their dimension 1; those of weights the layer knows.
    axis = dict(ch_axis=1) if kind == 'a' and scheme.get('is_per_channel') else {}
    parsed = QScheme.from_cfg({**axis, **scheme}, f'{where}.{kind}_qscheme')
    observer, fake_quant = dict(fields[f'{kind}_observer']), dict(fields[f'{kind}_fake_quant'])
    return TensorConfig(observer, fake_quant, parsed, f'{where}.{kind}', kind, 'ch_axis' in scheme)


def _known(cfg: Mapping[str, Any], where: str, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    allowed = (*FIELDS, *extra)
    for key, value in cfg.items():
        if key not in allowed:
            own = ('qtype', *allowed, 'overrides') if where == 'qconfig' else allowed
            raise ValueError(f'{where}: unknown field {key!r}; the fields are {", ".join(own)}')
        if key.endswith(('_observer', '_fake_quant')):
            _check_class(value, f'{where}.{key}')
    return dict(cfg)


def _check_class(cfg: Any, where: str) -> None:
    require(isinstance(cfg, Mapping) and 'type' in cfg, where, cfg, 'a dict with a type')
    require(isinstance(cfg['type'], (str, type)), f'{where}.type', cfg['type'], 'the name of a class, or a class')


def _override(item: Any, index: int) -> dict[str, Any]:
    where = f'qconfig.overrides[{index}]'
    if not isinstance(item, Mapping):
        raise ValueError(f'{where}: a dict wanted, got {item!r}')
    override = _known(item, where, MATCHERS)
    if not any(key in override for key in MATCHERS):
        raise ValueError(f'{where}: says for no layer that it applies; give one of {", ".join(MATCHERS)}')
    for key, allowed in (('name', 'a pattern of module paths'), ('type', 'the name of a class or function')):
        require(isinstance(override.get(key, ''), str), f'{where}.{key}', override.get(key), allowed)
    if override.get('order', 'first') not in ORDERS:
        raise ValueError(f'{where}.order: one of {ORDERS} wanted, got {override["order"]!r}')
    return override


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f'qconfig.overrides: a list of dicts wanted, got {value!r}')
    return list(value)


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key in FIELDS:
        if key not in override:
            continue
        both_schemes = key.endswith('_qscheme') and isinstance(override[key], Mapping) and merged[key] != FLOAT
        merged[key] = {**merged[key], **override[key]} if both_schemes else override[key]
    return merged


def _matches(override: Mapping[str, Any], name: str, module: nn.Module, kind: str, orders: frozenset[str]) -> bool:
    if 'name' in override and not fnmatchcase(name, override['name']):
        return False
    if 'type' in override and override['type'] not in {kind, *(c.__name__ for c in type(module).__mro__)}:
        return False
    return 'order' not in override or override['order'] in orders
