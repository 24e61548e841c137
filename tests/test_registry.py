"""The scope ``mmrazor`` resolves from anywhere, without noise and without a package of that name."""

from __future__ import annotations

import importlib.util
import logging
import time

import pytest
from mmengine import registry as mmengine_registry
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope, Registry
from torch import nn

import mmrazor_quant
from mmrazor_quant import registry

ROOTS = [each for each in vars(mmengine_registry).values() if isinstance(each, Registry)]


@registry.MODELS.register_module(name='RegistryProbe', force=True)
class Probe(nn.Module):
    pass


@pytest.fixture
def messages():
    """Warnings that mmengine logs."""
    records: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logger, handler = MMLogger.get_current_instance(), Collect(logging.INFO)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture
def default_scope(request):
    """Make a scope the default one for a test."""
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param
    time.sleep(1e-5)


def test_no_package_mmrazor_is_needed():
    assert importlib.util.find_spec('mmrazor_quant') is not None
    assert mmrazor_quant.registry.SCOPE == 'mmrazor'
    assert registry.MODELS.scope == 'mmrazor'


@pytest.mark.parametrize('default_scope', [None, 'mmengine', 'mmcls', 'mmrazor'], indirect=True)
def test_resolves_from_any_scope_without_noise(default_scope, messages):
    built = mmengine_registry.MODELS.build({'type': 'mmrazor.RegistryProbe'})
    scoped = mmengine_registry.MODELS.build({'type': 'RegistryProbe', '_scope_': 'mmrazor'})
    assert type(built) is type(scoped) is Probe
    assert messages == []


@pytest.mark.parametrize(
    'root, name',
    [
        (mmengine_registry.LOOPS, 'PTQLoop'),
        (mmengine_registry.LOOPS, 'QATEpochBasedLoop'),
        (mmengine_registry.LOOPS, 'QATIterBasedLoop'),
        (mmengine_registry.HOOKS, 'QuantEvalHook'),
        (mmengine_registry.HOOKS, 'CheckpointMatchHook'),
    ],
)
@pytest.mark.parametrize('default_scope', ['mmcls', 'mmrazor'], indirect=True)
def test_loops_and_hooks_resolve(default_scope, root, name, messages):
    assert root.get(f'mmrazor.{name}').__name__ == name
    assert messages == []


@pytest.mark.parametrize('default_scope', ['mmrazor'], indirect=True)
@pytest.mark.parametrize('root', ROOTS, ids=lambda each: each.name)
def test_every_registry_works_with_mmrazor_as_default_scope(default_scope, root, messages):
    with root.switch_scope_and_registry(None) as found:
        assert found.scope == 'mmrazor'
    assert messages == []


@pytest.mark.parametrize('default_scope', ['mmrazor'], indirect=True)
def test_names_of_mmengine_are_found_from_our_scope(default_scope):
    assert mmengine_registry.OPTIMIZERS.get('SGD') is mmengine_registry.OPTIMIZERS.module_dict['SGD']
    assert registry.HOOKS.get('EMAHook').__name__ == 'EMAHook'


def test_unknown_name_is_refused():
    with pytest.raises(KeyError, match='mmrazor.NoSuchThing'):
        mmengine_registry.MODELS.build({'type': 'mmrazor.NoSuchThing'})
