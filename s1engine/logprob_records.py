"""Log-probabilities of the tokens of one step as bytes, which cross from runner to engine and from
process to process unread.

csrc/cpu/logprob_records.hpp defines the layout. They are read where text is made.
"""

import struct
from collections.abc import Iterable

import numpy as np

from s1engine.outputs import RowLogprobs

_HEAD = struct.Struct("<2if")


def pack_logprobs(
    req_indices: Iterable[int],
    wanted: Iterable[int],
    chosen: np.ndarray,
    top: np.ndarray,
    top_ids: np.ndarray,
) -> bytes:
    """Records of n rows from float32 arrays: of the sampled ids [n], of the likeliest ones [n, k],
    and their ids [n, k] int32. ``wanted``: how many of these to report for each row."""
    records = b""
    for i, (req_index, count) in enumerate(zip(req_indices, wanted, strict=True)):
        ids, values = top_ids[i, :count].astype("<i4"), top[i, :count].astype("<f4")
        records += _HEAD.pack(req_index, len(ids), chosen[i]) + ids.tobytes() + values.tobytes()
    return records


def unpack_logprobs(records: bytes) -> dict[int, RowLogprobs]:
    """The log-probabilities of each row that has any, by req_index."""
    rows: dict[int, RowLogprobs] = {}
    at = 0
    while at < len(records):
        req_index, count, chosen = _HEAD.unpack_from(records, at)
        at += _HEAD.size
        values = struct.unpack_from(f"<{count}i{count}f", records, at)
        at += 8 * count
        rows[req_index] = RowLogprobs(chosen, tuple(zip(values, values[count:], strict=False)))
    return rows
