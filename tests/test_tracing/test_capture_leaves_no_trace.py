"""Capturing a model changes nothing of it: buffers, parameters, flags, hooks, keys, random state, memory."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from capturing import Net, capture
from torch import nn

from mmrazor_quant.tracing import CaptureError, CustomTracer, find_islands
from mmrazor_quant.tracing.state import preserved, seeded

X = torch.linspace(-2, 3, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


class Noisy(nn.Module):
    """Batch norm, dropout, buffers written to and random numbers of all three generators."""

    def __init__(self, data_dependent: bool = False):
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))
        self.data_dependent = data_dependent

    def forward(self, x):
        if self.training:
            self.calls.add_(1)
        x = self.dropout(self.frozen(self.bn(self.conv(x))))
        x = x + torch.rand(1) + random.random() * 0 + np.random.rand() * 0
        if self.data_dependent and x.sum() > 0:
            return x * 2
        return F.dropout(x, 0.1, self.training)


def snapshot(model):
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        {name: (id(p), p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: id(b) for name, b in model.named_buffers()},
        {name: m.training for name, m in model.named_modules()},
        {name: sorted(m._modules) for name, m in model.named_modules()},
        {name: _hooks(m) for name, m in model.named_modules()},
        {name: sorted(vars(m)) for name, m in model.named_modules()},
        (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
    )


def _hooks(module):
    return [len(value) for key, value in sorted(vars(module).items()) if key.endswith('_hooks')]


def assert_unchanged(model, before):
    after = snapshot(model)
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])
    assert after[1:] == before[1:]


def both_modes(model, *inputs):
    def run(x):
        model.eval()
        model(x)
        model.train()
        model(x)

    return [lambda x=x: run(x) for x in inputs]


@pytest.mark.parametrize('data_dependent', [False, True])
def test_finding_islands_leaves_no_trace(data_dependent):
    model = Noisy(data_dependent)
    model.train()
    model.frozen.eval()
    examples = both_modes(model, X, torch.randn(3, 3, 9, 8))
    before = snapshot(model)

    findings = find_islands(model, examples, CustomTracer())

    assert bool(findings.failures) == data_dependent
    assert_unchanged(model, before)


def test_a_plain_capture_does_not_train():
    model = Noisy().train()
    before = snapshot(model)

    with preserved(model):
        capture(model, X)

    assert_unchanged(model, before)


def test_a_capture_that_fails_leaves_no_trace():
    model = Net(lambda m, x: m.conv(x) * m.constant if x.sum() > 0 else x, constant=torch.ones(1)).eval()
    before = snapshot(model)

    findings = find_islands(model, [lambda: model(X)], CustomTracer())

    assert list(findings.islands) == ['conv']
    assert_unchanged(model, before)


def test_no_activation_is_kept_alive():
    alive = []

    def forward(module, x):
        y = module.conv(x)
        alive.append(weakref.ref(y))
        z = y * 2
        alive.append(weakref.ref(z))
        return z

    model = Net(forward).eval()
    tracer = CustomTracer()

    def run():
        example = X.clone()
        alive.append(weakref.ref(example))
        model(example)

    findings = find_islands(model, [run], tracer)
    findings.islands[''].install(model)
    gc.collect()

    assert len(alive) > 3
    assert not [ref() for ref in alive if ref() is not None]
    assert not [obj for obj in gc.get_objects() if type(obj).__name__ == 'TensorValue'], tracer


def test_containers_that_a_forward_fills():
    def forward(module, x):
        module.seen.append(x * 2)
        module.by_name['x'] = x
        return module.conv(x)

    model = Net(forward, seen=[], by_name={}).eval()

    find_islands(model, [lambda: model(X)], CustomTracer())

    assert model.seen == [] and model.by_name == {}


def test_no_patch_is_left_on_torch():
    apply = torch.autograd.Function.__dict__['apply']
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__

    with pytest.raises(CaptureError):
        capture(Net(lambda m, x: x if x.sum() > 0 else -x), X)

    assert torch.autograd.Function.__dict__['apply'] is apply
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getattr_)
    assert torch.overrides._get_current_function_mode() is None


def test_gradients_and_grad_mode_are_left():
    model = Net(lambda m, x: m.conv(x)).train()
    model(X).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}

    find_islands(model, both_modes(model, X), CustomTracer())

    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert torch.is_grad_enabled()


def test_preserved_restores_what_a_forward_replaced():
    model = Net(lambda m, x: x)
    model.register_buffer('mean', torch.zeros(2))
    mean = model.mean

    with preserved(model):
        model.mean.add_(1)
        model.mean = model.mean + 1
        model.eval()
        torch.rand(1)

    assert model.mean is mean
    assert model.mean.tolist() == [0.0, 0.0]
    assert model.training


def test_preserved_restores_the_contents_of_lists_and_the_like():
    model = Net(lambda m, x: x)
    model.counts, model.levels = [[1, 2], 3], {'low': {1}, 'high': deque([5], maxlen=2)}
    counts, levels, seen = model.counts, model.levels, model.counts[0]

    with preserved(model):
        model.counts[1] += 1
        seen.append(7)
        model.levels['low'].add(2)
        levels['high'].extend([6, 7])
        del levels['high']

    assert model.counts is counts and model.levels is levels and counts[0] is seen
    assert counts == [[1, 2], 3] and levels == {'low': {1}, 'high': deque([5])} and levels['high'].maxlen == 2


def test_preserved_restores_after_an_error():
    model = nn.BatchNorm2d(3).train()
    before = snapshot(model)

    with pytest.raises(RuntimeError), preserved(model):
        model(X)
        model.eval()
        raise RuntimeError

    assert_unchanged(model, before)


def test_seeded_gives_the_same_numbers_and_restores_the_state():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    before = copy.deepcopy((torch.get_rng_state(), np.random.get_state()[1], random.getstate()))
    with seeded():
        first = draw()
    with seeded():
        assert draw() == first
    with seeded(1):
        assert draw() != first

    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_statistics_that_a_forward_replaces_go_on_in_the_captured_model():
    """A buffer assigned (not written in place) in train mode: either captured faithfully or left to its own code."""

    def forward(module, x):
        if module.training:
            module.mean = module.mean * 0.9 + x.mean() * 0.1
        return module.conv(x)

    model = Net(forward)
    model.register_buffer('mean', torch.zeros(()))
    reference = copy.deepcopy(model)

    findings = find_islands(model, both_modes(model, X), CustomTracer())
    assert model.mean.item() == 0
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))

    for net in (model, reference):
        net.train()
        net(X)
        net(X + 1)
    assert torch.equal(model.mean, reference.mean)
    assert type(model.mean) is torch.Tensor


def test_buffers_written_in_place_go_on_in_the_captured_model():
    model = Noisy()
    reference = copy.deepcopy(model)
    findings = find_islands(model, both_modes(model, X), CustomTracer())
    findings.islands[''].install(model)

    for net in (model, reference):
        torch.manual_seed(1)
        net.train()
        for _ in range(3):
            net(X)

    assert model.calls.item() == 3
    for (key, a), b in zip(model.state_dict().items(), reference.state_dict().values()):
        assert torch.equal(a, b), key
