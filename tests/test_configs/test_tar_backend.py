"""Files in tar archives: read as those on a disk are, in worker processes too, and errors that say what is wrong."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine import fileio
from mmengine.fileio import LocalBackend

from mmrazor_quant.datasets import tar_backend
from mmrazor_quant.datasets.tar_backend import DATA_VARIABLE, TarBackend, check_archives, split_uri

SUFFIXES = ['.tar', '.tar.gz', '.tar.bz2', '.tar.xz']
FILES = {
    'readme.txt': 'grüß Gott\n'.encode(),
    'split/cat/1.jpg': b'one',
    'split/cat/2.jpg': b'',
    'split/dog/deep/3.jpg': bytes(range(256)) * 9,
}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder of files."""
    root = tmp_path / 'tree'
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / 'empty').mkdir()
    return root


def pack(tree: Path, suffix: str = '.tar') -> str:
    """Pack a folder and return the archive's address."""
    path = tree.with_name('files' + suffix)
    with tarfile.open(path, f'w:{suffix.removeprefix(".tar").removeprefix(".")}') as tar:
        tar.add(tree, arcname='.')
    return f'tar://{path}'


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_reads_what_was_packed(tree, suffix):
    archive = pack(tree, suffix)

    assert {name: fileio.get(f'{archive}/{name}') for name in FILES} == FILES
    assert fileio.get_text(f'{archive}/readme.txt') == 'grüß Gott\n'
    assert fileio.list_from_file(f'{archive}/readme.txt') == ['grüß Gott']


@pytest.mark.parametrize('folder', ['', '/split', '/split/cat', '/split/../split'])
@pytest.mark.parametrize(
    'options',
    [{}, {'recursive': True}, {'list_dir': False}, {'list_file': False, 'recursive': True}]
    + [{'list_dir': False, 'recursive': True, 'suffix': '.jpg'}],
)
def test_lists_as_mmengine_lists_a_disk(tree, folder, options):
    archive = pack(tree)

    listed = TarBackend().list_dir_or_file(archive + folder, **options)

    assert sorted(listed) == sorted(LocalBackend().list_dir_or_file(str(tree) + folder, **options))


@pytest.mark.parametrize('name', ['', 'readme.txt', 'split', 'split/cat/1.jpg', 'empty', 'nothing', 'split/ca'])
def test_knows_files_from_folders(tree, name):
    archive, local = pack(tree), tree / name
    address = fileio.join_path(archive, name)

    assert fileio.isfile(address) == local.is_file()
    assert fileio.isdir(address) == local.is_dir()
    assert fileio.exists(address) == local.exists()


def test_archive_without_entries_for_folders(tmp_path):
    path = tmp_path / 'flat.tar'
    (tmp_path / 'x').write_bytes(b'x')
    with tarfile.open(path, 'w') as tar:
        tar.add(tmp_path / 'x', arcname='a/b/x')

    backend = TarBackend()

    assert sorted(backend.list_dir_or_file(f'tar://{path}', recursive=True)) == ['a', 'a/b', 'a/b/x']
    assert backend.isdir(f'tar://{path}/a/b')


def test_local_copy_is_removed(tree):
    with fileio.get_local_path(f'{pack(tree)}/split/cat/1.jpg') as path:
        assert Path(path).read_bytes() == b'one'
        assert path.endswith('1.jpg')
    assert not os.path.exists(path)


def test_split_uri():
    assert split_uri('tar:///data/a.tar.xz/train/1.jpg') == ('/data/a.tar.xz', 'train/1.jpg')
    assert split_uri('data/my.tars/a.tar') == ('data/my.tars/a.tar', '')
    with pytest.raises(ValueError, match=r'no part of this path ends in \.tar'):
        split_uri('tar:///data/images.zip/1.jpg')


class ReadInWorker(torch.utils.data.Dataset):
    """Reads one file as often as it has items."""

    def __init__(self, address: str) -> None:
        self.address = address
        fileio.get_file_backend(address, enable_singleton=True).isfile(address)  # opened before workers exist

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> bool:
        name = list(FILES)[index % len(FILES)]
        return fileio.get(f'{self.address}/{name}') == FILES[name]


@pytest.mark.parametrize('suffix', ['.tar', '.tar.xz'])
def test_workers_do_not_disturb_each_other(tree, suffix):
    loader = torch.utils.data.DataLoader(ReadInWorker(pack(tree, suffix)), num_workers=2, batch_size=10)

    assert torch.cat(list(loader)).all()


def test_dataset_of_mmcls_reads_archives(tree):
    cv2 = pytest.importorskip('cv2')
    datasets = pytest.importorskip('mmcls.datasets')
    for name in ('split/cat/1.jpg', 'split/cat/2.jpg', 'split/dog/deep/3.jpg'):
        cv2.imwrite(str(tree / name), np.full((4, 5, 3), len(name), np.uint8))
    pipeline = [{'type': 'LoadImageFromFile'}]

    packed = datasets.CustomDataset(data_prefix=f'{pack(tree, ".tar.xz")}/split', pipeline=pipeline)
    local = datasets.CustomDataset(data_prefix=str(tree / 'split'), pipeline=pipeline)

    assert len(packed) == 3
    assert packed.CLASSES == local.CLASSES == ('cat', 'dog')
    for mine, other in zip(packed, local):
        assert mine['gt_label'] == other['gt_label']
        assert np.array_equal(mine['img'], other['img'])


def test_missing_archive_names_path_and_variable(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf'{tmp_path}/no\.tar.*{DATA_VARIABLE}'):
        fileio.get(f'tar://{tmp_path}/no.tar/1.jpg')
    assert not fileio.exists(f'tar://{tmp_path}/no.tar/1.jpg')


@pytest.mark.parametrize('name', ['split/cat/9.jpg', 'split/cat', ''])
def test_missing_member_is_named(tree, name):
    with pytest.raises(FileNotFoundError, match=f'there is no file {name!r} in this archive'):
        fileio.get(f'{pack(tree)}/{name}')


def test_missing_folder_is_named(tree):
    with pytest.raises(FileNotFoundError, match="there is no folder 'train' in this archive"):
        list(TarBackend().list_dir_or_file(f'{pack(tree)}/train'))


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('share', [0.4, 0.8])
def test_truncated_archive(tree, suffix, share):
    (tree / 'zlast').write_bytes(os.urandom(40000))
    path = Path(split_uri(pack(tree, suffix))[0])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    with pytest.raises(ValueError, match='files.tar.*: truncated, or no tar archive'):
        TarBackend().isfile(f'tar://{path}/readme.txt')


def test_too_large_to_unpack(tree, monkeypatch):
    monkeypatch.setattr(tar_backend, 'MAX_UNPACKED_BYTES', 2**10)

    with pytest.raises(ValueError, match='decompress it to a plain .tar'):
        TarBackend().get(f'{pack(tree, ".tar.xz")}/readme.txt')
    assert TarBackend().get(f'{pack(tree)}/split/cat/1.jpg') == b'one'


def test_check_archives_names_the_field(tree, tmp_path):
    archive = pack(tree)
    check_archives({'dataset': {'data_prefix': f'{archive}/split', 'indices': 3}}, 'test_dataloader')

    with pytest.raises(FileNotFoundError, match=r'^train\.datasets\[1\]\.data_prefix: there is no archive .*no\.tar'):
        check_archives({'datasets': [{'data_prefix': archive}, {'data_prefix': f'tar://{tmp_path}/no.tar'}]}, 'train')
