"""Who updates which parameter, seen as which matrices, and why. Every parameter has exactly one row.

A model that declares `parameter_roles()` is believed. In any other model a parameter's role is read off the type
of its module and its name; what neither tells is an error, because a guess would train for days unnoticed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from muonlab.errors import MuonlabError, unknown_name
from muonlab.layout import ParameterRole

# Roles whose matrices Muon takes unless `routes` says otherwise.
MUON_ROLES = ("query", "key", "value", "output", "mlp", "expert")
_ROW_HEADS = ("query", "key", "value")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Route:
    """One row of the routing table: `view` says in words which matrices the rule sees, "-" for entry by entry."""

    name: str
    shape: tuple[int, ...]
    group: str
    rule: str
    view: str
    reason: str


def format_routing(routes: list[Route]) -> str:
    """The table as aligned text, one line a parameter, with a heading."""
    rows = [("parameter", "shape", "group", "rule", "matrices", "reason")]
    rows += [
        (r.name, " x ".join(map(str, r.shape)) or "()", r.group, r.rule, r.view, r.reason) for r in routes
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parameter_groups(
    model: nn.Module,
    rule: str,
    *,
    routes: Mapping[str, str] | None = None,
    lr_scale: Mapping[str, float] | None = None,
    per_head: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups of a model for `Muon` (rule "muon") or `AdamW` (rule "adamw"), one per role.

    routes: {role or parameter-name pattern: rule} against the default of MUON_ROLES; a pattern goes before a role.
    lr_scale: {role: factor} multiplies the learning rate of a role; 0 freezes it.
    per_head: cut query, key and value into row blocks and output into column blocks, one a head.

    Weight decay never reaches tensors with fewer than two dimensions (gains and biases). Frozen parameters are routed too.
    Raises MuonlabError for a parameter without a role, one that two patterns send to different rules, tied weights with
    different rules, and names in `routes` or `lr_scale` that match nothing.
    """
    roles, whys = _roles(model)
    routes, lr_scale = dict(routes or {}), dict(lr_scale or {})
    groups: dict[tuple, dict[str, Any]] = {}
    used: set[str] = set()
    for name, param, tied in _unique_parameters(model):
        role = roles[name]
        chosen, reason = _rule(name, role.role, rule, whys[name], routes, used)
        for other in tied:
            if other in roles and _rule(other, roles[other].role, rule, "", routes, used)[0] != chosen:
                raise MuonlabError(
                    f"{other} is tied to {name}, but their routes differ; give both the same rule"
                )
            reason += f"; tied to {other}"
        settings = _view_settings(role, param, per_head) if chosen == "muon" else {}
        if param.ndim < 2:
            settings["weight_decay"] = 0.0
        key = (role.role, chosen, tuple(settings.items()))
        if key not in groups:
            where = {"rule": chosen, "name": role.role, "lr_scale": lr_scale.get(role.role, 1.0)}
            groups[key] = {"params": [], "reasons": [], **where, **settings}
        groups[key]["params"].append((name, param))
        groups[key]["reasons"].append(reason)
    known = {role.role for role in roles.values()}
    for key in routes:
        if key not in used:
            raise unknown_name("role or parameter in routes", key, known)
    for key in lr_scale:
        if key not in known:
            raise unknown_name("role in lr_scale", key, known)
    return _distinct_names(list(groups.values()))


def _unique_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, list[str]]]:
    """(first name, parameter, further names) of every distinct parameter: tied weights are one by identity."""
    found: dict[int, tuple[str, nn.Parameter, list[str]]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in found:
            found[id(param)][2].append(name)
        else:
            found[id(param)] = (name, param, [])
    return list(found.values())


def _roles(model: nn.Module) -> tuple[dict[str, ParameterRole], dict[str, str]]:
    """The role of every parameter name, and where it is from."""
    names = [name for name, _ in model.named_parameters()]
    if hasattr(model, "parameter_roles"):
        roles = model.parameter_roles()
        for name in names:
            if name not in roles:
                raise MuonlabError(
                    f"parameter '{name}' has no role in {type(model).__name__}.parameter_roles()"
                )
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in roles:
            if name not in every:
                raise unknown_name(f"parameter in {type(model).__name__}.parameter_roles()", name, every)
        return roles, {name: f"declared {role.role}" for name, role in roles.items()}
    modules = dict(model.named_modules())
    roles, whys = {}, {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        roles[name], whys[name] = _guess_role(name, leaf, modules[owner], param)
    return roles, whys


def _guess_role(name: str, leaf: str, module: nn.Module, param: nn.Parameter) -> tuple[ParameterRole, str]:
    """The role of a parameter of a model that declares none; the first line that fits decides."""
    kind = type(module).__name__
    words = name.lower().replace("_", ".").split(".")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return ParameterRole("embedding"), f"weight of {kind}"
    if isinstance(module, _NORMS) or "norm" in kind.lower():
        return ParameterRole("norm"), f"parameter of {kind}"
    if leaf.startswith("bias") or leaf.endswith("bias"):
        return ParameterRole("bias"), "named bias"
    if isinstance(module, nn.modules.conv._ConvNd):
        return ParameterRole("conv"), f"filter of {kind}"
    for role, marks in (("head", ("head", "unembed")), ("router", ("router",)), ("gate", ("gate", "gating"))):
        if any(mark in words for mark in marks) and not any(
            w in words for w in ("proj", "mlp", "attn", "attention")
        ):
            return ParameterRole(role), f"named {role}"
    if isinstance(module, nn.Linear):
        return ParameterRole("mlp"), f"weight of {kind}"
    raise MuonlabError(
        f"parameter '{name}' of shape {tuple(param.shape)} in {kind} has no known role; declare it in "
        "parameter_roles(), or name its rule in routes"
    )


def _rule(
    name: str, role: str, default: str, why: str, routes: Mapping[str, str], used: set[str]
) -> tuple[str, str]:
    """The rule of one parameter and the reason."""
    matches = [key for key in routes if key != role and fnmatchcase(name, key)]
    used.update(matches)
    if role in routes:
        used.add(role)
    if len({routes[key] for key in matches}) > 1:
        raise MuonlabError(
            f"parameter '{name}' matches {' and '.join(repr(m) for m in matches)} with different rules"
        )
    for key in (*matches, role):
        if key in routes:
            if routes[key] not in ("muon", "adamw"):
                raise unknown_name("rule in routes", routes[key], ("muon", "adamw"))
            return routes[key], f"{why}; routes: {key}"
    return ("muon" if default == "muon" and role in MUON_ROLES else "adamw"), why


def _view_settings(role: ParameterRole, param: nn.Parameter, per_head: bool) -> dict[str, Any]:
    """Settings of the matrix view of a parameter under Muon."""
    if per_head and role.num_heads > 1:
        return {"row_blocks" if role.role in _ROW_HEADS else "col_blocks": role.num_heads}
    return {"flatten": True} if role.role == "conv" and param.ndim > 2 else {}


def _distinct_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A role with several views or rules makes several groups: number them."""
    count: dict[str, int] = {}
    for group in groups:
        role = group["name"]
        count[role] = count.get(role, 0) + 1
        if count[role] > 1:
            group["name"] = f"{role}_{count[role]}"
    return groups
