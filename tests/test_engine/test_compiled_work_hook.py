"""A resumed training knows which functions its predecessor had compiled."""

from __future__ import annotations

import pytest
import torch
from mmengine.runner import Runner
from toy import config

from mmrazor_quant.ops import compiled, elementwise, reference

DONE = {'one': 2**30, 'other': 5}


@pytest.fixture
def switch(monkeypatch):
    monkeypatch.setattr(compiled.switch, 'done', dict(DONE))
    return compiled.switch


@pytest.mark.parametrize('resume', [True, False])
def test_resumed_run_goes_on_from_the_work_done(tmp_path, switch, resume):
    Runner.from_cfg(config(tmp_path / 'first', train_cfg__max_epochs=1)).train()
    checkpoint = tmp_path / 'first' / 'epoch_1.pth'
    saved = torch.load(checkpoint, weights_only=False)['compiled_work']
    assert DONE.items() <= saved.items()

    switch.done = {}
    changes = dict(load_from=str(checkpoint), resume=resume, train_cfg__max_epochs=2)
    runner = Runner.from_cfg(config(tmp_path / 'second', **changes))
    runner.build_train_loop(runner.cfg.train_cfg)  # which registers the hook
    runner.load_or_resume()
    assert switch.done == (saved if resume else {})


def test_names_of_functions_tell_them_apart_and_outlive_a_process():
    formulas = [(reference.forward_formula, 1, 'flat', False), (reference.forward_formula, 1, 'last', False),
                (reference.backward_formula, 2, 'flat', False)]  # fmt: skip
    names = {f'{f.__module__}.{f.__qualname__}' for f in (elementwise._function(*each) for each in formulas)}
    assert len(names) == len(formulas)
    assert 'mmrazor_quant.ops.reference.forward_formula[1, flat, False]' in names
