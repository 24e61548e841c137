"""Modules whose parts are called by others, as the heads and decoders of detectors do."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from mmrazor_quant.tracing import CustomTracer, Island, find_islands
from mmrazor_quant.tracing.report import CaptureReport

SMALL, LARGE = torch.linspace(-2, 3, 2 * 3 * 4).reshape(2, 3, 4), torch.linspace(-1, 5, 3 * 5 * 4).reshape(3, 5, 4)


class Decoder(nn.Module):
    """Refines with branches that are not its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x, branches):
        for layer, branch in zip(self.layers, branches):
            x = layer(x).relu()
            x = x + branch(x)
        return x


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)])
        self.classes = nn.Linear(4, 3)

    def forward(self, x):
        return self.classes(x), self.branches[1](x)


class Refining(nn.Module):
    """A detector in small: data decide in its own code, its decoder is handed branches of its head."""

    def __init__(self):
        super().__init__()
        self.decoder, self.head = Decoder(), Head()

    def forward(self, x, mode='predict'):
        x = self.decoder(x if x.sum() > 0 else -x, self.head.branches)
        return self.head(x)

    def predict(self, x):
        return self(x)


def run_on(model, *inputs):
    def run(x):
        for training in (False, True):
            model.train(training)
            model(x)

    return [lambda x=x: run(x) for x in inputs]


def captured(model):
    findings = find_islands(model, run_on(model, SMALL, LARGE), CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))
    return findings


def assert_equal(model, reference, *inputs):
    for x in inputs:
        assert all(torch.equal(a, b) for a, b in zip(model(x), reference(x), strict=True))


def test_parts_called_from_outside_are_islands_that_the_others_call():
    model = Refining().eval()
    reference = copy.deepcopy(model)

    findings = captured(model)

    assert set(findings.islands) == {'decoder', 'head', 'head.branches.0', 'head.branches.1'}
    assert findings.islands['head'].entries == {'branches.0', 'branches.1'}
    report = CaptureReport.of(model, findings)
    assert (report.layers_inside, report.layers_total, report.layers_alone) == (7, 7, [])
    assert {i['island']: i['layers'] for i in report.islands} == {
        'decoder': 2, 'head': 1, 'head.branches.0': 2, 'head.branches.1': 2,
    }  # fmt: skip
    assert_equal(model, reference, SMALL, LARGE, -SMALL)


def test_a_part_is_quantized_wherever_it_is_called():
    model = Refining().eval()
    captured(model)
    calls = []
    forward = Island.of(model.head.branches[1]).run
    Island.of(model.head.branches[1]).run = lambda *args: calls.append(1) or forward(*args)

    model(SMALL)

    assert len(calls) == 2


def test_a_copy_calls_its_own_parts():
    model = Refining().eval()
    captured(model)
    twin = copy.deepcopy(model)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert_equal(twin, reference, SMALL, LARGE)
    assert not torch.equal(twin(SMALL)[0], model(SMALL)[0])


def test_state_keys_stay():
    model = Refining()
    before = list(model.state_dict())

    captured(model)

    assert list(model.state_dict()) == before


def test_new_sizes_of_inner_and_outer_islands_are_captured_together():
    model = Refining().eval()
    reference = copy.deepcopy(model)
    captured(model)
    for path in ('head', 'head.branches.1'):
        island = Island.of(model.get_submodule(path))
        for variant in island.variants:
            variant.captures.clear()

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert_equal(model, reference, torch.ones(1, 2, 4))


class Stages(nn.Module):
    """Has a forward that nothing but the tensor mode calls; loss and predict call its stages."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2), nn.ReLU())

    def forward(self, x):
        return self.second(self.first(x))


class Staged(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = Stages()

    def forward(self, x):
        return self.stages(x)

    def predict(self, x):
        return self.stages.second(self.stages.first(x)[:, :2])


def test_a_module_that_is_passed_by_gives_way_to_its_parts():
    model = Staged().eval()
    reference = copy.deepcopy(model)
    findings = find_islands(model, [lambda: model(SMALL), lambda: model.predict(SMALL)], CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))

    assert set(findings.islands) == {'stages.first', 'stages.second'}
    assert 'outside' in str(findings.failures['stages'])
    assert torch.equal(model.predict(SMALL), reference.predict(SMALL))
    assert torch.equal(model(SMALL), reference(SMALL))


class Assisted(nn.Module):
    """Has a head that runs in training only."""

    def __init__(self):
        super().__init__()
        self.main, self.helper = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.main(x) + self.helper(x) if self.training else self.main(x)

    def predict(self, x):
        return self(x)


def test_what_runs_in_training_only_stays_float_and_is_reported():
    model = Assisted()

    findings = captured(model)

    assert list(findings.islands) == ['main']
    report = CaptureReport.of(model, findings)
    assert (report.training_only, report.layers_total, report.outside) == (['helper'], 1, {})
    assert 'runs in training only, stays float: helper' in report.table()


def test_what_an_example_did_not_get_to_is_not_taken_for_training_only():
    model = Assisted()

    def unfinished():
        model.train()
        model(SMALL)
        return False

    findings = find_islands(model, [unfinished], CustomTracer())

    assert set(findings.islands) == {'main', 'helper'}


class ManySizes(nn.Module):
    """Calls one module with several sizes, which burns one of them in."""

    def __init__(self):
        super().__init__()
        self.inner = BurntIn()

    def forward(self, x):
        x = x if x.sum() > 0 else -x
        return [self.inner(x), self.inner(x[:, :2]), self.inner(x[:, :1])]

    def predict(self, x):
        return self(x)


class BurntIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * list(range(x.shape[1]))[-1]


def test_calls_of_every_size_are_verified():
    model = ManySizes().eval()
    reference = copy.deepcopy(model)
    findings = find_islands(model, run_on(model, SMALL), CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))

    assert set(findings.islands) == {'inner'}
    assert_equal(model.eval(), reference, SMALL)


class Sharing(nn.Module):
    """One module under two names, and code that goes another way on longer inputs."""

    def __init__(self):
        super().__init__()
        branch = nn.Linear(4, 4)
        self.branches = nn.ModuleList([branch, branch])

    def forward(self, x):
        x = self.branches[0](x)
        return self.branches[1](x) if x.shape[1] > 4 else x


def test_running_a_graph_for_sizes_only_leaves_shared_modules_alone():
    model = Sharing()
    reference = copy.deepcopy(model)
    captured(model)

    assert model.branches[1].weight.device.type == 'cpu'
    with torch.no_grad():
        for x in (SMALL, LARGE, torch.ones(2, 4, 4)):
            assert torch.equal(model(x), reference(x))
