"""The model to train: a transformers decoder with packed attention and the chunked loss, sharded.

Weights are float32 shards (FSDP2, one unit per decoder layer). Forward and backward run in the
compute dtype; gradients are summed in float32.
"""

from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from s1engine.errors import ModelError, RequestError
from s1engine.gguf_file import SUFFIX
from s1engine.models.checkpoint import Checkpoint
from s1engine.models.model_path import resolve_model
from s1engine.reasoning_specs import FORMAT_SPECS
from s1engine.training.sft.distributed import DistributedContext
from s1engine.training.sft.loss import linear_cross_entropy
from s1engine.training.sft.packing import PackedRow
from s1engine.training.sft.sft_config import SftConfig

PACKED_ATTENTION = "s1engine_packed"  # its name in transformers


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, D]
    attention_mask: None,
    *,
    lengths: list[int],  # sum T
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of a row: [1, T, Hq, D]. One call per sample, so pairs of
    different samples cost nothing and no mask exists."""
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [
        scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True
        )
        for q, k, v in parts
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, lambda *_, **__: None)


class SftModel(nn.Module):
    """A causal language model whose forward pass returns the loss of a row."""

    def __init__(self, lm: nn.Module, config: SftConfig) -> None:
        super().__init__()
        self.lm = lm
        self._chunk = config.loss_chunk
        self._offload = config.offload == "activations"

    def forward(self, row: PackedRow) -> Tensor:
        """Sum of the cross-entropy over the row's targets, float32."""
        lm: Any = self.lm
        pin = row.input_ids.is_cuda
        with save_on_cpu(pin_memory=pin) if self._offload else nullcontext():
            hidden = lm.model(
                input_ids=row.input_ids,
                position_ids=row.position_ids,
                use_cache=False,
                lengths=row.lengths,
            ).last_hidden_state[0]  # [T, H]
        hidden = hidden[row.loss_positions]
        loss: Tensor = lm.lm_head.loss(hidden, row.loss_targets, self._chunk)
        return loss


def _head_loss(self: nn.Linear, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return linear_cross_entropy(hidden, self.weight, targets, chunk)


def load_architecture(config: SftConfig) -> PretrainedConfig:
    """The architecture of the recipe or of the model's directory. Raises ModelError if the trainer
    does not support it."""
    if config.architecture is not None:
        fields = dict(config.architecture)
        architecture = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        assert config.model is not None
        path = resolve_model(config.model)
        if path.suffix == SUFFIX:
            raise ModelError(f"{path}: cannot be trained; use the model's Hugging Face directory")
        architecture = AutoConfig.from_pretrained(path)
    kinds = set(getattr(architecture, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(architecture, "sliding_window", None):
        raise ModelError("models with sliding-window attention cannot be trained")
    limit = architecture.max_position_embeddings
    if config.block_size > limit:
        raise ModelError(f"block_size {config.block_size} exceeds the model's {limit} positions")
    return architecture


def create_meta_model(config: SftConfig, architecture: PretrainedConfig) -> nn.Module:
    """A transformers model without weights (on the meta device)."""
    with torch.device("meta"):
        return _create_model(config, architecture)


def _create_model(config: SftConfig, architecture: PretrainedConfig) -> nn.Module:
    lm = AutoModelForCausalLM.from_config(
        architecture, dtype=torch.float32, attn_implementation=PACKED_ATTENTION
    )
    return prepare_model(lm, config)


def prepare_model(lm: Any, config: SftConfig) -> nn.Module:
    """Adds the loss to the head, enables checkpointing, and sets training mode."""
    if config.gradient_checkpointing:
        # transformers before 5.20 has the second name only
        enable = getattr(lm, "activation_checkpointing_enable", None)
        (enable or lm.gradient_checkpointing_enable)({"use_reentrant": False})
    lm.lm_head.loss = MethodType(_head_loss, lm.lm_head)
    lm.train()
    return lm  # type: ignore[no-any-return]


def load_model(config: SftConfig, distributed: DistributedContext) -> SftModel:
    """The sharded model with its weights: random ones from the seed, or those of ``config.model``,
    of which each rank keeps only its shards."""
    architecture = load_architecture(config)
    if config.offload == "state" and distributed.device.type == "cpu":
        raise RequestError("offload: state needs a GPU to offload from", param="offload")
    device = torch.device("cpu") if config.offload == "state" else distributed.device
    if config.model is None:
        torch.manual_seed(config.seed)
        lm = _create_model(config, architecture).to(device)
        return _shard(SftModel(lm, config), config, distributed)
    model = _shard(SftModel(create_meta_model(config, architecture), config), config, distributed)
    model.to_empty(device=device)
    _load_weights(model.lm, Checkpoint(resolve_model(config.model)))
    decoder: Any = model.lm.model
    rotary = type(decoder.rotary_emb)  # the checkpoint does not hold its frequencies
    decoder.rotary_emb = rotary(architecture).to(distributed.device)
    return model


def _shard(model: SftModel, config: SftConfig, distributed: DistributedContext) -> SftModel:
    """FSDP2: one unit per layer, one for an untied head, one for the rest. Gradients become means
    over the ranks."""
    lm: Any = model.lm
    policy: dict[str, Any] = {
        "mesh": distributed.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=getattr(torch, config.compute_dtype), reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy() if config.offload == "state" else OffloadPolicy(),
    }
    for layer in lm.model.layers:
        fully_shard(layer, **policy)
    if not lm.config.tie_word_embeddings:
        fully_shard(lm.lm_head, **policy)
        register_fsdp_forward_method(lm.lm_head, "loss")
    fully_shard(model, **policy)
    return model


@torch.no_grad()
def _load_weights(lm: nn.Module, checkpoint: Checkpoint) -> None:
    named = dict(lm.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    checkpoint.check(shapes, lambda name: name == "lm_head.weight")
    for name, parameter in named.items():
        assert isinstance(parameter, DTensor)
        whole = checkpoint.read(name).float()
        shard = distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements,
            src_data_rank=None,
        )  # fmt: skip
        parameter.copy_(shard)


def export_model(
    model: SftModel, config: SftConfig, source: Path | None, out: Path, is_first: bool
) -> None:
    """Writes a Hugging Face directory in bfloat16 from the first rank. All ranks must call it.

    Args:
        source: directory whose generation_config.json is copied.
    """
    from huggingface_hub import save_torch_state_dict

    weights: dict[str, Tensor] = {}
    for name, parameter in model.lm.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if is_first:
            weights[name] = whole.detach().to(torch.bfloat16).cpu()
    if not is_first:
        return
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, out, max_shard_size="5GB")
    architecture: Any = load_architecture(config)
    architecture.dtype = torch.bfloat16
    architecture.architectures = [type(model.lm).__name__.removeprefix("FSDP")]
    if config.think_start == FORMAT_SPECS["s1"].start:
        architecture.reasoning_format = "s1"  # nothing else shows it to an engine
    architecture.save_pretrained(out)
    defaults = source / "generation_config.json" if source else None
    if defaults is not None and defaults.exists():
        (out / defaults.name).write_text(defaults.read_text())
