"""mmengine's checkpoints load under torch's default protection, and the protection holds."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

import mmrazor_quant  # noqa: F401
from mmrazor_quant.compat import (
    FakeQuantizeBase,
    UniformQuantizationObserverBase,
    _CodebaseOfMMDeploy,
    _history_buffer_getattr,
    show_codebase_to_mmdeploy,
)

HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'


def save_and_load(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load_pickle(code: bytes):
    """Load a checkpoint whose pickle is ``code``."""
    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    patched = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(patched, 'w') as target:
        for info in source.infolist():
            content = code if info.filename.endswith('data.pkl') else source.read(info)
            target.writestr(info, content)
    patched.seek(0)
    return torch.load(patched, weights_only=True)


def pickle_of_call(path: str, *arguments: bytes) -> bytes:
    """Pickle protocol 2 of a call of a global with arguments that are pickle code themselves."""
    module, name = path.rsplit('.', 1)
    call = b'c' + module.encode() + b'\n' + name.encode() + b'\n' + b'(' + b''.join(arguments) + b'tR'
    return b'\x80\x02' + call + b'.'


def string(text: str) -> bytes:
    return b'X' + struct.pack('<I', len(text)) + text.encode()


def reference(path: str) -> bytes:
    module, name = path.rsplit('.', 1)
    return b'c' + module.encode() + b'\n' + name.encode() + b'\n'


def test_base_classes_are_modules():
    assert issubclass(FakeQuantizeBase, torch.nn.Module)
    assert issubclass(UniformQuantizationObserverBase, torch.nn.Module)


def test_message_hub_loads():
    hub = MessageHub('compat')
    for value in (1.0, 2.5):
        hub.update_scalar('train/loss', value)
        hub.update_scalar('train/lr', np.float32(value))
    hub.update_info('val/per_class', np.arange(3.0))
    hub.update_info('best_score', np.float64(7.5))
    loaded = save_and_load({'message_hub': hub.state_dict()})['message_hub']
    history = loaded['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer)
    assert history.statistics('mean') == 1.75
    assert history.max() == 2.5
    np.testing.assert_array_equal(loaded['runtime_info']['val/per_class'], np.arange(3.0))
    assert loaded['runtime_info']['best_score'] == 7.5


@pytest.mark.parametrize('code', [code for code in np.typecodes['All'] if code not in 'OSUVMm'])
def test_numpy_arrays_and_scalars_of_all_number_types_load(code):
    array = np.array([0, 1, 1]).astype(code)
    loaded = save_and_load({'array': array, 'scalar': array[1], 'dtype': array.dtype})
    np.testing.assert_array_equal(loaded['array'], array)
    assert loaded['scalar'] == array[1]
    assert loaded['dtype'] == array.dtype


@pytest.mark.parametrize('array', [np.array(['a', 'bc']), np.array([b'x']), np.array(['2020-01-01'], 'M8[D]')])
def test_other_numpy_types_load(array):
    np.testing.assert_array_equal(save_and_load({'array': array})['array'], array)


def test_checkpoints_of_numpy_1_load():
    """numpy 1 writes ``numpy.core`` where numpy 2 writes ``numpy._core``."""
    code = pickle.dumps(np.arange(4.0), protocol=2).replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    np.testing.assert_array_equal(load_pickle(code), np.arange(4.0))


def test_other_getattr_is_refused():
    """What an attacker would write: reach a module through an attribute of something allowed."""
    code = pickle_of_call('builtins.getattr', reference(HISTORY_BUFFER), string('__init__'))
    with pytest.raises(pickle.UnpicklingError, match='refused'):
        load_pickle(code)


@pytest.mark.parametrize('name', ['__globals__', '__class__', 'register_statistics', '_set_default_statistics'])
def test_only_statistics_of_history_buffer_resolve(name):
    assert _history_buffer_getattr(HistoryBuffer, 'mean') is HistoryBuffer.mean
    with pytest.raises(pickle.UnpicklingError, match=name):
        _history_buffer_getattr(HistoryBuffer, name)
    with pytest.raises(pickle.UnpicklingError, match='mean'):
        _history_buffer_getattr(torch.Tensor, 'mean')
    with pytest.raises(pickle.UnpicklingError):
        _history_buffer_getattr(HistoryBuffer, type('str_', (str,), {})('mean'))


@pytest.mark.parametrize('path', ['os.system', 'posix.system', 'builtins.eval', 'builtins.exec', 'subprocess.Popen'])
def test_code_is_refused(path, tmp_path):
    code = pickle_of_call(path, string(f'touch {tmp_path / "hacked"}'))
    with pytest.raises(pickle.UnpicklingError):
        load_pickle(code)
    assert os.listdir(tmp_path) == []


def test_result_of_getattr_cannot_be_called():
    """A statistics method is data here: a checkpoint must not make it run."""
    inner = pickle_of_call('builtins.getattr', reference(HISTORY_BUFFER), string('mean'))
    code = inner[:-1] + b'(' + string('x') + b'tR.'
    with pytest.raises(pickle.UnpicklingError):
        load_pickle(code)


def test_object_arrays_are_refused():
    """They carry pickled objects of their own."""
    with pytest.raises(pickle.UnpicklingError):
        save_and_load({'array': np.array([OrderedDict(), builtins.print], dtype=object)})


def test_a_package_mmrazor_is_there_for_mmdeploy_only(monkeypatch):
    show_codebase_to_mmdeploy()
    (finder,) = (finder for finder in sys.meta_path if isinstance(finder, _CodebaseOfMMDeploy))
    assert finder.find_spec('mmdeploy.codebase.mmrazor.deploy').loader is finder
    assert finder.find_spec('mmdeploy.codebase.mmdet') is None
    monkeypatch.delitem(sys.modules, 'mmdeploy', raising=False)
    assert finder.find_spec('mmrazor') is None
    monkeypatch.setitem(sys.modules, 'mmdeploy', types.ModuleType('mmdeploy'))
    assert finder.find_spec('mmrazor') is not None
