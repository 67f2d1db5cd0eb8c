"""How each kernel is launched: one fixed table, no search at run time.

A first launch with a new configuration compiles, which a captured graph and a waiting request
cannot afford, so nothing here depends on a measurement at start. Every entry is compiled ahead of
time for sm_90 by ``bench/kernels_report.py``; what the entries cost there is in its table. Knows
shapes, not tensors.

float32 (``itemsize`` 4) is there to be compared with, not to be fast: its products run outside the
tensor cores and take small tiles.
"""

HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
MAX_GROUP = 64  # query heads that share a KV head
MAX_FLOAT32 = (128, 16)  # head size and group that still fit into registers without tensor cores
MAX_ROWS = 1024  # sequences of one extend step, whose starts a program reads at once
SMS = 132  # of an H100 or H200
MAX_SPLITS = 32  # beyond it the last program's reduction takes longer than the splits save


class Launch:
    """Compiler options of a launch."""

    def __init__(self, num_warps: int, num_stages: int = 3) -> None:
        self.num_warps = num_warps
        self.num_stages = num_stages

    def options(self) -> dict[str, int | bool]:
        """As keyword arguments; the last is the default, but newer compilers warn without it."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


class Attention:
    """Tiles of an attention kernel."""

    def __init__(self, block_m: int, block_n: int, launch: Launch) -> None:
        self.block_m = block_m  # packed rows: query tokens times the group
        self.block_n = block_n  # context tokens; a tile lies within one KV block
        self.launch = launch


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rows_of(width: int) -> tuple[int, int, Launch]:
    """Rows and columns of a tile for row-wise kernels that hold whole rows of ``width``."""
    columns = next_power_of_2(width)
    rows = max(1, 1024 // columns)
    return rows, columns, Launch(num_warps=min(max(rows * columns // 512, 1), 8))


def decode(head_dim: int, block_size: int, group: int, itemsize: int) -> Attention:
    """Decode attention. Tensor cores want 16 rows at least, so smaller groups are padded."""
    block_m = max(16, next_power_of_2(group))
    if itemsize == 4:
        return Attention(block_m, min(block_size, 16), Launch(num_warps=8, num_stages=2))
    block_n = min(block_size, 64 if head_dim <= 128 else 32)
    warps = 2 if head_dim <= 16 else 4 if head_dim <= 128 else 8
    return Attention(block_m, block_n, Launch(num_warps=warps))


def splits(rows: int, kv_heads: int) -> int:
    """Parts into which a long context is cut so that two programs an SM are busy."""
    wanted = 2 * SMS // max(rows * kv_heads, 1)
    return min(1 << max(wanted.bit_length() - 1, 0), MAX_SPLITS)


def extend(
    head_dim: int, block_size: int, group: int, itemsize: int, max_seqlen_q: int
) -> Attention:
    """Extend attention: large tiles for prompts, small ones for a few tokens a row."""
    narrowest = max(16, next_power_of_2(group))
    if itemsize == 4:
        return Attention(narrowest, min(block_size, 16), Launch(num_warps=8, num_stages=2))
    widest = 128 if head_dim <= 128 else 64
    block_m = max(min(next_power_of_2(max_seqlen_q * group), widest), narrowest)
    warps = 8 if block_m in (32, 128) or head_dim > 128 else 4  # at 32, four would spill
    block_n = min(block_size, 64 if head_dim <= 128 else 32)
    return Attention(block_m, block_n, Launch(num_warps=warps))


SAMPLE_TILE = 1024  # logits a program of the first sampling pass looks at
SAMPLE = Launch(num_warps=4)
FILTER_TILE = 1024  # logits a step of the threshold search looks at
FILTER = Launch(num_warps=16)
SILU_TILE = 1024
SILU = Launch(num_warps=4)
ROPE_HEADS = 8  # heads a program rotates
ROPE = Launch(num_warps=4)
STEP = Launch(num_warps=1)
