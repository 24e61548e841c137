"""What all learned fake quantizers have in common: start values, state, switches, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant import fake_quants, ops
from mmrazor_quant.fake_quants import LearnedFakeQuantize
from mmrazor_quant.observers import EMAMinMaxObserver, MinMaxObserver, MSEObserver
from mmrazor_quant.qscheme import QScheme

NAMES = ('LSQ', 'LSQPlus', 'PACT', 'DSQ', 'TQT')
PARAMETERS = {
    'LSQ': (['scale'], ['scale']),
    'LSQPlus': (['scale'], ['scale', 'offset']),
    'PACT': (['upper'], ['upper', 'lower']),
    'DSQ': (['upper', 'alpha'], ['upper', 'lower', 'alpha']),
    'TQT': (['log2_threshold'], None),
}
"""Names of the parameters in symmetric and asymmetric schemes."""


def build(name, scheme=None, observer=MinMaxObserver, **kwargs):
    kind = getattr(fake_quants, f'{name}FakeQuantize')
    scheme = scheme or QScheme(bit=4, is_symmetry=name == 'TQT')
    return kind(observer=observer, **scheme.observer_params(), **kwargs)


def config(name, per_channel=False, bit=4, **fields):
    fake_quant = dict(type=f'mmrazor.{name}FakeQuantize')
    symmetric = name == 'TQT'
    weights = dict(type='mmrazor.LSQFakeQuantize') if name == 'PACT' else fake_quant
    return dict(
        w_fake_quant=weights, a_fake_quant=fake_quant, a_observer=dict(type='mmrazor.MinMaxObserver'),
        w_qscheme=dict(bit=bit, is_per_channel=True),
        a_qscheme=dict(bit=bit, is_symmetry=symmetric, is_per_channel=per_channel), **fields,
    )  # fmt: skip


def network():
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3), nn.Flatten(1),
            nn.Linear(320, 6),
        )
    )  # fmt: skip


def learned_of(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, LearnedFakeQuantize)}


def schemes_of(name, bits=(4,)):
    """All kinds of schemes that the class takes."""
    return [
        QScheme(bit=bit, is_symmetry=symmetric, is_per_channel=channels, is_pot_scale=pot, is_signed=signed, ch_axis=1)
        for bit in bits
        for symmetric in ((True,) if name == 'TQT' else (True, False))
        for signed in (True, False)
        for channels in (False, True)
        for pot in (False, True)
    ]


ALL = [(name, scheme) for name in NAMES for scheme in schemes_of(name, (1, 4, 8))]
IDS = [
    f'{name}-{s.bit}{"sym" if s.is_symmetry else "asym"}{"s" if s.signed else "u"}{"-channels" * s.is_per_channel}'
    f'{"-pot" * s.is_pot_scale}'
    for name, s in ALL
]


# -- parameters and start values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_parameters_have_their_final_shape_before_any_data(name, per_channel):
    model = quantized(network(), config(name, per_channel))
    shapes = {'0': (4, 3), '3': (5, 4), '5': (6, 320)}
    before = {key: p for key, p in model.named_parameters() if 'fake_quant' in key}
    for layer, (out_channels, in_channels) in shapes.items():
        weight = model.architecture.get_submodule(f'{layer}.weight_fake_quant')
        act = model.architecture.get_submodule(f'{layer}.input_fake_quant')
        assert {p.shape for p in weight.learned_parameters()} == {(out_channels,)}
        assert {p.shape for p in act.learned_parameters()} == {(in_channels if per_channel else 1,)}
        assert weight.scale.shape == weight.zero_point.shape == (out_channels,)
        names = PARAMETERS[name][0 if name == 'TQT' else 1]
        assert [key for key, _ in act.named_parameters()] == names
    calibrate(model)
    model.train()(images()).sum().backward()
    after = {key: p for key, p in model.named_parameters() if 'fake_quant' in key}
    assert list(before) == list(after) and all(before[key] is after[key] for key in after)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in after.values())


@pytest.mark.parametrize('name, scheme', ALL, ids=IDS)
def test_start_values_are_those_of_the_observer(name, scheme):
    """The grid in use is the one that plain fake quantization has."""
    x = torch.randn(6, 3, 5) * torch.tensor([1.0, 2.0, 0.3]).reshape(1, 3, 1)
    x = x if scheme.signed or not scheme.is_symmetry else x.abs()
    plain, learned = build('', scheme), build(name, scheme)
    expected = plain(x)
    assert not learned.is_initialized
    learned.enable_fake_quant(False)
    learned(x)
    assert not learned.is_initialized, 'observing alone starts nothing'
    learned.compute_qparams()
    learned.enable_fake_quant()
    learned.disable_observer()

    y = learned(x)

    assert learned.is_initialized and learned.initialized.item() == 1
    torch.testing.assert_close(learned.scale_in_use(), plain.scale, rtol=1e-6, atol=0)
    if name != 'LSQPlus':
        assert torch.equal(learned.zero_point, plain.zero_point)
    flips = (y - expected).detach().abs() > 1e-5 * x.abs().max()
    assert flips.float().mean() < 0.02
    assert learned(x).requires_grad


@pytest.mark.parametrize('name', NAMES)
def test_starts_from_the_first_tensor_that_is_observed_and_quantized(name):
    x = torch.randn(200)
    quantizer = build(name)
    y = quantizer(x)
    assert quantizer.is_initialized
    assert (y - x).abs().max() < 0.6 * (x.max() - x.min()) / 15 * (2 if name == 'TQT' else 1)
    scale = quantizer.scale_in_use().clone()

    quantizer(100 * x)

    assert torch.equal(quantizer.scale_in_use(), scale), "the scale is not the observer's any more"
    assert quantizer.activation_post_process.max_val == x.max(), 'the observer rests'


@pytest.mark.parametrize('name', NAMES)
def test_calibrating_again_starts_again(name):
    x = torch.randn(200)
    quantizer = build(name)
    quantizer(x)
    first = quantizer.scale_in_use().clone()
    quantizer.activation_post_process.reset()
    quantizer.disable_fake_quant()
    quantizer(10 * x)
    assert torch.equal(quantizer.scale_in_use(), first)
    quantizer.compute_qparams()
    torch.testing.assert_close(quantizer.scale_in_use(), 10 * first)


@pytest.mark.parametrize('name', NAMES)
def test_an_empty_tensor_starts_nothing(name):
    """A detector's second stage without proposals."""
    quantizer = build(name)
    assert quantizer(torch.zeros(0, 4)).shape == (0, 4)
    assert not quantizer.is_initialized
    x = torch.randn(50, 4)
    quantizer(x)
    assert quantizer.activation_post_process.max_val == x.max() and quantizer.is_initialized


@pytest.mark.parametrize('observer', [MinMaxObserver, EMAMinMaxObserver, MSEObserver])
@pytest.mark.parametrize('name', NAMES)
def test_any_observer_gives_start_values(name, observer):
    quantizer = build(name, observer=observer)
    x = torch.randn(500)
    assert (quantizer(x) - x).pow(2).mean() < 0.05
    assert torch.isfinite(quantizer.scale_in_use()).all()


@pytest.mark.parametrize('name', NAMES)
def test_wide_integers(name):
    """A range that starts at zero, on 32 bits: the zero point is the lowest int32."""
    for signed in (True, False):
        scheme = QScheme(bit=32, is_symmetry=name == 'TQT', is_signed=signed)
        for x in (torch.rand(100), torch.randn(100), torch.randn(100).relu()):
            x = x.abs() if scheme.is_symmetry and not signed else x
            quantizer = build(name, scheme)
            y = quantizer(x)
            assert (y - x).abs().max() < 1e-5, (signed, quantizer)
            y.sum().backward()


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_power_of_two_scales_are_honoured_while_they_learn(name, per_channel):
    scheme = QScheme(bit=4, is_symmetry=name == 'TQT', is_per_channel=per_channel, ch_axis=1, is_pot_scale=True)
    quantizer = build(name, scheme)
    x = torch.randn(30, 3) * torch.tensor([1.0, 2.0, 0.3])
    if per_channel:
        quantizer.set_channels(3)
    quantizer(x)
    start = quantizer.scale_in_use().clone()
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.2)
    for _ in range(10):
        optimizer.zero_grad()
        y = quantizer(3 * x)
        scale, offset = quantizer.scale_in_use(), getattr(quantizer, 'offset', torch.zeros(1))
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
        steps = ((y - offset) / scale).detach()
        assert torch.allclose(steps, steps.round(), atol=1e-4), 'the forward used the scale it said'
        (y - 3 * x).pow(2).mean().backward()
        optimizer.step()
    assert not torch.equal(scale, start)


# -- switches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_switched_off_in_training_the_parameters_get_zero_gradients(name):
    quantizer = build(name)
    quantizer.disable_fake_quant()
    x = torch.randn(50, requires_grad=True)
    y = quantizer(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert (x.grad == 1).all()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in quantizer.learned_parameters())
    assert quantizer.activation_post_process.max_val == x.max()
    with torch.no_grad():
        assert quantizer(x) is x
    assert quantizer.eval()(x) is x


@pytest.mark.parametrize('name', NAMES)
def test_delay_of_a_model(name):
    """First float, then weights quantized, then everything: each parameter always has a gradient."""
    model = quantized(network(), config(name)).train()
    learned = learned_of(model)
    assert len(learned) == 6
    for state in ((True, False, True, False), (True, True, True, False), (True, True, True, True)):
        model.zero_grad()
        model.set_quant_state(*state)
        model(images()).pow(2).sum().backward()
        for path, quantizer in learned.items():
            on = state[1] if path.endswith('weight_fake_quant') else state[3]
            assert quantizer.is_initialized == on, path
            for parameter in quantizer.learned_parameters():
                assert parameter.grad is not None, path
                assert on or (parameter.grad == 0).all(), path


def test_delay_before_an_in_place_addition():
    def forward(m, x):
        y = m.a(x)
        y += m.b(x)
        return m.c(y)

    layers = dict(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 4, 1))
    model = quantized(Net(forward, **layers), config('LSQ'), quantize_add=True).train()
    model.set_quant_state(True, True, True, False)
    model(images()).sum().backward()


@pytest.mark.parametrize('name', NAMES)
def test_called_twice_before_backward(name):
    """A head shared by several feature maps."""
    quantizer = build(name)
    x = torch.randn(100, requires_grad=True)
    quantizer(x)
    expected = []
    for factor in (1, 2):
        quantizer.zero_grad()
        quantizer(factor * x).pow(2).sum().backward()
        expected.append([p.grad.clone() for p in quantizer.learned_parameters()])
    quantizer.zero_grad()
    (quantizer(x).pow(2).sum() + quantizer(2 * x).pow(2).sum()).backward()
    for parameter, one, two in zip(quantizer.learned_parameters(), *expected):
        torch.testing.assert_close(parameter.grad, one + two)


@pytest.mark.parametrize('name', NAMES)
def test_first_batch_seen_twice_before_backward(name):
    quantizer = build(name)
    x = torch.randn(100, requires_grad=True)
    (quantizer(x).sum() + quantizer(2 * x).sum()).backward()
    assert torch.isfinite(x.grad).all()


# -- state -------------------------------------------------------------------------------------------------------------


def moved(quantizer):
    """As after some steps of training."""
    with torch.no_grad():
        for parameter in quantizer.learned_parameters():
            parameter.mul_(1.1)
    return quantizer


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('prepared', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_saving_and_loading(name, prepared, assign):
    scheme = QScheme(bit=4, is_symmetry=name == 'TQT', is_per_channel=True)
    x = torch.randn(6, 30)
    one = build(name, scheme)
    one(x)
    moved(one)
    expected = one(x)
    two = build(name, scheme)
    if prepared:
        two.set_channels(6)
    keys = two.load_state_dict(copy.deepcopy(one.state_dict()), assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert two.is_initialized
    assert torch.equal(two(3 * x), one(3 * x)) and torch.equal(two(x), expected), 'not started again'
    assert all(isinstance(p, nn.Parameter) and p.shape == (6,) for p in two.learned_parameters())
    assert {key: value.tolist() for key, value in two.state_dict().items()} == {
        key: value.tolist() for key, value in one.state_dict().items()
    }


@pytest.mark.parametrize('name', NAMES)
def test_loading_what_was_not_started_yet(name):
    started, fresh = build(name), build(name)
    started(torch.randn(50))
    started.load_state_dict(fresh.state_dict())
    assert not started.is_initialized
    x = 100 * torch.randn(50)
    started(x)
    assert started.is_initialized and started.scale_in_use() > 1


@pytest.mark.parametrize('name', NAMES)
def test_a_model_of_another_life_continues(name):
    first = calibrate(quantized(network(), config(name, True)))
    for quantizer in learned_of(first).values():
        moved(quantizer)
    first(images())
    second = quantized(network(), config(name, True))
    second.load_state_dict(first.state_dict())
    second.set_quant_state(True, True, True, True)
    assert torch.equal(second(images()), first(images()))
    assert torch.equal(second(2 * images()), first(2 * images())), 'observers on, but the start is over'


@pytest.mark.parametrize('name', NAMES)
def test_copies_are_independent(name):
    one = build(name)
    x = torch.randn(100)
    one(x)
    two = copy.deepcopy(one)
    expected = one(x)
    assert two.is_initialized and torch.equal(two(x), expected)
    moved(two)
    assert torch.equal(one(x), expected) and not torch.equal(two(x), expected)


def test_a_running_average_of_parameters_is_one():
    """torch's averaged model over a learned one."""
    model = calibrate(quantized(network(), config('LSQPlus')))
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    path, quantizer = next(iter(learned_of(model).items()))
    before = quantizer.scale.detach().clone()
    moved(quantizer)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.get_submodule(path).scale, before * 1.05)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('bit', [2, 4])
@pytest.mark.parametrize('name', ['LSQ', 'LSQPlus', 'TQT'])
def test_training_finds_a_scale_of_little_error(name, bit):
    """From the extremes of a tensor with long tails, to about the best scale that there is."""
    x = torch.randn(2000).pow(3) / 20
    quantizer = build(name, QScheme(bit=bit, is_symmetry=name == 'TQT'))
    first = (quantizer(x) - x).pow(2).mean().item()
    start, zero_point = quantizer.scale_in_use().clone(), quantizer.zero_point
    ends = (quantizer.quant_min, quantizer.quant_max)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).pow(2).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.85 * first
    if name != 'LSQPlus':
        scales = [start * k / 50 for k in range(2, 60)]
        best = min((ops.fake_quantize(x, s, zero_point, *ends) - x).pow(2).mean() for s in scales)
        assert loss < 1.06 * best


@pytest.mark.parametrize('name', NAMES)
def test_sgd_on_a_model_lowers_its_loss(name):
    model = calibrate(quantized(network(), config(name, bit=3))).train()
    x, target = images(8), torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_refusals():
    with pytest.raises(ValueError, match='TQTFakeQuantize: True'):
        build('TQT', QScheme(is_symmetry=False))
    for alpha in (0, 1, -1, 2):
        with pytest.raises(ValueError, match=r'alpha: got .*\[0.001, 0.999\]'):
            build('DSQ', alpha=alpha)
    with pytest.raises(ValueError, match='set_channels: got 5'):
        build('LSQ').set_channels(5)


def test_a_plain_qconfig_names_the_field_of_what_is_refused():
    config = qconfig(a=4, a_fake_quant=dict(type='mmrazor.TQTFakeQuantize'))
    with pytest.raises(ValueError, match=r'qconfig\.a: TQTFakeQuantize.*is_symmetry: got False'):
        quantized(network(), config)
