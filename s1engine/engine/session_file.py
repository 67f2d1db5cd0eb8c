"""A session on disk: tokens, and K and V of the leading ones, in a safetensors file.

    tokens          int32 [N], all tokens of the session
    k.<i>, v.<i>    [T, Hkv, stored_dim] of layer i for the first T <= N tokens

The metadata names the model and the form of its cache; nothing else about requests is kept. A
checksum covers metadata and tensors. Knows no engine.
"""

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from s1engine import __version__
from s1engine.errors import RequestError
from s1engine.runner.kv_blocks import LayerKV, is_finite

FORMAT = "s1engine-session"
VERSION = "1"
_OWN = ("format", "version", "engine_version", "checksum")  # metadata besides the identity


@dataclass(frozen=True, slots=True)
class Session:
    """What a file holds."""

    token_ids: list[int]
    kv: list[LayerKV]
    identity: dict[str, str]
    """Names and values of all that must be equal where the session is restored."""

    @property
    def num_tokens(self) -> int:
        """Tokens that have K and V."""
        return len(self.kv[0][0])


def write_session(path: str, session: Session) -> None:
    """Writes the file whole or not at all, readable by its owner alone. Raises RequestError."""
    tensors = {"tokens": torch.tensor(session.token_ids, dtype=torch.int32)}
    for i, (k, v) in enumerate(session.kv):
        tensors |= {f"k.{i}": k, f"v.{i}": v}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "engine_version": __version__,
        **session.identity,
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    try:
        with _replacing(Path(path)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path}: cannot be written: {error}", param="path") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """The name of a file that takes the place of ``path`` if the block succeeds."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        os.close(descriptor)
        yield name
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_session(path: str) -> Session:
    """The session of a file, whole and undamaged. Raises RequestError."""
    try:
        data = Path(path).read_bytes()
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise _error(path, f"is no whole safetensors file: {error}") from error
    metadata: dict[str, str] = header.get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise _error(path, f"format is {metadata.get('format')}, not {FORMAT}")
    if metadata.get("version") != VERSION:
        raise _error(path, f"version is {metadata.get('version')}; this engine reads {VERSION}")
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(metadata, tensors):
        raise _error(path, "checksum differs: the file is damaged")
    identity = {name: value for name, value in metadata.items() if name not in _OWN}
    return Session(*_split(path, tensors), identity)


def _split(path: str, tensors: dict[str, Tensor]) -> tuple[list[int], list[LayerKV]]:
    """Tokens and layers; every tensor has the place and the shape that it should have."""
    layers = len(tensors) // 2
    names = [(f"k.{i}", f"v.{i}") for i in range(layers)]
    if layers == 0 or set(tensors) != {"tokens", *(name for pair in names for name in pair)}:
        raise _error(path, "tensors are not tokens, k.0, v.0, k.1, ...")
    kv = [(tensors[k], tensors[v]) for k, v in names]
    tokens, first = tensors["tokens"], kv[0][0]
    if tokens.dtype is not torch.int32 or tokens.dim() != 1:
        raise _error(path, "tokens is no list of int32")
    alike = all(t.shape == first.shape and t.dtype is first.dtype for pair in kv for t in pair)
    if not alike or first.dim() != 3 or len(first) > len(tokens):
        raise _error(path, "k and v differ in shape or dtype")
    if not all(is_finite(t) for pair in kv for t in pair):
        raise _error(path, "k or v holds NaN or infinity")
    return tokens.tolist(), kv


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    value = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        if tensor.numel():
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            value = zlib.crc32(data.data, value)
    return f"{value:08x}"


def _error(path: str, why: str) -> RequestError:
    return RequestError(f"{path}: {why}", param="path")
