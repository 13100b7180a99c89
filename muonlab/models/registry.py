"""Models by name. A file of this package registers its own with `@register_model("NAME")`."""

from typing import Any

import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.models.counts import has_formula, model_counts, total
from muonlab.registry import Registry
from muonlab.runtime import memory
from muonlab.settings.check import Named, build
from muonlab.settings.model import DecoderSettings, with_vocabulary

MODELS: Registry[nn.Module] = Registry("model", package="muonlab.models")
register_model = MODELS.register
list_models = MODELS.names


def build_model(name: str, **settings: object) -> nn.Module:
    """A freshly initialised model from the global torch generator; seed it first for reproducible weights.

    `name` is one of `list_models()`; `settings` are those of its section, `vocab_size` 256 where it is not known.
    Raises MuonlabError for an unknown name or setting, for sizes that do not fit, and for a model that the machine's
    memory cannot hold.
    """
    section: Any = build(MODELS.section(name), settings, "model")
    return make_model(with_vocabulary(section) if isinstance(section, DecoderSettings) else section)


def make_model(settings: Named) -> nn.Module:
    """The model of a checked section, freshly initialised from the global torch generator.

    Raises MuonlabError for a model that the machine's memory cannot hold.
    """
    if has_formula(settings) and torch.get_default_device().type != "meta":
        parameters = total(model_counts(settings).values()).parameters
        needed = parameters * torch.get_default_dtype().itemsize
        if needed > memory():
            raise MuonlabError(
                f"this {settings.name} has {parameters:.3g} parameters, {needed / 1e9:,.0f} GB of weights alone,"
                f" and the machine has {memory() / 1e9:,.0f} GB of memory; count it with python -m muonlab.models"
                " instead"
            )
    return MODELS.make(settings)
