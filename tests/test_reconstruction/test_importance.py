"""Weights of the squared errors from the task's loss."""

from __future__ import annotations

import pytest
import torch
from reconstructing import Block, calibrated, qconfig, same_state
from small_models import calibrate, images, trained
from torch import nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.reconstruction.importance import Importance, Place
from mmrazor_quant.reconstruction.islands import UnitizedIsland
from mmrazor_quant.registry import TASK_UTILS
from mmrazor_quant.tracing.island import islands_of


class Classifier(nn.Module):
    """A network with a loss, as OpenMMLab models have it, whose second output channel nothing reads."""

    def __init__(self, blocks: nn.Module | None = None, channels: int = 4) -> None:
        super().__init__()
        self.blocks = blocks or nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block(4))
        self.head = nn.Linear(channels, 3)
        with torch.no_grad():
            self.head.weight[:, 1] = 0

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = self.head(self.blocks(inputs).mean((2, 3)))
        if mode == 'loss':
            return {'loss': nn.functional.cross_entropy(logits, data_samples)}
        return logits

    def predict(self, inputs, data_samples=None):
        return self(inputs)


class Labelled(GeneralQuant):
    """Batches are images with labels."""

    def test_step(self, data):
        return self(data[0])

    def data_preprocessor(self, data, training=False):
        return dict(inputs=data[0], data_samples=data[1])


def data() -> list:
    return [(images(6, seed=i), torch.arange(6) % 3) for i in range(2)]


def labelled() -> Labelled:
    torch.manual_seed(0)
    quantizer = dict(type='mmrazor.CustomQuantizer', qconfig=qconfig())
    model = Labelled(trained(Classifier()), quantizer, input_shape=(3, 8, 8))
    return calibrate(model.eval(), *(x for x, _ in data()))


def measured(model: Labelled) -> tuple[Importance, list[Place]]:
    model.set_quant_state(False, False, False, False)
    places = {}
    for path, module in islands_of(model.architecture).items():
        island = UnitizedIsland(module, 'block')
        places.update(((path, i), island) for i in range(len(island.plan())))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Importance.measure(model, data(), places), list(places)


def test_squared_gradients_of_the_loss():
    model = labelled()
    importance, places = measured(model)
    squares = torch.zeros(3)
    for x, labels in data():
        with torch.no_grad():
            logits = model(x)
        logits.requires_grad_()
        nn.functional.cross_entropy(logits, labels).backward()
        squares += logits.grad.square().sum(0)

    (found,) = importance.of(places[-1], [])

    assert torch.allclose(found[(3,)], squares / squares.mean(), rtol=1e-4)


def test_what_nothing_depends_on_has_no_weight():
    importance, places = measured(labelled())

    block = next(p for p in places if importance.of(p, []) and (4, 8, 8) in importance.of(p, [])[0])
    found = importance.of(places[places.index(block) + 1], [])[0][(4, 8, 8)]

    assert found.mean() == pytest.approx(1.0, rel=1e-4)
    assert found[1].abs().max() == 0 and found[0].min() >= 0 and found[0].max() > 0


class Twice(nn.Module):
    """Units of two layers side by side, which only the whole contains; the second reads two channels of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        with torch.no_grad():
            self.c.weight[:, 2] = self.d.weight[:, 2] = 0

    def forward(self, x):
        x = self.a(x) * self.b(x)
        return self.c(x) * self.d(x)


def test_units_of_one_name_have_importances_of_their_own():
    model = labelled()
    model = Labelled(trained(Classifier(Twice(), 3)), model.quantizer, input_shape=(3, 8, 8))
    calibrate(model.eval(), *(x for x, _ in data()))
    importance, places = measured(model)
    first, second = (importance.of(place, [])[0][(3, 8, 8)] for place in places[:2])

    assert first[2].abs().max() == 0 and first[0].min() > 0
    assert second[2].min() > 0 and second[1].abs().max() == 0


def test_it_changes_what_is_learned(tmp_path):
    plain, weighted = labelled(), labelled()

    for model, fisher in ((plain, False), (weighted, True)):
        TASK_UTILS.build(dict(type='mmrazor.BRECQ', iters=50, fisher=fisher)).run(model, data(), tmp_path / str(fisher))

    assert not same_state(plain, weighted)


def test_a_model_without_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match='reconstruction.fisher: got True'):
        TASK_UTILS.build(dict(type='mmrazor.BRECQ', fisher=True)).run(calibrated(), [images()], tmp_path)
