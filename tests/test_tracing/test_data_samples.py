"""Modules that are called with data samples, which are other objects in every call; and graphs for sizes seen later."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from mmrazor_quant.tracing import CustomTracer, Island, find_islands
from mmrazor_quant.tracing import island as island_module

IMAGES = torch.linspace(-2, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
LARGE = torch.linspace(-1, 5, 2 * 3 * 12 * 10).reshape(2, 3, 12, 10)


def samples(count: int = 2, **changes) -> list[BaseDataElement]:
    """As they come from a dataset, each of an image of its own."""
    meta = dict(img_id=np.random.randint(2**30), img_shape=(8, 8), scale=1.5, **changes)
    return [BaseDataElement(metainfo=meta, instances=InstanceData(boxes=torch.rand(3, 4))) for _ in range(count)]


class Model(nn.Module):
    """Depends on data, so that its head is an island, as heads with losses are."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x, given):
        return self.head(x if x.sum() > 0 else -x, given)


class Head(nn.Module):
    """Uses a function of the data samples."""

    def __init__(self, read) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 4, 1), read

    def forward(self, x, given):
        return self.conv(x) * self.read(given)


def captured(read) -> tuple[Model, Model, Island | None]:
    """A model over its islands, the model it was, and the island of the head."""
    torch.manual_seed(0)
    model = Model(Head(read)).eval()
    reference = copy.deepcopy(model)
    given = samples()
    findings = find_islands(model, [lambda: model(IMAGES, given)], CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))
    return model.eval(), reference, findings.islands.get('head')


READS = {
    'how many there are': lambda given: len(given),
    'a number': lambda given: given[0].scale,
    'a number of the meta information': lambda given: sum(each.metainfo['scale'] for each in given),
    'a nested tuple': lambda given: given[1].metainfo['img_shape'][0],
    'an attribute that is not there': lambda given: getattr(given[0], 'flip', 2) + hasattr(given[1], 'flip'),
    'what is not there': lambda given: given[0].metainfo.get('flip', 2) + ('flip' in given[0].metainfo),
}


@pytest.mark.parametrize('name', READS)
def test_other_data_samples_use_the_graph_if_the_same_is_read_of_them(name):
    model, reference, island = captured(READS[name])

    for _ in range(20):
        given = samples()
        assert torch.equal(model(IMAGES, given), reference(IMAGES, given))

    assert len(island.variants) == 1


def test_what_differs_in_what_is_read_gets_its_own_graph():
    model, reference, island = captured(READS['a nested tuple'])

    for height in (8, 5, 6, 5, 8):
        given = samples()
        given[1].set_metainfo(dict(img_shape=(height, 8)))
        assert torch.equal(model(IMAGES, given), reference(IMAGES, given))

    assert len(island.variants) == 3


@pytest.mark.parametrize('name', ['what is not there', 'an attribute that is not there'])
def test_what_was_absent_and_is_there_later(name):
    model, reference, _ = captured(READS[name])
    given = samples(flip=5)
    assert torch.equal(model(IMAGES, given), reference(IMAGES, given))


def test_what_is_of_another_type_later():
    model, reference, _ = captured(READS['a nested tuple'])
    for shape in (np.array([8, 8]), [8, 8], (8.0, 8), (True, 8)):
        given = samples()
        given[1].set_metainfo(dict(img_shape=shape))
        assert torch.equal(model(IMAGES, given), reference(IMAGES, given))


def test_data_samples_are_not_kept():
    model, _, _ = captured(READS['a nested tuple'])
    kept = []
    for height in range(4):
        given = samples()
        given[1].set_metainfo(dict(img_shape=(height, 8)))
        model(IMAGES, given)
        kept += map(weakref.ref, given)
    del given
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)


def test_graphs_of_unforeseen_calls_are_limited():
    model, reference, island = captured(READS['a number'])
    for scale in range(3 * island_module.MAX_LATER):
        given = samples()
        given[0].set_metainfo(dict(scale=scale))
        model(IMAGES, given)
    assert len(island.variants) <= 1 + island_module.MAX_LATER
    assert torch.equal(model(IMAGES, given), reference(IMAGES, given))


REFUSED = {
    'tensors': lambda given: given[0].instances.boxes.mean(),
    'methods': lambda given: len(given[0].keys()),
    'all': lambda given: len(given[0].metainfo),
    'a union': lambda given: len(given[0].metainfo | {}),
    'a comparison': lambda given: 1 + (given[0].metainfo != {}),
}


@pytest.mark.parametrize('name', REFUSED)
def test_modules_that_read_anything_else_give_way_to_their_children(name):
    model, reference, island = captured(REFUSED[name])
    assert island is None and Island.of(model.head.conv) is not None
    given = samples()
    assert torch.equal(model(IMAGES, given), reference(IMAGES, given))


def test_a_module_that_writes_to_data_samples_gives_way():
    def write(given):
        given[0].set_field(3.0, 'score', field_type='metainfo')
        return given[0].score

    model, reference, island = captured(write)
    given = samples()
    assert island is None and torch.equal(model(IMAGES, given), reference(IMAGES, given))
    assert given[0].score == 3.0


# -- sizes -------------------------------------------------------------------------------------------------------------


def count_captures(island: Island) -> list[int]:
    """A list that grows with every graph that is captured."""
    counted, recapture = [], island.recapture

    def counting(*args):
        counted.append(1)
        return recapture(*args)

    island.recapture = counting
    return counted


def test_a_call_of_a_new_kind_is_captured_at_few_sizes_only():
    model, reference, island = captured(READS['how many there are'])
    counted = count_captures(island)
    for size in (4, 6, 9, 5, 7, 8, 20, 3):
        x, given = torch.rand(3, 3, size, size + 1), samples(3)
        assert torch.equal(model(x, given), reference(x, given))
    assert len(counted) == island_module.ENOUGH_SIZES


class Counting(Head):
    def forward(self, x, given):
        return super().forward(x, given) * list(range(x.shape[3] // 4 + 1))[-1]


ORDERS = {
    'each another': [(3, n, n) for n in (5, 6, 7, 8, 9, 16, 5)],
    'first the width alone, then the height': [(3, 8, 8), (3, 8, 12), (3, 8, 16), (3, 16, 16), (3, 32, 8)],
    'first the height alone': [(3, 8, 8), (3, 12, 8), (3, 24, 8), (3, 16, 16), (3, 16, 32)],
    'within one count': [(3, 8, 8), (3, 9, 9), (3, 10, 10), (3, 16, 16), (3, 7, 7)],
}


@pytest.mark.parametrize('name', ORDERS)
def test_a_call_of_a_new_kind_whose_code_counts_pixels_is_right_at_every_size(name):
    torch.manual_seed(0)
    model = Model(Counting(len)).eval()
    reference = copy.deepcopy(model)
    given = samples()
    findings = find_islands(model, [lambda: model(IMAGES, given)], CustomTracer())
    findings.islands['head'].install(model.head)
    for batch, *size in ORDERS[name]:
        x, given = torch.rand(batch, 3, *size), samples(batch)
        assert torch.equal(model(x, given), reference(x, given))


class Optional(nn.Module):
    """Takes a mask or none, and counts rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, mask=None):
        x = self.conv(x) * list(range(x.shape[2] // 8 + 1))[-1]
        return x if mask is None else x * mask


def test_batches_of_another_kind_tell_nothing_of_image_sizes():
    model = nn.Sequential(Optional()).eval()
    reference = copy.deepcopy(model)
    findings = find_islands(model, [lambda: model(torch.rand(2, 3, 16, 16))], CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))
    for batch, size in ((1, 16), (2, 16), (3, 16), (4, 16), (2, 32), (2, 64), (1, 16)):
        x, mask = torch.rand(batch, 3, size, size), torch.rand(batch, 1, size, size)
        assert torch.equal(model[0](x, mask), reference[0](x, mask))


def test_copies_keep_as_many_graphs():
    model, _, island = captured(READS['a number'])
    for scale in range(10):
        given = samples()
        given[0].set_metainfo(dict(scale=scale))
        model(IMAGES, given)
    twin = Island.of(copy.deepcopy(model).head)
    assert len(twin.variants) == len(island.variants) == 11
    assert twin._prepared == 1


class Branching(nn.Module):
    """Goes another way on larger images, which leaves a guard."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.extra = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.extra(x) if x.shape[2] > 10 else x


def test_guards_are_tried_once_for_each_size(monkeypatch):
    model = nn.Sequential(Branching()).eval()
    reference = copy.deepcopy(model)
    findings = find_islands(model, [lambda: model(IMAGES), lambda: model(LARGE)], CustomTracer())
    for path, island in findings.islands.items():
        island.install(model.get_submodule(path))
    tried, passes = [], island_module._passes_guards
    monkeypatch.setattr(island_module, '_passes_guards', lambda *args: tried.append(1) or passes(*args))
    sizes = [(6, 6), (14, 9), (9, 9), (20, 20)]

    def run_all() -> int:
        tried.clear()
        for size in sizes:
            x = torch.rand(1, 3, *size)
            assert torch.equal(model(x), reference(x))
        return len(tried)

    assert run_all() > 0
    assert run_all() == 0
