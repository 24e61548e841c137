"""PTQLoop with further steps: when they run, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
from toy import quant_state

from mmrazor_quant.ptq_steps import PTQStep, PTQSteps, Stage
from mmrazor_quant.registry import TASK_UTILS

CLE = {'type': 'mmrazor.CrossLayerEqualization'}
MSE = {'type': 'mmrazor.WeightRangeMSE'}
BIAS = {'type': 'mmrazor.BiasCorrection'}
LOW_BITS = {'w_qscheme': {'bit': 2, 'is_per_channel': False}}


def remember(stage, calls):
    """Make a step that notes the state it finds the model in."""

    class Remember(PTQStep):
        def run(self, context):
            scale = next(context.model.weight_quantizers())[1].scale
            calls.append((self.stage, context.model.is_calibrated, bool((scale != 1).any()), context.count))

    Remember.stage = stage
    return Remember()


def biases(runner):
    return torch.cat([runner.model.state_dict()[key] for key in ('backbone.bn.bias', 'head.bias')])


def test_steps_run_at_their_stage_whatever_their_order(make_runner):
    calls = []
    order = (Stage.AFTER_CALIBRATION, Stage.AFTER_WEIGHTS, Stage.BEFORE_CALIBRATION)
    runner = make_runner()
    runner.test_loop.extra_steps = PTQSteps([remember(stage, calls) for stage in order])

    runner.test()

    assert calls == [
        (Stage.BEFORE_CALIBRATION, False, False, 3),
        (Stage.AFTER_WEIGHTS, False, True, 3),
        (Stage.AFTER_CALIBRATION, True, True, 3),
    ]


@pytest.mark.parametrize('steps', [[CLE], [MSE], [BIAS], [BIAS, MSE, CLE]])
def test_each_step_alone_and_all_together(make_runner, tmp_path, log, steps):
    runner = make_runner(test_cfg__extra_steps=steps, model__quantizer__qconfig=LOW_BITS)
    lines = log(runner)

    metrics = runner.test()

    assert quant_state(runner.model) == (False, True, False, True)
    titles = {CLE['type']: 'Cross-layer equalization', MSE['type']: 'Ranges of least error', BIAS['type']: 'Bias corr'}
    for step in steps:
        assert any(line.startswith(titles[step['type']]) for line in lines)
    again = make_runner(load_from=str(tmp_path / 'quantized.pth'), test_cfg__extra_steps=steps,
                        model__quantizer__qconfig=LOW_BITS)  # fmt: skip
    assert again.test() == {'toy/accuracy': metrics['toy/accuracy']}
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in runner.model.state_dict().items())


def test_bias_correction_leaves_the_float_metrics(make_runner, log):
    plain = make_runner(model__quantizer__qconfig=LOW_BITS)
    expected = plain.test()
    runner = make_runner(test_cfg__extra_steps=[BIAS], model__quantizer__qconfig=LOW_BITS)
    lines = log(runner)

    metrics = runner.test()

    assert not torch.equal(biases(runner), biases(plain))
    assert metrics['float/toy/accuracy'] == expected['float/toy/accuracy']
    assert any('pass 2 of 2 [3/3]  eta: 0:00:00' in line for line in lines)


def test_weights_quantized_while_observing_have_their_final_ranges(make_runner):
    """The ranges are set before the activations behind quantized weights are observed."""
    scales = []
    for steps in ([], [MSE]):
        runner = make_runner(test_cfg__extra_steps=steps, test_cfg__calibrate_weights_quantized=True,
                             model__quantizer__qconfig=LOW_BITS)  # fmt: skip
        runner.test()
        scales.append(runner.model.state_dict()['head.input_fake_quant.scale'].clone())
    assert not torch.equal(*scales)


@pytest.mark.parametrize(('steps', 'message'), [
    ({'type': 'mmrazor.BiasCorrection'}, r'test_cfg.extra_steps: got .* allowed: a list of dicts'),
    (['BiasCorrection'], r"test_cfg.extra_steps\[0\]: got 'BiasCorrection', allowed: a dict with a type"),
    ([CLE, {'type': 'mmrazor.Unknown'}], r"test_cfg.extra_steps\[1\].type: got 'mmrazor.Unknown', allowed: "
                                         'mmrazor.BiasCorrection, mmrazor.CrossLayerEqualization, mmrazor.Weight'),
    ([{'type': 'mmrazor.CustomTracer'}], r"extra_steps\[0\].type: got 'mmrazor.CustomTracer', allowed: mmrazor.Bias"),
    ([{**BIAS, 'batches': 3}], r'extra_steps\[0\].batches: .* no such field; allowed: activations, passes'),
    ([{**BIAS, 'passes': 0}], r'extra_steps\[0\]\.passes: got 0, allowed: integers from 1 up'),
    ([{**BIAS, 'activations': 8}], r'extra_steps\[0\].activations: got 8, allowed: True, False'),
    ([{**CLE, 'clips': 'keep'}], r"extra_steps\[0\].clips: got 'keep', allowed: 'scale', 'skip'"),
    ([{**MSE, 'error': 'input'}], r"extra_steps\[0\].error: got 'input', allowed: 'output', 'weight'"),
])  # fmt: skip
def test_wrong_configs_are_refused_before_any_work(make_runner, steps, message):
    runner = make_runner(test_cfg__extra_steps=steps)
    with pytest.raises((ValueError, TypeError), match=message):
        runner.test()
    assert not runner.model.is_calibrated


def test_steps_of_users_can_be_named_in_configs(make_runner):
    calls = []

    @TASK_UTILS.register_module(force=True)
    class CountBatches(PTQStep):
        stage = Stage.AFTER_CALIBRATION

        def __init__(self, title: str) -> None:
            self.title = title

        def run(self, context):
            calls.append((self.title, len(list(context.batches()))))

    try:
        make_runner(test_cfg__extra_steps=[{'type': 'mmrazor.CountBatches', 'title': 'x'}]).test()
    finally:
        TASK_UTILS.module_dict.pop('CountBatches')
    assert calls == [('x', 3)]
