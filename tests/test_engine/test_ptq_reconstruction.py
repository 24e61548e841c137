"""Reconstruction by the config of a PTQLoop."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from toy import config

from mmrazor_quant import ops
from mmrazor_quant.registry import LOOPS

QCONFIG = dict(
    w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.QDropFakeQuantize'),
    w_qscheme=dict(bit=2, is_symmetry=False, is_per_channel=True),
    a_qscheme=dict(bit=4, is_symmetry=False),
)
CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
QUANTIZER = dict(type='mmrazor.CustomQuantizer', qconfig=QCONFIG)


@pytest.fixture(autouse=True)
def eager():
    """Compiling takes longer than all that these tests compute."""
    with ops.eager_mode():
        yield


def ptq(**fields) -> dict:
    """Changes of the toy config."""
    return dict(model__quantizer=QUANTIZER, test_cfg=dict(type='mmrazor.PTQLoop', calibrate_steps=3, **fields))


def learned(runner: Runner) -> list[torch.Tensor]:
    """The learned integers of all weights."""
    return [quantizer.integers for _, quantizer in runner.model.weight_quantizers()]


@pytest.mark.parametrize('method', ['AdaRound', 'BRECQ', 'QDrop'])
def test_the_checkpoint_holds_what_was_learned_and_is_evaluated_only(make_runner, tmp_path, method):
    runner = make_runner(**ptq(reconstruction=dict(type=f'mmrazor.{method}', iters=20)))
    metrics = runner.test()

    checkpoint = tmp_path / 'quantized.pth'
    again = make_runner(**ptq(reconstruction=dict(type=f'mmrazor.{method}', iters=20)), load_from=str(checkpoint))
    evaluated = again.test()

    assert all(integers.numel() for integers in learned(runner))
    assert all(torch.equal(a, b) for a, b in zip(learned(runner), learned(again)))
    assert evaluated['toy/accuracy'] == metrics['toy/accuracy']
    assert (tmp_path / 'reconstruction.json').is_file() and not (tmp_path / 'reconstruction').exists()


def test_a_killed_run_goes_on(make_runner, tmp_path):
    fields = ptq(reconstruction=dict(type='mmrazor.QDrop', iters=20))
    whole = make_runner(work_dir=tmp_path / 'whole', **fields)
    whole.test()
    killed = make_runner(work_dir=tmp_path / 'killed', **fields)

    class Kill(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if 'Reconstruction [1/' in record.getMessage():
                raise KeyboardInterrupt

    killed.logger.addHandler(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.test()
    resumed = make_runner(work_dir=tmp_path / 'killed', **fields)
    resumed.test()

    one, other = whole.model.state_dict(), resumed.model.state_dict()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize(
    ('reconstruction', 'message'),
    [
        ('mmrazor.AdaRound', r'test_cfg\.reconstruction: got'),
        (
            dict(type='mmrazor.Magic'),
            r'test_cfg\.reconstruction\.type: got .mmrazor\.Magic., allowed: mmrazor\.Ada',
        ),
        (dict(type='mmrazor.AdaRound', iters=0), r'test_cfg\.reconstruction\.iters: got 0'),
        (dict(type='mmrazor.AdaRound', steps=5), r'test_cfg\.reconstruction of type AdaRound has no field .steps.'),
    ],
)
def test_wrong_fields_are_named_before_any_work(make_runner, reconstruction, message):
    with pytest.raises(ValueError, match=message):
        make_runner(**ptq(reconstruction=reconstruction)).test()


def test_the_form_of_the_rfc(make_runner):
    rfc = dict(pattern='block', loss=dict(type='mmrazor.AdaRoundLoss', iters=7))
    runner = make_runner(**ptq(reconstruction_cfg=rfc, batch_num=2))

    loop = LOOPS.build(runner._test_loop, default_args=dict(
        runner=runner, dataloader=runner._test_dataloader, evaluator=runner._test_evaluator,
    ))  # fmt: skip

    assert (loop.reconstruction.settings.granularity, loop.reconstruction.settings.iters) == ('block', 7)
    assert loop.calibrate_steps == 2


@pytest.mark.parametrize('wrong', [dict(pattern='layer'), dict(loss=dict(type='mmrazor.MSELoss')), 3])
def test_other_forms_are_refused(make_runner, wrong):
    with pytest.raises(ValueError, match=r'test_cfg\.reconstruction_cfg'):
        make_runner(**ptq(reconstruction_cfg=wrong)).test()


def test_the_config_of_the_rfc_runs_with_other_data(tmp_path):
    rfc = Config.fromfile(CONFIGS / 'examples' / 'rfc_adaround.py')
    cfg = config(tmp_path, model__quantizer=rfc.model.quantizer)
    others = dict(
        dataloader=cfg.test_dataloader,
        evaluator=cfg.test_evaluator,
        calibrate_dataloader=cfg.train_dataloader,
        batch_num=2,
    )
    cfg.test_cfg = {key: others.get(key, value) for key, value in rfc.test_cfg.items()}
    cfg.test_cfg.reconstruction_cfg.loss.iters = 10
    runner = Runner.from_cfg(cfg)

    runner.test()

    assert set(others) < set(rfc.test_cfg)
    assert all(integers.numel() for integers in learned(runner))
