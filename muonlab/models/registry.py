"""Models by name."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from muonlab.errors import MuonlabError, unknown_name
from muonlab.models.counts import Count, moe_counts, nanogpt_counts, total
from muonlab.models.moe import MoE
from muonlab.models.nanogpt import NanoGPT
from muonlab.registry import Registry

MODELS = Registry("model")
register_model = MODELS.register
register_model("nanogpt")(NanoGPT)
register_model("moe")(MoE)

COUNTS: dict[str, Callable[[Mapping[str, Any], int], dict[str, Count]]] = {
    "nanogpt": nanogpt_counts,
    "moe": moe_counts,
}


def build_model(name: str, **settings: Any) -> nn.Module:
    """A freshly initialised model from the global torch generator; seed it first for reproducible weights.

    `name` is one of `list_models()`; `settings` are the keyword arguments of its class. Raises MuonlabError for an
    unknown name or setting, for sizes that do not fit, and for a model that the machine's memory cannot hold.
    """
    if name in COUNTS and torch.get_default_device().type != "meta":
        parameters = total(model_counts(name, **settings).values()).parameters
        needed = parameters * torch.get_default_dtype().itemsize
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise MuonlabError(
                f"this {name} has {parameters:.3g} parameters, {needed / 1e9:,.0f} GB of weights alone, and the"
                f" machine has {memory / 1e9:,.0f} GB of memory; count it with python -m muonlab.models instead"
            )
    return MODELS.build(name, **settings)


def model_counts(name: str, length: int | None = None, **settings: Any) -> dict[str, Count]:
    """The Count of every part of a model from its settings alone; nothing is allocated.

    `length` is the sequence length of the attention's operations, None for the model's context. Raises MuonlabError
    for an unknown name or setting, and for a registered model that has no formula.
    """
    known = MODELS.settings(name)
    for setting in settings:
        if setting not in known:
            raise unknown_name(f"setting of model {name}", setting, known)
    if name not in COUNTS:
        raise MuonlabError(
            f"model '{name}' has no formula for its counts; those that have: {', '.join(COUNTS)}"
        )
    settings = known | settings
    return COUNTS[name](settings, settings["context"] if length is None else length)


def list_models() -> list[str]:
    """Names that `build_model` takes."""
    return MODELS.names()
