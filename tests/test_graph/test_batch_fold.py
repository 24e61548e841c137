"""Batch norms folded with the statistics of the batch, against the layer and its batch norm in training."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import FINE, Net, calibrate, error, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.quantizers import CustomQuantizer

BATCH = 8

PAIRS = {
    'convolution': lambda: (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    'with a bias': lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    'grouped, strided': lambda: (nn.Conv2d(3, 6, 3, groups=3, stride=2, padding=1), nn.BatchNorm2d(6)),
    'transposed': lambda: (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
    'not affine': lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    'cumulative average': lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)),
    'another momentum': lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.7, eps=1e-2)),
}


def pair(name):
    return trained(nn.Sequential(*PAIRS[name]()))


def prepared(module, config=FINE, **quantizer):
    """In training, with everything quantized and observed."""
    model = calibrate(quantized(module, config, bn_folding='batch', **quantizer)).train()
    model.set_quant_state(True, True, True, True)
    return model


def both(name, config=FINE):
    module = pair(name)
    return copy.deepcopy(module).train(), prepared(module, config)


def state(module):
    return {key: value for key, value in module.state_dict().items() if key.startswith('1.')}


@pytest.mark.parametrize('name', PAIRS)
def test_result_in_training_is_that_of_layer_and_norm(name):
    module, model = both(name)
    for seed in range(3):
        x = images(BATCH, seed=seed)
        assert error(model(x), module(x)) < 1e-3


@pytest.mark.parametrize('name', PAIRS)
def test_running_statistics_follow_as_in_torch(name):
    """The statistics are those of the float layer, but for its quantized input."""
    module, model = both(name)
    before = {key: value.clone() for key, value in state(module).items()}
    for seed in range(4):
        x = images(BATCH, seed=seed)
        module(x)
        model(x)
    found = state(model.architecture)
    for key, expected in state(module).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-3, atol=1e-3)
        assert key.endswith(('weight', 'bias')) or not torch.equal(before[key], expected)
    assert model.architecture[1].num_batches_tracked == 4


@pytest.mark.parametrize('name', PAIRS)
def test_gradients_are_those_of_layer_and_norm(name):
    module, model = both(name)
    x = images(BATCH)
    weight = torch.randn_like(module(x))
    module.load_state_dict({k: v for k, v in model.architecture.state_dict().items() if 'fake_quant' not in k})
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for each, leaf in zip((module, model), inputs):
        each.zero_grad()
        (each(leaf) * weight).sum().backward()
    assert error(inputs[1].grad, inputs[0].grad) < 1e-2
    for (key, expected), found in zip(module.named_parameters(), model.architecture.parameters()):
        if key == '0.bias':
            # The norm takes the mean away again, and with it the bias.
            assert found.grad.abs().max() < 1e-3 * model.architecture[1].running_var.max() * weight.numel() ** 0.5
        else:
            assert error(found.grad, expected.grad) < 1e-2, key


@pytest.mark.parametrize('name', ['convolution', 'with a bias', 'not affine'])
@pytest.mark.parametrize('evaluation', [True, False])
def test_frozen_and_evaluated_it_is_the_running_fold(name, evaluation):
    module = pair(name)
    batch, running = prepared(copy.deepcopy(module), qconfig(4, 4)), calibrate(quantized(module, qconfig(4, 4)))
    for model in (batch, running):
        model.train()
        model.set_quant_state(False, True, False, True)
        if evaluation:
            model.eval()
        else:
            model.freeze_bn()
    before = {key: value.clone() for key, value in state(batch.architecture).items()}
    x = images(BATCH, seed=3)
    assert torch.equal(batch(x), running(x))
    assert all(torch.equal(value, before[key]) for key, value in state(batch.architecture).items())


def test_learning_it_differs_from_the_running_fold():
    module = pair('convolution')
    batch, running = prepared(copy.deepcopy(module), qconfig(3, 8)), calibrate(quantized(module, qconfig(3, 8)))
    running.train()
    x = images(BATCH)
    assert 1e-4 < error(batch(x), running(x)) < 1


def test_the_weight_that_is_quantized_is_folded_with_the_batch():
    """Jacob et al. 2018, figure C.7."""
    model = prepared(pair('with a bias'), qconfig(4, 'float'))
    layer, norm = model.architecture
    seen = []
    layer.weight_fake_quant.register_forward_hook(lambda m, args, result: seen.append((args[0], result)))
    x = images(BATCH, seed=2)
    y = model(x)
    out = nn.functional.conv2d(x, layer.weight, layer.bias)
    variance, mean = torch.var_mean(out, (0, 2, 3), correction=0)
    factor = norm.weight / torch.sqrt(variance + norm.eps)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][0], layer.weight * factor.reshape(-1, 1, 1, 1))
    expected = nn.functional.conv2d(x, seen[0][1], norm.bias + (layer.bias - mean) * factor)
    torch.testing.assert_close(y, expected)


def test_switched_off_it_is_the_layer_and_its_norm():
    """Both float and observed only."""
    module, model = both('with a bias')
    for weight_observer in (False, True):
        model.set_quant_state(weight_observer, False, False, False)
        x = images(BATCH, seed=int(weight_observer))
        torch.testing.assert_close(model(x), module(x), rtol=1e-4, atol=1e-4)
        for key, value in state(module).items():
            torch.testing.assert_close(state(model.architecture)[key], value, rtol=1e-4, atol=1e-5)


def test_quantized_biases():
    model = prepared(pair('with a bias'), qconfig(4, 4), quantize_bias=True)
    plain = prepared(pair('with a bias'), qconfig(4, 4))
    plain.load_state_dict(model.state_dict())
    x = images(BATCH)
    scale = model.architecture[0].input_fake_quant.scale * model.architecture[0].weight_fake_quant.scale
    found, without = model(x), plain(x)
    assert not torch.equal(found, without)
    scale = torch.maximum(scale, model.architecture[0].input_fake_quant.scale *
                          model.architecture[0].weight_fake_quant.scale)  # fmt: skip
    assert ((found - without).abs().amax((0, 2, 3)) <= 0.51 * scale + 1e-5).all()


def test_other_dimensions_and_linear_layers():
    module = trained(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)))
    model = prepared(copy.deepcopy(module))
    module.train()
    assert error(model(images(BATCH)), module(images(BATCH))) < 1e-3
    for key in ('2.running_mean', '2.running_var'):
        torch.testing.assert_close(model.architecture.state_dict()[key], module.state_dict()[key], rtol=1e-3, atol=1e-3)


def test_a_layer_called_twice():
    """The statistics are updated in each call, as those of the batch norm would be."""
    children = dict(a=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    module = trained(Net(lambda m, x: m.norm(m.a(m.norm(m.a(x)))), **children))
    model = prepared(copy.deepcopy(module))
    module.train()
    x = images(BATCH)
    assert error(model(x), module(x)) < 2e-3
    assert model.architecture.norm.num_batches_tracked == module.norm.num_batches_tracked == 2
    torch.testing.assert_close(model.architecture.norm.running_var, module.norm.running_var, rtol=1e-3, atol=1e-3)


def test_synchronized_norms_in_a_single_process():
    norm = nn.SyncBatchNorm(4)
    module = trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    reference = nn.Sequential(copy.deepcopy(module[0]), nn.BatchNorm2d(4))
    reference.load_state_dict(module.state_dict())
    model = prepared(module)
    assert error(model(images(BATCH)), reference.train()(images(BATCH))) < 1e-3


def test_several_steps_of_training_agree_with_the_float_model():
    torch.manual_seed(0)
    module = trained(nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(64, 3)))  # fmt: skip
    model = prepared(copy.deepcopy(module))
    module.train()
    losses = []
    for each in (module, model):
        optimizer = torch.optim.SGD(each.parameters(), 0.02)
        losses.append([])
        for seed in range(10):
            loss = each(images(BATCH, seed=seed % 3)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_mixed_precision_keeps_its_statistics_in_float32():
    module = trained(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=1.0)))
    model = prepared(copy.deepcopy(module))
    module.train()
    x = images(BATCH)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected, found = module(x), model(x)
    assert error(found.float(), expected.float()) < 0.03
    for key in ('1.running_mean', '1.running_var'):
        value = model.architecture.state_dict()[key]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, module.state_dict()[key], rtol=1e-3, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match=r"quantizer\.bn_folding: got 'batches', allowed: 'running', 'batch'"):
        CustomQuantizer(bn_folding='batches')
