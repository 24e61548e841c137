"""Where fake quantizers go, and which tensors share one."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import FINE, Net, calibrate, error, images, names, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.tracing import Island


def conv(inputs=3, outputs=3, size=1):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def weights_and_acts(model):
    return names(model.weight_quantizers()), names(model.act_quantizers())


def assert_close_to_float(model, reference, x=None):
    """Calibrates and compares: with 16 bits everywhere only a wrong graph makes a difference."""
    x = images() if x is None else x
    calibrate(model, x)
    with torch.no_grad():
        found, expected = model(x), reference.eval()(x)
    assert error(found, expected) < 1e-3


def test_every_layer_has_a_quantizer_for_weight_and_input():
    reference = trained(nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(), nn.Flatten(), nn.Linear(192, 4)))

    model = quantized(copy.deepcopy(reference))

    assert weights_and_acts(model) == (
        ['0.weight_fake_quant', '3.weight_fake_quant', '5.weight_fake_quant'],
        ['0.input_fake_quant', '3.input_fake_quant', '5.input_fake_quant'],
    )
    assert_close_to_float(model, reference)


def test_layers_that_feed_layers():
    reference = nn.Sequential(conv(), conv(3, 4, 3), nn.ConvTranspose2d(4, 3, 3), conv())

    model = quantized(copy.deepcopy(reference))

    assert len(model.inserted.activations) == 4
    assert_close_to_float(model, reference)


def test_layers_that_read_one_tensor_share_its_quantizer():
    reference = Net(lambda m, x: m.a(x) + m.b(x) + m.c(x + 1), a=conv(), b=conv(), c=conv())

    model = quantized(copy.deepcopy(reference))

    assert names(model.act_quantizers()) == ['a.input_fake_quant', 'c.input_fake_quant']
    assert len(model.inserted.weights) == 3
    assert_close_to_float(model, reference)


def test_layers_configured_differently_do_not_share():
    config = dict(FINE, overrides=[dict(name='b', a_qscheme=dict(bit=4))])

    model = quantized(Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()), config)

    assert names(model.act_quantizers()) == ['a.input_fake_quant', 'b.input_fake_quant']
    assert [q.quant_max for _, q in model.act_quantizers()] == [2**16 - 1, 15]


WRITTEN = {
    'in-place method': lambda x: x.add_(3),
    'in-place operator': lambda x: x.__iadd__(3),
    'item assignment': lambda x: x.__setitem__((slice(None), 0), 9.0),
    'through a view': lambda x: x[:, 0].add_(9),
    'through a reshaped view': lambda x: F.relu(x.view(2, -1), inplace=True),
    'function': lambda x: torch.relu_(x),
    'out argument': lambda x: torch.add(x, 5, out=x),
}


@pytest.mark.parametrize('name', WRITTEN)
def test_a_tensor_that_is_written_to_is_quantized_again(name):
    def forward(module, x):
        x = x * 1
        y = module.a(x)
        WRITTEN[name](x)
        return y + module.b(x)

    reference = Net(forward, a=conv(), b=conv())

    model = quantized(copy.deepcopy(reference))

    assert len(model.inserted.activations) == 2
    assert_close_to_float(model, reference)


def test_a_tensor_written_to_before_it_is_read_is_shared():
    reference = Net(
        lambda m, x: (lambda y: m.a(y) + m.b(y))(m.relu(m.stem(x))), stem=conv(), a=conv(), b=conv(), relu=nn.ReLU(True)
    )

    model = quantized(copy.deepcopy(reference))

    assert names(model.act_quantizers()) == ['stem.input_fake_quant', 'a.input_fake_quant']
    assert_close_to_float(model, reference)


def test_a_shared_layer_has_one_weight_quantizer_and_one_input_quantizer_per_call():
    reference = Net(lambda m, x: [m.head(x), m.head(F.max_pool2d(x, 2) * 30)], head=conv())

    model = quantized(copy.deepcopy(reference))

    assert weights_and_acts(model) == (['head.weight_fake_quant'], ['head.input_fake_quant', 'head.input_1_fake_quant'])
    calibrate(model)
    small, large = (q.scale.item() for _, q in model.act_quantizers())
    assert large > 5 * small
    with torch.no_grad():
        for found, expected in zip(model(images()), reference(images())):
            assert error(found, expected) < 1e-3


def test_a_layer_called_on_its_own_output():
    reference = Net(lambda m, x: m.a(m.a(x)), a=conv())

    assert_close_to_float(quantized(copy.deepcopy(reference)), reference)


def test_functional_layers_have_the_quantizers_of_the_module_whose_weight_they_use():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
            self.linear = nn.Linear(64, 5)

        def forward(self, x):
            x = F.conv2d(x, self.weight, bias=self.bias, padding=1)
            return F.linear(x.flatten(2), self.linear.weight)

    reference = Functional()
    model = quantized(copy.deepcopy(reference))

    assert weights_and_acts(model) == (
        ['weight_fake_quant', 'linear.weight_fake_quant'], ['input_fake_quant', 'linear.input_fake_quant']
    )  # fmt: skip
    assert model.inserted.weights[0].weight == 'weight'
    assert_close_to_float(model, reference)


def test_a_weight_used_by_a_module_and_a_function():
    reference = Net(lambda m, x: m.a(x) + F.conv2d(x * 4, m.a.weight), a=conv())

    model = quantized(copy.deepcopy(reference))

    assert len(model.inserted.weights) == 1
    assert len(model.inserted.activations) == 2
    assert_close_to_float(model, reference)


def test_a_computed_weight_in_a_module_of_any_name():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_conv = conv()

        def forward(self, x):
            return F.conv2d(x, self.input_conv.weight * 2)

    reference = Net(lambda m, x: m.input_proj(x), input_proj=Computed())

    model = quantized(copy.deepcopy(reference))

    assert names(model.act_quantizers()) == ['input_proj.input_fake_quant', 'input_proj.weight_fake_quant']
    assert_close_to_float(model, reference)


MATMULS = {
    'matmul': lambda m, x: torch.matmul(m.a(x), x * 2),
    'operator': lambda m, x: m.a(x) @ x.transpose(-1, -2),
    'method': lambda m, x: m.a(x).matmul(x * 2),
    'bmm': lambda m, x: torch.bmm(m.a(x).flatten(0, 1), x.flatten(0, 1)),
    'mm': lambda m, x: m.a(x).flatten(1).mm(x.flatten(1).t()),
    'einsum': lambda m, x: torch.einsum('bchw,bcwk->bchk', m.a(x), x * 2),
    'with a parameter': lambda m, x: m.table @ m.a(x),
}


@pytest.mark.parametrize('name', MATMULS)
def test_both_inputs_of_matrix_products_are_quantized(name):
    reference = Net(MATMULS[name], a=conv(), table=nn.Parameter(torch.randn(8, 8)))

    model = quantized(copy.deepcopy(reference))

    kind = 'einsum' if name == 'einsum' else 'matmul'
    assert names(model.act_quantizers())[1:] == [f'{kind}_input0_fake_quant', f'{kind}_input1_fake_quant']
    assert_close_to_float(model, reference)


def test_a_product_of_a_tensor_with_itself_has_one_quantizer():
    reference = Net(lambda m, x: (lambda y: y @ y)(m.a(x)), a=conv())

    model = quantized(copy.deepcopy(reference))

    assert names(model.act_quantizers()) == ['a.input_fake_quant', 'matmul_input0_fake_quant']
    assert_close_to_float(model, reference)


def test_adds_are_quantized_on_request():
    reference = Net(lambda m, x: m.a(x) + x + 1, a=conv())

    assert names(quantized(copy.deepcopy(reference)).act_quantizers()) == ['a.input_fake_quant']
    model = quantized(copy.deepcopy(reference), quantize_add=True)

    # the input of the layer and of the addition is one tensor
    assert names(model.act_quantizers()) == ['a.input_fake_quant', 'add_input0_fake_quant']
    assert_close_to_float(model, reference)


def test_in_place_adds_leave_what_is_added_to():
    def forward(module, x):
        y = module.a(x)
        y += x
        return module.b(y) + x

    reference = Net(forward, a=conv(), b=conv())
    model = quantized(copy.deepcopy(reference), quantize_add=True)

    x = images()
    assert_close_to_float(model, reference, x)
    assert torch.equal(x, images())


def test_one_quantizer_per_call_site_under_both_training_flags():
    reference = Net(lambda m, x: m.b(F.dropout(m.a(x), 0.5, m.training)) * (2 if m.training else 1), a=conv(), b=conv())

    model = quantized(copy.deepcopy(reference))

    assert len(list(Island.of(model.architecture).graphs())) == 2
    assert names(model.act_quantizers()) == ['a.input_fake_quant', 'b.input_fake_quant']
    assert_close_to_float(model, reference)


class Branching(nn.Module):
    """Goes another way on large inputs; two layers share an input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.extra = conv(), conv(), conv()

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return self.extra(y) if x.shape[2] > 100 else y * 2


def test_a_graph_captured_later_has_the_quantizers_of_the_first():
    reference = Branching()
    model = calibrate(quantized(copy.deepcopy(reference), qconfig(w=3, a=3)))
    large = images(1, (3, 104, 8), seed=1).clamp(-2, 2)

    with pytest.warns(UserWarning, match='extra'), torch.no_grad():
        found = model(large)

    a, b = model.architecture.a, model.architecture.b
    x = a.input_fake_quant(large)
    expected = sum(F.conv2d(x, m.weight_fake_quant(m.weight), m.bias) for m in (a, b))
    assert torch.equal(found, model.architecture.extra(expected))


def test_a_graph_captured_later_is_converted_too():
    model = calibrate(quantized(Branching(), qconfig(w=3, a=3)))
    converted = model.convert()
    large = images(1, (3, 104, 8), seed=1)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        assert torch.allclose(converted(large), model(large), atol=1e-5)


def test_quantizers_are_inserted_where_the_weights_are():
    model = nn.Sequential(conv(), nn.ReLU(), conv()).to(torch.float64)

    wrapped = calibrate(quantized(model, qconfig(w=16, a=16)), images().double())

    assert wrapped(images().double()).dtype == torch.float64


def test_a_model_without_layers_in_reach_names_the_reasons():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 3, 1, 1))

        def forward(self, x):
            return F.conv2d(x, self.table) if x.sum() > 0 else x

    with pytest.raises(ValueError, match='could be captured'):
        quantized(Choosing())
