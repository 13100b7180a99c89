"""Models that declare their parameters' roles and attention layouts; nothing here knows an optimizer."""

from muonlab.models.counts import model_counts
from muonlab.models.decoder import ModelOutput
from muonlab.models.moe import MoE
from muonlab.models.nanogpt import NanoGPT
from muonlab.models.registry import build_model, list_models, register_model

__all__ = ["MoE", "ModelOutput", "NanoGPT", "build_model", "list_models", "model_counts", "register_model"]
