"""Checkpoint files: atomic, checked, found again."""

from __future__ import annotations

import os

import pytest
import torch
from mmengine.fileio import get_file_backend
from torch import nn

from mmrazor_quant.engine import checkpoint as ckpt

COMPLETE = {'state_dict': {}, 'optimizer': {}, 'message_hub': {}, 'meta': {}}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save(path, content, mtime=None):
    torch.save(content, path)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def test_backend_writes_and_leaves_nothing_else(tmp_path):
    backend = get_file_backend(str(tmp_path), backend_args={'backend': ckpt.ATOMIC_BACKEND})
    backend.put(b'one', tmp_path / 'sub' / 'a.pth')
    backend.put(b'two', tmp_path / 'sub' / 'a.pth')
    assert (tmp_path / 'sub' / 'a.pth').read_bytes() == b'two'
    assert os.listdir(tmp_path / 'sub') == ['a.pth']


def test_killed_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    backend = ckpt.AtomicLocalBackend()
    backend.put(b'old', tmp_path / 'a.pth')

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', killed)
    with pytest.raises(KeyboardInterrupt):
        backend.put(b'new', tmp_path / 'a.pth')
    assert (tmp_path / 'a.pth').read_bytes() == b'old'
    monkeypatch.undo()
    backend.put(b'newer', tmp_path / 'a.pth')
    assert os.listdir(tmp_path) == ['a.pth']


def test_removal_waits_for_the_next_file(tmp_path):
    """mmengine's CheckpointHook removes the last checkpoint before it writes the next."""
    pending = []
    one, other = ckpt.AtomicLocalBackend(pending), ckpt.AtomicLocalBackend(pending)
    one.put(b'1', tmp_path / '1.pth')
    one.remove(tmp_path / '1.pth')
    assert (tmp_path / '1.pth').is_file()
    other.put(b'2', tmp_path / '2.pth')
    assert os.listdir(tmp_path) == ['2.pth']
    one.remove(tmp_path / '2.pth')
    other.put(b'again', tmp_path / '2.pth')
    assert (tmp_path / '2.pth').read_bytes() == b'again'


def test_removal_is_immediate_without_shared_list(tmp_path):
    backend = ckpt.AtomicLocalBackend()
    backend.put(b'1', tmp_path / '1.pth')
    backend.remove(tmp_path / '1.pth')
    assert os.listdir(tmp_path) == []


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'load_from: there is no file .*nothing\.pth'):
        ckpt.check_checkpoint(str(tmp_path / 'nothing.pth'), 'load_from')
    with pytest.raises(FileNotFoundError, match='load_from: there is no file'):
        ckpt.check_checkpoint(str(tmp_path), 'load_from')


@pytest.mark.parametrize('legacy', [False, True])
def test_truncated_file_is_named(tmp_path, legacy):
    path = tmp_path / 'cut.pth'
    torch.save({'weight': torch.zeros(1000)}, path, _use_new_zipfile_serialization=not legacy)
    ckpt.check_checkpoint(str(path), 'checkpoint')
    truncate(path)
    with pytest.raises(ValueError, match=r'checkpoint: .*cut\.pth cannot be read; it is truncated or not a checkpoint'):
        ckpt.check_checkpoint(str(path), 'checkpoint')


@pytest.mark.parametrize('content', [b'', b'hello world, this is text', b'PK\x03\x04 no zip'])
def test_other_file_is_refused(tmp_path, content):
    path = tmp_path / 'other.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'checkpoint: .*other\.pth .*not a checkpoint'):
        ckpt.check_checkpoint(str(path), 'checkpoint')


def test_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match='holds a list, not a checkpoint'):
        ckpt.check_checkpoint(str(save(tmp_path / 'list.pth', [1])), 'checkpoint')


def test_unsafe_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match='not safe to load'):
        ckpt.check_checkpoint(str(save(tmp_path / 'module.pth', {'model': nn.Linear(1, 1)})), 'checkpoint')


@pytest.mark.parametrize('path', [None, 'https://example.com/a.pth', 's3://bucket/a.pth'])
def test_nothing_and_addresses_are_not_checked(path):
    ckpt.check_checkpoint(path, 'checkpoint')


def test_checkpoint_of_another_network_is_refused():
    model = nn.Linear(2, 3)
    ckpt.check_checkpoint_matches({'state_dict': {'weight': torch.zeros(3, 2), 'more': torch.zeros(1)}}, model)
    ckpt.check_checkpoint_matches({'module.bias': torch.zeros(3)}, model)
    for other in ({'backbone.weight': torch.zeros(3, 2)}, {'weight': torch.zeros(4, 2)}, {}):
        with pytest.raises(ValueError, match=r'does not belong to this model: none of its \d+ entries'):
            ckpt.check_checkpoint_matches({'state_dict': other}, model)


def test_resumes_from_the_noted_checkpoint(tmp_path):
    noted = save(tmp_path / 'epoch_1.pth', COMPLETE, mtime=1)
    save(tmp_path / 'epoch_2.pth', COMPLETE, mtime=2)
    (tmp_path / 'last_checkpoint').write_text(str(noted))
    assert ckpt.find_resumable_checkpoint(tmp_path) == str(noted)


@pytest.mark.parametrize('note', [None, '', 'gone.pth', 'epoch_3.pth'])
def test_resumes_from_the_newest_complete_one_where_the_note_fails(tmp_path, note):
    save(tmp_path / 'epoch_1.pth', COMPLETE, mtime=1)
    save(tmp_path / 'epoch_2.pth', COMPLETE, mtime=2)
    truncate(save(tmp_path / 'epoch_3.pth', {**COMPLETE, 'state_dict': torch.zeros(999)}))
    save(tmp_path / 'best_accuracy_epoch_2.pth', {'state_dict': {}, 'meta': {}, 'message_hub': {}}, mtime=9)
    if note is not None:
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / note) if note else '')
    assert ckpt.find_resumable_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')


def test_resumes_from_another_folder(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    save(tmp_path / 'elsewhere' / 'epoch_1.pth', COMPLETE)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'elsewhere' / 'epoch_2.pth'))
    assert ckpt.find_resumable_checkpoint(tmp_path) == str(tmp_path / 'elsewhere' / 'epoch_1.pth')


def test_nothing_to_resume_from(tmp_path):
    assert ckpt.find_resumable_checkpoint(tmp_path) is None
    assert ckpt.find_resumable_checkpoint(tmp_path / 'not_there') is None
