"""Every config resolves, names what exists, and its quantizer accepts what it says."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmcls.utils
import mmcv.ops
import mmdet.utils
import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import (
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    Registry,
)

import mmrazor_quant  # noqa: F401
from mmrazor_quant.engine.checkpoint import check_checkpoint

ROOT = Path(__file__).resolve().parents[2] / 'configs'
MODULES = {'examples/tinynet.py', 'examples/built_module.py'}
"""Python files beside the examples that are no configs."""

PATHS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob('*.py') if '_base_' not in p.parts)
# What stands in deploy/ is for mmdeploy, which has no registry for most of it.
CONFIGS = [name for name in PATHS if name not in MODULES and not name.startswith('deploy/')]
QUANTIZED = [name for name in CONFIGS if name.split('/')[0] in ('ptq', 'qat')]
STOCK = [name for name in QUANTIZED if 'benchmark' not in name]
NETWORKS = ['resnet18', 'resnet50', 'mobilenet-v2', 'mobilenet-v3-small', 'efficientnet-b0', 'repvgg-A0']
NETWORKS += ['vit-base-p16', 'swin-tiny', 'convnext-tiny']
DETECTORS = ['retinanet_r50', 'fcos_r50', 'atss_r50', 'yolox-nano', 'yolox-tiny', 'yolox-s', 'rtmdet-tiny', 'ssdlite']
DETECTORS += ['faster-rcnn_r50', 'mask-rcnn_r50', 'detr_r50']
PACKAGES = {'mmcls': mmcls, 'mmdet': mmdet}
BITS = {'lsq': ['w8a8', 'w4a4', 'w3a3', 'w2a2'], 'lsq_plus': ['w4a4', 'w2a2'], 'iao': ['w8a8']}
"""Of each method, that is of each folder of its configs."""
PARTS = ['data_preprocessor', 'backbone', 'neck', 'head']
PARTS += ['bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'encoder', 'decoder']
TASKS = {'anchor_generator', 'prior_generator', 'bbox_coder', 'assigner', 'sampler'}
"""Parts of detectors that are no modules."""


def scope_of(name: str) -> str:
    """Give the package that a config's network comes from, which its data tell."""
    return 'mmdet' if re.search(r'_coco\d*\.py$', name) else 'mmcls'


@pytest.fixture(autouse=True, scope='module')
def registered() -> None:
    """Have the modules of mmcls and mmdet in their registries."""
    mmcls.utils.register_all_modules(init_default_scope=False)
    mmdet.utils.register_all_modules(init_default_scope=False)


@functools.cache
def resolved(name: str) -> Config:
    """Load a config as the tools do, once for all tests."""
    return Config.fromfile(ROOT / name)


def load(name: str) -> Config:
    """Load a config; what a test changes in it is its own."""
    return copy.deepcopy(resolved(name))


def dicts_of(value: Any, name: str = '') -> Iterator[tuple[str, dict]]:
    """Yield all dicts in a config that have a type, each with the name of the entry that it stands in."""
    if isinstance(value, dict):
        if 'type' in value:
            yield name, value
        for key, each in value.items():
            if key != 'init_cfg':
                yield from dicts_of(each, key)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from dicts_of(each, name)


def check_types(registry: Registry, value: Any, scope: str) -> None:
    """Look every type in a part of a config up, as building it would."""
    for name, each in dicts_of(value):
        if name == 'roi_layer':
            assert hasattr(mmcv.ops, each['type']), each['type']
            continue
        own = TASK_UTILS if name in TASKS else registry
        with own.switch_scope_and_registry(each.get('_scope_', scope)) as scoped:
            assert scoped.get(each['type']) is not None, each['type']


@pytest.mark.parametrize('name', ['ptq/swin-tiny_w4a8_in1k.py', 'qat/benchmark/resnet20_w4a4_cifar10.py'])
def test_survives_a_dump(name, tmp_path):
    cfg = load(name)
    cfg.dump(tmp_path / 'dumped.py')

    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('name', CONFIGS)
def test_types_exist(name):
    cfg = load(name)
    model, scope = cfg.model.get('architecture', cfg.model), scope_of(name)

    assert cfg.default_scope == scope
    check_types(MODELS, {key: model[key] for key in ('type', *PARTS) if model.get(key)}, scope)
    check_types(OPTIMIZERS, cfg.get('optim_wrapper', {}).get('optimizer'), scope)
    check_types(PARAM_SCHEDULERS, cfg.get('param_scheduler'), scope)
    hooks = [*cfg.get('default_hooks', {}).values(), *cfg.get('custom_hooks', [])]
    check_types(HOOKS, [{'type': hook['type']} for hook in hooks if 'type' in hook], scope)
    loaders = [cfg[key] for key in ('train_dataloader', 'val_dataloader', 'test_dataloader') if cfg.get(key)]
    for dataset in [loader['dataset'] for loader in loaders]:
        check_types(DATASETS, {'type': dataset['type']}, scope)
        check_types(TRANSFORMS, dataset.get('pipeline'), scope)
    check_types(METRICS, [cfg.get('val_evaluator'), cfg.get('test_evaluator')], scope)


@pytest.mark.parametrize('name', [name for name in CONFIGS if '_w' in name])
def test_quantizer_accepts_its_qconfig(name):
    cfg = load(name)

    assert cfg.model.type == 'mmrazor.GeneralQuant'
    quantizer = MODELS.build(cfg.model.quantizer)
    schemes = [config.scheme for config in quantizer.qconfig.all_tensor_configs()[:2]]
    bits = re.search(r'_w(\d+)a(\d+)', name).groups()
    assert [scheme.bit for scheme in schemes] == [int(bit) for bit in bits]


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('field', ['train_cfg', 'test_cfg'])
def test_loops_take_their_arguments(name, field):
    loop = load(name).get(field, {}).copy()
    kind = loop.pop('type', None)
    loop.pop('_scope_', None)
    is_ptq, is_qat = name.startswith('ptq/') and field == 'test_cfg', name.startswith('qat/') and field == 'train_cfg'

    assert (kind == 'mmrazor.PTQLoop') or not is_ptq
    assert (kind == 'mmrazor.QATEpochBasedLoop') or not is_qat
    if kind is not None:
        loop_class = LOOPS.get(kind)
        # What the runner gives, unless the config does.
        given = dict.fromkeys(['runner', 'dataloader', *(['evaluator'] if field == 'test_cfg' else [])])
        inspect.signature(loop_class).bind(**{**given, **loop})
        assert set(loop) <= set(inspect.signature(loop_class).parameters)


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('kind', ['ptq', 'qat'])
def test_networks_have_configs(kind, network):
    assert f'{kind}/{network}_w8a8_in1k.py' in STOCK


@pytest.mark.parametrize('detector', DETECTORS)
@pytest.mark.parametrize('kind', ['ptq', 'qat'])
def test_detectors_have_configs(kind, detector):
    assert f'{kind}/{detector}_w8a8_coco.py' in STOCK


@pytest.mark.parametrize('network', ['resnet18', 'resnet50', 'mobilenet-v2', 'efficientnet-b0'])
@pytest.mark.parametrize('method, bits', [(method, each) for method in BITS for each in BITS[method]])
def test_methods_have_configs(method, bits, network):
    assert f'qat/{method}/{network}_{method.replace("_", "-")}_{bits}_in1k.py' in STOCK


@pytest.mark.parametrize('name', [name for name in QUANTIZED if '_lsq' in name])
def test_learned_scales_are_trained_as_such(name):
    cfg = load(name)
    qconfig = cfg.model.quantizer.qconfig
    kind = 'mmrazor.LSQPlusFakeQuantize' if '_lsq-plus' in name else 'mmrazor.LSQFakeQuantize'

    assert qconfig.w_fake_quant.type == qconfig.a_fake_quant.type == kind
    assert cfg.optim_wrapper.constructor == 'mmrazor.QuantOptimWrapperConstructor'
    if '_lsq-plus' in name:
        assert strip_scope(cfg.optim_wrapper.paramwise_cfg) == {'offset_lr_mult': 0.1}


@pytest.mark.parametrize('name', [name for name in QUANTIZED if '_iao_' in name])
def test_integer_arithmetic_has_no_float_left(name):
    quantizer = load(name).model.quantizer

    assert quantizer.bn_folding == 'batch'
    assert quantizer.quantize_bias is True
    assert quantizer.quantize_add is True


@pytest.mark.parametrize('name', STOCK)
def test_architecture_and_weights_belong_together(name):
    """What the package itself gives as the weights of the config that the architecture comes from."""
    package, _, path = stock_base(ROOT / name).partition('::')
    models = Path(PACKAGES[package].__file__).parent / '.mim' / 'configs'
    stock = Config.fromfile(models / path)
    metafile = yaml.safe_load((models / Path(path).parent / 'metafile.yml').read_text())
    weights = [model['Weights'] for model in metafile['Models'] if model['Config'].endswith(path)]

    cfg = load(name)

    assert package == scope_of(name)
    assert strip_scope(cfg.model.architecture) == strip_scope(stock.model)
    assert strip_scope(cfg.test_dataloader) == strip_scope(stock.test_dataloader)
    if weights:
        assert cfg.model.float_checkpoint in weights
        check_checkpoint(cfg.model.float_checkpoint, 'float_checkpoint')
    else:
        assert cfg.model.float_checkpoint.startswith(f'work_dirs/{Path(path).stem}/')


def stock_base(path: Path) -> str:
    """Give the config of a package that one inherits, maybe through another."""
    text = path.read_text()
    own = re.search(r"'(mm(?:cls|det)::[^']+)'", text)
    return own[1] if own else stock_base(path.parent / re.search(r"_base_ = '([^']+)'", text)[1])


def strip_scope(value: Any) -> Any:
    """Leave out what mmengine notes about where a part of a config comes from."""
    if isinstance(value, dict):
        return {key: strip_scope(each) for key, each in value.items() if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [strip_scope(each) for each in value]
    return value


@pytest.mark.parametrize('name', [name for name in STOCK if name.startswith('qat/')])
def test_nothing_of_the_stock_schedule_is_left(name):
    cfg = load(name)

    assert [scheduler.type for scheduler in cfg.param_scheduler] == ['CosineAnnealingLR']
    assert cfg.param_scheduler[0].T_max == cfg.train_cfg.max_epochs
    own = {'paramwise_cfg'} if '_lsq-plus_' in name else set()
    assert set(cfg.optim_wrapper) == set(cfg.qat_optim_wrapper) | own
    assert set(cfg.optim_wrapper.optimizer) == set(cfg.qat_optim_wrapper.optimizer)
    if scope_of(name) == 'mmcls':
        assert cfg.get('custom_hooks', []) == []


@pytest.mark.parametrize('name', [name for name in QUANTIZED if scope_of(name) == 'mmdet' and 'yolox' in name])
def test_images_are_not_mixed_when_detectors_are_fine_tuned(name):
    cfg = load(name)
    switch = [hook for hook in cfg.get('custom_hooks', []) if hook.type == 'YOLOXModeSwitchHook']

    if 'benchmark' in name:
        types = {transform.type for transform in cfg.train_dataloader.dataset.pipeline}
        assert types.isdisjoint({'Mosaic', 'MixUp', 'RandomAffine'})
    elif name.startswith('qat/'):
        # The hook acts before the epoch of this number (from 1 on).
        assert [cfg.train_cfg.max_epochs - hook.num_last_epochs for hook in switch] == [1]


# Of the benchmarks, those with few bits for the weights alone have them in all layers.
@pytest.mark.parametrize('name', [name for name in QUANTIZED if re.search(r'_w[234]a[234]_|_w4a8_in1k', name)])
def test_first_and_last_layer_at_8_bits(name):
    orders = {item['order']: item for item in load(name).model.quantizer.qconfig.overrides}

    assert set(orders) == {'first', 'last'}
    assert all(item[f'{kind}_qscheme'] == {'bit': 8} for item in orders.values() for kind in 'wa')
