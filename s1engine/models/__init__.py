"""Models: their facts (model_config), their computation (decoder), their weights (loader)."""

from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_path import resolve_model

__all__ = ["Decoder", "ModelConfig", "load_decoder", "resolve_model"]
