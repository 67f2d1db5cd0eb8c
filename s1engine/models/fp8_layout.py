"""Layouts of fp8 checkpoints: which are supported, and where their scales are.

Matrices of the layers are e4m3, each with a tensor of scales: one for each row, one for the whole
matrix, or one for each block. Matrices may also be in 16 bits. How a checkpoint wants activations
rounded is ignored. Opens no files.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s1engine.checks import shown
from s1engine.models.config_reader import ConfigReader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP8 = "fp8"  # the format's name, as in ops.quantization
_METHODS = ("fp8", "compressed-tensors")
_PER_STRATEGY = {"channel": "row", "tensor": "matrix"}


@dataclass(frozen=True, slots=True)
class Fp8Layout:
    """Scales of a matrix X.weight in e4m3."""

    suffix: str
    """Its scales are X.<suffix>."""
    per: str
    """One scale for each row, matrix or block."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns of a block."""

    def covers(self, name: str) -> bool:
        """May this tensor be in fp8? Embeddings and head may not."""
        return ".layers." in name and name.endswith("_proj.weight")

    def scales(self, name: str) -> str:
        """The tensor of scales of matrix ``name``."""
        return name.removesuffix("weight") + self.suffix

    def inputs(self, name: str) -> str:
        """The input scale of matrix ``name``, which is ignored."""
        return name.removesuffix("weight") + "input_scale"

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes that the scales of a matrix [N, K] may have."""
        rows, columns = shape
        if self.per == "row":
            return ((rows, 1), (rows,))
        if self.per == "matrix":
            return ((1,), ())
        return ((-(-rows // self.block[0]), -(-columns // self.block[1])),)

    def row_scales(self, scales: "Tensor", rows: int) -> "Tensor":
        """[N, 1] float32, for layouts with at most one scale a row."""
        assert self.per != "block"
        return scales.float().reshape(-1, 1).expand(rows, 1)

    def dequantize(self, values: "Tensor", scales: "Tensor", dtype: "torch.dtype") -> "Tensor":
        """e4m3 values [N, K] times their scales, in ``dtype``."""
        if self.per == "block":
            height, width = self.block
            wide = scales.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
            wide = wide[: values.shape[0], : values.shape[1]]
        else:
            wide = self.row_scales(scales, values.shape[0])
        return (values.float() * wide).to(dtype)


def parse_fp8(config: ConfigReader) -> Fp8Layout | None:
    """The layout that config.json describes; None: nothing is quantized. Raises ModelError."""
    if not config.get("quantization_config"):
        return None
    quantized = config.section("quantization_config")
    method = quantized.get("quant_method")
    if method not in _METHODS:
        raise quantized.error(
            "quant_method", f"{shown(method)} is not supported; supported: {', '.join(_METHODS)}"
        )
    return _plain(quantized) if method == "fp8" else _compressed_tensors(quantized)


def _plain(quantized: ConfigReader) -> Fp8Layout:
    """In blocks, as Qwen publishes it, or with a scale for each matrix."""
    _one_of(quantized, "fmt", (None, "e4m3"))
    block = quantized.get("weight_block_size")
    if block is None:
        return Fp8Layout("weight_scale", "matrix")
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        raise quantized.error("weight_block_size", f"must be two sizes; got {shown(block)}")
    return Fp8Layout("weight_scale_inv", "block", (block[0], block[1]))


def _compressed_tensors(quantized: ConfigReader) -> Fp8Layout:
    _one_of(quantized, "format", ("float-quantized",))
    for further in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantized.get(further):
            raise quantized.error(further, "is set: not supported")
    groups = quantized.section("config_groups")
    names = list(groups)
    if len(names) != 1:
        raise groups.error("", f"has {len(names)} groups; one is supported")
    group = groups.section(names[0])
    _one_of(group, "format", (None, "float-quantized"))
    weights = group.section("weights")
    for key, value in (("num_bits", 8), ("type", "float"), ("symmetric", True)):
        _one_of(weights, key, (value,))
    _one_of(weights, "strategy", tuple(_PER_STRATEGY))
    return Fp8Layout("weight_scale", _PER_STRATEGY[weights.get("strategy")])


def _one_of(fields: ConfigReader, key: str, supported: tuple[object, ...]) -> None:
    if fields.get(key) not in supported:
        names = ", ".join(str(value) for value in supported if value is not None)
        raise fields.error(key, f"{shown(fields.get(key))} is not supported; supported: {names}")
