"""How each kernel is launched: one fixed table, no search at run time.

A first launch with a new configuration compiles, which a captured graph and a waiting request
cannot afford, so nothing here depends on a measurement at start. Every entry is compiled ahead of
time for sm_90 by ``kernels/compile_report.py``; what the entries cost there is in its table. Knows
shapes, not tensors.

float32 (``itemsize`` 4) is there to be compared with, not to be fast: its products run outside the
tensor cores and take small tiles.
"""

from s1engine.kernels import pdl

HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
MAX_GROUP = 64  # query heads that share a KV head
MAX_FLOAT32 = (128, 16)  # head size and group that still fit into registers without tensor cores
MAX_BATCH_ROWS = 1024  # sequences of one extend step, whose starts a program reads at once
NUM_SMS = 132  # of an H100 or H200
MAX_DECODE_SPLITS = 32  # beyond it the last program's reduction takes longer than the splits save


class LaunchOptions:
    """Compiler options of a launch."""

    def __init__(self, num_warps: int, num_stages: int = 3) -> None:
        self.num_warps = num_warps
        self.num_stages = num_stages

    def options(self) -> dict[str, int | bool]:
        """As keyword arguments, the kernel's PDL among them; newer compilers warn without
        enable_fp_fusion, which is the default."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            "PDL": pdl.available(),
            **({"launch_pdl": True} if pdl.available() else {}),
        }


class AttentionTiles:
    """Tiles of an attention kernel."""

    def __init__(self, block_m: int, block_n: int, launch: LaunchOptions) -> None:
        self.block_m = block_m  # packed rows: query tokens times the group
        self.block_n = block_n  # context tokens; a tile lies within one KV block
        self.launch = launch


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def norm_tiles(width: int) -> tuple[int, int, LaunchOptions]:
    """Rows and columns of a tile for row-wise kernels that hold whole rows of ``width``."""
    columns = next_power_of_2(width)
    rows = max(1, 1024 // columns)
    return rows, columns, LaunchOptions(num_warps=min(max(rows * columns // 512, 1), 8))


def decode_tiles(head_dim: int, block_size: int, group: int, itemsize: int) -> AttentionTiles:
    """Decode attention. Tensor cores want 16 rows at least, so smaller groups are padded; so few
    are done sooner by two warps than by four."""
    block_m = max(16, next_power_of_2(group))
    if itemsize == 4:
        return AttentionTiles(
            block_m, min(block_size, 16), LaunchOptions(num_warps=8, num_stages=2)
        )
    block_n = min(block_size, 64 if head_dim <= 128 else 32)
    warps = 8 if head_dim > 128 else 2 if block_m == 16 else 4
    return AttentionTiles(block_m, block_n, LaunchOptions(num_warps=warps))


def decode_splits(rows: int, kv_heads: int) -> int:
    """Parts into which a long context is cut so that two programs an SM are busy."""
    wanted = 2 * NUM_SMS // max(rows * kv_heads, 1)
    return min(1 << max(wanted.bit_length() - 1, 0), MAX_DECODE_SPLITS)


def prefill_tiles(
    head_dim: int, block_size: int, group: int, itemsize: int, stored: int, max_seqlen_q: int
) -> AttentionTiles:
    """Extend attention: large tiles for prompts, small ones for a few tokens a row. Cached values
    take ``stored`` bytes: where they are converted on the way, Triton 3.6 spills at wider tiles."""
    narrowest = max(16, next_power_of_2(group))
    if itemsize == 4:
        return AttentionTiles(
            narrowest, min(block_size, 16), LaunchOptions(num_warps=8, num_stages=2)
        )
    block_m = max(min(next_power_of_2(max_seqlen_q * group), 64), narrowest)
    warps = 8 if block_m == 32 or head_dim > 128 else 4  # at 32, four would spill
    block_n = min(block_size, 64 if head_dim <= 128 else 32)
    if head_dim > 128 and block_m == 64 and stored < itemsize:
        block_n = 16
    return AttentionTiles(block_m, block_n, LaunchOptions(num_warps=warps))


def padded_batch_rows(rows: int) -> int:
    """Rows whose starts a program of extend attention reads: few different numbers, since each is
    a compilation of its own."""
    return next(most for most in (32, 256, MAX_BATCH_ROWS) if rows <= most)


MAX_CUDA_CORE_TOKENS = 2  # rows of a step that the small linears multiply without tensor cores
MAX_SKINNY_TOKENS = 64  # rows of a step for which weights are read once by the small linears
SPLIT_K_WORKSPACE = (
    2 * NUM_SMS * 65 * 64,
    4 * NUM_SMS,
)  # floats and counters that no launch exceeds

# Tiles of the small linears: rows of the weights, bytes of each at a time, warps, programs an SM;
# and by the tokens that these are padded to: rows, columns, warps, stages, programs an SM.
CUDA_CORE_TILES = (8, 1024, 4, 8)
TENSOR_CORE_TILES = {16: (64, 128, 4, 4, 2), 32: (64, 128, 4, 4, 2), 64: (128, 64, 8, 4, 1)}


class SkinnyTiles:
    """Tiles of a linear layer for few rows; a program owns ``rows`` rows of the weights."""

    def __init__(
        self, rows: int, tokens: int, block_k: int, splits: int, launch: LaunchOptions
    ) -> None:
        self.rows = rows
        self.tokens = tokens  # the rows of the step, padded
        self.block_k = block_k
        self.splits = splits  # parts of K
        self.launch = launch

    @property
    def dot(self) -> bool:
        """On tensor cores?"""
        return self.tokens > MAX_CUDA_CORE_TOKENS

    def options(self) -> dict[str, int | bool]:
        """As keyword arguments of a launch."""
        return {
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "BLOCK_K": self.block_k,
            "SPLITS": self.splits,
            "DOT": self.dot,
            **self.launch.options(),
        }


# Products left to cuBLAS, as (tokens padded as in ``linear``, n, k).
CUBLAS_SHAPES: frozenset[tuple[int, int, int]] = frozenset()


def fits_skinny_gemm(tokens: int, n: int, k: int) -> bool:
    """Are weights [n, k] multiplied by the kernels built on ``skinny_gemm``, or by cuBLAS?"""
    return 0 < tokens <= MAX_SKINNY_TOKENS and (_padded(tokens), n, k) not in CUBLAS_SHAPES


def _padded(tokens: int) -> int:
    """Tensor cores want 16 at least."""
    return (
        next_power_of_2(tokens)
        if tokens <= MAX_CUDA_CORE_TOKENS
        else max(16, next_power_of_2(tokens))
    )


def skinny_gemm_tiles(tokens: int, n: int, k: int, itemsize: int) -> SkinnyTiles:
    """Weights [n, k] of ``itemsize`` bytes times up to MAX_SKINNY_TOKENS vectors.

    fp8 takes half the rows where a thread holds twice the columns of each, more stages, so that as
    many bytes are on their way, and narrower tiles beside 64 vectors, where wider would spill.
    float32 is multiplied outside the tensor cores.
    """
    assert 0 < tokens <= MAX_SKINNY_TOKENS
    padded = _padded(tokens)
    if tokens <= MAX_CUDA_CORE_TOKENS:
        rows, nbytes, warps, programs = CUDA_CORE_TILES
        block_k = min(nbytes // itemsize, max(next_power_of_2(k), 64))
        rows, stages = (rows if itemsize > 1 else rows // 2), 3
    elif itemsize == 4:
        rows, block_k, warps, stages, programs = 16, 32, 4, 4, 2
    elif itemsize == 1:
        block_k = 64 if padded == MAX_SKINNY_TOKENS else 128
        rows, warps, stages, programs = 64, 4, 6, 2
    else:
        rows, block_k, warps, stages, programs = TENSOR_CORE_TILES[padded]
    return split_k_tiles(n, k, rows, padded, block_k, programs, LaunchOptions(warps, stages))


def split_k_tiles(
    n: int, k: int, rows: int, padded: int, block_k: int, programs: int, launch: LaunchOptions
) -> SkinnyTiles:
    """K in as many parts as make up to ``programs`` programs an SM, within SPLIT_K_WORKSPACE."""
    programs = min(programs * NUM_SMS, SPLIT_K_WORKSPACE[0] // ((rows + 1) * padded))
    splits = _parts(cdiv(n, rows), cdiv(k, block_k), programs)
    return SkinnyTiles(rows, padded, block_k, splits, launch)


def head_tiles(tokens: int, k: int, itemsize: int) -> SkinnyTiles:
    """The language model's head: so many rows that K is not split."""
    tiles = skinny_gemm_tiles(tokens, 2**20, k, itemsize)
    assert tiles.splits == 1
    return tiles


BEST_TILE = LaunchOptions(num_warps=8)  # of the tiles of the head


def _parts(tiles: int, blocks: int, programs: int) -> int:
    """Parts of two blocks at least, none of them empty, that make up to ``programs`` programs."""
    parts = max(min(programs // tiles, cdiv(blocks, 2), 8), 1)
    return cdiv(blocks, cdiv(blocks, parts))


SAMPLE_TILE = 1024  # logits a program of the first sampling pass looks at
SAMPLE = LaunchOptions(num_warps=4)
FILTER_TILE = 1024  # logits a step of the threshold search looks at
FILTER = LaunchOptions(num_warps=16)
SILU_TILE = 1024
SILU = LaunchOptions(num_warps=4)
ROPE_HEADS = 8  # heads a program rotates
ROPE = LaunchOptions(num_warps=4)
BUDGET_STEP = LaunchOptions(num_warps=1)
