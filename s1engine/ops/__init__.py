"""The seam between devices: one set of operations, several implementations.

``torch_ops`` is the definition and the oracle, ``cpu_ops`` runs the C++ kernels of ``csrc/cpu``,
``triton_ops`` the Triton kernels. The decoder calls them through ``Ops`` and does not know its
device. The runner does: it chooses data types, block size and memory, and how steps are recorded.

Shapes: T tokens and B sequences (rows of the batch) of a step, Hq/Hkv query/KV heads, D head size,
S block size, V vocabulary, H hidden, F intermediate, N/K rows and columns of a weight. A KV cache
is [num_blocks, Hkv, S, D] in the model's type; ``kv_quant`` defines it in int8 and fp8.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops.packed import PackedMatrix
from s1engine.ops.quantization import QuantizedMatrix

Activation: TypeAlias = Literal["silu", "gelu_tanh"]

Matrix: TypeAlias = Tensor | QuantizedMatrix | PackedMatrix
"""A weight [N, K] as the device's ``pack`` returns it; ``matrix[:n]`` are the first rows."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The tokens of one step. Row b owns tokens cu_seqlens_q[b]:cu_seqlens_q[b+1]; they are the
    last ones of a context of context_lens[b] tokens, which implies causal masking."""

    positions: Tensor  # [T] int32, position of each token in its sequence
    slot_mapping: Tensor  # [T] int64, block_id * S + offset where the token's K and V go
    cu_seqlens_q: Tensor  # [B + 1] int32, first token of each row
    context_lens: Tensor  # [B] int32, tokens of the row in the cache after this step
    block_table: Tensor  # [B, max_blocks] int32, entries beyond a row's context are undefined
    max_seqlen_q: int  # longest row; 1 means every row decodes
    num_decode_rows: int = 0  # so many rows at the beginning have one token each; may be too low


@dataclass(frozen=True, slots=True)
class Penalties:
    """Inputs of the three penalties; rows without any carry neutral values."""

    repetition: Tensor  # [B] float32
    presence: Tensor  # [B] float32
    frequency: Tensor  # [B] float32
    in_prompt: Tensor  # [B, V] bool
    output_counts: Tensor  # [B, V] int32


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """How to sample one token for each of B rows. None fields: no row needs the rule."""

    temperature: Tensor  # [B] float32, 0 is greedy
    top_k: Tensor  # [B] int32, 0 keeps all
    top_p: Tensor  # [B] float32, 1 keeps all
    min_p: Tensor  # [B] float32, 0 keeps all
    seeds: Tensor  # [B] int64, the 64-bit Philox key
    positions: Tensor  # [B] int64, index in its sequence of the token to sample: the counter
    all_greedy: bool  # every temperature is 0: plain argmax
    filtered: bool  # some row uses top_k, top_p or min_p
    penalties: Penalties | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None  # rows int64, ids int64, values float32
    banned: tuple[Tensor, Tensor] | None = None  # rows int64, ids int64: never sampled


@dataclass(frozen=True, slots=True)
class EndTensors:
    """The end matcher of csrc/core/end_matcher.hpp."""

    next_state: Tensor  # [states, V] uint8; from END_COMPLETE on a marker is complete
    depths: Tensor  # [states] int32, bytes of a marker that a state has matched
    token_lens: Tensor  # [V] uint8, bytes of a token, 1 to 31


@dataclass(frozen=True, slots=True)
class DeviceBatchTensors:
    """What the device needs to run decode steps of B rows without the host: the rows (``fields``,
    ``phrases``, written by ``Scheduler.begin_multi_step``), how they sample, and where the sampled
    ids go. A step reads it and prepares it for the next step."""

    fields: Tensor  # [len(ROW_FIELDS), B] int32
    phrases: Tensor  # int32, phrases and stop tokens of all rows
    slot_mapping: Tensor  # [B] int64
    sample_positions: Tensor  # [B] int64
    block_table: Tensor  # [B, max_blocks] int32, with the block of the next position
    temperature: Tensor  # [B] float32; this and the next four as in SamplingMetadata
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    triggers: Tensor  # [n] int32, ids that end thinking
    newlines: Tensor  # [V] uint8, 1 where the token's text ends in a newline
    output_tokens: Tensor  # [steps, B] int32, a ring of sampled ids; NO_TOKEN where none counted
    step_counter: Tensor  # [1] int32, steps so far; modulo `steps` the next row of output_tokens
    block_size: int
    null_slot: int  # where rows that have finished write
    ends: EndTensors | None = None  # of a format with end markers of several tokens

    def field(self, name: str) -> Tensor:
        """A field of every row, [B] int32, as a view."""
        return self.fields[_core.ROW_FIELDS.index(name)]


class Ops(Protocol):
    """The operations of a device. Arguments ``*_cache`` and ``residual`` are written in place.

    ``residual`` [T, H] is the sum that runs through the layers. ``pending_residual`` [T, H] is what
    the previous operation left to be added to it, or None: see ``linear_residual``.
    """

    name: str

    def check_model(
        self,
        *,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        quantization: str | None = None,
    ) -> None:
        """Raises RequestError, with a list of what is covered, for a model that is not."""

    def pack(self, weight: Tensor | QuantizedMatrix) -> Matrix:
        """weight [N, K] in the device's layout; called once, when a model is loaded."""

    def embed(self, ids: Tensor, weight: Matrix) -> Tensor:
        """Rows ``ids`` [T] int32 of weight [V, H] -> [T, H], which the caller may overwrite."""

    def embed_shard(self, ids: Tensor, weight: Matrix, first: int) -> Tensor:
        """The same for a shard of the vocabulary that starts at id ``first``; zeros for other
        ids."""

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` [n] int32 of x [T, H] -> [n, H]."""

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        """x [T, K] times weight [N, K] transposed, plus bias [N] -> [T, N]."""

    def logits(self, hidden: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        """rms_norm(hidden [B, H]) times weight [V, H] transposed -> [B, V] float32."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place, then rms_norm(residual)."""

    def rope_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
    ) -> None:
        """Rotate q [T, Hq, D] and k [T, Hkv, D] in place by cos_sin [max_len, D] float32 (cosines
        of D/2 angles, then sines; half-split pairing), then store k and v [T, Hkv, D] at
        slot_mapping in the caches."""

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        meta: AttentionMetadata,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of q [T, Hq, D] over each row's cached context -> [T, Hq * D].

        ``window`` W > 0: a query at position p sees the keys p - W + 1 .. p. Blocks whose every key
        lies before the windows of a row's tokens are not read: their entries in the block table may
        be any block. ``sinks`` [Hq] float32: each softmax has one more logit, whose value vector is
        0 (Xiao et al., arXiv 2309.17453; as learned by gpt-oss)."""

    def norm_residual(self, x: Tensor, norm: Tensor, eps: float, residual: Tensor) -> None:
        """residual += rms_norm(x [T, H], norm [H])."""

    def scale_rows(self, x: Tensor, scales: Tensor, positions: Tensor) -> None:
        """x[t] *= scales[positions[t]] for each token of x [T, H] or [T, Hq, D]; scales float32."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2F] -> silu(gate_up[:, :F]) * gate_up[:, F:] -> [T, F]."""

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        """The same with gelu in its tanh form."""

    def norm_qkv_rope_write(
        self,
        pending_residual: Tensor | None,
        residual: Tensor,
        norm: Tensor | None,
        eps: float,
        weight: Matrix,
        bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
    ) -> Tensor:
        """Everything before attention -> q [T, Hq, D]: residual += pending_residual, its rms_norm
        with ``norm`` [H] if given, times weight [(Hq + 2 Hkv) D, H] transposed, plus bias; if
        ``q_norm`` and ``k_norm`` are given, rms_norm of q and k: of each head if they are [D], of
        all heads at once if they are [Hq D] and [Hkv D]; then rope_write."""

    def linear_residual(
        self, x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor
    ) -> Tensor | None:
        """Adds linear(x, weight, bias) to residual and returns None; or returns the product, which
        the next operation adds where it reads the residual anyway."""

    def norm_gate_up(
        self,
        pending_residual: Tensor | None,
        residual: Tensor,
        norm: Tensor | None,
        eps: float,
        weight: Matrix,
        activation: Activation = "silu",
    ) -> Tensor:
        """residual += pending_residual; silu_and_mul(linear(rms_norm(residual), weight)) [T, F].
        Without ``norm``, of the residual itself; with ``activation`` gelu_tanh, gelu_and_mul."""

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        """logits [B, V] float32, possibly overwritten -> token ids [B] int64."""

    def sample_and_advance(
        self,
        hidden: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        batch: DeviceBatchTensors,
        *,
        filtered: bool,
    ) -> None:
        """Samples a token for every row from linear(rms_norm(hidden [B, H]), weight [V, H]), its
        triggers banned where ``sample_banned`` says so. Then advances the row: budget state,
        output_tokens and the inputs of the next step. ``filtered``: some row uses top_k, top_p or
        min_p."""

    def sample_rows(self, logits: Tensor, batch: DeviceBatchTensors, *, filtered: bool) -> Tensor:
        """The first half of ``sample_and_advance``: ids [B] int64 from logits [B, V] float32, which
        may be overwritten."""

    def advance(self, sampled: Tensor, batch: DeviceBatchTensors) -> None:
        """The second half: advances every row by its token of ``sampled`` [B] int64."""

    def best_of_shard(
        self,
        hidden: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        batch: DeviceBatchTensors,
        first: int,
        limit: int,
    ) -> Tensor | None:
        """The candidate of a rank that holds rows ``first`` .. of the head, of which the first
        ``limit`` may be sampled, as ``torch_sampling.best_of_shard`` defines it: [B, 2] float32.
        Without filters and end markers. None, by shapes alone: only from the logits of all ranks.
        """

    def logprobs(self, logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-softmax of raw logits [B, V], without NaN and infinity: (of token_ids [B], top-k
        values [B, k], ids [B, k])."""

    def score_rows(
        self, logits: Tensor, token_ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``logprobs``, in float32 and int32, with ranks [B] after the first: 1 and the number
        of tokens before it, likelier or as likely with a lower id. An id beyond V has
        -infinity and V + 1. ``token_ids`` [B] int64."""


def select_ops(device: str, num_threads: int | None = None) -> Ops:
    """The operations for ``cpu`` or ``cuda``. ``num_threads`` is the CPU's (see ThreadLease)."""
    if device == "cpu":
        from s1engine.ops.cpu_ops import CpuOps

        return CpuOps(num_threads)
    from s1engine.ops.triton_ops import TritonOps

    return TritonOps()
