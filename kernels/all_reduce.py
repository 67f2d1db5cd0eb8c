"""One-shot all-reduce of few rows among the ranks of a machine, with residual and norm.

    total = x of rank 0 + x of rank 1 + ...           (float32, in the order of ranks)
    residual += total                                 (rounded once; or without one, out = total)
    normed = rms_norm(residual) * weight              (if there is a norm)

Every rank pushes its rows into an inbox on each rank's device, then raises a flag there, and sums
what has arrived in its own. So all ranks have the same bits after one exchange, where a ring needs
a round for each rank.

A program owns a row. It numbers its exchanges: a flag holds the number of the last one, and odd and
even ones use different halves of the inbox. A rank that fills a half again has seen all flags of
the exchange between, so all ranks have read what was there. Numbers lie in memory and outlive a
launch, so a graph may replay it. All programs of a launch must be resident, since they wait for
programs of other devices: MAX_ROWS rows on NUM_SMS multiprocessors are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents

MAX_ROWS = 64  # of a launch
MAX_POLLS = 1 << 26  # of a flag, about a minute; then the rank that should raise it is lost


class Inboxes:
    """What one rank knows of the inboxes of all.

    Args:
        addresses: [2, size] int64 on the device, flags and rows of each rank.
        exchanges: [MAX_ROWS] int32, number of each program's last exchange; zeros at first.
        lost: [1] int32, 0 at first; else this rank waits for no other any more, and results are
            undefined.
    """

    def __init__(
        self,
        rank: int,
        width: int,
        dtype: torch.dtype,
        addresses: Tensor,
        exchanges: Tensor,
        lost: Tensor,
    ) -> None:
        self.rank, self.width, self.dtype = rank, width, dtype
        self.addresses, self.exchanges, self.lost = addresses, exchanges, lost

    @staticmethod
    def num_bytes(size: int, width: int, dtype: torch.dtype) -> int:
        """Of a rank's inbox: flags [MAX_ROWS, size] int32, rows [2, size, MAX_ROWS, width]."""
        return 4 * MAX_ROWS * size + 2 * size * MAX_ROWS * width * dtype.itemsize

    @classmethod
    def create(
        cls, rank: int, inboxes: list[int], width: int, dtype: torch.dtype, device: torch.device
    ) -> "Inboxes":
        """``inboxes``: by rank, the address of its inbox, ``num_bytes`` zeros aligned to 16 bytes,
        as this rank's device sees it."""
        rows = [inbox + 4 * MAX_ROWS * len(inboxes) for inbox in inboxes]
        return cls(
            rank, width, dtype,
            addresses=torch.tensor([inboxes, rows], dtype=torch.int64, device=device),
            exchanges=torch.zeros(MAX_ROWS, dtype=torch.int32, device=device),
            lost=torch.zeros(1, dtype=torch.int32, device=device),
        )  # fmt: skip


@triton.jit
def _row_at(address_ptr, slot, column, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers to row ``slot`` of an inbox. Aligned rows are accessed by 16 bytes."""
    rows = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    pointers = rows + (slot.to(tl.int64) * WIDTH + column)
    if WIDTH % 8 == 0:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), 8)
    return pointers


@triton.jit(do_not_specialize=["rank"])
def _all_reduce_kernel(
    x_ptr,  # [rows, WIDTH]
    residual_ptr,  # [rows, WIDTH], in place; read if HAS_RESIDUAL
    weight_ptr,  # [WIDTH]; read if HAS_NORM
    out_ptr,  # [rows, WIDTH]: normed, or the sum if there is no residual
    address_ptr,  # [2, SIZE] int64
    exchange_ptr,  # [MAX_ROWS] int32
    lost_ptr,  # [1] int32
    rank,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    MAX_POLLS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row.to(tl.int64) * WIDTH + column
    grid_dependency_wait(PDL)
    launch_dependents(PDL)  # all programs are resident, and the next kernel's may load weights
    exchange = tl.load(exchange_ptr + row) + 1
    half = (exchange & 1) * SIZE
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    for to in tl.static_range(SIZE):
        slot = (half + rank) * MAX_ROWS + row
        pushed = _row_at(address_ptr + SIZE + to, slot, column, WIDTH, x_ptr.dtype.element_ty)
        tl.store(pushed, x, mask=inside)
    tl.debug_barrier()  # all threads have stored
    for to in tl.static_range(SIZE):
        flags = tl.load(address_ptr + to).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + row * SIZE + rank, exchange, sem="release", scope="sys")
    flags = tl.load(address_ptr + rank).to(tl.pointer_type(tl.int32)) + row * SIZE
    for source in tl.static_range(SIZE):
        polls = 0
        behind = tl.atomic_add(flags + source, 0, sem="acquire", scope="sys") - exchange
        while (behind < 0) & (polls < MAX_POLLS):  # numbers wrap around
            lost = tl.load(lost_ptr, volatile=True)
            polls = tl.where(lost != 0, MAX_POLLS, polls + 1)
            behind = tl.atomic_add(flags + source, 0, sem="acquire", scope="sys") - exchange
        if behind < 0:
            tl.store(lost_ptr, 1)
    tl.debug_barrier()  # all threads may read
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(SIZE):
        slot = (half + source) * MAX_ROWS + row
        part = _row_at(address_ptr + SIZE + rank, slot, column, WIDTH, x_ptr.dtype.element_ty)
        total += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_ptr + at, total.to(residual_ptr.dtype.element_ty), mask=inside)
    if HAS_NORM:
        total = total.to(x_ptr.dtype.element_ty).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total = total * tl.rsqrt(tl.sum(total * total, axis=0) / WIDTH + eps) * weight
    if HAS_NORM or not HAS_RESIDUAL:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(exchange_ptr + row, exchange)


def all_reduce(
    x: Tensor,
    inboxes: Inboxes,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    *,
    max_polls: int = MAX_POLLS,
) -> Tensor:
    """x [T, H], T at most MAX_ROWS, becomes the sum over ranks, in place, and is returned.

    With ``residual`` [T, H] the sum is added to it in place, and x stays as it was; with ``norm``
    [H] too, x becomes the rms_norm of the new residual. All ranks call it with the same shapes in
    the same order, and no call may be in flight on two streams.
    """
    rows, width = x.shape
    assert rows <= MAX_ROWS and width == inboxes.width and x.dtype == inboxes.dtype
    assert x.is_contiguous() and (norm is None or residual is not None)
    if residual is not None:
        assert residual.shape == x.shape and residual.dtype == x.dtype
        assert residual.is_contiguous()
    if norm is not None:
        assert norm.shape == (width,) and norm.is_contiguous()
    block, launch = launch_table.all_reduce_tile(width)
    _all_reduce_kernel[(rows,)](
        x, x if residual is None else residual, x if norm is None else norm, x,
        inboxes.addresses, inboxes.exchanges, inboxes.lost, inboxes.rank, eps,
        WIDTH=width, BLOCK=block, SIZE=inboxes.addresses.shape[1], MAX_ROWS=MAX_ROWS,
        MAX_POLLS=max_polls, HAS_RESIDUAL=residual is not None, HAS_NORM=norm is not None,
        **launch.kwargs(),
    )  # fmt: skip
    return x
