"""From a model's files to a Decoder on a device. Owns how checkpoint tensors become weights.

q, k and v become one matrix, gate and up another. Each is copied straight from the memory-mapped
file to its place, so loading needs no second copy of the model. A rank reads its own part only.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s1engine.models.checkpoint import StoredWeights, open_weights
from s1engine.models.collective import Collective
from s1engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from s1engine.models.families import NORM_NAMES
from s1engine.models.model_config import EMBED, LM_HEAD, ModelConfig
from s1engine.models.shard import UNSHARDED, Shard
from s1engine.models.tensor_names import (
    StoredRows,
    head_names,
    is_other_part,
    stored_shapes,
    tensor_sources,
)
from s1engine.ops import Matrix, Ops
from s1engine.ops.quantization import FP8, HEAD_FORMATS, QuantizedMatrix, quantize
from s1engine.progress import ProgressBar, progress_bar

_IN_PAIRS = re.compile(r"\.[qk]_(proj|norm)\.")  # tensors of heads that are rotated


def load_decoder(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: str,
    ops: Ops,
    progress: bool = False,
    max_positions: int | None = None,
    quantization: str | None = None,
    collective: Collective | None = None,
) -> Decoder:
    """The model of directory or file ``path`` in ``dtype``; ``progress`` draws a bar on stderr.

    ``max_positions`` and ``collective`` as for Decoder; ``config`` is the whole model's.
    ``quantization``: format of the matrices (``ops.quantization``), None: the checkpoint's own.
    """
    shard = UNSHARDED if collective is None else collective.shard
    own = shard.config(config)
    checkpoint = open_weights(path)
    sources = tensor_sources(config, checkpoint)
    _check_tensors(checkpoint, config, sources)
    total = own.num_parameters * dtype.itemsize
    with progress_bar(
        progress,
        total=total,
        desc=f"loading {path.name}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
    ) as bar:
        reader = _Reader(checkpoint, sources, config, own, dtype, device, bar, shard)
        weights = _weights(reader, own, _Packer(ops, config.quantization(quantization)))
        return Decoder(own, weights, ops, max_positions, collective)


class _Reader:
    """Copies checkpoint tensors to the device in the model's dtype."""

    def __init__(
        self,
        checkpoint: StoredWeights,
        sources: dict[str, StoredRows],
        whole: ModelConfig,
        config: ModelConfig,
        dtype: torch.dtype,
        device: str,
        bar: ProgressBar,
        shard: Shard = UNSHARDED,
    ) -> None:
        self._checkpoint = checkpoint
        self._sources = sources
        self._whole_shapes = whole.tensor_shapes()
        self._shapes = config.tensor_shapes()
        self._pair_order = _pair_order(config)
        self._norm_offset = config.norm_offset
        self._last: tuple[str, Tensor] | None = None
        self._fp8 = config.fp8
        self._dtype = dtype
        self._device = device
        self._bar = bar
        self._shard = shard

    def read(self, *names: str) -> Tensor:
        """The tensors ``names``, concatenated by rows."""
        rows = [self._shapes[name][0] for name in names]
        columns = self._shapes[names[0]][1:]
        out = torch.empty((sum(rows), *columns), dtype=self._dtype, device=self._device)
        for name, part in zip(names, torch.split(out, rows), strict=True):
            stored = self._arrange(name, self._plain(name), tuple(part.shape))
            part[: len(stored)].copy_(stored)
            part[len(stored) :].zero_()
            if not _is_finite(part):
                why = "does not fit float16; use bfloat16 or float32"
                if self._dtype != torch.float16 or not stored.isfinite().all():
                    why = "holds NaN or infinity"
                raise self._checkpoint.error(self._sources[name].name, why)
            self._bar.update(part.nbytes)
        return out

    def read_matrix(self, *names: str) -> Tensor | QuantizedMatrix:
        """The same, kept in fp8 if they are stored so with at most one scale a row."""
        fp8 = self._fp8
        stored_names = [self._sources[name].name for name in names]
        if fp8 is None or fp8.per == "block" or not all(map(self._checkpoint.is_fp8, stored_names)):
            return self.read(*names)
        rows = [self._shapes[name][0] for name in names]
        size = (sum(rows), self._shapes[names[0]][1])
        values = torch.empty(size, dtype=torch.float8_e4m3fn, device=self._device)
        scales = torch.empty((size[0], 1), dtype=torch.float32, device=self._device)
        parts = zip(names, torch.split(values, rows), torch.split(scales, rows), strict=True)
        for name, part, scale in parts:
            source = self._sources[name]
            stored = self._stored(source.name)
            of_rows = fp8.row_scales(self._checkpoint.read(fp8.scales(source.name)), len(stored))
            part.copy_(self._arrange(name, self._rows(name, stored), tuple(part.shape)))
            if not of_rows.isfinite().all() or bool((part.view(torch.int8) & 127 == 127).any()):
                raise self._checkpoint.error(source.name, "holds NaN or infinity")
            scale.copy_(self._arrange(name, self._rows(name, of_rows), tuple(scale.shape)))
            self._bar.update(part.numel() * self._dtype.itemsize)
        return QuantizedMatrix(FP8, values, scales, self._dtype)

    def _plain(self, name: str) -> Tensor:
        """A tensor as it is stored; fp8 is dequantized."""
        source = self._sources[name].name
        stored = self._stored(source)
        if self._fp8 is not None and self._checkpoint.is_fp8(source):
            scales = self._checkpoint.read(self._fp8.scales(source))
            stored = self._fp8.dequantize(stored, scales, self._dtype)
        stored = self._rows(name, stored)
        if self._norm_offset and name.endswith("norm.weight"):
            return stored.float() + self._norm_offset
        return stored

    def _stored(self, source: str) -> Tensor:
        """A tensor of the checkpoint. The last one is kept: it may hold the next tensors too."""
        if self._last is None or self._last[0] != source:
            self._last = source, self._checkpoint.read(source)
        return self._last[1]

    def _rows(self, name: str, stored: Tensor) -> Tensor:
        """The rows of tensor ``name`` in the checkpoint's tensor that holds it."""
        return stored.narrow(0, self._sources[name].first, self._whole_shapes[name][0])

    def _arrange(self, name: str, whole: Tensor, shape: tuple[int, ...]) -> Tensor:
        """This rank's part, the dimensions of query and key heads in our order."""
        part = self._shard.cut(name, whole, shape)
        if self._pair_order is None or not _IN_PAIRS.search(name):
            return part
        heads: Tensor = part.unflatten(0, (-1, len(self._pair_order)))
        return heads[:, self._pair_order].flatten(0, 1)


def _is_finite(values: Tensor) -> bool:
    """Is none of them NaN or infinity? The extremes show either, faster than comparing each."""
    lowest, highest = values.aminmax()
    return bool(lowest.isfinite() & highest.isfinite())


@dataclass(frozen=True, slots=True)
class _Packer:
    """Packs matrices for the device, quantized if asked for."""

    ops: Ops
    quantization: str | None

    def layer(self, weight: Tensor | QuantizedMatrix) -> Matrix:
        return self._pack(weight, self.quantization)

    def head(self, weight: Tensor) -> Matrix:
        """Head and tied embeddings, which few bits harm most."""
        return self._pack(weight, HEAD_FORMATS.get(self.quantization or "", self.quantization))

    def _pack(self, weight: Tensor | QuantizedMatrix, fmt: str | None) -> Matrix:
        if isinstance(weight, QuantizedMatrix):
            if weight.format == fmt:
                return self.ops.pack(weight)
            weight = weight.dequantize()
        return self.ops.pack(weight if fmt is None else quantize(weight, fmt))


def _weights(
    reader: "_Reader | _RandomReader", config: ModelConfig, pack: _Packer
) -> DecoderWeights:
    embed = reader.read(EMBED)
    head = pack.head(embed if config.tie_word_embeddings else reader.read(LM_HEAD))
    if config.tie_word_embeddings:
        del embed  # the packed one serves both
    return DecoderWeights(
        embed=head if config.tie_word_embeddings else embed,
        layers=tuple(_layer(reader, config, index, pack) for index in range(config.num_layers)),
        norm=reader.read("model.norm.weight"),
        lm_head=head,
    )


def _layer(
    reader: "_Reader | _RandomReader", config: ModelConfig, index: int, pack: _Packer
) -> LayerWeights:
    layer = f"model.layers.{index}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    has_qk_norm = config.qk_norm or config.wide_qk_norm
    qkv = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
    return LayerWeights(
        qkv=pack.layer(reader.read_matrix(*(name + ".weight" for name in qkv))),
        qkv_bias=reader.read(*(name + ".bias" for name in qkv)) if config.qkv_bias else None,
        q_norm=reader.read(attention + "q_norm.weight") if has_qk_norm else None,
        k_norm=reader.read(attention + "k_norm.weight") if has_qk_norm else None,
        o=pack.layer(reader.read_matrix(attention + "o_proj.weight")),
        o_bias=reader.read(attention + "o_proj.bias") if config.o_bias else None,
        sinks=reader.read(attention + "sinks").float() if config.attention_sinks else None,
        gate_up=pack.layer(reader.read_matrix(mlp + "gate_proj.weight", mlp + "up_proj.weight")),
        down=pack.layer(reader.read_matrix(mlp + "down_proj.weight")),
        **{field: reader.read(layer + name) for field, name in NORM_NAMES[config.norms].items()},
    )


def _pair_order(config: ModelConfig) -> list[int] | None:
    """Order of the dimensions of query and key heads; None: the checkpoint's."""
    return None if config.rope.partial == 1.0 else config.rope.pair_order(config.head_dim)


def _check_tensors(
    checkpoint: StoredWeights, config: ModelConfig, sources: dict[str, StoredRows]
) -> None:
    """Raises ModelError unless the checkpoint holds the model's tensors and no others. A tied head
    may be there if it equals the embeddings."""
    tied: tuple[str, ...] = ()
    if config.tie_word_embeddings:
        tied = tuple(name for name in head_names(config) if name in checkpoint)
    checkpoint.check(
        stored_shapes(config, sources),
        lambda name: name in tied or is_other_part(config, name),
        config.fp8,
    )
    for head in tied:
        if not torch.equal(checkpoint.read(head), checkpoint.read(sources[EMBED].name)):
            raise checkpoint.error(head, "differs from the embeddings that config.json ties to it")


def random_decoder(
    config: ModelConfig,
    dtype: torch.dtype,
    device: str,
    ops: Ops,
    *,
    seed: int = 0,
    max_positions: int | None = None,
    quantization: str | None = None,
) -> Decoder:
    """A model of these shapes with normal weights of deviation 0.02, generated on the device; for
    measurements."""
    generator = torch.Generator(device).manual_seed(seed)
    reader = _RandomReader(config.tensor_shapes(), dtype, device, generator)
    return Decoder(config, _weights(reader, config, _Packer(ops, quantization)), ops, max_positions)


@dataclass(frozen=True, slots=True)
class _RandomReader:
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: str
    generator: torch.Generator

    def read(self, *names: str) -> Tensor:
        rows = sum(self.shapes[name][0] for name in names)
        size = (rows, *self.shapes[names[0]][1:])
        out = torch.empty(size, dtype=self.dtype, device=self.device)
        if len(size) == 1 and names[0].endswith("weight"):  # a norm
            return out.fill_(1)
        return out.normal_(0, 0.02, generator=self.generator)

    def read_matrix(self, *names: str) -> Tensor:
        return self.read(*names)
