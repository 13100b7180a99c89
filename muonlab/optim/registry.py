"""Optimizers by name: {adamw, muon} x {no clip, clip}."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.muon import AdamW, Muon
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.routing import parameter_groups
from muonlab.registry import Registry

OPTIMIZERS = Registry("optimizer")
register_optimizer = OPTIMIZERS.register
list_optimizers = OPTIMIZERS.names

Builder = Callable[..., CombinedOptimizer]


def build_optimizer(name: str, model: nn.Module, **settings: Any) -> CombinedOptimizer:
    """The optimizer of all parameters of `model`, routed by their roles.

    `name` is one of `list_optimizers()`, `settings` are its builder's. An unknown name or setting raises
    MuonlabError with the near ones.
    """
    return OPTIMIZERS.build(name, model, **settings)


def _shows_settings_of(constructor: type, without: tuple[str, ...]) -> Callable[[Builder], Builder]:
    """Write the settings that a builder hands on as **settings into its signature, for the registry."""

    def show(builder: Builder) -> Builder:
        own = [p for p in inspect.signature(builder).parameters.values() if p.kind is not p.VAR_KEYWORD]
        builder.__signature__ = inspect.Signature([*own, *_settings(constructor, without)])
        return builder

    return show


def _settings(constructor: type, without: tuple[str, ...]) -> list[inspect.Parameter]:
    """The settings with defaults of a constructor, as keywords."""
    parameters = inspect.signature(constructor).parameters.values()
    chosen = (p for p in parameters if p.default is not p.empty and p.name not in without)
    return [p.replace(kind=p.KEYWORD_ONLY) for p in chosen]


@register_optimizer("adamw")
@_shows_settings_of(AdamW, without=("clip",))
def adamw(model: nn.Module, *, lr_scale: Mapping[str, float] | None = None, **settings: Any) -> AdamW:
    """AdamW for every parameter, in one group a role.

    lr_scale: {role: factor} multiplies the learning rate of a role. The other settings are those of `AdamW`.
    """
    return AdamW(parameter_groups(model, "adamw", lr_scale=lr_scale), **settings)


# Which matrices a parameter is comes from the routing, not from settings of the whole optimizer.
@register_optimizer("muon")
@_shows_settings_of(Muon, without=("row_blocks", "col_blocks", "flatten", "clip"))
def muon(
    model: nn.Module,
    *,
    routes: Mapping[str, str] | None = None,
    lr_scale: Mapping[str, float] | None = None,
    per_head: bool = False,
    split_qkv: bool = True,
    **settings: Any,
) -> Muon:
    """Muon for the hidden matrices, AdamW for embeddings, head, norms, biases, router, gates and filters.

    routes: {role or parameter-name pattern: "muon" | "adamw"} overrides that, for instance {"head": "muon"}
        or {"query": "adamw", "key": "adamw"}.
    lr_scale: {role: factor} multiplies the learning rate of a role.
    per_head: orthogonalise every head of query, key, value and output apart.
    split_qkv: orthogonalise query, key and value of a fused weight apart; false takes it as one matrix.
    The other settings are those of `Muon`.
    """
    return Muon(parameter_groups(model, "muon", routes, lr_scale, per_head, split_qkv), **settings)


def _with_clip(builder: Builder) -> Builder:
    """The same with a QK-Clip: the builder's settings and QKClip's, whose `momentum` is `clip_momentum`."""
    clip_settings = {
        "clip_momentum" if p.name == "momentum" else p.name: p
        for p in _settings(QKClip, without=("process_group",))
    }

    def build(model: nn.Module, **settings: Any) -> CombinedOptimizer:
        if not hasattr(model, "attention_layouts"):
            raise MuonlabError(
                f"{type(model).__name__} declares no attention_layouts(), without which QK-Clip cannot act"
            )
        given = {p.name: settings.pop(name) for name, p in clip_settings.items() if name in settings}
        return builder(model, clip=QKClip(model.attention_layouts(), **given), **settings)

    own = inspect.signature(builder).parameters.values()
    build.__signature__ = inspect.Signature([*own, *(p.replace(name=n) for n, p in clip_settings.items())])
    return build


register_optimizer("adamwclip")(_with_clip(adamw))
register_optimizer("muonclip")(_with_clip(muon))
