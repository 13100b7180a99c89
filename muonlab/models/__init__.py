"""Models that declare their parameters' roles and attention layouts; nothing here knows an optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muonlab.models.contract import CausalModel, MixtureModel, ModelOutput
    from muonlab.models.counts import model_counts
    from muonlab.models.moe import MoE
    from muonlab.models.nanogpt import NanoGPT
    from muonlab.models.registry import build_model, list_models, register_model

__all__ = [
    "CausalModel",
    "MixtureModel",
    "MoE",
    "ModelOutput",
    "NanoGPT",
    "build_model",
    "list_models",
    "model_counts",
    "register_model",
]

_MODULES = {
    "CausalModel": "contract",
    "MixtureModel": "contract",
    "MoE": "moe",
    "ModelOutput": "contract",
    "NanoGPT": "nanogpt",
    "build_model": "registry",
    "list_models": "registry",
    "model_counts": "counts",
    "register_model": "registry",
}


def __getattr__(name: str) -> object:
    """Imports a name's module when it is first asked for: counting a model needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
