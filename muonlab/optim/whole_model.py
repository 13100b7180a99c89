"""A rule as an optimizer of its name: `optimizer=lion` for a whole model, with the settings that the rule has.

`@optimizer_of_its_name` above `@register_rule("NAME")` is all that a rule's file needs. A rule for matrices takes the
hidden ones and leaves the rest to AdamW; any other takes every parameter.
"""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from torch import nn

from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.matrix_view import MatrixSettings
from muonlab.optim.optimizers import register_optimizer
from muonlab.optim.routing import parameter_groups
from muonlab.optim.rules import RuleClass, setting_names
from muonlab.optim.weight_averages import WeightAverages
from muonlab.settings.check import NonNegative
from muonlab.settings.optimizer import AverageSettings, BesideAdamW, Factors, Routes, RoutingSettings

OF_GROUPS = setting_names(MatrixSettings)  # the model's routing gives these to each group


@dataclass(frozen=True, kw_only=True)
class EveryParameter(AverageSettings):
    """How the parameters of a model are given to a rule that takes them all.

    routes: {role or parameter-name pattern: rule}, such as {"query": "muon"}, for those that go to another rule.
    lr_scale: {role: factor} multiplies the learning rate of a role; 0 freezes it.
    other_lr: the learning rate of embeddings, head, norms and biases; None: lr.
    """

    routes: Routes | None = None
    lr_scale: Factors | None = None
    other_lr: NonNegative | None = None


@dataclass(frozen=True, kw_only=True)
class HiddenMatrices(RoutingSettings, BesideAdamW, AverageSettings):
    """How the parameters of a model are given to a rule for matrices, with AdamW for the rest."""


def optimizer_of_its_name(rule: RuleClass) -> RuleClass:
    """Decorator of a registered rule, which makes it an optimizer by name. Raises MuonlabError if the name is taken."""
    matrices = issubclass(rule.settings, MatrixSettings)
    hints = get_type_hints(rule.settings, include_extras=True)
    own: list[tuple[str, Any, Any]] = [
        (spec.name, hints[spec.name], field(default=spec.default))
        for spec in fields(rule.settings)
        if spec.name not in OF_GROUPS
    ]
    section = make_dataclass(
        f"{rule.__name__}Options",
        [("name", Literal[rule.name], field(default=rule.name)), *own],
        bases=(HiddenMatrices if matrices else EveryParameter,),
        frozen=True,
        kw_only=True,
    )

    def build(model: nn.Module, settings: Any) -> CombinedOptimizer:
        s = settings
        group = rule.settings(**{name: getattr(s, name) for name, *_ in own})
        if not matrices:
            groups = parameter_groups(model, rule.name, s.routes, s.lr_scale, other_lr=s.other_lr)
            return CombinedOptimizer(groups, rule.name, {rule.name: group}, averages=WeightAverages.of(s))
        groups = parameter_groups(model, rule.name, s.routes, s.lr_scale, s.per_head, s.split_qkv)
        defaults = {rule.name: group, "adamw": s.adamw}
        return CombinedOptimizer(groups, rule.name, defaults, averages=WeightAverages.of(s))

    build.__doc__, build.__module__ = rule.__doc__, rule.__module__
    build.__annotations__["settings"] = section
    register_optimizer(rule.name)(build)
    return rule
