"""Models: their facts (model_config), their computation (decoder), their weights (loader)."""

from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder, resolve_model
from s1engine.models.model_config import ModelConfig

__all__ = ["Decoder", "ModelConfig", "load_decoder", "resolve_model"]
