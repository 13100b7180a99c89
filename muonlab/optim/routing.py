"""Who updates which parameter, seen as which matrices, and why. Every parameter has exactly one row.

What a parameter is for, its role, is declared by the model or read off module types and names. A wrong guess would
train for days unnoticed, so a parameter that cannot be identified gets no role, and is refused unless a route names it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from muonlab.errors import MuonlabError, unknown_name
from muonlab.layout import ParameterRole
from muonlab.optim.matrix_view import Group
from muonlab.optim.rules import RULES, setting_names

# What a rule for matrices takes unless `routes` says otherwise. Embeddings and heads are tables of rows used one by
# one; routers, gates, norms and biases are too thin for an orthogonal update to mean anything.
MUON_ROLES = ("query", "key", "value", "output", "latent", "qkv", "mlp", "expert", "linear")
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# The last part of a module's name, in the spelling of common model code.
NAMED_LINEAR = {
    "query": ("query", "q_proj", "to_q", "wq", "q"),
    "key": ("key", "k_proj", "to_k", "wk", "k"),
    "value": ("value", "v_proj", "to_v", "wv", "v"),
    "output": ("o_proj", "out_proj", "to_out", "wo"),
    "head": ("lm_head", "head", "unembed", "embed_out", "classifier"),
    "router": ("router",),
    "gate": ("gate", "gating"),
}


@dataclass(frozen=True)
class Role:
    """What one parameter is for, in how many head blocks, and the reason.

    `name` is a ParameterRole's role, or for guessed ones also "linear" or "vector"; "" is unknown. `row_blocks`
    are a fused QKV weight's rows of query, key and value; () for three equal blocks.
    """

    name: str
    num_heads: int
    reason: str
    row_blocks: tuple[int, ...] = ()


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
    """The table as aligned text, one line per parameter, under a heading."""
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
    other_lr: float | None = None,
    rest: str = "adamw",
) -> list[Group]:
    """Parameter groups of a model, one per role.

    rule: a registered rule. One for matrices, such as "muon", takes MUON_ROLES and leaves the others to `rest`; any
        other rule takes every parameter.
    routes: {role or parameter-name pattern: rule} against that default; a pattern (as for file names: * ? [abc]) goes
        before a role.
    lr_scale: {role: factor} multiplies the learning rate of a role; 0 freezes it.
    per_head: cut query, key and value into row blocks and output into column blocks, one per head.
    split_qkv: cut a fused QKV weight into its three matrices; false leaves it one.
    other_lr: the learning rate of every role but MUON_ROLES; None: that of the rule.

    Tied weights are one parameter, by identity. Weight decay never reaches tensors with fewer than two
    dimensions (gains and biases). Raises MuonlabError for a parameter that nothing routes, one that two
    patterns send to different rules, tied weights with different rules, names in `routes` or `lr_scale` that
    match nothing, and `split_qkv=False` with `per_head` or for a model without a fused weight.
    """
    roles = model_roles(model)
    if not split_qkv:
        _check_fused(roles.values(), per_head)
    table = _Routes(rule, routes or {}, rest)
    groups: dict[tuple, Group] = {}
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
        if param.ndim < 2 and "weight_decay" in setting_names(RULES[target].settings):
            view, reason = {"weight_decay": 0.0}, f"{reason}; no decay"
        group = groups.setdefault(
            (role.name, target, tuple(view.items())),
            {"params": [], "reasons": [], "rule": target, "name": role.name or "routed", **view},
        )
        group["params"].append((name, param))
        group["reasons"].append(reason)
    present = {role.name for role in roles.values()} - {""}
    table.check_used(present)
    for role_name, factor in (lr_scale or {}).items():
        if role_name not in present:
            raise unknown_name("role in lr_scale", role_name, present)
        for group in groups.values():
            if group["name"] == role_name:
                group["lr_scale"] = factor
    if other_lr is not None:
        for group in groups.values():
            if group["name"] not in MUON_ROLES:
                group["lr"] = other_lr
    return _numbered(list(groups.values()))


class _Routes:
    """The rule of every parameter, remembering which overrides were ever used."""

    def __init__(self, default: str, routes: Mapping[str, str], rest: str):
        self.default, self.routes, self.rest = default, dict(routes), rest
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
                f"parameter '{name}' ({role.reason}) has no role; declare it in the model's "
                f"parameter_roles(), or route it by name: routes={{'{name}': 'adamw'}}"
            )
        takes = not self.for_matrices or role.name in MUON_ROLES
        return (self.default if takes else self.rest), role.reason

    def check_used(self, roles: set[str]) -> None:
        """Raise MuonlabError for an override that matched nothing."""
        for key in self.routes:
            if key not in self.used:
                raise unknown_name("role or parameter in routes", key, roles)


def _unique_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, list[str]]]:
    """(first name, parameter, further names) of every distinct parameter."""
    unique: dict[int, tuple[str, nn.Parameter, list[str]]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in unique:
            unique[id(param)][2].append(name)
        else:
            unique[id(param)] = (name, param, [])
    return list(unique.values())


def _check_fused(roles: Iterable[Role], per_head: bool) -> None:
    if per_head:
        raise MuonlabError(
            "per_head cuts a fused QKV weight into its heads, so split_qkv=false cannot leave it whole"
        )
    if all(role.name != "qkv" for role in roles):
        raise MuonlabError(
            "split_qkv=false needs a model with a fused QKV weight (model.fused_qkv=true); this one keeps "
            "query, key and value in separate weights"
        )


def _view(name: str, role: Role, param: nn.Parameter, per_head: bool, split_qkv: bool) -> Group:
    """Group settings that say which matrices Muon sees in a parameter."""
    if role.name == "conv":
        if param.ndim > 2 and param.shape[1] == 1:
            raise MuonlabError(
                f"'{name}' is a depthwise filter, whose channels do not form a matrix; leave it to adamw"
            )
        return {"flatten": True}
    if role.name == "qkv":
        equal = len(set(role.row_blocks)) <= 1  # one stack of three is faster than three matrices
        whole = 3 if equal else role.row_blocks
        return {"row_blocks": role.num_heads if per_head else whole} if split_qkv else {}
    if per_head and role.num_heads > 1:
        return {"col_blocks" if role.name == "output" else "row_blocks": role.num_heads}
    return {}


def _numbered(groups: list[Group]) -> list[Group]:
    """Distinct names where one role has several groups (other views or rules): query, query_2, ..."""
    count: dict[str, int] = {}
    for group in groups:
        name = group["name"]
        count[name] = count.get(name, 0) + 1
        if count[name] > 1:
            group["name"] = f"{name}_{count[name]}"
    return groups


# ---------------------------------------------------------------- roles
def model_roles(model: nn.Module) -> dict[str, Role]:
    """A Role for every name of `model.named_parameters(remove_duplicate=False)` that has one.

    Raises MuonlabError if the model declares roles and leaves out a parameter or names one that is not there.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    declare = getattr(model, "parameter_roles", None)
    if declare is not None:
        declared: Mapping[str, ParameterRole] = declare()
        kind = type(model).__name__
        for name in dict(model.named_parameters()):
            if name not in declared:
                raise MuonlabError(f"parameter '{name}' has no role in {kind}.parameter_roles()")
        for name in declared:
            if name not in every:
                raise unknown_name(f"parameter in {kind}.parameter_roles()", name, every)
        return {
            name: Role(r.role, r.num_heads, f"declared {r.role}", r.row_blocks)
            for name, r in declared.items()
        }
    modules = dict(model.named_modules())
    owners = {name: modules[name.rpartition(".")[0]] for name in every}
    # What is an embedding anywhere is one everywhere: its rows are looked up, never summed.
    embedded = {id(every[name]) for name, module in owners.items() if _is_embedding(module)}
    return {
        name: Role("embedding", 0, "weight of an embedding")
        if id(every[name]) in embedded
        else _guess(name, owners[name], every[name])
        for name in every
    }


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _guess(name: str, module: nn.Module, param: nn.Parameter) -> Role:
    """The role of one parameter of a model that declares none; the first line that fits decides."""
    kind = type(module).__name__
    owner, _, leaf = name.rpartition(".")
    if isinstance(module, NORMS) or "norm" in kind.lower():
        return Role("norm", 0, f"parameter of {kind}")
    if leaf.endswith("bias"):
        return Role("bias", 0, "named bias")
    if param.ndim < 2:
        return Role("vector", 0, "has no matrix")
    if isinstance(module, nn.modules.conv._ConvNd):
        return Role("conv", 0, f"filter of {kind}")
    if isinstance(module, nn.MultiheadAttention):
        if leaf == "in_proj_weight":
            return Role("qkv", 3 * module.num_heads, f"query, key and value of {kind}")
        for role, leaves in (
            ("query", "q_proj_weight"),
            ("key", "k_proj_weight"),
            ("value", "v_proj_weight"),
        ):
            if leaf == leaves:
                return Role(role, module.num_heads, f"{role} of {kind}")
    if isinstance(module, nn.Linear):
        last = owner.rpartition(".")[2].lower()
        for role, spellings in NAMED_LINEAR.items():
            if last in spellings:
                return Role(role, 0, f"{kind} named {last}")
        return Role("linear", 0, f"weight of {kind}")
    return Role("", 0, f"parameter of {kind}")
