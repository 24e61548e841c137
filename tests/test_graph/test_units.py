"""Units: what is cut where, and that the pieces together are the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calibrate, images, qconfig, quantized, trained
from torch import nn

from mmrazor_quant.graph.units import find_units
from mmrazor_quant.tracing.code import compile_graph
from mmrazor_quant.tracing.island import Island, islands_of


class Residual(nn.Module):
    """Two convolutions with a connection around them."""

    def __init__(self, channels: int, out: int | None = None) -> None:
        super().__init__()
        out = out or channels
        self.one = nn.Conv2d(channels, out, 3, padding=1)
        self.two = nn.Conv2d(out, out, 3, padding=1)
        self.around = nn.Conv2d(channels, out, 1) if out != channels else nn.Identity()

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x))) + self.around(x))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, gate, projection, without a connection around them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 12, 1), nn.BatchNorm2d(12), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(12, out, 1), nn.BatchNorm2d(out))

    def forward(self, x):
        return self.project(self.depthwise(self.expand(x)))


class CrossStage(nn.Module):
    """A CSP stage: one half through a residual block, the other around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, 4, 1)
        self.short = nn.Conv2d(channels, 4, 1)
        self.block = Residual(4)
        self.final = nn.Conv2d(8, channels, 1)

    def forward(self, x):
        return self.final(torch.cat([self.block(self.main(x)), self.short(x)], 1))


class Attention(nn.Module):
    """The block of a transformer, written out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Head(nn.Module):
    """The head of a detector: the same layers on several levels, two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Conv2d(3, 6, 3, padding=1)
        self.scores, self.boxes = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        levels = [F.relu(self.tower(level)) for level in (x, F.max_pool2d(x, 2))]
        return [self.scores(level) for level in levels], [self.boxes(level) for level in levels]


class Backbone(nn.Module):
    """Blocks of which more than one is given out, as to a neck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stages = nn.Sequential(Residual(6), Residual(6, 8), Residual(8))

    def forward(self, x):
        outputs = []
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return tuple(outputs)


class Connected(nn.Module):
    """A network with a connection from end to end, over more layers than a block has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        self.blocks = nn.Sequential(*(Residual(4) for _ in range(9)))

    def forward(self, x):
        x = self.stem(x)
        return self.last(torch.cat([x, self.blocks(x)], 1))


class Resized(nn.Module):
    """A level made as large as one that is computed later."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine, self.last = nn.Conv2d(3, 4, 1, 2), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        coarse = self.coarse(x)
        fine = self.fine(x)
        return self.last(F.interpolate(coarse, size=fine.shape[2:]) + fine)


def prepared(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8), **quantizer):
    model = calibrate(quantized(trained(model), input_shape=shape, **quantizer), images(shape=shape))
    path, module = next(iter(islands_of(model.architecture).items()))
    graph = Island.of(module).variants[0].captures[False][0].graph
    return model, module, graph


def unit_names(model: nn.Module, granularity: str, shape: tuple[int, ...] = (3, 8, 8)) -> list[str]:
    _, module, graph = prepared(model, shape)
    return [unit.name for unit in find_units(graph, module, granularity)]


@pytest.mark.parametrize('granularity', ['layer', 'block', 'stage', 'island'])
@pytest.mark.parametrize('backend', ['academic', 'onnxruntime'])
@pytest.mark.parametrize(
    'make',
    [
        Backbone, Head, Connected, Resized, lambda: Inverted(3, 5), lambda: CrossStage(3),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.ReLU(inplace=True), Residual(4, 6)),
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), Attention(), Attention()),
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_units_in_their_order_are_the_graph(make, backend, granularity):
    _, module, graph = prepared(make(), config=qconfig(w=8, a=8), backend=backend)
    x = images(seed=3)

    units = find_units(graph, module, granularity)
    values = dict(zip((n for n in graph.nodes if n.op == 'placeholder'), [x]))
    for unit in units:
        inputs = [values[node].clone() for node in unit.inputs]
        values.update(zip(unit.outputs, compile_graph(unit.function_graph)(module, *inputs)))
    structure = next(n for n in graph.nodes if n.op == 'output').args[0]
    found = torch.utils._pytree.tree_leaves(torch.fx.node.map_arg(structure, values.__getitem__))

    expected = torch.utils._pytree.tree_leaves(compile_graph(graph)(module, x))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    weights = [weight for unit in units for weight in unit.weights]
    assert len(weights) == len(set(weights)), 'each weight is in one unit'


def test_residual_blocks_of_a_backbone_with_several_outputs():
    assert unit_names(Backbone(), 'block') == ['stem', 'stages.0', 'stages.1', 'stages.2']


def test_blocks_whose_additions_have_two_quantizers():
    _, module, graph = prepared(Backbone(), config=qconfig(w=8, a=8), backend='onnxruntime')
    units = find_units(graph, module, 'block')
    assert [unit.name for unit in units] == ['stem', 'stages.0', 'stages.1', 'stages.2']


def test_layers():
    assert unit_names(Backbone(), 'layer') == [
        'stem', 'stages.0.one', 'stages.0.two', 'stages.1.one', 'stages.1.two', 'stages.1.around', 'stages.2.one',
        'stages.2.two',
    ]  # fmt: skip


def test_stages_and_island():
    assert unit_names(Backbone(), 'stage') == ['stem', 'stages']
    assert unit_names(Backbone(), 'island') == ['']


def test_an_inverted_residual_without_connection_is_a_block():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Inverted(6, 6), Inverted(6, 8))

    assert unit_names(model, 'block') == ['0', '1', '2']


def test_long_chains_of_one_module_stay_layers():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(6)))

    assert unit_names(model, 'block') == ['0', '1', '2', '3', '4', '5']


def test_a_cross_stage_block_holds_the_block_inside():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), CrossStage(6), nn.ReLU(), CrossStage(6))
    _, module, graph = prepared(model)

    units = find_units(graph, module, 'block')

    halves = {'main', 'short', 'block.one', 'block.two'}
    for path, unit in (('2', units[1]), ('4', units[3])):
        assert set(unit.weights) == {f'{path}.{name}.weight_fake_quant' for name in halves}
    assert [unit.name for unit in units] == ['0', '2', '2.final', '4', '4.final']


def test_both_halves_of_a_transformer_block():
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), Attention(), Attention())
    _, module, graph = prepared(model)

    units = find_units(graph, module, 'block')

    assert [unit.weights for unit in units] == [
        ('1.weight_fake_quant',),
        ('2.qkv.weight_fake_quant', '2.out.weight_fake_quant'),
        ('2.up.weight_fake_quant', '2.down.weight_fake_quant'),
        ('3.qkv.weight_fake_quant', '3.out.weight_fake_quant'),
        ('3.up.weight_fake_quant', '3.down.weight_fake_quant'),
    ]
    products = [name for name in units[1].quantizers if 'matmul' in name]
    assert len(products) == 4, 'the products of activations take part'


def test_a_head_on_several_levels_has_each_layer_in_one_unit():
    _, module, graph = prepared(Head())

    units = find_units(graph, module, 'block')

    towers = [unit for unit in units if 'tower.weight_fake_quant' in unit.weights]
    assert len(towers) == 1 and len(towers[0].outputs) >= 1
    assert sum(len(unit.weights) for unit in units) == 3


def test_a_connection_from_end_to_end_is_no_block():
    names = unit_names(Connected(), 'block')

    assert names == ['stem', *(f'blocks.{i}' for i in range(9)), 'last']


def test_layers_used_in_turns_are_one_unit():
    def forward(m, x):
        for _ in range(2):
            x = m.two(F.relu(m.one(x)))
        return x

    model = Net(forward, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 3, 1))

    _, module, graph = prepared(model)
    units = find_units(graph, module, 'layer')

    assert [set(unit.weights) for unit in units] == [{'one.weight_fake_quant', 'two.weight_fake_quant'}]
