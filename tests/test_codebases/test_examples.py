"""Example inputs for models of any library."""

from __future__ import annotations

import mmcls.models  # noqa: F401  registers its models
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmrazor_quant.codebases import build_examples, has_modes


class Recording(nn.Module):
    """Notes what it is run on."""

    def __init__(self, channels=3, accepts=lambda shape: True):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 1)
        self.accepts, self.calls = accepts, []

    def forward(self, x):
        if not self.accepts(tuple(x.shape)):
            raise ValueError('not of this size')
        return self.conv(x)


def shapes(model, *args):
    return [example.shape for example in build_examples(model, *args)]


def test_a_second_example_has_another_batch_height_and_width():
    (first, second) = shapes(Recording(), (3, 16, 16))

    assert first == (2, 3, 16, 16)
    assert len({*first[2:], *second[2:]}) == 3 and second[2] != second[3]
    assert second[0] != first[0]


def test_a_model_of_one_size_is_verified_at_another_batch():
    (first, second) = shapes(Recording(accepts=lambda shape: shape[2:] == (16, 16)), (3, 16, 16))

    assert second[0] != first[0] and second[1:] == first[1:]


def test_a_model_of_one_shape_has_one_example():
    assert shapes(Recording(accepts=lambda shape: shape == (2, 3, 16, 16)), (3, 16, 16)) == [(2, 3, 16, 16)]


def test_the_size_that_a_module_declares():
    model = nn.Sequential(Recording(accepts=lambda shape: shape[2:] == (12, 20)))
    model[0].img_size = (12, 20)

    assert shapes(model)[0] == (2, 3, 12, 20)


def test_common_sizes_and_gray_images_are_tried():
    assert shapes(Recording(channels=1, accepts=lambda shape: shape[2:] == (32, 32)))[0] == (2, 1, 32, 32)


def test_a_model_may_take_one_image_only():
    assert shapes(Recording(accepts=lambda shape: shape[0] == 1), (3, 128, 128)) == [(1, 3, 128, 128), (1, 3, 160, 192)]


def test_a_model_that_runs_on_nothing_says_what_was_tried():
    with pytest.raises(ValueError, match=r'input_shape.*\(2, 3, 224, 224\): ValueError: not of this size'):
        build_examples(Recording(accepts=lambda shape: False))


def test_examples_have_the_dtype_of_the_model():
    model = Recording().double()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))

    for example in build_examples(model, (3, 8, 8)):
        example.run()

    assert set(seen) == {torch.float64}


def test_examples_are_the_same_each_time_and_take_no_random_numbers():
    model, seen = Recording(), []
    example = build_examples(model, (3, 8, 8))[0]
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    state = torch.get_rng_state()

    example.run()
    example.run()

    half = len(seen) // 2
    assert half and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_classifier_runs_in_every_mode():
    with DefaultScope.overwrite_default_scope('mmcls'):
        model = MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(type='LeNet5'),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='StackedLinearClsHead', num_classes=3, in_channels=120, mid_channels=[5]),
            )
        )
    modes = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: modes.append((kwargs['mode'], m.training)), with_kwargs=True
    )
    losses = []
    model.head.loss_module.register_forward_hook(lambda module, args, out: losses.append(out))

    build_examples(model, (1, 32, 32))[0].run()

    assert modes[-3:] == [('tensor', False), ('predict', False), ('loss', True)]
    assert len(losses) == 1 and torch.isfinite(losses[0])


def test_which_models_have_modes():
    class Silent(BaseModel):
        def forward(self, inputs, mode='tensor'):
            return inputs

    assert has_modes(Silent())
    assert not has_modes(nn.Conv2d(3, 3, 1))


def test_input_without_sizes():
    examples = build_examples(nn.Linear(8, 2), (8,))

    assert [example.shape for example in examples] == [(2, 8), (3, 8)]
