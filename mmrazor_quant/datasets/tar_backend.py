"""Reading datasets out of tar archives, without unpacking them, through mmengine's file backends."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mmengine.fileio import BaseStorageBackend, register_backend

DATA_VARIABLE = 'MMRAZOR_QUANT_DATA'
"""Environment variable in which the configs of this project look for the folder of their data."""

SCHEME = 'tar://'
"""What addresses in archives begin with."""

MAX_UNPACKED_BYTES = 2**31
"""A compressed archive is kept in memory unpacked; a larger one than this is refused."""

_SUFFIX = re.compile(r'\.tar(?:\.gz|\.bz2|\.xz)?$')
_OPENERS = {'gz': gzip.open, 'z2': bz2.open, 'xz': lzma.open}
_DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError)


def split_uri(uri: str | os.PathLike[str]) -> tuple[str, str]:
    """Split the address of a member into archive and member.

    Args:
        uri: Such as ``tar:///data/images.tar/val/1.jpg``; ``tar://`` may be left out.

    Returns:
        Path of the archive, and path of the member in it ('' for all of it).

    Raises:
        ValueError: No part of the path has the suffix of an archive.

    Example:
        >>> split_uri('tar:///data/images.tar/val/1.jpg')
        ('/data/images.tar', 'val/1.jpg')
    """
    parts = str(uri).removeprefix(SCHEME).split('/')
    for count in range(1, len(parts) + 1):
        if _SUFFIX.search(parts[count - 1]):
            member = posixpath.normpath('/'.join(parts[count:]) or '.')
            return '/'.join(parts[:count]), '' if member == '.' else member
    raise ValueError(f'{uri}: no part of this path ends in .tar, .tar.gz, .tar.bz2 or .tar.xz')


@dataclass
class Archive:
    """Where the files of one archive are.

    Attributes:
        path: The archive.
        files: Offset and size in bytes of each file, by its path in the archive.
        folders: Names of the folders and files in each folder, by its path; '' is the top.
        content: The whole archive, where it had to be unpacked to read from its middle; else None.
    """

    path: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=lambda: {'': []})
    content: bytes | None = None

    @classmethod
    def open(cls, path: str) -> Archive:
        """Read the table of contents of an archive; unpack it into memory if it is compressed.

        Args:
            path: The archive.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or too large to unpack.
        """
        check_archive(path)
        archive = cls(path)
        try:
            with open(path, 'rb') as raw:
                if not path.endswith('.tar'):
                    archive.content = _unpack(path, raw)
                archive._index(raw if archive.content is None else io.BytesIO(archive.content))
        except _DAMAGED as error:
            raise ValueError(f'{path}: truncated, or no tar archive ({error})') from error
        return archive

    def _index(self, stream: BinaryIO) -> None:
        with tarfile.open(fileobj=stream, mode='r:') as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if member.isreg():
                    self.files[name] = (member.offset_data, member.size)
                    self._add_to_folder(name)
                elif member.isdir() and name != '.':
                    self._add_folder(name)

    def _add_folder(self, name: str) -> None:
        if name not in self.folders:
            self.folders[name] = []
            self._add_to_folder(name)

    def _add_to_folder(self, name: str) -> None:
        parent, _, own = name.rpartition('/')
        self._add_folder(parent)
        self.folders[parent].append(own)

    def read(self, member: str) -> bytes:
        """Read one file.

        Args:
            member: Its path in the archive.

        Raises:
            FileNotFoundError: There is no such file in the archive.
        """
        if member not in self.files:
            raise FileNotFoundError(f'{self.path}: there is no file {member!r} in this archive')
        offset, size = self.files[member]
        if self.content is not None:
            return self.content[offset : offset + size]
        # Opened anew each time: a file that worker processes inherited open has one position for all of them.
        with open(self.path, 'rb') as stream:
            stream.seek(offset)
            return stream.read(size)


def check_archive(path: str) -> None:
    """Raise FileNotFoundError for an archive that does not exist, saying where configs look for it.

    Args:
        path: The archive.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'there is no archive {path}. The configs of this project take the folder of their data from the '
            f'environment variable {DATA_VARIABLE} ({os.environ.get(DATA_VARIABLE) or "not set"})'
        )


def check_archives(value: Any, field: str) -> None:
    """Check that all archives which a part of a config reads from exist: before models are built, not after.

    Args:
        value: Part of a config, such as a dataloader.
        field: Where it stands in the config, for the error.

    Raises:
        FileNotFoundError: One does not exist.
        ValueError: An address has no archive in it.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_archives(each, f'{field}.{key}')
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            check_archives(each, f'{field}[{index}]')
    elif isinstance(value, str) and value.startswith(SCHEME):
        try:
            check_archive(split_uri(value)[0])
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f'{field}: {error}') from error


def _unpack(path: str, raw: BinaryIO) -> bytes:
    chunks, size = [], 0
    with _OPENERS[path[-2:]](raw) as stream:
        while chunk := stream.read(2**20):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_UNPACKED_BYTES:
                raise ValueError(
                    f'{path}: more than {MAX_UNPACKED_BYTES >> 20} MiB unpacked, too much to keep in memory; '
                    'decompress it to a plain .tar, which is read in place'
                )
    return b''.join(chunks)


class TarBackend(BaseStorageBackend):
    """Read-only files in tar archives, as ``tar:///path/of/images.tar/folder/1.jpg``.

    Registered under the prefix ``tar``, so that ``data_prefix='tar:///data/images.tar/val'`` is all that a dataset
    needs. A plain archive is read in place; a compressed one is unpacked once, into memory that worker processes
    share with the process that made the dataset.
    """

    def __init__(self) -> None:
        self._archives: dict[str, Archive] = {}

    def _find(self, uri: str | os.PathLike[str]) -> tuple[Archive, str]:
        path, member = split_uri(uri)
        if path not in self._archives:
            self._archives[path] = Archive.open(path)
        return self._archives[path], member

    def get(self, filepath: str | os.PathLike[str]) -> bytes:
        """Read a file.

        Args:
            filepath: Its address.

        Raises:
            FileNotFoundError: There is no such archive, or no such file in it.
        """
        archive, member = self._find(filepath)
        return archive.read(member)

    def get_text(self, filepath: str | os.PathLike[str], encoding: str = 'utf-8') -> str:
        """Read a file as text."""
        return self.get(filepath).decode(encoding)

    def exists(self, filepath: str | os.PathLike[str]) -> bool:
        """Tell whether there is a file or folder of this address."""
        return self.isfile(filepath) or self.isdir(filepath)

    def isfile(self, filepath: str | os.PathLike[str]) -> bool:
        """Tell whether there is a file of this address."""
        if not os.path.isfile(split_uri(filepath)[0]):
            return False
        archive, member = self._find(filepath)
        return member in archive.files

    def isdir(self, filepath: str | os.PathLike[str]) -> bool:
        """Tell whether there is a folder of this address; an archive is one itself."""
        if not os.path.isfile(split_uri(filepath)[0]):
            return False
        archive, member = self._find(filepath)
        return member in archive.folders

    def join_path(self, filepath: str | os.PathLike[str], *filepaths: str | os.PathLike[str]) -> str:
        """Join parts of an address."""
        return posixpath.join(str(filepath), *map(str, filepaths))

    def list_dir_or_file(
        self,
        dir_path: str | os.PathLike[str],
        list_dir: bool = True,
        list_file: bool = True,
        suffix: str | tuple[str, ...] | None = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        """List a folder, as :meth:`mmengine.fileio.LocalBackend.list_dir_or_file` does.

        Args:
            dir_path: Address of the folder.
            list_dir: Whether to list folders.
            list_file: Whether to list files.
            suffix: Endings of the files wanted; None: all.
            recursive: Whether to list the folders in the folder too.

        Yields:
            Paths relative to the folder.

        Raises:
            FileNotFoundError: There is no such archive, or no such folder in it.
        """
        archive, root = self._find(dir_path)
        if root not in archive.folders:
            raise FileNotFoundError(f'{archive.path}: there is no folder {root!r} in this archive')
        pending = ['']
        while pending:
            below = pending.pop()
            for name in archive.folders[posixpath.join(root, below).rstrip('/')]:
                path = posixpath.join(below, name)
                is_dir = posixpath.join(root, path) in archive.folders
                if is_dir and recursive:
                    pending.append(path)
                if (list_dir and is_dir) or (list_file and not is_dir and path.endswith(suffix or '')):
                    yield path

    @contextmanager
    def get_local_path(self, filepath: str | os.PathLike[str]) -> Iterator[str]:
        """Write a file to a temporary one, for libraries that read from a disk only.

        Args:
            filepath: Its address.

        Yields:
            Path of the copy, which is removed afterwards.
        """
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / posixpath.basename(str(filepath))
            copy.write_bytes(self.get(filepath))
            yield str(copy)


register_backend('tar', TarBackend, force=True, prefixes='tar')
