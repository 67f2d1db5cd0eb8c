"""Tensor parallelism: which part of a model each rank holds, and how many ranks can share it.

Query and KV heads, the inner size of the MLP and the vocabulary are cut into as many parts as there
are ranks, in order. So q, k, v, gate, up, embedding and head lose rows, o and down lose columns,
and the ranks' results add up to the whole model's. Every rank holds all norms. Knows nothing of how
ranks communicate (collective.py).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_facts import ModelFacts

if TYPE_CHECKING:
    from torch import Tensor

PARAM = "tensor_parallel_size"
NOISE_IDS = 4  # one draw of the sampler's generator covers so many ids, all of one part


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``rank`` of ``size``."""

    rank: int
    size: int

    def config(self, model: ModelConfig) -> ModelConfig:
        """The part as a model of its own, so shapes and bytes follow from it as usual. Where there
        are fewer KV heads than ranks, several ranks hold the same one. The parts of the vocabulary
        are padded to a multiple of NOISE_IDS.

        Raises RequestError if so many ranks cannot share the model.
        """
        check_tensor_parallel(model, self.size)
        if self.size == 1:
            return model
        return replace(
            model,
            num_heads=model.num_heads // self.size,
            num_kv_heads=max(model.num_kv_heads // self.size, 1),
            intermediate_size=model.intermediate_size // self.size,
            vocab_size=-(-model.vocab_size // (self.size * NOISE_IDS)) * NOISE_IDS,
        )

    def cut(self, name: str, whole: "Tensor", shape: tuple[int, ...]) -> "Tensor":
        """A view of this rank's part of tensor ``name``. It has ``shape`` less rows that count as
        zeros: the padding of the vocabulary, and on all ranks but 0 a bias that is added after an
        all-reduce."""
        if name.endswith("o_proj.bias") and self.rank > 0:
            return whole[:0]
        for dim, (size, own) in enumerate(zip(whole.shape, shape, strict=True)):
            if own < size:
                start = min(self._part(name, size // own) * own, size)
                whole = whole.narrow(dim, start, min(own, size - start))
        return whole

    def _part(self, name: str, parts: int) -> int:
        """Index of this rank's part. Only k and v can have fewer parts than there are ranks."""
        replicated = ".k_proj." in name or ".v_proj." in name
        return self.rank * parts // self.size if replicated else self.rank


UNSHARDED = Shard(0, 1)


def check_tensor_parallel(model: ModelFacts, size: int) -> None:
    """Raises RequestError, with the sizes that would do, unless ``size`` ranks can share the
    model."""
    if size == 1:
        return
    if not isinstance(model, ModelConfig):
        raise RequestError(
            f"{PARAM} {size}: {model.architecture} is computed by transformers, which ranks cannot "
            "share; leave it out",
            param=PARAM,
        )
    if model.wide_qk_norm:
        raise RequestError(
            f"{PARAM} {size}: {model.architecture} norms the queries and keys of all heads at "
            "once, which ranks cannot share; leave it out",
            param=PARAM,
        )
    if not _can_share(model, size):
        sizes = ", ".join(map(str, tensor_parallel_sizes(model)))
        raise RequestError(
            f"{PARAM} {size} does not divide {model.num_heads} query heads, {model.num_kv_heads} "
            f"KV heads and inner size {model.intermediate_size} of the model; use one of {sizes}",
            param=PARAM,
        )


def tensor_parallel_sizes(model: ModelConfig, largest: int | None = None) -> list[int]:
    """Numbers of ranks that can share the model, ascending, up to ``largest``."""
    sizes = range(1, min(model.num_heads, largest or model.num_heads) + 1)
    return [size for size in sizes if _can_share(model, size)]


def _can_share(model: ModelConfig, size: int) -> bool:
    """KV heads are cut, or each is replicated on as many ranks."""
    kv = model.num_kv_heads
    return (
        (size == 1 or not model.wide_qk_norm)
        and model.num_heads % size == 0
        and (kv % size == 0 or size % kv == 0)
        and model.intermediate_size % size == 0
        and (size == 1 or max(size, NOISE_IDS + 1) <= model.vocab_size)
    )
