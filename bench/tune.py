"""Other launches than those in ``kernels/config.py``, timed beside them on the GPU that is there.

What a row finds faster is not used by itself: the table is fixed, and changed by hand where a
difference is clear and holds for every shape it stands for. All alternatives are compiled first, on
all cores, and those that do not compile are left out.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from s1engine.bench.device_time import ceilings, copies, seconds
from s1engine.bench.kernel_speed import numbers, table
from s1engine.bench.kernel_work import KERNELS, Place, Work
from s1engine.bench.shapes import NAMES, shape
from s1engine.errors import RequestError
from s1engine.ops import select_ops
from s1engine.ops.compile_ahead import compiled_ahead

if TYPE_CHECKING:  # needs Triton, which machines without a GPU may lack
    from s1engine.bench.launches import Choice

ROUNDS = 5
PRODUCTS = ("norm_qkv", "linear_o", "norm_gate_up", "linear_down")
NAMED = (*PRODUCTS, "decode", "extend")  # as in ``launches``


def measure(
    kernel: str, at: Place, batch: int, context: int, limits: dict[str, Any]
) -> list[dict[str, Any]]:
    """Microseconds of every choice, the fastest first."""
    from s1engine.bench.launches import choices

    ops = select_ops(at.device)
    work = KERNELS[kernel](at, ops, batch, context)
    more = copies(work.nbytes, at.device) - 1
    works = [work, *(KERNELS[kernel](at, ops, batch, context) for _ in range(more))]
    bound = max(work.nbytes / limits["read_bytes_per_s"], work.flops / limits["matmul_flop_per_s"])
    rows = []
    with torch.inference_mode():
        for choice in choices(kernel, batch, at.model.num_kv_heads):
            took = _time(choice, works, at.device)
            rows.append({
                "kernel": kernel, "batch": batch, "context": context, "choice": choice.name,
                "us": took and round(1e6 * took, 2),
                "share_of_ceiling": took and round(bound / took, 3),
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["us"] or float("inf"))


def _time(choice: "Choice", works: list[Work], device: str) -> float | None:
    """None if the choice cannot be launched: too much shared memory, say."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        with choice.chosen():
            return seconds([work.ours for work in works], device, ROUNDS)
    except (CompilationError, OutOfResources, PTXASError):
        return None


def _cases(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, int, int]]:
    for kernel in names:
        for batch in numbers("batch", args.batch):
            for context in numbers("context", args.context) if kernel not in PRODUCTS else (1,):
                if kernel != "extend" or batch == 1:
                    yield kernel, batch, context


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every kernel at every size; the fastest few of each on stderr."""
    names = list(NAMED) if args.kernels == "all" else args.kernels.split(",")
    for name in names:
        if name not in NAMED:
            raise RequestError(
                f"kernels: {name!r} is unknown; there are {', '.join(NAMED)}", param="kernels"
            )
    if not torch.cuda.is_available():
        raise RequestError("bench tune needs a CUDA device", param="device")
    from s1engine.bench.launches import choices

    at = Place(shape(args.shape), torch.bfloat16, "cuda")
    cases = list(_cases(args, names))
    with compiled_ahead(progress=True), torch.inference_mode():
        for kernel, batch, context in cases:
            work = KERNELS[kernel](at, select_ops(at.device), batch, context)
            for choice in choices(kernel, batch, at.model.num_kv_heads):
                with choice.chosen():
                    work.ours()
    limits = ceilings(at.device)
    rows: list[dict[str, Any]] = []
    for case in tqdm(cases, unit="case"):
        found = measure(case[0], at, *case[1:], limits)
        own = [row for row in found if row["choice"] == "table"]
        print(table([*own, *found[: args.top]]), file=sys.stderr)
        rows += found
    return {"shape": args.shape, "dtype": str(at.dtype), "ceilings": limits, "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench tune``."""
    parser.add_argument("--kernels", default="all", help=f"comma-separated: {', '.join(NAMED)}")
    parser.add_argument("--shape", default="7B", choices=NAMES, help="Qwen2.5 of that size")
    parser.add_argument("--batch", default="1,4,16,64", help="rows, comma-separated")
    parser.add_argument("--context", default="1024,8192", help="cached tokens of attention")
    parser.add_argument("--top", type=int, default=4, help="alternatives shown of each case")
