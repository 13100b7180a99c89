"""Who updates which parameter, seen as which matrices, and why. Every parameter has exactly one row."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.model_roles import Role, model_roles
from muonlab.optim.rules import RULES

# What a rule for matrices takes unless `routes` says otherwise. Embeddings and heads are tables of rows used one by
# one; routers, gates, norms and biases are too thin for an orthogonal update to mean anything.
MUON_ROLES = ("query", "key", "value", "output", "latent", "qkv", "mlp", "expert", "linear")


@dataclass(frozen=True)
class Route:
    """One row of the routing table.

    `group` is the parameter group (the role, where roles route), `rule` what updates it ("muon", "adamw"),
    `view` says in words which matrices the rule sees, "-" for entry by entry.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    rule: str
    view: str
    reason: str


def format_routing(routes: Sequence[Route]) -> str:
    """The table as aligned text, one line a parameter, under a heading."""
    rows = [("parameter", "shape", "group", "rule", "matrices", "reason")]
    for r in routes:
        rows.append((r.name, " x ".join(map(str, r.shape)) or "scalar", r.group, r.rule, r.view, r.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def collapse_layers(routes: list[Route]) -> list[Route]:
    """The table with layers that are treated alike in one row: `blocks.*.mlp.up.weight (6)`, six parameters."""
    merged: dict[Route, int] = {}
    for route in routes:
        row = replace(route, name=re.sub(r"(?<=\.)\d+(?=\.)", "*", route.name))
        merged[row] = merged.get(row, 0) + 1
    return [replace(row, name=f"{row.name} ({count})") if count > 1 else row for row, count in merged.items()]


def parameter_groups(
    model: nn.Module,
    rule: str,
    routes: Mapping[str, str] | None = None,
    lr_scale: Mapping[str, float] | None = None,
    per_head: bool = False,
    split_qkv: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of a model, one per role.

    rule: a registered rule. One for matrices, such as "muon", is given MUON_ROLES, and "adamw" the rest; any other is
        given every parameter.
    routes: {role or parameter-name pattern: rule} against that default; a pattern (as for file names: * ? [abc]) goes
        before a role.
    lr_scale: {role: factor} multiplies the learning rate of a role; 0 freezes it.
    per_head: cut query, key and value into row blocks and output into column blocks, one a head.
    split_qkv: cut a fused QKV weight into its three matrices; false leaves it one.

    Tied weights are one parameter, by identity. Weight decay never reaches tensors with fewer than two
    dimensions (gains and biases). Raises MuonlabError for a parameter that nothing routes, one that two
    patterns send to different rules, tied weights with different rules, names in `routes` or `lr_scale` that
    match nothing, and `split_qkv=False` with `per_head` or for a model without a fused weight.
    """
    roles = model_roles(model)
    if not split_qkv:
        _check_fused(roles.values(), per_head)
    table = _Routes(rule, routes or {})
    groups: dict[tuple, dict[str, Any]] = {}
    for name, param, tied in _unique_parameters(model):
        role = roles[name]
        target, reason = table.rule_of(name, role)
        for other in tied:
            if other in roles and table.rule_of(other, roles[other])[0] != target:
                raise MuonlabError(
                    f"'{other}' is tied to '{name}' but routed to another rule; give both the same"
                )
            reason += f"; tied to {other}"
        view = _view(name, role, param, per_head, split_qkv) if RULES[target].takes_matrices else {}
        if param.ndim < 2:
            view, reason = {"weight_decay": 0.0}, f"{reason}; no decay"
        group = groups.setdefault(
            (role.name, target, tuple(view.items())),
            {"params": [], "reasons": [], "rule": target, "name": role.name or "routed", **view},
        )
        group["params"].append((name, param))
        group["reasons"].append(reason)
    known = {role.name for role in roles.values()} - {""}
    table.check_used(known)
    for role_name, factor in (lr_scale or {}).items():
        if role_name not in known:
            raise unknown_name("role in lr_scale", role_name, known)
        for group in groups.values():
            if group["name"] == role_name:
                group["lr_scale"] = factor
    return _numbered(list(groups.values()))


class _Routes:
    """The rule of every parameter, remembering which overrides were ever used."""

    def __init__(self, default: str, routes: Mapping[str, str]):
        self.default, self.routes = default, dict(routes)
        self.used: set[str] = set()
        for rule in self.routes.values():
            if rule not in RULES:
                raise unknown_name("rule in routes", rule, RULES)
        if default not in RULES:
            raise unknown_name("rule", default, RULES)
        self.for_matrices = RULES[default].takes_matrices

    def rule_of(self, name: str, role: Role) -> tuple[str, str]:
        """(rule, reason) of one parameter."""
        patterns = [key for key in self.routes if key != role.name and fnmatchcase(name, key)]
        self.used.update(patterns)
        if len({self.routes[key] for key in patterns}) > 1:
            both = " and ".join(f"'{key}'" for key in patterns)
            raise MuonlabError(f"routes {both} send parameter '{name}' to different rules")
        if role.name in self.routes:
            self.used.add(role.name)
            patterns.append(role.name)
        if patterns:
            return self.routes[patterns[0]], f"{role.reason}; routes '{patterns[0]}'"
        if not role.name and self.for_matrices:
            raise MuonlabError(
                f"parameter '{name}' ({role.reason}) has no known role; declare it in the model's "
                f"parameter_roles(), or route it by name: routes={{'{name}': 'adamw'}}"
            )
        takes = not self.for_matrices or role.name in MUON_ROLES
        return (self.default if takes else "adamw"), role.reason

    def check_used(self, roles: set[str]) -> None:
        """Raise MuonlabError for an override that matched nothing."""
        for key in self.routes:
            if key not in self.used:
                raise unknown_name("role or parameter in routes", key, roles)


def _unique_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, list[str]]]:
    """(first name, parameter, further names) of every distinct parameter."""
    found: dict[int, tuple[str, nn.Parameter, list[str]]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in found:
            found[id(param)][2].append(name)
        else:
            found[id(param)] = (name, param, [])
    return list(found.values())


def _check_fused(roles: Iterable[Role], per_head: bool) -> None:
    if per_head:
        raise MuonlabError(
            "per_head cuts a fused QKV weight into its heads, so split_qkv=false cannot leave it whole"
        )
    if all(role.name != "qkv" for role in roles):
        raise MuonlabError(
            "split_qkv=false needs a model with a fused QKV weight (model.fused_qkv=true); this one keeps "
            "query, key and value apart"
        )


def _view(name: str, role: Role, param: nn.Parameter, per_head: bool, split_qkv: bool) -> dict[str, Any]:
    """Group settings that say which matrices Muon sees in a parameter."""
    if role.name == "conv":
        if param.ndim > 2 and param.shape[1] == 1:
            raise MuonlabError(
                f"'{name}' is a depthwise filter, whose channels make no matrix; leave it to adamw"
            )
        return {"flatten": True}
    if role.name == "qkv":
        equal = len(set(role.row_blocks)) <= 1  # one stack of three is faster than three matrices
        whole = 3 if equal else role.row_blocks
        return {"row_blocks": role.num_heads if per_head else whole} if split_qkv else {}
    if per_head and role.num_heads > 1:
        return {"col_blocks" if role.name == "output" else "row_blocks": role.num_heads}
    return {}


def _numbered(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Distinct names where one role makes several groups (other views or rules): query, query_2, ..."""
    count: dict[str, int] = {}
    for group in groups:
        name = group["name"]
        count[name] = count.get(name, 0) + 1
        if count[name] > 1:
            group["name"] = f"{name}_{count[name]}"
    return groups
