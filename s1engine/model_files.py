"""The files of a model directory: which of them may be opened, and how large they may be.

A directory that others made is data, not a promise. Before anything in it is read, each file that a
reader of ours or of transformers may open is checked: it is a regular file, no larger than its kind
needs, and texts lie in the directory itself, for their content reaches answers and messages. Links
of the hub's cache lead to the blobs of the same repository. Weights may be links to another disk.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s1engine.errors import ModelError

MAX_FILES = 2**14  # of a directory
MAX_JSON_BYTES = 2**25
MAX_JSON_VALUES = 2**19  # entries and fields of one file
MAX_TOKENIZER_BYTES = 2**26
MAX_TEXT_BYTES = 2**26  # of any other text
TEMPLATES = "additional_chat_templates"
_TEXTS = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken")
_WEIGHTS = (".safetensors", ".gguf")


def check_directory(folder: Path) -> None:
    """Raises ModelError, naming the file, unless all files of ``folder`` may be opened."""
    roots = _roots(folder)
    for number, file in enumerate(_files(folder)):
        if number == MAX_FILES:
            raise ModelError(f"{folder}: holds more than {MAX_FILES} files")
        if file.suffix in _WEIGHTS:
            check_file(file)
        elif file.suffix in _TEXTS:
            check_file(file, _max_bytes(file))
            _check_place(file, roots)


def check_file(file: Path, max_bytes: int | None = None) -> None:
    """Raises ModelError unless ``file`` is a regular file of at most ``max_bytes``: to open a pipe
    could wait forever, and a device never ends."""
    try:
        status = file.stat()
    except FileNotFoundError:
        where = f": it is a link to {os.readlink(file)}" if file.is_symlink() else ""
        raise ModelError(f"{file}: no such file{where}") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ModelError(f"{file}: must be a regular file; it is {kind}")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ModelError(f"{file}: has {status.st_size} bytes; the limit is {max_bytes}")


def read_text(file: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of ``file``. Raises ModelError, or FileNotFoundError if there is no such file."""
    if not file.exists():
        raise FileNotFoundError(file)
    check_file(file, max_bytes)
    try:
        with file.open("rb") as stream:
            return stream.read(max_bytes).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read as text: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``, in which each field stands once. Raises ModelError, or
    FileNotFoundError if there is no such file."""
    text = read_text(file, MAX_JSON_BYTES)
    if sum(map(text.count, ",[{")) > MAX_JSON_VALUES:
        raise ModelError(f"{file}: holds more than {MAX_JSON_VALUES} values")

    def checked(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(fields)
        if len(values) < len(fields):
            names = [name for name, _ in fields]
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelError(f"{file}: field {twice[:80]!r} stands twice in an object")
        return values

    try:
        value = json.loads(text, object_pairs_hook=checked)
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: must hold a JSON object")
    return value


def _files(folder: Path) -> Iterator[Path]:
    """Of the folder, and of the one below it that holds templates."""
    try:
        yield from sorted(folder.iterdir())
        if (folder / TEMPLATES).is_dir():
            yield from sorted((folder / TEMPLATES).iterdir())
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read: {error}") from error


def _max_bytes(file: Path) -> int:
    if file.suffix != ".json":
        return MAX_TEXT_BYTES
    is_vocabulary = file.name.startswith(("tokenizer.", "vocab", "tekken"))
    return MAX_TOKENIZER_BYTES if is_vocabulary else MAX_JSON_BYTES


def _roots(folder: Path) -> list[Path]:
    """The folders in which the targets of links must lie: the directory, and the blobs of its
    repository in the hub's cache (``<repository>/snapshots/<revision>/``)."""
    whole = folder.resolve()
    if whole.parent.name == "snapshots":
        return [whole, whole.parent.parent / "blobs"]
    return [whole]


def _check_place(file: Path, roots: list[Path]) -> None:
    target = file.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise ModelError(
            f"{file}: is a link to {target}, outside of the model directory; copy the file (only "
            "weights may be links)"
        )
