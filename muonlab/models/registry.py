"""Models by name."""

from typing import Any

from torch import nn

from muonlab.models.nanogpt import NanoGPT
from muonlab.registry import Registry

MODELS = Registry("model")
register_model = MODELS.register
register_model("nanogpt")(NanoGPT)


def build_model(name: str, **settings: Any) -> nn.Module:
    """A freshly initialised model from the global torch generator; seed it first for reproducible weights.

    `name` is one of `list_models()`; `settings` are the keyword arguments of its class. Raises MuonlabError for an
    unknown name or setting and for sizes that do not fit.
    """
    return MODELS.build(name, **settings)


def list_models() -> list[str]:
    """Names that `build_model` takes."""
    return MODELS.names()
