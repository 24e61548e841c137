"""Data samples among the arguments of a module: what its forward reads of them, and which others hold the same.

A data sample is another object in every call. A graph depends on no more of it than the code read while it was traced.
"""

from __future__ import annotations

from typing import Any, NoReturn

from mmengine.structures import BaseDataElement

from .errors import CaptureError

Path = tuple[Any, ...]
"""An attribute, and keys of nested dicts."""

_PLAIN = (int, float, str, bool, type(None))
_MISSING = '<missing>'


class Watched:
    """Stands for a data sample among the constants of a call; keeps nothing of it but what was read.

    Args:
        kind: class of the data sample.
        reads: what was read so far, by path.
    """

    def __init__(self, kind: type, reads: dict[Path, Any] | None = None) -> None:
        self.kind, self.reads = kind, dict(reads or {})

    def copied(self) -> Watched:
        """Returns one that records for itself."""
        return Watched(self.kind, self.reads)

    def accepts(self, value: Any) -> bool:
        """Tells whether an argument is a data sample of which the same would be read."""
        return type(value) is self.kind and all(_alike(_find(value, path), read) for path, read in self.reads.items())

    def stand_in(self, element: BaseDataElement) -> BaseDataElement:
        """Returns an object of the data sample's class whose reads are recorded.

        Args:
            element: the data sample.

        Returns:
            The object. Reading anything else than numbers, strings and nested tuples or dicts of them raises
            ``CaptureError``, and so does changing it.
        """
        return object.__new__(_stand_in_class(element, self.reads))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Watched) and (self.kind, self.reads) == (other.kind, other.reads)

    __hash__ = None

    def __repr__(self) -> str:
        return f'Watched({self.kind.__name__}, {self.reads})'


def _stand_in_class(element: BaseDataElement, reads: dict[Path, Any]) -> type:
    def read(self: Any, name: str) -> Any:
        if name.startswith('__'):
            return object.__getattribute__(self, name)
        try:
            value = getattr(element, name)
        except AttributeError:
            reads[(name,)] = _MISSING
            raise
        return _watch(value, (name,), reads)

    def refuse(self: Any, *_: Any) -> NoReturn:
        raise CaptureError(f'its forward changes a {type(element).__name__}, or goes through all that it holds')

    refused = ('__setattr__', '__delattr__', '__contains__', '__repr__', '__str__')
    return type(type(element).__name__, (type(element),), {'__getattribute__': read, **dict.fromkeys(refused, refuse)})


def _watch(value: Any, path: Path, reads: dict[Path, Any]) -> Any:
    if isinstance(value, dict):
        return _WatchedDict(value, path, reads)
    if not _is_plain(value):
        raise CaptureError(f'its forward reads {".".join(map(str, path))} of a data sample, a {type(value).__name__}')
    reads[path] = value
    return value


class _WatchedDict(dict):
    """A dict whose reads are recorded; empty for what gets at its contents without asking."""

    def __init__(self, contents: dict, path: Path, reads: dict[Path, Any]) -> None:
        super().__init__()
        self._contents, self._path, self._reads = contents, path, reads

    def __getitem__(self, key: Any) -> Any:
        if key not in self:
            raise KeyError(key)
        return _watch(self._contents[key], (*self._path, key), self._reads)

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: Any) -> bool:
        found = key in self._contents
        if not found:
            self._reads[(*self._path, key)] = _MISSING
        return found

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise CaptureError(f'its forward goes through all of {".".join(map(str, self._path))} of a data sample')

    __iter__ = __len__ = __setitem__ = __delitem__ = __eq__ = __repr__ = _refuse
    __or__ = __ror__ = __ior__ = __ne__ = __reversed__ = _refuse
    keys = values = items = copy = pop = popitem = update = setdefault = clear = _refuse
    __hash__ = None


def _find(element: BaseDataElement, path: Path) -> Any:
    value = getattr(element, path[0], _MISSING)
    for key in path[1:]:
        value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
    return value


def _alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or not _is_plain(a):
        return False
    return len(a) == len(b) and all(map(_alike, a, b)) if isinstance(a, (tuple, list)) else a == b


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, _PLAIN)
