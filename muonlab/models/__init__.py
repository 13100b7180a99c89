"""Models that declare their parameters' roles and attention layouts; nothing here knows an optimizer."""

from muonlab.models.nanogpt import ModelOutput, NanoGPT
from muonlab.models.registry import build_model, list_models, register_model

__all__ = ["ModelOutput", "NanoGPT", "build_model", "list_models", "register_model"]
