"""The float model as a teacher of its quantized copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from small_models import qconfig
from torch import Tensor, nn

from mmrazor_quant.algorithms import GeneralQuant
from mmrazor_quant.algorithms.distillation import Distillation


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x.mean((2, 3))), torch.zeros(3, dtype=torch.int64)


class Model(BaseModel):
    """Writes into its samples, as some detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.unused = nn.Conv2d(3, 6, 3), Head(), nn.ReLU()

    def forward(self, inputs: Tensor, data_samples: list[int] | None = None, mode: str = 'tensor') -> Any:
        scores, _ = self.head(self.conv(inputs))
        if mode != 'loss':
            return scores
        labels = torch.tensor([data_samples.pop() for _ in range(len(scores))])
        return {'loss': F.cross_entropy(scores, labels)}


def samples(count: int = 2) -> list[int]:
    return [1] * count


def model(**distillation: Any) -> GeneralQuant:
    torch.manual_seed(0)
    network = GeneralQuant(
        Model(), dict(type='mmrazor.CustomQuantizer', qconfig=qconfig(w=2, a=2)), input_shape=(3, 8, 8),
        distillation=dict(module='head', **distillation),
    )  # fmt: skip
    network.observe_weights()
    network.set_quant_state(False, True, True, True)
    return network.train()


@pytest.mark.parametrize('loss', ['kl', 'mse'])
def test_the_loss_is_what_the_formula_says(loss):
    network = model(loss=loss, temperature=2.0, weight=3.0)
    images = torch.randn(2, 3, 8, 8)
    torch.manual_seed(0)
    float_scores = Model()(images).double()

    losses = network(images, samples(), mode='loss')
    scores = network(images).double()

    if loss == 'kl':
        p, q = (F.softmax(s / 2.0, 1) for s in (float_scores, scores))
        expected = 3.0 * 4.0 * (p * (p / q).log()).sum(1).mean()
    else:
        expected = 3.0 * (float_scores - scores).square().mean()
    torch.testing.assert_close(losses['loss_distill'].double(), expected, rtol=1e-3, atol=1e-7)
    assert expected > 0 and set(losses) == {'loss', 'loss_distill'}


def test_the_student_learns_from_it_and_the_teacher_stays():
    network = model()
    teacher = network.distillation._teacher
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images = torch.randn(2, 3, 8, 8)
    found = []
    for _ in range(5):
        loss = network(images, samples(), mode='loss')['loss_distill']
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[-1] < found[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    own = {id(p) for p in network.parameters()}
    assert not any(id(p) in own for p in teacher.parameters())
    assert copy.deepcopy(network).distillation is network.distillation


def test_nothing_of_it_outside_of_training():
    network, plain = model().eval(), model()
    plain.distillation = None
    images = torch.randn(2, 3, 8, 8)
    assert set(network(images, samples(), mode='loss')) == {'loss'}
    assert network.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    'field, value, message',
    [
        ('module', 'heads', "model.distillation.module: got 'heads', allowed: modules of the architecture, such as"),
        ('module', None, 'model.distillation.module: got None'),
        ('loss', 'l3', "model.distillation.loss: got 'l3', allowed: 'kl', 'mse'"),
        ('weight', 0, 'model.distillation.weight: got 0, allowed: numbers above 0'),
        ('temperature', 'hot', "model.distillation.temperature: got 'hot', allowed: numbers above 0"),
    ],
)
def test_bad_fields_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Distillation(Model(), **{'module': 'head', field: value})


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match='model.distillation: got .*tau'):
        GeneralQuant(Model(), input_shape=(3, 8, 8), distillation=dict(module='head', tau=2))


def test_a_module_that_is_not_called_is_refused():
    network = model()
    network.distillation.module = 'unused'
    with pytest.raises(ValueError, match="model.distillation.module: got 'unused'"):
        network(torch.randn(2, 3, 8, 8), samples(), mode='loss')


def test_a_teacher_needs_weights():
    with pytest.raises(ValueError, match='model.float_checkpoint: got None, allowed with model.distillation'):
        GeneralQuant(dict(type='ImageClassifier'), distillation=dict(module='head'))
