"""The API keys of ``s1engine serve``: where they come from, and what their clients may ask for."""

import argparse
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s1engine.checks import check_int
from s1engine.config import EngineConfig
from s1engine.errors import RequestError

if TYPE_CHECKING:
    from s1engine.server.admission import ClientLimits

API_KEY_VARIABLE = "S1ENGINE_API_KEY"


def api_keys(given: Sequence[str] | None, file: str | None) -> list[str]:
    """The keys of the flags, else those of the variable, which is removed: no child inherits it.

    Raises RequestError for an empty key: an unset variable must not open the server.
    """
    variable = os.environ.pop(API_KEY_VARIABLE, None)
    keys = _checked_keys("api_key", given or ()) + read_keys("api_key_file", file)
    if not keys and variable is not None:
        keys = _checked_keys(API_KEY_VARIABLE, [variable])
    return keys


def read_keys(param: str, file: str | None) -> list[str]:
    """The keys of a file, one a line; none without a file."""
    if file is None:
        return []
    try:
        keys = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{param}: {error}", param=param) from error
    if not keys:
        raise RequestError(f"{param}: {file} holds no key", param=param)
    return _checked_keys(param, keys)


def _checked_keys(param: str, keys: Sequence[str]) -> list[str]:
    for key in keys:
        if not (key and key.isascii() and key.isprintable() and " " not in key):
            raise RequestError(
                f"{param}: a key is empty, or has other characters than printable ASCII",
                param=param,
            )
    return list(keys)


def client_limits(
    args: argparse.Namespace,
    config: EngineConfig,
    keys: Sequence[str],
    priority_keys: Sequence[str],
) -> "ClientLimits":
    """The limits of the flags. Clients are the numbers of ``keys``, then of ``priority_keys``."""
    from s1engine.server.admission import MAX_QUEUED, MAX_REQUEST_SEQUENCES, ClientLimits

    queued, sequences = args.max_queued_requests, args.max_sequences_per_request
    queued = MAX_QUEUED if queued is None else queued
    sequences = MAX_REQUEST_SEQUENCES if sequences is None else sequences
    check_int("max_queued_requests", queued, 0, 2**20)
    check_int("max_sequences_per_request", sequences, 1, 2**20)
    if args.max_sequences_per_key is not None:
        check_int("max_sequences_per_key", args.max_sequences_per_key, 1, 2**20)
    all_keys = [*keys, *priority_keys]
    if len(set(all_keys)) < len(all_keys):
        raise RequestError("api_key: two keys are equal", param="api_key")
    privileged = frozenset(str(len(keys) + i) for i in range(len(priority_keys)))
    shared = bool(priority_keys) or len(keys) > 1
    return ClientLimits(
        max_in_flight=config.max_num_seqs + queued,
        num_clients=max(len(all_keys), 1),
        max_per_client=args.max_sequences_per_key,
        max_per_request=sequences,
        priority_clients=privileged if shared else None,
    )


def is_loopback(host: str) -> bool:
    """Is this address only reached from this machine?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
