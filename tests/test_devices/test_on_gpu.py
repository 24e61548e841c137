"""On a GPU: numbers as on the CPU, and captured models as they are themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from small_detectors import DETECTORS, SIZE, config_of, write_boxes
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.codebases import codebase_of, run_mode
from mmrazor_quant.engine.launch import register_codebase
from mmrazor_quant.tracing.island import Island, islands_of
from mmrazor_quant.tracing.state import seeded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')]


@pytest.fixture(autouse=True)
def same_algorithms(monkeypatch):
    """Convolutions computed in one way only, in full float32."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture(params=['eager', 'compiled'])
def way(request) -> Iterator[None]:
    """Formulas in eager, or compiled."""
    if request.param == 'compiled':
        request.getfixturevalue('compile_at_once')
        yield
    else:
        with ops.eager_mode():
            yield


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    """Copies of tensors, of which floating ones ask for gradients."""
    return [t.detach().clone().to(device).requires_grad_(t.is_floating_point()) for t in tensors]


def small() -> nn.Module:
    """Convolutions, an addition, a matrix product and a linear layer, as trained."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (x + self.second(x)).flatten(2)
        return self.fc((x @ x.transpose(1, 2)).mean(1))

    def block(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    return trained(Net(forward, first=block(3), second=block(8), fc=nn.Linear(8, 5)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('ch_axis', [-1, 0, 1])
def test_fake_quantization_is_the_same_to_the_bit(way, ch_axis, dtype):
    x = torch.randn(32, 48, 9, 9).to(dtype)
    count = 1 if ch_axis < 0 else x.shape[ch_axis]
    scale, zero_point = torch.rand(count) / 10 + 0.01, torch.randint(-8, 8, (count,))
    results = []
    for device in ('cpu', 'cuda'):
        value = on(device, x)[0]
        result = ops.fake_quantize(value, scale.to(device), zero_point.to(device), -8, 7, ch_axis)
        result.backward(torch.ones_like(result))
        results.append((result.detach().cpu(), value.grad.cpu()))

    assert all(map(torch.equal, *results))


@pytest.mark.parametrize('ch_axis', [-1, 0, 1])
@pytest.mark.parametrize('function', [ops.fake_quantize_learned, ops.fake_quantize_offset])
def test_learned_steps_get_the_same_gradients(way, function, ch_axis):
    x = torch.randn(32, 48, 9, 9)
    count = 1 if ch_axis < 0 else x.shape[ch_axis]
    scale, offset, grad = torch.rand(count) / 10 + 0.05, torch.zeros(count), torch.randn_like(x)
    results = []
    for device in ('cpu', 'cuda'):
        learned = on(device, x, scale, offset)
        result = function(*learned, -8, 7, ch_axis)
        result.backward(grad.to(device))
        results.append([result.detach().cpu(), *(t.grad.cpu() for t in learned if t.grad is not None)])

    assert len(results[0]) == len(results[1]) == (3 if function is ops.fake_quantize_learned else 4)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    for cpu, gpu in zip(results[0][2:], results[1][2:], strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    'observer', ['MinMaxObserver', 'EMAMinMaxObserver', 'MSEObserver', 'HistogramObserver', 'PercentileObserver']
)
def test_calibration_finds_the_same_ranges(observer):
    config = qconfig(8, 8, a_observer=dict(type=f'mmrazor.{observer}'), w_observer=dict(type='mmrazor.MSEObserver'))
    cpu = quantized(small(), config)
    gpu = copy.deepcopy(cpu).cuda()
    batches = [images(8, seed=seed) for seed in range(3)]
    calibrate(cpu, *batches)
    calibrate(gpu, *(batch.cuda() for batch in batches))

    saved = gpu.state_dict()
    scales = {key: value for key, value in cpu.state_dict().items() if key.endswith('.scale')}
    assert len(scales) > 6 and all(saved[key].is_cuda for key in scales)
    for key, value in scales.items():
        torch.testing.assert_close(saved[key].cpu(), value, rtol=1e-3, atol=0.0, msg=key)


@pytest.mark.parametrize('kind', ['FakeQuantize', 'LSQFakeQuantize', 'LSQPlusFakeQuantize', 'TQTFakeQuantize'])
def test_training_takes_the_same_steps(way, kind):
    pot = dict(is_pot_scale=True) if kind == 'TQTFakeQuantize' else {}
    schemes = {
        'w_qscheme': dict(bit=8, is_per_channel=True, **pot),
        'a_qscheme': dict(bit=8, is_symmetry=kind == 'TQTFakeQuantize', **pot),
    }
    fakes = {f'{part}_fake_quant': dict(type=f'mmrazor.{kind}') for part in 'wa'}
    cpu = quantized(small(), {**schemes, **fakes, 'a_observer': dict(type='mmrazor.MinMaxObserver')})
    cpu = calibrate(cpu, images(8))
    losses = {}
    for model, device in ((cpu, 'cpu'), (copy.deepcopy(cpu).cuda(), 'cuda')):
        model.train()
        model.set_quant_state(False, True, False, True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        losses[device] = []
        for _ in range(4):
            loss = model.architecture(images(8).to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())

    assert losses['cpu'][-1] < 0.99 * losses['cpu'][0]
    assert losses['cuda'] == pytest.approx(losses['cpu'], rel=0.02)


@pytest.mark.parametrize('name', list(DETECTORS))
def test_detectors_captured_on_the_cpu_are_themselves_on_the_gpu(name, tmp_path):
    write_boxes(tmp_path)
    register_codebase('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        captured = MODELS.build(config_of(name, tmp_path, tmp_path / 'config').model).cuda().eval()
    own = copy.deepcopy(captured)
    assert len(islands_of(own)) > 1
    for module in islands_of(own).values():
        Island.uninstall(module)

    outputs = []
    for model in (captured.architecture, own.architecture):
        with seeded(), torch.no_grad(), codebase_of(model).settings(model):
            outputs.append([run_mode(model, (2, 3, size, SIZE), 'tensor') for size in (SIZE, 96)])
    found, expected = map(torch.utils._pytree.tree_leaves, outputs)
    tensors = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, Tensor)]
    assert tensors and all(a.is_cuda for pair in tensors for a in pair)
    # Attention is captured as its parts, matrices in another layout, which a GPU does not round in the same way.
    exact = dict(rtol=1e-3, atol=1e-4) if name == 'detr' else dict(rtol=0.0, atol=0.0)
    for a, b in tensors:
        torch.testing.assert_close(a, b, **exact)
