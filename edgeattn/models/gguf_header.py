"""The header of a GGUF file: metadata and where each tensor lies, checked before it is believed.

The `gguf` package has a reader too, but one flipped length makes it loop over billions of elements
that are not there, so the header is parsed here with every length checked against the file.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgeattn.errors import CheckpointError, MissingDependencyError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# GGUF value type -> struct format, little-endian.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_MAX_DIMENSIONS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Attributes:
        shape: dimensions, outermost first (GGUF stores them the other way round).
        kind: name of the GGML type ("F32", "Q4_1", ...).
        offset: first byte, from the start of the file.
        size: bytes.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class Metadata:
    """Typed access to the metadata; a value of another type is refused by its key.

    Attributes:
        values: key -> Python value; floats of 32 bits as their shortest decimal (1e-05, not
            9.999999747378752e-06), which is what the model's config said before conversion.
    """

    values: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        """The integer under `key`."""
        return self._typed(key, default, "one integer", _is_integer)

    def number(self, key: str, default: float | None = None) -> float:
        """The integer or float under `key`, as a float."""
        return float(self._typed(key, default, "one number", _is_number))

    def flag(self, key: str, default: bool) -> bool:
        """The boolean under `key`."""
        return self._typed(key, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, key: str, default: str | None = None) -> str:
        """The string under `key`."""
        return self._typed(key, default, "a string", lambda v: isinstance(v, str))

    def strings(self, key: str) -> list[str]:
        """The list of strings under `key`."""
        return self._typed(key, None, "a list of strings", _list_of(lambda v: isinstance(v, str)))

    def integers(self, key: str, default: list[int]) -> list[int]:
        """The list of integers under `key`."""
        return self._typed(key, default, "a list of integers", _list_of(_is_integer))

    def numbers(self, key: str) -> list[float]:
        """The list of numbers under `key`."""
        return self._typed(key, None, "a list of numbers", _list_of(_is_number))

    def _typed(self, key: str, default: T | None, wanted: str, check: Callable[[Any], bool]) -> T:
        value = self.values.get(key, default)
        if value is None or not check(value):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
            raise CheckpointError(
                expected=f"{wanted} under '{key}' in the GGUF header",
                came="the key is missing" if value is None else f"it holds {shown}",
                todo="use a GGUF file written by llama.cpp's converter for this kind of model",
            )
        typed: T = value
        return typed


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its weights.

    Attributes:
        path: the file.
        metadata: its keys.
        tensors: name -> place, in file order.
        file_size: bytes of the file when it was read.
        digest: SHA-256 of the header's bytes and the file's size.
    """

    path: Path
    metadata: Metadata = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    file_size: int
    digest: str


def read_header(path: Path) -> GgufHeader:
    """Reads and checks the header of `path`.

    Raises:
        CheckpointError: not a GGUF file, of another version, truncated, or inconsistent.
        MissingDependencyError: the `gguf` package is not installed.
    """
    sizes = _type_sizes()
    try:
        with path.open("rb") as stream:
            if path.stat().st_size == 0:
                raise _broken(path, "it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path), sizes)
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error.strerror})") from error


def _type_sizes() -> dict[int, tuple[str, int, int]]:
    """GGML type number -> (name, elements of a block, bytes of a block)."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingDependencyError(
            expected="the gguf package, which knows the quantised types",
            came="it is not installed",
            todo="install edgeattn[export]",
        ) from error
    return {int(t): (t.name, block, size) for t, (block, size) in GGML_QUANT_SIZES.items()}


def _parse(cursor: _Cursor, sizes: Mapping[int, tuple[str, int, int]]) -> GgufHeader:
    num_tensors, num_keys = _read_preamble(cursor)
    values: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in values:
            raise _broken(cursor.path, f"metadata key '{key}' occurs twice")
        values[key] = _read_value(cursor, key)
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string("a tensor's name")
        if name in infos:
            raise _broken(cursor.path, f"tensor '{name}' occurs twice")
        infos[name] = _read_info(cursor, name)
    metadata = Metadata(values)
    alignment = metadata.integer("general.alignment", _ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        raise _broken(cursor.path, f"general.alignment is {alignment}, not a power of two")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {name: _place(cursor, name, info, start, sizes) for name, info in infos.items()}
    digest = hashlib.sha256(cursor.data[: cursor.offset])
    digest.update(str(len(cursor.data)).encode())
    return GgufHeader(cursor.path, metadata, tensors, len(cursor.data), digest.hexdigest())


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Magic, version and counts -> (tensors, metadata keys)."""
    if cursor.take(4, "the magic") != _MAGIC:
        raise _broken(cursor.path, "it does not begin with 'GGUF'")
    version = cursor.scalar("I", "the version")
    if version not in _VERSIONS:
        big_endian = version >= 1 << 16
        raise CheckpointError(
            expected=f"a little-endian GGUF file of version {' or '.join(map(str, _VERSIONS))}",
            came=f"{cursor.path} is {'big-endian' if big_endian else f'of version {version}'}",
            todo="convert the model again with a current llama.cpp",
        )
    return cursor.scalar("Q", "the tensor count"), cursor.scalar("Q", "the key count")


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.scalar("I", f"the type of '{key}'")
    if kind != _ARRAY:
        return _read_element(cursor, key, kind)
    kind = cursor.scalar("I", f"the element type of '{key}'")
    count = cursor.scalar("Q", f"the length of '{key}'")
    if kind == _STRING:
        # A string takes 8 bytes at least: an absurd count ends here, not in a loop.
        cursor.require(8 * count, f"the strings of '{key}'")
        return [cursor.string(f"a string of '{key}'") for _ in range(count)]
    if kind not in _SCALARS:
        raise _broken(cursor.path, f"'{key}' is an array of unknown type {kind}")
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    raw = cursor.take(count * dtype.itemsize, f"the values of '{key}'")
    return np.frombuffer(raw, dtype).tolist()


def _read_element(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string(f"the value of '{key}'")
    if kind not in _SCALARS:
        raise _broken(cursor.path, f"'{key}' is of unknown type {kind}")
    value = cursor.scalar(_SCALARS[kind], f"the value of '{key}'")
    return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value


def _read_info(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """One tensor's (shape, type number, offset from the start of the data)."""
    what = f"the description of tensor '{name}'"
    rank = cursor.scalar("I", what)
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise _broken(cursor.path, f"tensor '{name}' has {rank} dimensions")
    shape = tuple(cursor.scalar("Q", what) for _ in range(rank))[::-1]
    return shape, cursor.scalar("I", what), cursor.scalar("Q", what)


def _place(
    cursor: _Cursor,
    name: str,
    info: tuple[tuple[int, ...], int, int],
    start: int,
    sizes: Mapping[int, tuple[str, int, int]],
) -> TensorInfo:
    shape, number, offset = info
    if number not in sizes:
        raise CheckpointError(
            expected="tensors of types the installed gguf package knows",
            came=f"tensor '{name}' is of type number {number}",
            todo="upgrade the gguf package, or convert the model to another type",
        )
    kind, block, block_bytes = sizes[number]
    if 0 in shape or shape[-1] % block:
        raise _broken(
            cursor.path, f"tensor '{name}' of type {kind} has the impossible shape {list(shape)}"
        )
    elements = 1
    for dimension in shape:
        elements *= dimension
    size = elements // block * block_bytes
    end = start + offset + size
    if end > len(cursor.data):
        raise _broken(
            cursor.path,
            f"tensor '{name}' ends at byte {end} while the file has {len(cursor.data)}",
        )
    return TensorInfo(shape, kind, start + offset, size)


class _Cursor:
    """Reads forward through mapped bytes and never past their end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def require(self, size: int, what: str) -> None:
        if size > len(self.data) - self.offset:
            raise _broken(self.path, f"it ends within {what}")

    def take(self, size: int, what: str) -> bytes:
        self.require(size, what)
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def scalar(self, code: str, what: str) -> Any:
        code = f"<{code}"
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.scalar("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"{what} is not UTF-8") from error


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(check(v) for v in value)


def _broken(path: Path, came: str) -> CheckpointError:
    return CheckpointError(
        expected=f"{path} to be a whole GGUF file", came=came, todo="download it again"
    )
