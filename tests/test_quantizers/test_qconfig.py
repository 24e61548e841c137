"""What a qconfig says, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from small_models import Net, calibrate, images, names, quantized
from torch import nn

from mmrazor_quant.compat import FakeQuantizeBase, UniformQuantizationObserverBase
from mmrazor_quant.fake_quants import FakeQuantize
from mmrazor_quant.observers import EMAMinMaxObserver, MinMaxObserver
from mmrazor_quant.quantizers import CustomQuantizer, QConfig
from mmrazor_quant.registry import MODELS


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3),
        nn.Flatten(), nn.Linear(180, 6),
    )  # fmt: skip


def bits(model):
    """Bits of weight and input by layer; 0 where there is no quantizer."""
    found = {}
    for layer in ('0', '2', '4', '6'):
        module = model.architecture.get_submodule(layer)
        quantizers = [getattr(module, name, None) for name in ('weight_fake_quant', 'input_fake_quant')]
        found[layer] = tuple(0 if q is None else (q.quant_max - q.quant_min).bit_length() for q in quantizers)
    return found


def overridden(*overrides, **fields):
    return quantized(network(), dict(fields, overrides=list(overrides)))


def test_the_default_is_8_bits_per_channel_and_per_tensor():
    model = calibrate(quantized(network(), {}))

    assert set(bits(model).values()) == {(8, 8)}
    weight, act = model.architecture[0].weight_fake_quant, model.architecture[0].input_fake_quant
    assert type(weight) is type(act) is FakeQuantize
    assert isinstance(weight.activation_post_process, MinMaxObserver)
    assert isinstance(act.activation_post_process, EMAMinMaxObserver)
    assert weight.qscheme == torch.per_channel_symmetric and act.qscheme == torch.per_tensor_affine
    assert (weight.scale.shape, act.scale.shape) == ((4,), (1,))


def test_the_arguments_of_the_rfc():
    model = quantized(
        network(),
        dict(
            qtype='affine',
            w_observer=dict(type='mmrazor.MSEObserver'),
            a_observer=dict(type='mmrazor.EMAMSEObserver'),
            w_fake_quant=dict(type='mmrazor.FakeQuantize'),
            a_fake_quant=dict(type='mmrazor.FakeQuantize'),
            w_qscheme=dict(bit=2, is_symmetry=True, is_per_channel=True, is_pot_scale=True),
            a_qscheme=dict(bit=4, is_symmetry=True, is_per_channel=False, is_pot_scale=False),
        ),
        is_qat=True,
        skipped_methods=None,
    )

    calibrate(model)

    assert set(bits(model).values()) == {(2, 4)}
    scale = model.architecture[0].weight_fake_quant.scale
    assert torch.equal(scale.log2(), scale.log2().round())
    assert type(model.architecture[0].input_fake_quant.activation_post_process).__name__ == 'EMAMSEObserver'


def test_the_channels_of_a_transposed_convolution_are_axis_1():
    model = calibrate(quantized(network(), {}))

    quantizer = model.architecture[4].weight_fake_quant

    assert (quantizer.ch_axis, quantizer.scale.shape) == (1, (5,))
    expected = model.architecture[4].weight.abs().amax((0, 2, 3)) / 127.5
    assert torch.allclose(quantizer.scale, expected)


def test_per_tensor_weights():
    model = calibrate(quantized(network(), dict(w_qscheme=dict(bit=8, is_per_channel=False))))

    assert {q.scale.numel() for _, q in model.weight_quantizers()} == {1}


def test_per_channel_activations():
    config = dict(a_qscheme=dict(bit=8, is_per_channel=True, ch_axis=1))

    model = calibrate(quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), config))

    quantizer = model.architecture[0].input_fake_quant
    assert (quantizer.ch_axis, quantizer.scale.numel()) == (1, 3)


def test_overrides_by_name():
    model = overridden(dict(name='2', w_qscheme=dict(bit=4)), dict(name='[46]', a_qscheme=dict(bit=3)))

    assert bits(model) == {'0': (8, 8), '2': (4, 8), '4': (8, 3), '6': (8, 3)}
    assert all(quantizer.is_per_channel for _, quantizer in model.weight_quantizers())


def test_names_are_patterns_over_whole_paths():
    nested = Net(lambda m, x: m.backbone(x) + m.head(x), backbone=network()[:1], head=nn.Conv2d(3, 4, 3))

    model = quantized(nested, dict(overrides=[dict(name='backbone.*', w_qscheme=dict(bit=4))]))

    quantizers = dict(model.weight_quantizers())
    assert quantizers['backbone.0.weight_fake_quant'].quant_max == 7
    assert quantizers['head.weight_fake_quant'].quant_max == 127


def test_overrides_by_type():
    model = overridden(dict(type='Conv2d', w_qscheme=dict(bit=4)), dict(type='Linear', a_qscheme=dict(bit=5)))

    assert bits(model) == {'0': (4, 8), '2': (4, 8), '4': (8, 8), '6': (8, 5)}


def test_overrides_by_a_base_class():
    assert set(bits(overridden(dict(type='Module', w_qscheme=dict(bit=4)))).values()) == {(4, 8)}


def test_overrides_by_order():
    model = overridden(
        dict(order='first', w_qscheme=dict(bit=5)), dict(order='last', w_qscheme=dict(bit=6)), w_qscheme=dict(bit=3)
    )

    assert bits(model) == {'0': (5, 8), '2': (3, 8), '4': (3, 8), '6': (6, 8)}


def test_first_and_last_are_by_execution_not_by_definition():
    model = Net(lambda m, x: m.a(m.b(x)), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))

    wrapped = quantized(model, dict(overrides=[dict(order='first', w_qscheme=dict(bit=4))]))

    assert wrapped.architecture.b.weight_fake_quant.quant_max == 7
    assert wrapped.architecture.a.weight_fake_quant.quant_max == 127


def test_all_conditions_of_an_override_must_hold():
    model = overridden(dict(type='Conv2d', order='first', w_qscheme=dict(bit=4)))

    assert bits(model) == {'0': (4, 8), '2': (8, 8), '4': (8, 8), '6': (8, 8)}


def test_later_overrides_win_and_leave_what_they_do_not_name():
    model = overridden(
        dict(type='Conv2d', w_qscheme=dict(bit=4, is_per_channel=False), a_qscheme=dict(bit=4)),
        dict(name='2', w_qscheme=dict(bit=6)),
    )

    assert bits(model) == {'0': (4, 4), '2': (6, 4), '4': (8, 8), '6': (8, 8)}
    assert model.architecture[2].weight_fake_quant.scale.numel() == 1


def test_float_overrides():
    model = overridden(
        dict(order='first', w_qscheme='float', a_qscheme='float'),
        dict(name='2', w_qscheme='float'),
        dict(name='4', a_qscheme='float'),
    )

    assert bits(model) == {'0': (0, 0), '2': (0, 8), '4': (8, 0), '6': (8, 8)}
    reference = network()
    calibrate(model)
    x = model.architecture[0](images())
    assert torch.equal(x, reference[0](images()))


def test_a_float_layer_keeps_its_batch_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    net[1].running_mean.fill_(2.0)

    model = quantized(net, dict(overrides=[dict(name='0', w_qscheme='float', a_qscheme='float')]))
    calibrate(model)

    assert torch.equal(model.architecture[:3](images()), net[:3](images()))
    expected = model.architecture[3].input_fake_quant(net[:3](images()))
    weight = model.architecture[3].weight_fake_quant(net[3].weight)
    assert torch.equal(model(images()), nn.functional.conv2d(expected, weight, net[3].bias))


def test_a_float_base_with_one_layer_quantized():
    model = quantized(
        network(),
        dict(
            w_qscheme='float', a_qscheme='float', overrides=[dict(name='2', w_qscheme=dict(bit=4, is_per_channel=True))]
        ),
    )

    assert bits(model) == {'0': (0, 0), '2': (4, 0), '4': (0, 0), '6': (0, 0)}


def test_overrides_of_observers_and_fake_quantizers():
    model = overridden(dict(order='last', a_observer=dict(type='mmrazor.MSEObserver')))

    kinds = [type(q.activation_post_process).__name__ for _, q in model.act_quantizers()]
    assert kinds == ['EMAMinMaxObserver'] * 3 + ['MSEObserver']


def test_overrides_of_functions():
    net = Net(lambda m, x: m.a(x) @ (x * 2), a=nn.Conv2d(3, 3, 1))

    model = quantized(net, dict(overrides=[dict(type='matmul', a_qscheme='float')]))

    assert names(model.act_quantizers()) == ['a.input_fake_quant']


REFUSED = {
    'qtype': (dict(qtype='log'), 'qconfig.qtype', 'log'),
    'unknown field': (dict(w_scheme=dict(bit=4)), 'w_scheme', 'w_qscheme'),
    'bit 0': (dict(w_qscheme=dict(bit=0)), 'qconfig.w_qscheme.bit', '0'),
    'bit 33': (dict(a_qscheme=dict(bit=33)), 'qconfig.a_qscheme.bit', '33'),
    'bit as text': (dict(a_qscheme=dict(bit='8')), 'qconfig.a_qscheme.bit', "'8'"),
    'unknown scheme field': (dict(a_qscheme=dict(bits=8)), 'qconfig.a_qscheme.bits', 'bit'),
    'scheme of another type': (dict(a_qscheme=8), 'qconfig.a_qscheme', '8'),
    'unknown observer': (dict(w_observer=dict(type='mmrazor.NoSuchObserver')), 'w_observer', 'NoSuchObserver'),
    'unknown fake quantizer': (dict(a_fake_quant=dict(type='NoSuch')), 'a_fake_quant', 'NoSuch'),
    'observer without type': (dict(a_observer=dict(averaging=1)), 'qconfig.a_observer', 'type'),
    'observer as text': (dict(a_observer='mmrazor.MinMaxObserver'), 'qconfig.a_observer', 'type'),
    'unknown argument': (dict(a_observer=dict(type='mmrazor.MinMaxObserver', wrong=1)), 'qconfig.a', 'wrong'),
    'range given twice': (dict(a_observer=dict(type='mmrazor.MinMaxObserver', quant_min=1)), 'qconfig.a', 'quant_min'),
    'overrides as dict': (dict(overrides=dict(name='a')), 'qconfig.overrides', 'list'),
    'override as text': (dict(overrides=['conv']), 'qconfig.overrides[0]', 'conv'),
    'override for nothing': (dict(overrides=[dict(w_qscheme=dict(bit=4))]), 'qconfig.overrides[0]', 'name'),
    'unknown order': (dict(overrides=[dict(order='second', w_qscheme='float')]), 'qconfig.overrides[0]', 'second'),
    'unknown override field': (dict(overrides=[dict(name='a', bit=4)]), 'qconfig.overrides[0]', 'bit'),
    'bit in an override': (
        dict(overrides=[dict(name='*'), dict(name='a', w_qscheme=dict(bit=40))]),
        'qconfig.overrides[1].w_qscheme.bit', '40',
    ),
    'observer in an override': (
        dict(overrides=[dict(name='a', w_observer=dict(type='NoSuch'))]), 'qconfig.overrides[0].w_observer', 'NoSuch'
    ),
    'float as base': (dict(w_qscheme='Float'), 'qconfig.w_qscheme', 'Float'),
    'text': ('w8a8', 'qconfig: got', "'w8a8'"),
    'an empty list': ([], 'qconfig: got', '[]'),
    'observer type as number': (dict(w_observer=dict(type=1)), 'qconfig.w_observer.type: got', '1'),
    'fake quantizer type as None': (dict(a_fake_quant=dict(type=None)), 'qconfig.a_fake_quant.type: got', 'None'),
    'observer type where nothing is quantized': (
        dict(a_qscheme='float', a_observer=dict(type=1)), 'qconfig.a_observer.type: got', '1'
    ),
    'override for a class itself': (
        dict(overrides=[dict(type=nn.Conv2d, w_qscheme='float')]), 'qconfig.overrides[0].type: got', 'Conv2d'
    ),
    'override for a number': (
        dict(overrides=[dict(name=0, w_qscheme='float')]), 'qconfig.overrides[0].name: got', '0'
    ),
    'text for a number': (
        dict(a_observer=dict(type='mmrazor.EMAMinMaxObserver', ema_ratio='0.9')),
        'qconfig.a_observer.ema_ratio: got', "'0.9'",
    ),
    'number for a flag': (
        dict(w_fake_quant=dict(type='mmrazor.LSQFakeQuantize', scale_grad=0)),
        'qconfig.w_fake_quant.scale_grad: got', '0',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_a_wrong_qconfig_names_the_field_and_the_value(name):
    config, field, given = REFUSED[name]

    with pytest.raises(ValueError) as error:
        CustomQuantizer(qconfig=config)

    assert field in str(error.value)
    assert given in str(error.value)


@pytest.mark.parametrize('override', [dict(name='no.such.layer'), dict(type='Conv3d'), dict(name='0', type='Linear')])
def test_an_override_that_matches_nothing_is_an_error(override):
    with pytest.raises(ValueError, match=r'overrides\[1\].*matches no') as error:
        overridden(dict(name='0', w_qscheme=dict(bit=4)), dict(override, w_qscheme=dict(bit=4)))

    assert '0, 2, 4, 6' in str(error.value)


def test_one_quantizer_object_prepares_several_models():
    quantizer = CustomQuantizer(dict(overrides=[dict(name='0', w_qscheme=dict(bit=4))]))
    from mmrazor_quant.algorithms import GeneralQuant

    GeneralQuant(network(), quantizer, input_shape=(3, 8, 8))

    with pytest.raises(ValueError, match='matches no'):
        GeneralQuant(nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 1)), quantizer, input_shape=(3, 8, 8))


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match=r"quantizer.backend: .*academic.*'nowhere'"):
        CustomQuantizer(backend='nowhere')
    with pytest.raises(ValueError, match=r'quantizer.backend: .*academic.*\[1\]'):
        CustomQuantizer(backend=[1])


@pytest.mark.parametrize('field', ['quantize_add', 'quantize_bias'])
@pytest.mark.parametrize('given', [1, 'False', None])
def test_switches_of_the_quantizer_are_flags(field, given):
    with pytest.raises(ValueError, match=f'quantizer.{field}: got {given!r}, allowed: True, False'):
        CustomQuantizer(**{field: given})


def test_resolve_tells_weights_and_activations_apart():
    config = QConfig(dict(w_qscheme='float', overrides=[dict(order='last', w_qscheme=dict(bit=2))]))

    assert config.resolve('a', nn.Linear(1, 1), 'layer')['w'] is None
    assert config.resolve('a', nn.Linear(1, 1), 'layer', frozenset({'last'}))['w'].scheme.bit == 2
    assert config.resolve('a', nn.Linear(1, 1), 'layer')['a'].scheme.bit == 8


class OwnObserver(UniformQuantizationObserverBase):
    """As a user writes one, in torch's style."""

    def __init__(self, dtype, qscheme, quant_min, quant_max, factor=1.0):
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=quant_min, quant_max=quant_max)
        self.factor = factor
        self.register_buffer('largest', torch.zeros(1))

    def forward(self, x):
        torch.maximum(self.largest, x.detach().abs().max() * self.factor, out=self.largest)
        return x

    def reset_min_max_vals(self):
        self.largest.zero_()

    def calculate_qparams(self):
        return self._calculate_qparams(-self.largest, self.largest)


class OwnFakeQuantize(FakeQuantizeBase):
    """Rounds in the user's own way, with a parameter of its own."""

    def __init__(self, observer, quant_min, quant_max, offset=0.0, **observer_kwargs):
        super().__init__()
        self.activation_post_process = observer(quant_min=quant_min, quant_max=quant_max, **observer_kwargs)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.offset = nn.Parameter(torch.tensor(offset))
        self.register_buffer('scale', torch.ones(1))
        self.register_buffer('zero_point', torch.zeros(1))

    def calculate_qparams(self):
        return self.activation_post_process.calculate_qparams()

    def forward(self, x):
        if self.observer_enabled[0]:
            self.activation_post_process(x)
        if self.fake_quant_enabled[0]:
            return (x / self.scale).round().clamp(self.quant_min, self.quant_max) * self.scale + self.offset
        return x


@pytest.fixture
def own_classes():
    for cls in (OwnObserver, OwnFakeQuantize):
        MODELS.register_module(module=cls, force=True)
    yield
    for cls in (OwnObserver, OwnFakeQuantize):
        del MODELS._module_dict[cls.__name__]


@pytest.mark.parametrize('prefix', ['', 'mmrazor.'])
def test_a_users_own_classes(own_classes, prefix):
    model = quantized(
        network(),
        dict(
            a_observer=dict(type=f'{prefix}OwnObserver', factor=2.0),
            a_fake_quant=dict(type=f'{prefix}OwnFakeQuantize', offset=0.25),
            a_qscheme=dict(bit=4, is_symmetry=True),
            w_qscheme='float',
        ),
    )
    assert 'input_fake_quant.offset' in '\n'.join(model.state_dict())

    calibrate(model)

    quantizer = model.architecture[0].input_fake_quant
    assert type(quantizer) is OwnFakeQuantize
    assert torch.allclose(quantizer.scale, images().abs().max() * 2 / 7.5)
    expected = (images() / quantizer.scale).round().clamp(-8, 7) * quantizer.scale + 0.25
    assert torch.equal(quantizer(images()), expected)
    model.train()
    model(images()).sum().backward()
    assert quantizer.offset.grad is not None


def test_classes_themselves_instead_of_names():
    model = calibrate(quantized(network(), dict(a_observer=dict(type=MinMaxObserver), w_qscheme='float')))

    assert isinstance(model.architecture[0].input_fake_quant.activation_post_process, MinMaxObserver)


TORCH = {
    'observers': dict(
        w_observer=dict(type=torch.ao.quantization.PerChannelMinMaxObserver),
        a_observer=dict(type=torch.ao.quantization.MinMaxObserver),
    ),
    'fake quantizers': dict(
        w_observer=dict(type=torch.ao.quantization.PerChannelMinMaxObserver),
        a_observer=dict(type=torch.ao.quantization.MovingAverageMinMaxObserver),
        w_fake_quant=dict(type=torch.ao.quantization.FakeQuantize),
        a_fake_quant=dict(type=torch.ao.quantization.FakeQuantize),
    ),
}


@pytest.mark.parametrize('name', TORCH)
def test_torchs_own_classes(name):
    reference = calibrate(quantized(network(), dict(a_observer=dict(type='mmrazor.MinMaxObserver'))))

    model = calibrate(quantized(network(), TORCH[name]))

    for (path, found), (_, expected) in zip(
        [*model.weight_quantizers(), *model.act_quantizers()],
        [*reference.weight_quantizers(), *reference.act_quantizers()],
    ):
        assert torch.allclose(found.scale, expected.scale, rtol=1e-5), path
        assert torch.equal(found.zero_point.long(), expected.zero_point.long()), path
    assert torch.allclose(model(images()), reference(images()), atol=1e-4)
    converted = model.convert()
    assert torch.allclose(converted(images()), model(images()), atol=1e-4)
