"""From a model's name to its files: a local path, or those of the hub, which are cached."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from s1engine.errors import ModelError
from s1engine.gguf_file import SUFFIX
from s1engine.model_files import check_directory, check_file

_REPOSITORY = r"(\w[\w.-]*/\w[\w.-]*)"
_HUB_ID = re.compile(_REPOSITORY)
_HUB_FILE = re.compile(rf"{_REPOSITORY}/([\w./-]+{re.escape(SUFFIX)})")
_HUB_QUANT = re.compile(rf"{_REPOSITORY}:(\w[\w.-]*)")
_HUB_FILES = ["*.json", "*.jinja", "merges.txt", "model*.safetensors"]


def resolve_model(name_or_path: str) -> Path:
    """The directory or the GGUF file of a model.

    A name is a local path, or a hub id: ``owner/name``, ``owner/name/file.gguf``, or
    ``owner/name:Q4_K_M`` for the one GGUF file of that quantization. A directory without
    config.json but with one GGUF file means that file. Raises ModelError, also for files that must
    not be opened (``model_files``).
    """
    path = Path(os.path.expanduser(name_or_path))
    if path.is_dir():
        return _in_directory(path)
    if path.exists():
        if path.suffix != SUFFIX:
            raise ModelError(f"{path}: a model is a Hugging Face directory or a {SUFFIX} file")
        check_file(path)
        return path
    if _HUB_ID.fullmatch(name_or_path) and not name_or_path.endswith(SUFFIX):
        return _in_directory(_download(name_or_path, name_or_path, _HUB_FILES))
    if match := _HUB_FILE.fullmatch(name_or_path):
        repository, file = match.groups()
        return _only_file(_download(name_or_path, repository, [file]), [file], name_or_path)
    if match := _HUB_QUANT.fullmatch(name_or_path):
        repository, quant = match.groups()
        patterns = [f"*{spelling}{SUFFIX}" for spelling in {quant.upper(), quant.lower()}]
        return _only_file(_download(name_or_path, repository, patterns), patterns, name_or_path)
    raise ModelError(
        f"{path}: no such file or directory, and no hub id of the form owner/name, "
        f"owner/name/file{SUFFIX} or owner/name:Q4_K_M"
    )


def _in_directory(path: Path) -> Path:
    check_directory(path)
    files = sorted(path.glob(f"*{SUFFIX}"))
    if (path / "config.json").exists() or not files:
        return path
    if len(files) > 1:
        raise ModelError(
            f"{path}: holds several {SUFFIX} files; name one of {', '.join(f.name for f in files)}"
        )
    return files[0]


def _download(name: str, repository: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub  # slow to import, and a local model does not need it

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # network, permission, disk
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{name}: no such file or directory, and it could not be fetched from the hub: {reason}"
        ) from error


def _only_file(folder: Path, patterns: Sequence[str], name: str) -> Path:
    files = sorted({file for pattern in patterns for file in folder.rglob(pattern)})
    if len(files) == 1:
        return files[0]
    names = ", ".join(str(file.relative_to(folder)) for file in files) or "none"
    raise ModelError(f"{name}: must match one file of the hub's repository; it matches {names}")
