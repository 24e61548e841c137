"""GeneralQuant under mmengine's own Runner, hooks and wrappers, with a real network of mmcls."""

from __future__ import annotations

import copy
import random

import mmcls.models  # noqa: F401  registers its models
import pytest
import torch
from mmcls.structures import ClsDataSample
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.runner import Runner
from small_models import FINE, calibrate, error
from torch.utils.data import Dataset

from mmrazor_quant.algorithms import GeneralQuant

SHAPE = (3, 16, 16)


class Pictures(Dataset):
    """Noise whose brightness is its class."""

    metainfo = {'classes': ('dark', 'bright')}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)) + 3 * (index % 2)
        return dict(inputs=image * 20 + 60, data_samples=ClsDataSample().set_gt_label(index % 2))


class Share(BaseMetric):
    """Share of right labels."""

    def process(self, data_batch, data_samples):
        self.results += [float(s['pred_label']['label'] == s['gt_label']['label']) for s in data_samples]

    def compute_metrics(self, results):
        return dict(share=sum(results) / len(results))


def classifier():
    return dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet_CIFAR', depth=18, base_channels=2, stem_channels=2),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=2, in_channels=16, loss=dict(type='CrossEntropyLoss')),
    )


def loader(shuffle):
    return dict(
        dataset=Pictures(), batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=shuffle),
        collate_fn=dict(type='pseudo_collate'),
    )  # fmt: skip


def runner_of(work_dir, **changes):
    model = dict(
        type='mmrazor.GeneralQuant', architecture=classifier(), input_shape=SHAPE,
        quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=FINE),
    )  # fmt: skip
    return Runner(
        model=changes.pop('model', model),
        work_dir=str(work_dir),
        data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=2, mean=[60] * 3, std=[20] * 3),
        train_dataloader=loader(True),
        val_dataloader=loader(False),
        val_evaluator=Evaluator(Share()),
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        default_scope='mmcls',
        randomness=dict(seed=0),
        experiment_name=f'short_{random.SystemRandom().getrandbits(40)}',
        log_level='ERROR',
        **changes,
    )


def quantize(runner):
    """Calibrates the model of a runner: it is then trained with these ranges."""
    calibrate(runner.model, torch.stack([(Pictures()[i]['inputs'] - 60) / 20 for i in range(8)]))
    return runner


def test_float_and_wrapped_model_train_alike(tmp_path):
    """With quantization off the wrapped model is the float model, also to the optimizer."""
    states = []
    for name, model in (('quant', None), ('float', classifier())):
        runner = runner_of(tmp_path / name, **({} if model is None else {'model': model}))
        runner.train()
        states.append(runner.model.state_dict())

    quant, reference = states
    for key, value in reference.items():
        assert torch.equal(quant[key], value), key


def test_training_with_averaged_weights_checkpoints_and_resume(tmp_path):
    hooks = dict(custom_hooks=[dict(type='EMAHook', momentum=0.5)])
    runner = quantize(runner_of(tmp_path, **copy.deepcopy(hooks)))

    runner.train()

    assert 0 <= runner.message_hub.get_scalar('val/share').current() <= 1
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    assert {'state_dict', 'ema_state_dict', 'optimizer'} <= set(saved)
    # EMAHook saves the averaged weights as the model's, and the model's own as the average's
    key = 'backbone.conv1.weight'
    averaged, own = saved['state_dict'][key], saved['ema_state_dict'][f'module.{key}']
    assert torch.equal(own, runner.model.state_dict()[key])
    assert not torch.equal(averaged, own)
    assert saved['state_dict']['quant_calibrated'].item() == 1

    resumed = runner_of(tmp_path, resume=True, **copy.deepcopy(hooks))
    resumed.train()
    for name, value in runner.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_checkpoint_of_a_quantized_run_evaluates_alike(tmp_path):
    runner = quantize(runner_of(tmp_path))
    runner.train()
    x = torch.randn(2, *SHAPE)
    runner.model.set_quant_state(False, True, False, True)

    other = runner_of(tmp_path / 'other', load_from=str(tmp_path / 'epoch_2.pth'))
    other.load_or_resume()
    other.model.set_quant_state(False, True, False, True)

    assert other.model.is_calibrated
    assert torch.equal(other.model.eval()(x), runner.model.eval()(x))


@pytest.mark.parametrize('amp', [False, True])
def test_a_quantized_step_is_near_the_float_one(amp):
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope('mmcls'):
        torch.manual_seed(0)
        reference = MODELS.build(classifier())
        model = GeneralQuant(
            copy.deepcopy(reference), dict(type='mmrazor.CustomQuantizer', qconfig=FINE), input_shape=SHAPE
        )
    x = torch.randn(8, *SHAPE)
    with torch.no_grad():
        calibrate(model, x)
        model.reset_observers()
        model.train()
        model.set_quant_state(True, True, True, False)
        model(x)  # the ranges of a training step
        model.compute_act_qparams()
        model.set_quant_state(True, True, False, True)
    samples = [ClsDataSample().set_gt_label(i % 2) for i in range(8)]

    losses = []
    for net in (model, reference):
        net.train()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=amp):
            losses.append(net(x, samples, mode='loss')['loss'])
        losses[-1].backward()

    assert error(losses[0], losses[1]) < (5e-2 if amp else 1e-2)
    grads = [dict(net.named_parameters())[f'{p}backbone.conv1.weight'].grad
             for net, p in ((model, 'architecture.'), (reference, ''))]  # fmt: skip
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in grads), dim=0) > (0.9 if amp else 0.99)
