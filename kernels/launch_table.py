"""How each kernel is launched: one fixed table, no search at run time.

The first launch with a new configuration compiles, which takes too long inside a captured graph or
a request, so nothing here depends on a measurement at start. ``compile_report`` compiles every
entry ahead of time for sm_90; its table shows registers and memory. Knows shapes, not tensors.

float32 (``itemsize`` 4) is for comparisons: its products run outside the tensor cores and use small
tiles.
"""

from s1engine.kernels import pdl

HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
MAX_GROUP = 64  # query heads that share a KV head
MAX_FLOAT32 = (128, 16)  # head size and group that still fit into registers without tensor cores
MAX_BATCH_ROWS = 1024  # rows of a batch that one program reads at once
NUM_SMS = 132  # of an H100 or H200
MAX_DECODE_SPLITS = 32  # beyond it the last program's reduction takes longer than the splits save


class LaunchOptions:
    """Compiler options of a launch."""

    def __init__(self, num_warps: int, num_stages: int = 3) -> None:
        self.num_warps = num_warps
        self.num_stages = num_stages

    def kwargs(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch, the kernel's PDL included. enable_fp_fusion is the
        default; newer compilers warn if it is missing."""
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
        self.block_m = block_m  # queries: tokens times the group
        self.block_n = block_n  # context tokens; a tile lies within one KV block
        self.launch = launch


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def norm_tiles(width: int) -> tuple[int, int, LaunchOptions]:
    """Rows and columns of an RMSNorm's tile, which holds whole rows of ``width``."""
    columns = next_power_of_2(width)
    rows = max(1, 1024 // columns)
    return rows, columns, LaunchOptions(num_warps=min(max(rows * columns // 512, 1), 8))


def decode_tiles(
    head_dim: int, block_size: int, group: int, itemsize: int, windowed: bool = False
) -> AttentionTiles:
    """Tiles of paged_decode. Tensor cores need 16 queries, so smaller groups are padded; for 16,
    two warps are faster than four. With a window two would spill at a head size of 128."""
    block_m = max(16, next_power_of_2(group))
    if itemsize == 4:
        return AttentionTiles(block_m, min(block_size, 16), LaunchOptions(8, num_stages=2))
    block_n = min(block_size, 64 if head_dim <= 128 else 32)
    fits_two = block_m == 16 and (head_dim < 128 or not windowed)
    warps = 8 if head_dim > 128 else 2 if fits_two else 4
    return AttentionTiles(block_m, block_n, LaunchOptions(warps))


def decode_splits(rows: int, kv_heads: int) -> int:
    """Parts into which paged_decode cuts a long context to keep two programs an SM busy."""
    wanted = 2 * NUM_SMS // max(rows * kv_heads, 1)
    return min(1 << max(wanted.bit_length() - 1, 0), MAX_DECODE_SPLITS)


def prefill_tiles(
    head_dim: int, block_size: int, group: int, itemsize: int, kv_itemsize: int, max_seqlen_q: int,
    windowed: bool = False,
) -> AttentionTiles:  # fmt: skip
    """Tiles of paged_prefill: large for prompts, small for a few tokens a row. Where cached values
    are dequantized (``kv_itemsize`` below ``itemsize``), wider tiles spill in Triton 3.6."""
    narrowest = max(16, next_power_of_2(group))
    if itemsize == 4:
        return AttentionTiles(narrowest, min(block_size, 16), LaunchOptions(8, num_stages=2))
    most = 32 if windowed and head_dim > 128 and kv_itemsize < itemsize else 64
    block_m = max(min(next_power_of_2(max_seqlen_q * group), most), narrowest)
    warps = 8 if block_m == 32 or head_dim > 128 else 4  # at 32, four would spill
    block_n = min(block_size, 64 if head_dim <= 128 else 32)
    if head_dim > 128 and block_m == 64 and kv_itemsize < itemsize:
        block_n = 16
    return AttentionTiles(block_m, block_n, LaunchOptions(warps))


def padded_batch_rows(rows: int) -> int:
    """``rows`` of a batch rounded up to one of few sizes: each is a compilation of its own."""
    return next(size for size in (32, 256, MAX_BATCH_ROWS) if rows <= size)


MAX_CUDA_CORE_TOKENS = 2  # tokens that skinny_gemm multiplies without tensor cores
MAX_SKINNY_TOKENS = 64  # tokens for which skinny_gemm reads the weights once
SPLIT_K_WORKSPACE = (2 * NUM_SMS * 65 * 64, 4 * NUM_SMS)  # floats and counters of any launch

# Tiles of skinny_gemm on CUDA cores: rows of the weight, bytes of each at a time, warps, programs
# an SM; and on tensor cores, by padded tokens: BLOCK_N, BLOCK_K, warps, stages, programs an SM.
CUDA_CORE_TILES = (8, 1024, 4, 8)
TENSOR_CORE_TILES = {16: (64, 128, 4, 4, 2), 32: (64, 128, 4, 4, 2), 64: (128, 64, 8, 4, 1)}


class SkinnyTiles:
    """Tiles of a kernel built on ``skinny_gemm``; a program owns ``block_n`` rows of the weight."""

    def __init__(
        self, block_n: int, block_t: int, block_k: int, split_k: int, launch: LaunchOptions
    ) -> None:
        self.block_n = block_n
        self.block_t = block_t  # tokens, padded
        self.block_k = block_k
        self.split_k = split_k  # parts of K
        self.launch = launch

    @property
    def dot(self) -> bool:
        """Whether tensor cores multiply (``tl.dot``)."""
        return self.block_t > MAX_CUDA_CORE_TOKENS

    def kwargs(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_T": self.block_t,
            "BLOCK_K": self.block_k,
            "SPLIT_K": self.split_k,
            "DOT": self.dot,
            **self.launch.kwargs(),
        }


# Products left to cuBLAS, as (padded tokens, N, K).
CUBLAS_SHAPES: frozenset[tuple[int, int, int]] = frozenset()


def fits_skinny_gemm(tokens: int, n: int, k: int) -> bool:
    """Whether a kernel built on ``skinny_gemm`` multiplies a weight [N, K]; else cuBLAS does."""
    return 0 < tokens <= MAX_SKINNY_TOKENS and (_padded(tokens), n, k) not in CUBLAS_SHAPES


def _padded(tokens: int) -> int:
    """Tokens of a tile; tensor cores need 16."""
    least = 1 if tokens <= MAX_CUDA_CORE_TOKENS else 16
    return max(least, next_power_of_2(tokens))


def skinny_gemm_tiles(tokens: int, n: int, k: int, itemsize: int) -> SkinnyTiles:
    """Tiles for a weight [N, K] of ``itemsize`` bytes and up to MAX_SKINNY_TOKENS tokens.

    fp8 uses half the rows where a thread holds twice the columns of each, more stages to keep as
    many bytes in flight, and narrower tiles for 64 tokens, where wider ones would spill. float32 is
    multiplied outside the tensor cores.
    """
    assert 0 < tokens <= MAX_SKINNY_TOKENS
    padded = _padded(tokens)
    if tokens <= MAX_CUDA_CORE_TOKENS:
        block_n, nbytes, warps, programs = CUDA_CORE_TILES
        block_k = min(nbytes // itemsize, max(next_power_of_2(k), 64))
        block_n, stages = (block_n if itemsize > 1 else block_n // 2), 3
    elif itemsize == 4:
        block_n, block_k, warps, stages, programs = 16, 32, 4, 4, 2
    elif itemsize == 1:
        block_k = 64 if padded == MAX_SKINNY_TOKENS else 128
        block_n, warps, stages, programs = 64, 4, 6, 2
    else:
        block_n, block_k, warps, stages, programs = TENSOR_CORE_TILES[padded]
    return split_k_tiles(n, k, block_n, padded, block_k, programs, LaunchOptions(warps, stages))


def split_k_tiles(
    n: int, k: int, block_n: int, block_t: int, block_k: int, programs: int, launch: LaunchOptions
) -> SkinnyTiles:
    """K in as many parts as give ``programs`` programs an SM at most, within SPLIT_K_WORKSPACE."""
    programs = min(programs * NUM_SMS, SPLIT_K_WORKSPACE[0] // ((block_n + 1) * block_t))
    split_k = _split_count(cdiv(n, block_n), cdiv(k, block_k), programs)
    return SkinnyTiles(block_n, block_t, block_k, split_k, launch)


def _split_count(tiles: int, blocks: int, programs: int) -> int:
    """Parts of at least two blocks, none empty, that give up to ``programs`` programs."""
    parts = max(min(programs // tiles, cdiv(blocks, 2), 8), 1)
    return cdiv(blocks, cdiv(blocks, parts))


def head_tiles(tokens: int, k: int, itemsize: int) -> SkinnyTiles:
    """Tiles of the LM head, which has so many rows that K is not split."""
    tiles = skinny_gemm_tiles(tokens, 2**20, k, itemsize)
    assert tiles.split_k == 1
    return tiles


BEST_TILE = LaunchOptions(8)  # of the tiles of the head
SAMPLE_TILE = 1024  # logits of a program of the first sampling pass
SAMPLE = LaunchOptions(4)
FILTER_TILE = 1024  # logits of an iteration of the threshold search
FILTER = LaunchOptions(16)
SILU_TILE = 1024
SILU = LaunchOptions(4)
ROPE_HEADS = 8  # heads that a program rotates
ROPE = LaunchOptions(4)


def budget_step_launch(padded_rows: int) -> LaunchOptions:
    """One warp holds 128 rows; with more, rows a warp are halved, since 256 in one would spill."""
    return LaunchOptions(1 if padded_rows <= 128 else padded_rows // 64)


def all_reduce_tile(width: int) -> tuple[int, LaunchOptions]:
    """Columns of a program, which owns a row of ``width``."""
    columns = next_power_of_2(width)
    return columns, LaunchOptions(max(min(columns // 512, 16), 1))
