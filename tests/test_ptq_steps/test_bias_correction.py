"""Bias correction: what is measured, where it goes, and that the shift is gone afterwards."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.engine.calibration import set_float, set_quantized
from mmrazor_quant.graph.taps import tapped
from mmrazor_quant.ptq_steps import BiasCorrection, StepContext
from mmrazor_quant.tracing.island import Island, islands_of

CONFIG = qconfig(w=3, a=6, w_qscheme=dict(bit=3, is_per_channel=False))


def conv(a, b, **kwargs):
    return nn.Conv2d(a, b, 3, padding=1, **kwargs)


@pytest.fixture
def lines():
    """What is logged."""
    found, logger = [], MMLogger.get_current_instance()

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collect()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


NETS = {
    'norms': lambda: nn.Sequential(
        conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)
    ),
    'biases': lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 8), nn.ReLU(), conv(8, 4)),
    'norm without parameters': lambda: nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6, affine=False), nn.ReLU(), conv(6, 4)
    ),
    'linear': lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5)),
    'linear over rows': lambda: Net(
        lambda m, x: m.b(F.relu(m.a(x.flatten(2)))), a=nn.Linear(64, 12), b=nn.Linear(12, 5)
    ),
    'transposed': lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, stride=2), nn.ReLU(), conv(6, 4)),
    'called for three sizes': lambda: Net(
        lambda m, x: tuple(m.b(F.relu(m.norm(m.a(x[..., ::s, ::s])))) for s in (1, 2, 4)),
        a=conv(3, 6), norm=nn.BatchNorm2d(6), b=conv(6, 4),
    ),
}  # fmt: skip


def batches(count=4, size=16):
    # Not centred, as images are not: a weight's error then shifts the mean.
    return [{'inputs': images(size, seed=seed).abs()} for seed in range(count)]


def prepared(build, data, config=CONFIG):
    model = quantized(trained(build()), config)
    return calibrate(model, *(batch['inputs'] for batch in data))


def correct(model, data, **arguments):
    BiasCorrection(**arguments).run(StepContext(model, data, len(data)))
    return model


@torch.no_grad()
def means(model, data, which=None):
    """Mean output per channel of all layers, over all data, of a model as it is."""
    sums = {}

    def tap(layer, output):
        axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
        rows = output.movedim(axis, 0).flatten(1)
        total, count = sums.get(layer, (0, 0))
        sums[layer] = total + rows.double().sum(1), count + rows.shape[1]
        return output

    with tapped(model.architecture, tap):
        for batch in data:
            model.test_step(batch)
    return {layer: total / count for layer, (total, count) in sums.items()}


def shifts(model, targets, data):
    """Root mean square of the shift of every layer's output from the float network's."""
    return [
        float((found - target).square().mean().sqrt()) for found, target in zip(means(model, data).values(), targets)
    ]


def float_means(model, data):
    set_float(model)
    found = list(means(model, data).values())
    set_quantized(model)
    return found


@pytest.mark.parametrize('name', NETS)
def test_shift_is_gone(name):
    data = batches()
    model = prepared(NETS[name], data)
    targets = float_means(model, data)
    before = shifts(model, targets, data)

    correct(model, data)

    after = shifts(model, targets, data)
    assert max(before) > 0.01
    assert max(after) < 0.03 * max(before)


@pytest.mark.parametrize('name', NETS)
def test_no_entries_are_added_and_statistics_stay(name):
    data = batches(1)
    model = prepared(NETS[name], data)
    state = copy.deepcopy(model.state_dict())

    correct(model, data)

    after = model.state_dict()
    assert after.keys() == state.keys()
    changed = {key.rpartition('.')[2] for key in state if not torch.equal(state[key], after[key])}
    assert changed == ({'running_mean', 'bias'} if name == 'norm without parameters' else {'bias'})


def test_one_batch_is_the_layer_by_layer_algorithm():
    """Against the plain way: layer by layer, measure the shift with all before corrected, subtract it."""
    data = batches(1)
    model = prepared(NETS['norms'], data)
    expected = copy.deepcopy(model)
    targets = float_means(expected, data)
    for index, place in enumerate(('1', '4', '6')):
        found = list(means(expected, data).values())[index]
        expected.architecture.get_submodule(place).bias.data -= (found - targets[index]).float()

    correct(model, data, passes=1)

    for place in ('1', '4', '6'):
        one, other = (each.architecture.get_submodule(place).bias for each in (model, expected))
        assert torch.allclose(one, other, atol=1e-5), place


def test_without_activations_the_shift_of_weights_alone_is_corrected():
    data = batches()
    model = prepared(NETS['biases'], data, qconfig(w=3, a=2, w_qscheme=dict(bit=3, is_per_channel=False)))
    other = copy.deepcopy(model)
    targets = float_means(model, data)

    correct(model, data, activations=False)
    assert [bool(q.fake_quant_enabled) for _, q in model.act_quantizers()] == [True] * 3
    model.set_quant_state(act_fake_quant=False)
    before = shifts(other, targets, data)
    other.set_quant_state(act_fake_quant=False)

    assert max(shifts(model, targets, data)) < 0.03 * max(shifts(other, targets, data))
    model.set_quant_state(act_fake_quant=True)
    assert max(shifts(model, targets, data)) > 0.1 * max(before)


def test_second_pass_removes_what_the_first_leaves():
    data = batches(8, 2)
    model = prepared(NETS['norms'], data)
    other, targets = copy.deepcopy(model), float_means(model, data)

    correct(model, data, passes=1)
    correct(other, data, passes=3)

    assert max(shifts(other, targets, data)) < 0.5 * max(shifts(model, targets, data))


def test_graphs_captured_meanwhile_are_measured_and_left_without_taps():
    def build():
        def forward(m, x):
            x = m.a(x)
            return m.b(F.relu(x)) if x.shape[-1] != 16 else m.b(x)

        return Net(forward, a=conv(3, 6), b=conv(6, 4))

    data = batches(2)
    model = prepared(build, data)
    (island,) = (Island.of(module) for module in islands_of(model.architecture).values())
    sources = [graph.python_code('self').src for graph in island.graphs()]
    data += [{'inputs': images(4, (3, 16, 16)).abs()}]
    targets = float_means(copy.deepcopy(model), data)

    correct(model, data)

    graphs = list(island.graphs())
    assert [graph.python_code('self').src for graph in graphs[: len(sources)]] == sources
    assert len(graphs) == len(sources) + 1
    assert not [node for graph in graphs for node in graph.nodes if 'tap' in str(node.target)]
    assert max(shifts(model, targets, data)) < 0.05


def test_layers_without_a_place_are_reported_and_left(lines):
    def build():
        return Net(
            lambda m, x: F.linear(m.b(F.relu(m.a(x))).flatten(1), m.c.weight, m.c.bias),
            a=conv(3, 6, bias=False), b=conv(6, 4), c=nn.Linear(256, 3),
        )  # fmt: skip

    data = batches(1)
    model = prepared(build, data)
    state = copy.deepcopy(model.state_dict())

    correct(model, data)

    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {'b.bias'}
    text = next(line for line in lines if 'Bias correction of' in line)
    assert 'Bias correction of 1 layers' in text
    assert '1 not corrected: it has no bias, and no batch norm that is folded into it' in text
    assert '1 not corrected: no data reached it' in text


class Shuffled(list):
    """Data in another order whenever they are gone through, as augmented images are others."""

    def __iter__(self):
        order = torch.randperm(len(self)).tolist()
        return iter([self[i] for i in order])


def test_each_batch_is_compared_with_itself():
    data = [{'inputs': (i + 1) * images(8, seed=i).abs()} for i in range(6)]
    model = prepared(NETS['norms'], data)
    targets = float_means(model, data)

    BiasCorrection().run(StepContext(model, Shuffled(data), len(data)))

    assert max(shifts(model, targets, data)) < 0.05


def test_data_that_are_not_finite_are_refused():
    data = batches(1)
    model = prepared(NETS['biases'], data)
    data[0]['inputs'][0, 0, 0, 0] = float('nan')

    with pytest.raises(ValueError, match='the outputs of 0 are NaN or infinite'):
        correct(model, data)
