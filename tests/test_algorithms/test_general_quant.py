"""GeneralQuant: still the float model, with quantization beside it."""

from __future__ import annotations

import copy
import random
import warnings

import mmcls.models  # noqa: F401  registers its models
import numpy as np
import pytest
import torch
from mmcls.models.backbones.base_backbone import BaseBackbone
from mmcls.structures import ClsDataSample
from mmengine.hooks import EMAHook
from mmengine.model import BaseDataPreprocessor, BaseModel, ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint, save_checkpoint
from small_models import FINE, Net, calibrate, error, images, names, qconfig, quantized
from torch import nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.quantizers import CustomQuantizer

IMAGE = (3, 16, 16)
PREPROCESSOR = dict(type='mmcls.ClsDataPreprocessor', num_classes=4, mean=[0.5] * 3, std=[2.0] * 3)


def classifier(backbone=None, channels=16):
    """Config of a small residual network of mmcls."""
    small = dict(type='ResNet_CIFAR', depth=18, base_channels=2, stem_channels=2, strides=(1, 1, 2, 2))
    return dict(
        type='mmcls.ImageClassifier',
        backbone=backbone or small,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=4, in_channels=channels, loss=dict(type='CrossEntropyLoss')),
        _scope_='mmcls',
    )


def build(config=None, architecture=None, **kwargs):
    quantizer = dict(type='mmrazor.CustomQuantizer', qconfig=FINE if config is None else config)
    kwargs = dict(data_preprocessor=PREPROCESSOR, input_shape=IMAGE) | kwargs
    torch.manual_seed(0)
    return GeneralQuant(architecture or classifier(), quantizer, **kwargs)


def float_model():
    torch.manual_seed(0)
    model = MODELS.build(dict(classifier(), data_preprocessor=PREPROCESSOR))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def batch(size=4, seed=0):
    samples = [ClsDataSample().set_gt_label(i % 4) for i in range(size)]
    return images(size, IMAGE, seed), samples


@pytest.fixture(scope='module')
def prepared():
    """A float model and the same one wrapped; tests copy what they change."""
    with DefaultScope.overwrite_default_scope('mmcls'):
        reference = float_model()
        torch.manual_seed(0)
        wrapped = build(architecture=copy.deepcopy(reference))
    return reference, wrapped


@pytest.fixture
def pair(prepared):
    return copy.deepcopy(prepared)


@pytest.fixture
def model(pair):
    return pair[1]


# -- the float model ---------------------------------------------------------------------------------------------------


def test_float_outputs_are_bit_equal_in_all_modes(pair):
    reference, model = pair
    x, samples = batch()
    for net in pair:
        net.eval()
    assert torch.equal(model(x, mode='tensor'), reference(x, mode='tensor'))
    for found, expected in zip(model(x, samples, mode='predict'), reference(x, samples, mode='predict')):
        assert torch.equal(found.pred_label.score, expected.pred_label.score)
    for net in pair:
        net.train()
    assert torch.equal(model(x, samples, mode='loss')['loss'], reference(x, samples, mode='loss')['loss'])
    assert torch.equal(model(x, samples, 'loss')['loss'], reference(x, samples, 'loss')['loss'])
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())


def test_the_state_dict_is_the_float_one_and_quantization_beside_it(pair):
    reference, model = pair
    expected, found = list(reference.state_dict()), list(model.state_dict())

    assert [key for key in found if key in set(expected)] == expected
    assert all('_fake_quant.' in key or key == 'quant_calibrated' for key in set(found) - set(expected))
    assert len(found) > len(expected)


def test_modules_keep_class_and_path(pair):
    reference, model = pair
    assert type(model.architecture) is type(reference)
    modules = dict(model.architecture.named_modules())
    assert all(type(modules[path]) is type(module) for path, module in reference.named_modules())
    assert model.backbone is model.architecture.backbone
    assert model.with_neck and model.head.num_classes == 4
    with pytest.raises(AttributeError, match='no_such_part'):
        model.no_such_part  # noqa: B018


def test_a_float_checkpoint_loads_with_no_missing_float_key(pair, tmp_path):
    reference, model = pair
    with torch.no_grad():
        for value in reference.state_dict().values():
            value.add_(1)

    result = model.load_state_dict(reference.state_dict(), strict=False)

    assert not result.unexpected_keys
    assert all('_fake_quant.' in key or key == 'quant_calibrated' for key in result.missing_keys)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())


def test_train_step_val_step_and_test_step(pair):
    reference, model = pair
    data = dict(inputs=[torch.randint(0, 255, IMAGE, dtype=torch.uint8) for _ in range(4)], data_samples=batch()[1])
    for net in pair:
        net.eval()
    found, expected = (net.test_step(copy.deepcopy(data)) for net in (model, reference))
    assert [f.pred_label.label.item() for f in found] == [e.pred_label.label.item() for e in expected]
    assert len(model.val_step(copy.deepcopy(data))) == 4
    losses = []
    for net in pair:
        net.train()
        wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), lr=0.1))
        losses += [[net.train_step(copy.deepcopy(data), wrapper)['loss'].item() for _ in range(2)]]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


# -- quantization ------------------------------------------------------------------------------------------------------


def test_quantized_is_near_float_and_not_float(pair):
    reference, model = pair
    x, _ = batch()
    reference.eval()

    calibrate(model, x)

    assert model.is_calibrated
    assert 0 < error(model(x), reference(x)) < 1e-2
    model.set_quant_state(False, False, False, False)
    assert torch.equal(model(x), reference(x))


def test_each_switch_does_what_it_says(model):
    x, _ = batch()
    float_out = model.eval()(x)
    calibrate(model, x)
    outs = {}
    for weight, act in ((False, True), (True, False), (True, True)):
        model.set_quant_state(weight_fake_quant=weight, act_fake_quant=act)
        outs[weight, act] = model(x)
        assert not torch.equal(outs[weight, act], float_out)
    assert len({tuple(out.flatten().tolist()) for out in outs.values()}) == 3
    model.set_quant_state()
    assert torch.equal(model(x), outs[True, True])


def test_calibration_sees_float_activations_of_all_batches(model):
    first, second = batch(seed=1)[0], batch(seed=2)[0] * 3

    calibrate(model, first, second)

    quantizer = dict(model.act_quantizers())['backbone.conv1.input_fake_quant']
    low, high = min(first.min(), second.min()), max(first.max(), second.max())
    assert torch.allclose(quantizer.scale, (high - low) / (2**16 - 1))


def test_observing_the_weights_anew_forgets_the_old_ones():
    model = quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), qconfig(w_observer=dict(type='mmrazor.MinMaxObserver')))
    model.observe_weights()
    scale = model.architecture[0].weight_fake_quant.scale.clone()

    with torch.no_grad():
        model.architecture[0].weight.div_(4)
    model.observe_weights()

    assert torch.allclose(model.architecture[0].weight_fake_quant.scale, scale / 4)


def test_loss_and_gradients_under_quantization(model):
    x, samples = batch()
    calibrate(model, x)
    model.set_quant_state(True, True, True, True)
    model.train()

    loss = model(x, samples, mode='loss')['loss']
    loss.backward()

    assert torch.isfinite(loss)
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith('conv1.weight'))


def test_the_observer_follows_the_weights_while_training(model):
    x, samples = batch()
    calibrate(model, x)
    model.set_quant_state(True, True, True, True)
    before = {name: q.scale.clone() for name, q in model.weight_quantizers()}
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4:
                p.mul_(3)

    model.train()(x, samples, mode='loss')

    after = dict(model.weight_quantizers())
    grown = [(after[name].scale > before[name] * 1.5).any().item() for name in before if 'conv' in name]
    assert all(grown)


def test_a_quantized_checkpoint_gives_the_same_model_in_a_new_instance(model, tmp_path):
    x, _ = batch()
    calibrate(model, x)
    save_checkpoint(dict(state_dict=model.state_dict()), str(tmp_path / 'quantized.pth'))
    with DefaultScope.overwrite_default_scope('mmcls'):
        torch.manual_seed(9)
        other = build(architecture=classifier())
    assert not other.is_calibrated

    load_checkpoint(other, str(tmp_path / 'quantized.pth'), strict=True)

    assert other.is_calibrated
    other.eval()
    assert torch.equal(other(x), model(x))
    assert list(other.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


def test_a_copy_is_equal_and_independent(model):
    x, _ = batch()
    calibrate(model, x)
    expected = model(x)

    twin = copy.deepcopy(model)

    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        for _, q in (*model.weight_quantizers(), *model.act_quantizers()):
            q.scale.mul_(3)
    model.set_quant_state(False, False, False, False)
    assert torch.equal(twin(x), expected)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}


def test_convert_equals_the_fake_quantized_model(model):
    x, samples = batch()
    calibrate(model, x)

    converted = model.convert()

    assert type(converted) is type(model.architecture)
    calls = []
    for module in converted.modules():
        if isinstance(module, FakeQuantizeBase):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert error(converted(x, mode='tensor'), model(x, mode='tensor')) < 1e-4
    labels = [s.pred_label.label.item() for s in converted(x, samples, mode='predict')]
    assert labels == [s.pred_label.label.item() for s in model(x, samples, mode='predict')]
    assert not calls
    weight = converted.backbone.conv1.weight / model.backbone.conv1.weight_fake_quant.scale.reshape(-1, 1, 1, 1)
    assert torch.allclose(weight, weight.round(), atol=1e-2)


def test_freezing_batch_norm(model):
    x, samples = batch()
    model.train()
    model.freeze_bn()
    before = model.backbone.bn1.running_mean.clone() if hasattr(model.backbone, 'bn1') else None
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    state = [m.running_mean.clone() for m in norms]

    model(x, samples, mode='loss')
    assert all(torch.equal(m.running_mean, s) for m, s in zip(norms, state))
    model.freeze_bn(False)
    model(x, samples, mode='loss')

    assert norms and all(not torch.equal(m.running_mean, s) for m, s in zip(norms, state))
    assert before is None or before.dim() == 1


def test_mixed_precision(model):
    x, samples = batch()
    calibrate(model, x)
    model.set_quant_state(True, True, True, True)
    model.train()

    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(x, samples, mode='loss')['loss']
    loss.backward()

    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(q.scale.dtype == torch.float32 for _, q in (*model.weight_quantizers(), *model.act_quantizers()))
    model.eval()
    model.set_quant_state(False, True, False, True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert error(model(x).float(), model.float()(x)) < 0.1


def test_averaged_models(model):
    x, samples = batch()
    calibrate(model, x)
    model.set_quant_state(True, True, True, True)
    averaged = ExponentialMovingAverage(model, momentum=0.5)
    start = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    model.train()
    model(x, samples, mode='loss')['loss'].backward()
    optimizer.step()
    averaged.update_parameters(model)  # the first update copies
    model(x, samples, mode='loss')['loss'].backward()
    middle = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.step()
    averaged.update_parameters(model)

    name = 'architecture.backbone.conv1.weight'
    found, end = dict(averaged.module.named_parameters())[name], dict(model.named_parameters())[name]
    assert torch.allclose(found, (middle[name] + end) / 2, atol=1e-6)
    assert not torch.equal(found, start[name])
    averaged.eval()
    assert torch.isfinite(averaged(x)).all()
    assert set(averaged.module.state_dict()) == set(model.state_dict())
    assert EMAHook is not None


def test_the_order_of_float_and_prepared_parameters_is_the_same_for_optimizers(pair):
    reference, model = pair
    expected = [name for name, _ in reference.named_parameters()]

    assert [name.removeprefix('architecture.') for name, _ in model.named_parameters()] == expected


def test_reports(model):
    report = model.capture_report()

    assert (report.layers_total, report.layers_inside, report.layers_alone) == (21, 21, [])
    assert [row['island'] for row in model.quantizable_report()] == ['backbone', 'head']
    assert '21 of 21' in report.table()


# -- ways to say what the architecture is ------------------------------------------------------------------------------


def test_a_float_checkpoint_as_argument(pair, tmp_path):
    reference, _ = pair
    torch.save(dict(state_dict=reference.state_dict(), meta={}), tmp_path / 'float.pth')

    with DefaultScope.overwrite_default_scope('mmcls'):
        model = build(float_checkpoint=str(tmp_path / 'float.pth'))
        model.init_weights()

    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())


def test_without_a_checkpoint_the_weights_are_initialised(model):
    with torch.no_grad():
        model.head.fc.weight.fill_(100)

    model.init_weights()

    assert model.head.fc.weight.abs().max() < 1


@pytest.mark.parametrize('kind', ['missing', 'truncated', 'text', 'of another model'])
def test_a_bad_float_checkpoint(kind, tmp_path):
    path = tmp_path / 'float.pth'
    if kind == 'truncated':
        torch.save(nn.Conv2d(3, 4, 3).state_dict(), path)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == 'text':
        path.write_text('404: not found')
    elif kind == 'of another model':
        torch.save(dict(state_dict=nn.Linear(7, 3).state_dict()), path)

    with pytest.raises(FileNotFoundError if kind == 'missing' else ValueError, match='float_checkpoint') as caught:
        quantized_from(path)

    assert 'float.pth' in str(caught.value)


def quantized_from(path):
    return GeneralQuant(
        nn.Sequential(nn.Conv2d(3, 2, 1)), dict(type='mmrazor.CustomQuantizer'), input_shape=IMAGE,
        float_checkpoint=str(path),
    )  # fmt: skip


def test_any_built_module():
    reference = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    reference(images())

    model = calibrate(quantized(copy.deepcopy(reference)))

    assert error(model(images()), reference(images())) < 1e-3
    assert torch.equal(model(images(), None, mode='predict'), model(images()))
    assert list(model.state_dict())[:3] == ['quant_calibrated', '0.weight', '0.bias']
    with pytest.raises(TypeError, match='architecture.*loss'):
        model(images(), None, mode='loss')


def test_a_module_without_preprocessor_uses_the_one_given():
    class Halve(BaseDataPreprocessor):
        def forward(self, data, training=False):
            return dict(inputs=torch.stack(data['inputs']) / 2)

    model = GeneralQuant(
        nn.Sequential(nn.Conv2d(3, 4, 3)), dict(type='mmrazor.CustomQuantizer'), Halve(), input_shape=IMAGE
    ).eval()

    found = model.test_step(dict(inputs=[images(1, IMAGE)[0]]))

    assert torch.equal(found, model(images(1, IMAGE) / 2))
    assert 'data_preprocessor' not in '\n'.join(model.state_dict())


@pytest.mark.parametrize('name', ['Registered', 'mmrazor.Registered'])
def test_a_registered_module_that_takes_no_preprocessor(name):
    from mmrazor_quant.registry import MODELS as OWN_MODELS

    @OWN_MODELS.register_module(name='Registered', force=True)
    class Registered(nn.Sequential):
        def __init__(self, width):
            super().__init__(nn.Conv2d(3, width, 1))

    try:
        with DefaultScope.overwrite_default_scope('mmcls' if '.' in name else 'mmrazor'):
            model = build(architecture=dict(type=name, width=2))
    finally:
        del OWN_MODELS._module_dict['Registered']

    assert type(model.data_preprocessor).__name__ == 'ClsDataPreprocessor'
    assert model(images(2, IMAGE)).shape == (2, 2, 16, 16)


class Modes(BaseModel):
    """An mmengine model in its own words: no ``predict`` method, arguments of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 4)

    def forward(self, inputs, label=None, mode='tensor'):
        logits = self.fc(self.body(inputs).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, label))
        return logits if mode == 'tensor' else logits.argmax(1)


def test_an_mmengine_model_without_a_predict_method():
    reference = Modes().eval()
    model = quantized(copy.deepcopy(reference))
    label = torch.tensor([0, 1])

    assert torch.equal(model(images()), reference(images()))
    assert torch.equal(model(images(), mode='predict'), reference(images(), mode='predict'))
    found, expected = (net(images(), label=label, mode='loss')['loss'] for net in (model, reference))
    assert torch.equal(found, expected)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    assert 'loss' in model.train().train_step(dict(inputs=images(), label=label), wrapper)
    assert len(names(model.weight_quantizers())) == 2


@pytest.mark.parametrize('architecture', [None, 3, 'resnet', [nn.Conv2d(3, 3, 1)], nn.Conv2d])
def test_an_architecture_of_another_type(architecture):
    with pytest.raises(TypeError, match='architecture'):
        GeneralQuant(architecture, dict(type='mmrazor.CustomQuantizer'))


def test_a_quantizer_of_another_type():
    with pytest.raises(TypeError, match='quantizer'):
        GeneralQuant(nn.Conv2d(3, 3, 1), 'mmrazor.CustomQuantizer')


def test_a_built_quantizer_and_the_default_one():
    for quantizer in (CustomQuantizer(), None):
        model = calibrate(GeneralQuant(nn.Sequential(nn.Conv2d(3, 3, 1)), quantizer, input_shape=IMAGE))
        assert model.architecture[0].weight_fake_quant.quant_max == 127


@pytest.mark.parametrize('shape', [(3, 0, 8), (3, 8, 8.0), (), 'abc'])
def test_an_input_shape_that_is_none(shape):
    with pytest.raises(ValueError, match='input_shape'):
        quantized(nn.Sequential(nn.Conv2d(3, 3, 1)), input_shape=shape)


def test_an_input_shape_that_the_model_does_not_take():
    with pytest.raises(ValueError, match='input_shape.*expected input.*channels') as caught:
        quantized(nn.Sequential(nn.Conv2d(3, 3, 1)), input_shape=(5, 8, 8))

    assert '(2, 5, 8, 8)' in str(caught.value)


def test_the_size_that_a_model_declares_is_used():
    class Declares(nn.Module):
        def __init__(self):
            super().__init__()
            self.img_size = (10, 12)
            self.conv, self.fc = nn.Conv2d(3, 2, 1), nn.Linear(240, 3)

        def forward(self, x):
            return self.fc(self.conv(x).flatten(1))

    model = GeneralQuant(Declares(), dict(type='mmrazor.CustomQuantizer'))

    assert len(names(model.weight_quantizers())) == 2


class OwnBackbone(BaseBackbone):
    """As a user registers one through custom_imports."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.attend = nn.Linear(width, width)

    def forward(self, x):
        x = self.stem(x)
        gate = self.attend(x.mean((2, 3))).sigmoid()[..., None, None]
        return (x * gate if x.shape[-1] > 1 else x,)


def test_a_users_own_backbone_is_quantized_as_a_stock_one():
    from mmcls.registry import MODELS as MMCLS_MODELS

    MMCLS_MODELS.register_module(module=OwnBackbone, force=True)
    try:
        with DefaultScope.overwrite_default_scope('mmcls'):
            model = build(architecture=classifier(dict(type='OwnBackbone', width=6), channels=6))
    finally:
        del MMCLS_MODELS._module_dict['OwnBackbone']

    x, samples = batch()
    float_out = model.eval()(x)
    calibrate(model, x)

    assert model.capture_report().outside == {}
    assert [site.norm for site in model.inserted.weights] == ['backbone.stem.1', None, None]
    assert 0 < error(model(x), float_out) < 1e-2


# -- bad data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('observer', ['MinMaxObserver', 'EMAMinMaxObserver', 'MSEObserver', 'EMAMSEObserver'])
def test_nan_or_infinity_in_the_calibration_data_names_the_quantizer(value, observer):
    config = qconfig(a_observer=dict(type=f'mmrazor.{observer}'))
    model = quantized(nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 1)), config)
    bad = images()
    bad[0, 0, 0, 0] = value

    with pytest.raises(ValueError, match='1.input_fake_quant.*NaN'):
        calibrate(model, images(), bad)

    assert not model.is_calibrated
    calibrate(model, images())


TORCH_OBSERVERS = [
    dict(type=torch.ao.quantization.MinMaxObserver),
    dict(type=torch.ao.quantization.MovingAverageMinMaxObserver),
    dict(type=torch.ao.quantization.HistogramObserver),
]


@pytest.mark.parametrize('observer', TORCH_OBSERVERS[:2], ids=lambda cfg: cfg['type'].__name__)
def test_bad_data_are_found_behind_torchs_own_observers(observer):
    model = quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), qconfig(a_observer=observer))
    bad = images()
    bad[0, 0, 0, 0] = float('nan')

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='0.input_fake_quant.*no data'):
            model.compute_act_qparams()
        with pytest.raises(ValueError, match='0.input_fake_quant'):
            calibrate(model, bad)
        calibrate(model, images())


@pytest.mark.parametrize('observer', TORCH_OBSERVERS, ids=lambda cfg: cfg['type'].__name__)
def test_a_second_calibration_forgets_the_first(observer):
    model = quantized(nn.Sequential(nn.Conv2d(3, 2, 1)), qconfig(a_observer=observer))
    scale = calibrate(model, images()).architecture[0].input_fake_quant.scale.clone()

    calibrate(model, images() * 100)
    calibrate(model, images())

    assert torch.equal(model.architecture[0].input_fake_quant.scale, scale)


def test_nan_in_a_weight_names_the_quantizer():
    model = quantized(nn.Sequential(nn.Conv2d(3, 2, 1)))
    with torch.no_grad():
        model.architecture[0].weight[0, 0] = float('nan')

    with pytest.raises(ValueError, match='0.weight_fake_quant.*NaN'):
        model.observe_weights()


def test_no_data_names_the_quantizer():
    model = quantized(nn.Sequential(nn.Conv2d(3, 2, 1)))
    model.observe_weights()

    with pytest.raises(ValueError, match='0.input_fake_quant.*no data'):
        model.compute_act_qparams()


@pytest.mark.parametrize('bit', [2, 4, 8])
def test_a_channel_of_zeros_and_a_constant_activation_have_valid_scales(bit):
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        layers[0].weight[1] = 0
        layers[1].weight[2] = 0
        layers[1].weight[0] = -layers[1].weight[0]
    reference = copy.deepcopy(layers).eval()
    model = quantized(layers, qconfig(bit, bit))

    for x in (images(), torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 5.0), torch.full((2, 3, 8, 8), -1e-20)):
        calibrate(model, x)
        for name, quantizer in (*model.weight_quantizers(), *model.act_quantizers()):
            assert (quantizer.scale > 0).all() and torch.isfinite(quantizer.scale).all(), name
        found, expected = model(x), reference(x)
        assert torch.isfinite(found).all()
        if bit == 8:
            assert torch.allclose(found, expected, atol=0.1)
        converted = model.convert()(x)
        assert torch.allclose(converted, found, atol=1e-4)


def test_double_precision():
    reference = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).double().eval()

    model = calibrate(quantized(copy.deepcopy(reference)), images().double())

    assert model(images().double()).dtype == torch.float64
    assert error(model(images().double()), reference(images().double())) < 1e-3


def test_a_model_moves_as_a_whole():
    model = calibrate(quantized(Net(lambda m, x: m.a(x) * m.scale, a=nn.Conv2d(3, 2, 1), scale=torch.ones(1))))

    moved = copy.deepcopy(model).to('meta')

    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {'meta'}
    assert moved.architecture(torch.empty(2, 3, 8, 8, device='meta')).shape == (2, 2, 8, 8)


def test_wrapping_draws_no_random_numbers():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout(0.5))
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    quantized(net)

    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert random.getstate() == state[2]
