"""What every parameter of a model is for: declared by the model, or read off module types and names.

A wrong guess would train for days unnoticed, so a parameter that cannot be identified gets no role, and
routing refuses it unless a route names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from muonlab.errors import MuonlabError, unknown_name
from muonlab.layout import ParameterRole

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
    """What one parameter is for, in how many head blocks, and how that is known.

    `name` is a ParameterRole's role, or for guessed ones also "linear" or "vector"; "" is unknown. `row_blocks`
    are a fused QKV weight's rows of query, key and value; () for three equal blocks.
    """

    name: str
    num_heads: int
    reason: str
    row_blocks: tuple[int, ...] = ()


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
