"""Reconstruction as a whole, on a small network."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from reconstructing import Small, batches, calibrated, make_model, qconfig, reconstruct, same_state
from small_models import images
from torch import Tensor, nn

from mmrazor_quant.fake_quants import AdaRoundFakeQuantize
from mmrazor_quant.reconstruction import engine
from mmrazor_quant.tracing import island as tracing_island

METHODS = ['AdaRound', 'BRECQ', 'QDrop']
HERE = Path(__file__).parent


def output_error(model: nn.Module, data: list | None = None) -> float:
    """Squared error of the quantized outputs, on the calibration data unless others are given."""
    data = batches() if data is None else data
    with torch.no_grad():
        model.set_quant_state(False, False, False, False)
        wanted = [model(x) for x in data]
        model.set_quant_state(False, True, False, True)
        return sum((model(x) - y).square().sum().item() for x, y in zip(data, wanted))


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    """Messages of warnings in the log."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize('method', METHODS)
def test_outputs_come_nearer_to_the_float_ones(tmp_path, method):
    model = calibrated()
    before = output_error(model)

    reports = reconstruct(model, tmp_path, method, iters=200).reports

    assert output_error(model) < 0.6 * before
    assert all(report.after <= report.before for report in reports)
    assert [report.unit for report in reports][-1] == 'head'


@pytest.mark.parametrize('method', METHODS)
def test_float_weights_stay_and_only_the_quantizers_change(tmp_path, method):
    model = calibrated()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]

    reconstruct(model, tmp_path, method)

    after = model.state_dict()
    assert before.keys() == after.keys()
    changed = {key.rpartition('.')[2] for key in after if not torch.equal(before[key], after[key])}
    assert changed <= {'integers', 'scale'} and 'integers' in changed
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())


def test_weights_lie_on_their_grid(tmp_path):
    model = calibrated()

    reconstruct(model, tmp_path)

    for path, quantizer in model.weight_quantizers():
        assert isinstance(quantizer, AdaRoundFakeQuantize) and quantizer.is_learned, path
        assert quantizer.integers.min() >= quantizer.quant_min and quantizer.integers.max() <= quantizer.quant_max
        layer = model.architecture.get_submodule(path.rpartition('.')[0])
        steps = quantizer(layer.weight) / quantizer.scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        assert torch.allclose(steps, steps.round(), atol=1e-4)


def test_the_result_depends_on_the_seed_alone(tmp_path):
    one, again, other = (calibrated() for _ in range(3))

    reconstruct(one, tmp_path / 'one', seed=1)
    torch.randn(3)
    reconstruct(again, tmp_path / 'again', seed=1)
    reconstruct(other, tmp_path / 'other', seed=2)

    assert same_state(one, again)
    assert not same_state(one, other)


class Killed(logging.Handler):
    """Ends a run as the log says that so many units are done."""

    def __init__(self, done: int) -> None:
        super().__init__()
        self.done = done

    def emit(self, record: logging.LogRecord) -> None:
        if f'Reconstruction [{self.done}/' in record.getMessage():
            raise KeyboardInterrupt


@pytest.mark.parametrize('done', [1, 3])
@pytest.mark.parametrize('method', ['AdaRound', 'QDrop'])
def test_a_killed_run_goes_on_where_it_was_and_ends_the_same(tmp_path, method, done):
    whole, killed, resumed = (calibrated() for _ in range(3))
    reconstruct(whole, tmp_path / 'whole', method)
    handler = Killed(done)
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            reconstruct(killed, tmp_path / 'killed', method)
    finally:
        logger.removeHandler(handler)
    files = sorted((tmp_path / 'killed' / 'reconstruction').glob('unit_*.pth'))
    times = [file.stat().st_mtime_ns for file in files]

    run = reconstruct(resumed, tmp_path / 'killed', method)

    assert len(files) == done
    assert [file.stat().st_mtime_ns for file in files] == times, 'finished units are not learned again'
    assert same_state(resumed, whole)
    run.clean_up()
    assert not (tmp_path / 'killed' / 'reconstruction').exists()


def test_files_of_other_settings_data_or_weights_are_not_resumed_from(tmp_path):
    reconstruct(calibrated(), tmp_path)
    fresh = calibrated()
    reconstruct(fresh, tmp_path / 'fresh', lr=2e-2)
    other = calibrated()

    reconstruct(other, tmp_path, lr=2e-2)

    assert same_state(other, fresh)


@pytest.mark.parametrize('mixed', [0.0, 0.5])
def test_spilling_changes_nothing(tmp_path, mixed):
    in_memory, on_disk = calibrated(), calibrated()

    free = reconstruct(in_memory, tmp_path / 'memory', drop_prob=mixed)
    spilled = reconstruct(on_disk, tmp_path / 'disk', drop_prob=mixed, cache_gib=100_000 / 2**30)

    assert same_state(in_memory, on_disk)
    assert free.cache_peak > 100_000 >= spilled.cache_peak > 0
    assert not (tmp_path / 'disk' / 'reconstruction_cache').exists()


def test_a_unit_that_got_worse_is_as_before(tmp_path):
    model = calibrated(qconfig(w=8, a=8))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    reports = reconstruct(model, tmp_path, 'QDrop', iters=3, lr=1e3).reports

    worse = [report.unit for report in reports if report.after > report.before]
    assert len(worse) >= 2
    assert [report.unit for report in reports if not report.kept] == worse
    for key, value in model.state_dict().items():
        if key.startswith(tuple(worse)):
            assert torch.equal(before[key], value), key


def test_steps_of_activations_are_learned_where_asked_for(tmp_path):
    fixed, joint, after = calibrated(), calibrated(), calibrated()
    scales = [quantizer.scale.clone() for _, quantizer in fixed.act_quantizers()]

    reconstruct(fixed, tmp_path / 'a', act_lr=0.0)
    reconstruct(joint, tmp_path / 'b', act_lr=1e-2)
    reconstruct(after, tmp_path / 'c', act_lr=1e-2, act_stage='after')

    assert all(torch.equal(q.scale, s) for (_, q), s in zip(fixed.act_quantizers(), scales))
    for model in (joint, after):
        assert not any(torch.equal(q.scale, s) for (_, q), s in zip(model.act_quantizers(), scales))
    assert not same_state(joint, after)


def test_scales_of_weights_are_learned_where_asked_for(tmp_path):
    model = calibrated()
    scales = [quantizer.scale.clone() for _, quantizer in model.weight_quantizers()]

    reports = reconstruct(model, tmp_path, 'QDrop', iters=200, scale_lr=1e-3).reports

    kept = tuple(report.unit for report in reports if report.kept)
    assert len(kept) >= 3
    for (path, quantizer), scale in zip(model.weight_quantizers(), scales):
        change = (quantizer.scale / scale - 1).abs().max()
        assert (0 < change < 1) if path.startswith(kept) else change == 0


def test_images_of_several_sizes(tmp_path):
    data = [images(2, (3, 8, 8)), images(2, (3, 12, 8), seed=1), images(1, (3, 6, 6), seed=2), images(3, seed=3)]
    model = calibrated(data=data)

    reports = reconstruct(model, tmp_path, data=data, batch_size=2).reports

    assert all(report.after < report.before for report in reports)


class Pooling(nn.Module):
    """Two layers and a mean, of a part of the pixels where there is a mask; with a check it cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, mask, x, checked=False):
        if checked and bool(x.isnan().any()):
            raise ValueError('NaN')
        x = F.relu(self.conv(x))
        x = x.mean((2, 3)) if mask is None else (x * mask).sum((2, 3)) / mask.sum((2, 3))
        return self.linear(x)


class Masked(Small):
    """A network that masks wide images, and looks into tall ones."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Pooling()

    def forward(self, x):
        x = self.backbone(x)
        means = x.mean(1, keepdim=True)
        mask = (means >= means.mean((2, 3), keepdim=True)).float() if x.shape[3] > 8 else None
        if bool(x.isnan().any()):
            raise ValueError('NaN')
        return self.head(mask, x, checked=x.shape[2] > 8)


class Scaling(nn.Module):
    """A layer, and a factor that each of its graphs has as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x, factor):
        return self.linear(x.mean((2, 3)) * (8 / int(factor)))


class Scaled(Small):
    """A network with another factor for each width of images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Scaling()

    def forward(self, x):
        factor = f'{x.shape[3]}'
        x = self.backbone(x)
        if bool(x.isnan().any()):
            raise ValueError('NaN')
        return self.head(x, factor)


def wide(x: Tensor, width: int = 12) -> Tensor:
    """Make images wide."""
    return F.interpolate(x, (8, width), mode='bilinear')


@pytest.mark.parametrize('granularity', ['block', 'island'])
def test_calls_with_and_without_a_mask_are_learned_together(tmp_path, warnings_logged, granularity):
    data, masked = batches(2), [wide(x) for x in batches(4)[2:]]
    model = calibrated(network=Masked, data=[*data, *masked])
    before = [output_error(model, each) for each in (data, masked)]

    settings = dict(iters=200, granularity=granularity)
    reports = reconstruct(model, tmp_path, 'AdaRound', data=[*data, *masked], **settings).reports

    assert reports[-1].unit == 'head' and reports[-1].after < 0.8 * reports[-1].before
    assert all(output_error(model, each) < 0.8 * error for each, error in zip((data, masked), before))
    assert not warnings_logged


@pytest.mark.parametrize('captured', [2, 0])
def test_calls_without_a_graph_are_said_to_be_left_out(tmp_path, warnings_logged, captured):
    data = [*batches(captured), *(F.interpolate(x, (12, 8)) for x in batches(3))]
    with pytest.warns(UserWarning, match='cannot be captured'):
        model = calibrated(network=Masked, data=[*batches(1), *data])

    reports = reconstruct(model, tmp_path, data=data).reports

    assert warnings_logged == [
        'Reconstruction of head leaves out 3 of 5 calls'
        if captured
        else 'Reconstruction leaves head as it is: no graph serves its calls on the calibration data'
    ]
    assert any(report.unit.startswith('head') for report in reports) == bool(captured)


def test_calls_whose_graphs_were_given_up_are_said_to_be_left_out(tmp_path, warnings_logged, monkeypatch):
    monkeypatch.setattr(tracing_island, 'MAX_LATER', 1)
    data = [*batches(2), *(wide(x, width) for x, width in zip(batches(3), (12, 14, 16)))]

    reports = reconstruct(calibrated(network=Scaled, data=data), tmp_path, data=data).reports

    assert warnings_logged == ['Reconstruction of head leaves out 2 of 5 calls']
    assert reports[-1].unit == 'head.linear', 'the calls of the other graphs are learned from'


class OfTheBatch(Small):
    """A network whose samples depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*self.backbone, Centered())


class Centered(nn.Module):
    """Takes off the mean of the batch, and has a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        return x - x.mean(0, keepdim=True)


def test_samples_that_depend_on_each_other_are_not_taken_apart(tmp_path):
    model = calibrated(network=OfTheBatch)

    reports = reconstruct(model, tmp_path, iters=120).reports

    # Were batches mixed, the targets would be those of other batches, and be missed by far.
    assert all(report.after < report.before for report in reports)


def test_a_fresh_model_loads_the_learned_rounding_exactly(tmp_path):
    model = calibrated()
    reconstruct(model, tmp_path)
    fresh = make_model()

    missing, unexpected = fresh.load_state_dict(model.state_dict())
    fresh.set_quant_state(False, True, False, True)

    assert not missing and not unexpected
    assert same_state(fresh, model)
    with torch.no_grad():
        assert torch.equal(fresh(images(5, seed=9)), model(images(5, seed=9)))


@torch.no_grad()
def test_round_trip_through_a_new_process_and_convert(tmp_path):
    model = calibrated()
    reconstruct(model, tmp_path)
    x = images(5, seed=9)
    torch.save(dict(state=model.state_dict(), x=x), tmp_path / 'saved.pth')

    command = [sys.executable, str(HERE / 'reload_run.py'), str(tmp_path)]
    paths = f'{HERE}:{HERE.parent}'
    process = subprocess.run(command, capture_output=True, text=True, env={**_environment(), 'TEST_PATHS': paths})

    assert process.returncode == 0, process.stderr[-3000:]
    found = torch.load(tmp_path / 'outputs.pth')
    expected, converted = model(x), model.convert()(x)
    assert torch.equal(found['quantized'], expected)
    assert torch.equal(found['converted'], converted)
    assert torch.allclose(converted, expected, atol=1e-5)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, 'MMRAZOR_QUANT_EAGER': '1'}


@torch.no_grad()
def test_converted_weights_are_the_learned_integers_times_the_scale(tmp_path):
    model = calibrated()
    reconstruct(model, tmp_path)

    converted = model.convert()

    for path, quantizer in model.weight_quantizers():
        weight = converted.get_submodule(path.rpartition('.')[0]).weight
        shape = [-1] + [1] * (weight.dim() - 1)
        integers = weight / quantizer.scale.reshape(shape) + quantizer.zero_point.reshape(shape)
        assert torch.allclose(integers, quantizer.integers.float(), atol=1e-4)


def test_log_files(tmp_path):
    reports = reconstruct(calibrated(), tmp_path).reports

    logged = json.loads((tmp_path / 'reconstruction.json').read_text())
    with open(tmp_path / 'reconstruction.csv', newline='') as file:
        rows = list(csv.DictReader(file))

    assert [each['unit'] for each in logged] == [row['unit'] for row in rows] == [report.unit for report in reports]
    assert [float(row['after']) for row in rows] == [report.after for report in reports]


def test_layers_without_learned_rounding_are_rounded_to_nearest(tmp_path):
    config = qconfig()
    config['overrides'] = [dict(name='head', w_fake_quant=dict(type='mmrazor.FakeQuantize'))]
    model = calibrated(config)

    reports = reconstruct(model, tmp_path, act_lr=1e-3).reports

    assert reports[-1].unit == 'head' and reports[-1].weights == 0
    assert not hasattr(model.architecture.head.weight_fake_quant, 'integers')


def test_a_model_with_nothing_to_learn_is_refused(tmp_path):
    model = calibrated(qconfig(act='FakeQuantize', weight='FakeQuantize'))

    with pytest.raises(ValueError, match='w_fake_quant.type.*AdaRoundFakeQuantize'):
        reconstruct(model, tmp_path)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(iters=0), r'reconstruction\.iters: got 0, allowed: an int >= 1'),
        (dict(granularity='neuron'), r'reconstruction\.granularity: got .neuron.'),
        (dict(drop_prob=1.0), r'reconstruction\.drop_prob'),
        (dict(powers=(2.0,)), r'reconstruction\.powers'),
        (dict(fisher='yes'), r'reconstruction\.fisher'),
        (dict(cache_gib=-1), r'reconstruction\.cache_gib'),
        (dict(iterations=5), r"has no field 'iterations'; known are granularity, iters"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(calibrated(), tmp_path, **settings)


def test_calibration_forgets_what_was_learned(tmp_path):
    model, fresh = calibrated(), calibrated()
    reconstruct(model, tmp_path)

    model.observe_weights()

    assert all(not quantizer.is_learned for _, quantizer in model.weight_quantizers())
    x = fresh.architecture.head.weight
    assert torch.equal(model.architecture.head.weight_fake_quant(x), fresh.architecture.head.weight_fake_quant(x))


def test_processes_with_other_units_are_refused(tmp_path, monkeypatch):
    """Otherwise they would wait for each other for ever."""
    monkeypatch.setattr(engine, 'all_gather_object', lambda plan: [plan, plan[1:]])

    with pytest.raises(ValueError, match=r'process 1 has other units than process 0 .*head'):
        reconstruct(calibrated(), tmp_path, 'QDrop', iters=5)
