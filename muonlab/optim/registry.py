"""Optimizers by name: {adamw, muon} x {no clip, clip}, and anybody's own."""

from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.muon import AdamW, Muon
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.routing import parameter_groups
from muonlab.registry import Registry
from muonlab.settings.optimizer import (
    AdamWClipSettings,
    AdamWSettings,
    ClipSettings,
    MuonClipSettings,
    MuonSettings,
)

OPTIMIZERS: Registry[CombinedOptimizer] = Registry("optimizer")
register_optimizer = OPTIMIZERS.register
list_optimizers = OPTIMIZERS.names


def build_optimizer(name: str, model: nn.Module, **settings: object) -> CombinedOptimizer:
    """The optimizer of all parameters of `model`, routed by their roles.

    `name` is one of `list_optimizers()`, `settings` are its builder's. Raises MuonlabError for an unknown name or
    setting, with the near ones, and for a value of a wrong type, range or shape.
    """
    return OPTIMIZERS.build(name, settings, model)


@register_optimizer("adamw")
def adamw(model: nn.Module, settings: AdamWSettings, clip: QKClip | None = None) -> AdamW:
    """AdamW for every parameter."""
    groups = parameter_groups(model, "adamw", lr_scale=settings.lr_scale)
    return AdamW(groups, **settings.arguments(), clip=clip)


@register_optimizer("adamwclip")
def adamwclip(model: nn.Module, settings: AdamWClipSettings) -> AdamW:
    """AdamW followed by QK-Clip."""
    return adamw(model, settings, _clip(model, settings))


@register_optimizer("muon")
def muon(model: nn.Module, settings: MuonSettings, clip: QKClip | None = None) -> Muon:
    """Muon for the hidden matrices, AdamW for the rest."""
    groups = parameter_groups(model, "muon", **settings.routing())
    return Muon(groups, **settings.arguments(), clip=clip)


@register_optimizer("muonclip")
def muonclip(model: nn.Module, settings: MuonClipSettings) -> Muon:
    """Muon followed by QK-Clip."""
    return muon(model, settings, _clip(model, settings))


def _clip(model: nn.Module, settings: ClipSettings) -> QKClip:
    declare = getattr(model, "attention_layouts", None)
    if declare is None:
        raise MuonlabError(
            f"{type(model).__name__} declares no attention_layouts(), without which QK-Clip cannot act"
        )
    return QKClip(declare(), **settings.clip_arguments())
