"""A GGUF file: its metadata, the list of its tensors, and reading one of them.

Owns the header's layout (GGUF versions 2 and 3, little-endian) and the errors about files that are
truncated, newer, split or hostile. Knows tensors by GGUF name. The header is parsed here and not by
the ``gguf`` library, whose reader needs seconds for a vocabulary and trusts every count in the
file. The blocks of quantized types are the library's (``gguf.quants``).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from math import gcd, prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s1engine.errors import ModelError
from s1engine.model_files import check_file

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
VERSIONS = (2, 3)
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
)
"""Tensor types that can be read."""

# Limits far above any real model's. They bound the work on a hostile header.
_MAX_FIELDS = 2**14
_MAX_TENSORS = 2**17
_MAX_ARRAY = 2**24
_MAX_STRING = 2**26  # bytes
_MAX_NAME = 2**10
_MAX_ELEMENTS = 2**42
_JOINED_ROWS = 16  # converted as one
_KEPT = 2**12  # entries: longer arrays of numbers are counted only

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")  # of a string, before its bytes
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as torch names them


@dataclass(frozen=True, slots=True)
class MetadataArray:
    """An array in the metadata. ``values`` holds numbers, if they are few; ``GgufFile.array`` reads
    the others."""

    length: int
    values: tuple[Any, ...] | None
    kind: int
    offset: int  # of the first entry, in bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is in torch's order, ``offset`` counts from the file's
    begin."""

    type_name: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


class GgufFile:
    """The header of a file, checked against its size. Tensors are read on demand.

    Raises ModelError naming file and field.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        """Numbers, booleans, text and MetadataArrays by key."""
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as file:
                self._size = file.seek(0, 2)
                if self._size < 24:
                    raise ModelError(f"{path}: truncated: {self._size} bytes are no GGUF header")
                with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                    self._parse(_Cursor(path, data, self._size))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error

    def _parse(self, cursor: "_Cursor") -> None:
        magic, version = cursor.unpack("4sI", "the header")
        if magic != b"GGUF":
            raise ModelError(f"{self.path}: is no GGUF file: it begins with {magic!r}")
        if version not in VERSIONS:
            raise ModelError(
                f"{self.path}: GGUF version {version} is not supported; supported: little-endian "
                f"files of versions {' and '.join(map(str, VERSIONS))}"
            )
        num_tensors, num_fields = cursor.unpack("QQ", "the header")
        cursor.check_count("tensor_count", num_tensors, _MAX_TENSORS)
        cursor.check_count("kv_count", num_fields, _MAX_FIELDS)
        for _ in range(num_fields):
            key = cursor.text("the key of a metadata field", _MAX_NAME)
            if key in self.metadata:
                raise self.error(key, "stands twice in the metadata")
            (kind,) = cursor.unpack("I", key)
            self.metadata[key] = cursor.value(key, kind)
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise self.error("split.count", f"is {parts}: merge the parts into one file first")
        infos = list(_tensor_infos(cursor, num_tensors))
        begin = _aligned(cursor.at, self._alignment())
        for name, info in infos:
            if name in self.tensors:
                raise self.tensor_error(name, "stands twice in the file")
            self._add(name, info, begin)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (8 << i for i in range(14)):
            raise self.error("general.alignment", f"must be a power of two from 8; got {alignment}")
        return alignment

    def _add(self, name: str, raw: tuple[tuple[int, ...], int, int], begin: int) -> None:
        shape, type_id, offset = raw
        type_name, values, size = _types().get(type_id, (f"number {type_id}", 1, 1))
        if type_name not in TYPES:
            raise self.tensor_error(
                name, f"has type {type_name}, which is not supported; supported: {', '.join(TYPES)}"
            )
        if shape[-1] % values:
            raise self.tensor_error(
                name, f"has rows of {shape[-1]} values, no multiple of {type_name}'s {values}"
            )
        info = TensorInfo(type_name, shape, shape[-1] // values * size, begin + offset)
        if offset % self._alignment():
            raise self.tensor_error(name, f"has offset {offset}, which is not aligned")
        if info.offset + info.nbytes > self._size:
            raise self.tensor_error(
                name,
                f"ends at byte {info.offset + info.nbytes} of a file of {self._size}: the file is "
                "truncated or damaged",
            )
        self.tensors[name] = info

    def array(self, key: str) -> list[Any]:
        """The entries of a metadata array: text, or numbers. Raises ModelError."""
        found = self.metadata.get(key)
        if not isinstance(found, MetadataArray):
            raise self.error(key, "is missing, or no array")
        try:
            with self.path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                if found.kind == _STRING:
                    return list(_strings(data, found))
                return list(
                    struct.unpack_from(f"<{found.length}{_SCALARS[found.kind]}", data, found.offset)
                )
        except (OSError, struct.error) as error:
            raise ModelError(f"{self.path}: cannot be read: {error}") from error
        except UnicodeDecodeError:
            raise self.error(key, "is not UTF-8") from None

    def read(self, name: str) -> "Tensor":
        """Tensor ``name`` on the CPU: F32, F16 and BF16 as stored, quantized types as float32. It
        has a mapping of the file of its own, so its pages are freed with it."""
        import torch  # loads where tensors are read, not where the header is

        info = self.tensors[name]
        raw = self._map(name, info.nbytes)
        if info.type_name in _FLOATS:
            tensor = torch.from_numpy(raw).view(getattr(torch, _FLOATS[info.type_name]))
            return tensor.view(info.shape)
        from gguf import GGMLQuantizationType, quants

        # gguf converts 16 rows a call, so longer rows need fewer calls.
        rows = raw.view(np.ndarray).reshape(-1, info.row_bytes)
        rows = rows.reshape(len(rows) // gcd(len(rows), _JOINED_ROWS), -1)
        with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
            values = quants.dequantize(rows, GGMLQuantizationType[info.type_name])
        return torch.from_numpy(values).view(info.shape)

    def head(self, name: str, nbytes: int) -> bytes:
        """The first ``nbytes`` of a tensor as they are stored."""
        return self._map(name, min(nbytes, self.tensors[name].nbytes)).tobytes()

    def _map(self, name: str, nbytes: int) -> "np.memmap[Any, np.dtype[np.uint8]]":
        # Copy on write: torch wants writable memory, and the file stays as it is.
        try:
            return np.memmap(self.path, np.uint8, "c", self.tensors[name].offset, (nbytes,))
        except (OSError, ValueError) as error:
            raise self.tensor_error(name, f"can be read no more: {error}") from error

    def error(self, key: str, why: str) -> ModelError:
        """An error about metadata field ``key``, for the caller to raise."""
        return ModelError(f"{self.path}: {key} {why}")

    def tensor_error(self, name: str, why: str) -> ModelError:
        """An error about tensor ``name``, for the caller to raise."""
        return ModelError(f"{self.path}: tensor {name!r} {why}")


def open_gguf(path: Path) -> GgufFile:
    """The header of ``path``, which is parsed once as long as the file does not change. Raises
    ModelError."""
    check_file(path)
    stat = path.stat()
    return _open(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=2)
def _open(path: Path, _size: int, _mtime: int, _inode: int) -> GgufFile:
    return GgufFile(path)


def _strings(data: mmap, array: MetadataArray) -> Iterator[str]:
    at = array.offset
    for _ in range(array.length):
        (length,) = _LENGTH.unpack_from(data, at)
        at += 8
        yield data[at : at + length].decode()
        at += length


@cache
def _types() -> dict[int, tuple[str, int, int]]:
    """Name, values and bytes of a block of every type that the library knows, by its number."""
    from gguf import GGML_QUANT_SIZES

    return {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class _Cursor:
    """Reads the header from begin to end; nothing is read beyond the file."""

    def __init__(self, path: Path, data: mmap, size: int) -> None:
        self._path = path
        self._data = data
        self._size = size
        self.at = 0

    def unpack(self, layout: str, field: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack_from(layout, self._data, self._skip(struct.calcsize(layout), field))

    def _skip(self, nbytes: int, field: str) -> int:
        """Moves on by ``nbytes``; returns where they begin."""
        begin = self.at
        if begin + nbytes > self._size:
            raise ModelError(
                f"{self._path}: truncated or damaged: {field} ends at byte {begin + nbytes} of a "
                f"file of {self._size}"
            )
        self.at += nbytes
        return begin

    def check_count(self, field: str, count: int, limit: int) -> None:
        if count > limit:
            raise ModelError(f"{self._path}: {field} is {count}, above the limit of {limit}")

    def text(self, field: str, limit: int = _MAX_STRING) -> str:
        begin = self._string(field, limit)
        try:
            return self._data[begin : self.at].decode()
        except UnicodeDecodeError:
            raise ModelError(f"{self._path}: {field} is not UTF-8") from None

    def _string(self, field: str, limit: int) -> int:
        (length,) = self.unpack("Q", field)
        self.check_count(f"the length of {field}", length, limit)
        return self._skip(length, field)

    def value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind], key)[0]
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            raise ModelError(f"{self._path}: {key} has the unknown type {kind}")
        kind, length = self.unpack("IQ", key)
        self.check_count(f"the length of {key}", length, _MAX_ARRAY)
        if kind == _STRING:
            return self._skip_strings(key, length)
        if kind not in _SCALARS:
            raise ModelError(f"{self._path}: {key} is an array of the unsupported type {kind}")
        if length > _KEPT:
            begin = self._skip(length * struct.calcsize(_SCALARS[kind]), key)
            return MetadataArray(length, None, kind, begin)
        begin = self.at
        return MetadataArray(length, self.unpack(f"{length}{_SCALARS[kind]}", key), kind, begin)

    def _skip_strings(self, key: str, count: int) -> MetadataArray:
        """Moves on by an array of strings, which may have hundreds of thousands of entries."""
        begin = at = self.at
        unpack, data, last = _LENGTH.unpack_from, self._data, self._size - _LENGTH.size
        for _ in range(count):
            if at > last:
                break
            (length,) = unpack(data, at)
            if length > _MAX_STRING:
                self.check_count(f"the length of {key}", length, _MAX_STRING)
            at += 8 + length
        else:
            if at <= self._size:
                self.at = at
                return MetadataArray(count, None, _STRING, begin)
        self._skip(max(at, self._size + 1) - begin, key)  # raises: the file is too short
        raise AssertionError(key)


def _tensor_infos(
    cursor: _Cursor, count: int
) -> Iterator[tuple[str, tuple[tuple[int, ...], int, int]]]:
    """Name, shape, type and offset of each tensor."""
    for _ in range(count):
        name = cursor.text("the name of a tensor", _MAX_NAME)
        field = f"tensor {name!r}"
        (dims,) = cursor.unpack("I", field)
        cursor.check_count(f"the number of dimensions of {field}", dims, 4)
        shape = cursor.unpack(f"{dims}Q", field)[::-1]  # the file's order is innermost first
        cursor.check_count(f"the size of {field}", prod(shape), _MAX_ELEMENTS)
        if not shape or 0 in shape:
            raise ModelError(f"{cursor._path}: {field} has shape {list(shape)}")
        type_id, offset = cursor.unpack("IQ", field)
        yield name, (shape, type_id, offset)


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
