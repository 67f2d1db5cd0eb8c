"""The tensors of a Hugging Face directory: their names, their files, and reading them.

Owns safetensors (one file, or shards with an index) and the errors about files that are missing,
truncated, or do not hold what the model needs. Knows tensors by name and shape only.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s1engine.errors import ModelError
from s1engine.gguf_file import SUFFIX
from s1engine.model_files import check_file
from s1engine.models.config_reader import ConfigReader
from s1engine.models.fp8_layout import Fp8Layout
from s1engine.models.gguf_checkpoint import GgufCheckpoint

DIGEST_VALUES = 64
_SAFETENSORS = ".safetensors"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_DTYPES = ("F32", "F16", "BF16")
_FP8 = "F8_E4M3"


class Checkpoint:
    """The tensors of a directory, memory-mapped: nothing is read before ``read``."""

    def __init__(self, path: Path) -> None:
        self._listing, index = _weight_map(path)
        """The file that lists the tensors; named in errors about missing ones."""
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}  # of safetensors, without types
        for file in sorted(set(index.values())) or [self._listing]:
            self._open(file)
        for name, file in index.items():
            if self._files.get(name) != file:
                raise ModelError(f"{file}: tensor {name!r} is missing, though {_INDEX} lists it")

    def _open(self, file: Path) -> None:
        if file.exists():
            check_file(file)
        try:
            handle: Any = safe_open(file, framework="pt", device="cpu")
        except FileNotFoundError:
            raise ModelError(f"{file}: no such file, though {_INDEX} lists it") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a whole safetensors file: {error}") from error
        self._handles[file] = handle
        for name in list(handle.keys()):
            if name in self._files:
                raise ModelError(f"{file}: tensor {name!r} is in {self._files[name]} as well")
            self._files[name] = file

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        allowed: Callable[[str], bool],
        fp8: Fp8Layout | None = None,
    ) -> None:
        """Raises ModelError unless the tensors are exactly those of ``shapes``, in a float type.

        Matrices that ``fp8`` covers may be in fp8, with their scales as tensors of their own. Also
        allowed: tensors that ``allowed`` accepts, and tables of rotary frequencies, which old
        checkpoints store although they follow from the config.
        """
        known = set(shapes)
        for name, shape in shapes.items():
            if fp8 is not None and fp8.covers(name) and self.is_fp8(name):
                self._check_tensor(name, (shape,), (_FP8,))
                self._check_tensor(fp8.scales(name), fp8.scale_shapes(shape), _DTYPES)
                known |= {fp8.scales(name), fp8.inputs(name)}
            else:
                self._check_tensor(name, (shape,), _DTYPES)
        for name in self._files:
            if name not in known and not allowed(name) and not name.endswith(".inv_freq"):
                raise self.error(name, "is not part of this model")

    def _check_tensor(
        self, name: str, shapes: Collection[tuple[int, ...]], dtypes: Collection[str]
    ) -> None:
        stored = self._slice(name)
        if tuple(stored.get_shape()) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.error(name, f"has shape {stored.get_shape()}, not {expected}")
        if stored.get_dtype() not in dtypes:
            raise self.error(name, f"has type {stored.get_dtype()}, not {', '.join(dtypes)}")

    def is_fp8(self, name: str) -> bool:
        """Is the tensor stored in e4m3?"""
        dtype: str = self._slice(name).get_dtype()
        return dtype == _FP8

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise ModelError(f"{self._listing}: tensor {name!r} is missing")
        return self._handles[self._files[name]].get_slice(name)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU as it is stored. It has a mapping of the file of its own, so its
        pages are freed with it and do not add up while a model loads."""
        try:
            with safe_open(self._files[name], framework="pt", device="cpu") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self.error(name, f"can be read no more: {error}") from error
        return tensor

    def weights_digest(self) -> str:
        """A hash of names, dtypes, shapes and the first DIGEST_VALUES numbers of each tensor."""
        digest = hashlib.sha256()
        for name in sorted(self._files):
            tensor = self.read(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            first = tensor.flatten()[:DIGEST_VALUES].contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def error(self, name: str, why: str) -> ModelError:
        """An error about tensor ``name``, for the caller to raise."""
        return ModelError(f"{self._files[name]}: tensor {name!r} {why}")


StoredWeights = Checkpoint | GgufCheckpoint
"""The tensors of a model on disk, by their Hugging Face names."""


def open_weights(path: Path) -> StoredWeights:
    """The tensors of a Hugging Face directory or of a GGUF file. Raises ModelError."""
    return GgufCheckpoint(path) if path.suffix == SUFFIX else Checkpoint(path)


def _weight_map(path: Path) -> tuple[Path, dict[str, Path]]:
    """The single weight file and an empty map, or the index and its map: tensor -> file."""
    if (path / _SINGLE).exists():
        return path / _SINGLE, {}
    if (path / _INDEX).exists():
        return path / _INDEX, _read_index(path)
    for pattern in _PICKLES:
        for file in sorted(path.glob(pattern)):
            raise ModelError(
                f"{file}: pickled weights can run code and are not loaded; save the model as "
                "safetensors"
            )
    raise ModelError(f"{path / _SINGLE}: no such file, and no {_INDEX} beside it")


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = ConfigReader.read(path / _INDEX).section("weight_map")
    files: dict[str, Path] = {}
    for name in weight_map:
        file = weight_map.get(name)
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(_SAFETENSORS):
            raise weight_map.error(name, f"must name a {_SAFETENSORS} file beside it; got {file!r}")
        files[name] = path / file
    if not files:
        raise weight_map.error("", "is empty")
    return files
