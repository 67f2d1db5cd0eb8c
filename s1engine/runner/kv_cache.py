"""The memory behind the KV blocks: one K and one V tensor a layer.

Owns tensors only. The BlockManager (csrc/core) decides which sequence has which block. On the CPU
the memory is reserved at start, and the kernel adds pages as blocks are written.
"""

import ctypes
import mmap

import torch
from torch import Tensor

from s1engine.models.model_facts import ModelFacts
from s1engine.ops.kv_quant import stored_dim

ALIGNMENT = 64  # bytes, of each tensor


class KVCache:
    """K and V of every layer, each [num_blocks, num_kv_heads, block_size, stored_dim] in ``dtype``,
    which is the model's or one of 8 bits (ops/kv_quant).

    Zero at first: a kernel may read unused slots of a block, and NaN there would survive a mask.
    """

    def __init__(
        self,
        config: ModelFacts,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        row = stored_dim(config.head_dim, dtype)
        shape = (num_blocks, config.num_kv_heads, block_size, row)
        nbytes = num_blocks * config.num_kv_heads * block_size * row * dtype.itemsize
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reserved_bytes = 2 * config.num_layers * nbytes
        """Bytes of all tensors together."""
        memory = _Memory(2 * config.num_layers, nbytes) if device == "cpu" else None

        def allocate() -> Tensor:
            if memory is None:
                return torch.zeros(shape, dtype=dtype, device=device)
            return memory.next().view(dtype).view(shape)

        self.layers: list[tuple[Tensor, Tensor]] = [
            (allocate(), allocate()) for _ in range(config.num_layers)
        ]

    @property
    def num_tokens(self) -> int:
        """Capacity of all blocks together."""
        return self.num_blocks * self.block_size

    def summary(self) -> str:
        """One line: capacity, reserved and resident memory."""
        reserved, resident = self.reserved_bytes / 2**20, self.resident_bytes / 2**20
        tokens = f"{self.num_tokens:,} tokens"
        return f"{tokens}, {reserved:,.0f} MiB reserved, {resident:,.0f} MiB resident"

    @property
    def resident_bytes(self) -> int:
        """Bytes that occupy main memory now; on a GPU, all are there from the start."""
        if not self.layers or self.layers[0][0].device.type != "cpu":
            return self.reserved_bytes
        tensors = [tensor for pair in self.layers for tensor in pair]
        begin = min(tensor.data_ptr() for tensor in tensors)
        end = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
        return _resident(begin, end - begin)


class _Memory:
    """One anonymous mapping, cut into equal parts. It is zero, and a page occupies memory from its
    first write on. It ends with the last tensor in it."""

    def __init__(self, parts: int, nbytes: int) -> None:
        self._nbytes = nbytes
        self._stride = -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._next = 0
        size = max(parts * self._stride, 1)
        # NORESERVE: the reservation may exceed what the kernel would promise.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, size, flags=flags)

    def next(self) -> Tensor:
        """[nbytes] uint8, the next part."""
        begin, self._next = self._next, self._next + self._stride
        return torch.frombuffer(self._map, dtype=torch.uint8, count=self._nbytes, offset=begin)


def _resident(address: int, nbytes: int) -> int:
    """How many bytes from ``address`` on, in whole pages, are in main memory."""
    page = mmap.PAGESIZE
    begin = address // page * page
    pages = -(-(address + nbytes - begin) // page)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(pages * page), found):
        raise OSError(ctypes.get_errno(), "mincore")
    return (pages - bytes(found).count(0)) * page
