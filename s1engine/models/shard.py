"""Which part of a model a rank holds, if several share one: the only place that knows.

Query and KV heads, the inner size of the MLP and the vocabulary are cut into as many parts as there
are ranks, in order. So q, k, v, gate, up, embeddings and head lose rows, o and down lose columns,
and what a rank computes with its part is a summand of what the whole would give. Norms are whole
everywhere. Knows nothing of how ranks speak to each other.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig

PARAM = "tensor_parallel_size"


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``rank`` of ``size``."""

    rank: int
    size: int

    def config(self, model: ModelConfig) -> ModelConfig:
        """The part as a model of its own, so that its shapes and bytes follow as ever. KV heads of
        which there are fewer than ranks are held by several; the vocabulary is padded.

        Raises RequestError if the model cannot be cut so.
        """
        check(model, self.size)
        return replace(
            model,
            num_heads=model.num_heads // self.size,
            num_kv_heads=max(model.num_kv_heads // self.size, 1),
            intermediate_size=model.intermediate_size // self.size,
            vocab_size=-(-model.vocab_size // self.size),
        )

    def cut(self, name: str, whole: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A view of what this rank holds of tensor ``name``, whose part has that ``shape`` but for
        rows that do not exist and count as zeros: the padding of the vocabulary, and a bias that
        follows a sum over ranks, which is the first rank's alone."""
        if name.endswith("o_proj.bias") and self.rank > 0:
            return whole[:0]
        for dim, (size, own) in enumerate(zip(whole.shape, shape, strict=True)):
            if own < size:
                start = min(self._part(name, size // own) * own, size)
                whole = whole.narrow(dim, start, min(own, size - start))
        return whole

    def _part(self, name: str, parts: int) -> int:
        """Number of the part; only of k and v may there be fewer parts than ranks."""
        shared = ".k_proj." in name or ".v_proj." in name
        return self.rank * parts // self.size if shared else self.rank


UNSHARDED = Shard(0, 1)


def check(model: ModelConfig, size: int) -> None:
    """Raise RequestError, with the sizes that do, unless ``size`` ranks can share the model."""
    if not _divides(model, size):
        fitting = [n for n in range(1, model.num_heads + 1) if _divides(model, n)]
        raise RequestError(
            f"{PARAM} {size} does not divide {model.num_heads} query heads, {model.num_kv_heads} "
            f"KV heads and inner size {model.intermediate_size} of the model; use one of "
            f"{', '.join(map(str, fitting))}",
            param=PARAM,
        )


def _divides(model: ModelConfig, size: int) -> bool:
    kv = model.num_kv_heads
    return (
        model.num_heads % size == 0
        and (kv % size == 0 or size % kv == 0)
        and model.intermediate_size % size == 0
        and size <= model.vocab_size
    )
