"""Which parameters are updated together: those of one device, dtype, rule, settings and ranks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.matrix_view import Group, MatrixSettings
from muonlab.optim.rules import parameter_names, prepare_group, setting_names
from muonlab.optim.saved_state import state_dtype

# In what groups that are updated together may differ.
_VIEW_SETTINGS = setting_names(MatrixSettings)


@dataclass
class Bucket:
    """Parameters that are updated together, with the gradient and the group of each."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    @property
    def rule(self) -> str:
        """The name of the rule that updates them."""
        return self.groups[0]["rule"]

    @property
    def below_fp32(self) -> bool:
        """Whether they are updated as copies in fp32 and rounded once."""
        return self.params[0].dtype is not state_dtype(self.params[0])


def together(param_groups: Sequence[Group], rule_defaults: Mapping[str, Group]) -> list[Bucket]:
    """Parameters that have gradients, grouped by device, dtype, rule, settings and ranks.

    rule_defaults: by rule, the settings that its groups have. Raises MuonlabError for a sparse gradient and for a
    parameter that was made complex.
    """
    buckets: dict[tuple, Bucket] = defaultdict(Bucket)
    # a group without a momentum of its own has one where a scheduler wrote it
    shared = {
        rule: [name for name in {**defaults, "peak_lr": 0, "momentum": 0} if name not in _VIEW_SETTINGS]
        for rule, defaults in rule_defaults.items()
    }
    for group in param_groups:
        settings = _settings_key(group, shared[group["rule"]])
        for i, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise MuonlabError(
                    f"the gradient of {parameter_names(group)[i]} is sparse; only dense gradients are supported"
                )
            if not param.is_floating_point():
                raise not_real(param, parameter_names(group)[i])
            spread = getattr(param, "device_mesh", None)
            bucket = buckets[param.device, param.dtype, group["rule"], settings, spread]
            bucket.params.append(param)
            bucket.grads.append(grad)
            bucket.groups.append(group)
    return list(buckets.values())


def _settings_key(group: Group, names: list[str]) -> tuple:
    """The settings that groups must have in common to be updated together, hashable."""
    key = tuple([id(v) if isinstance(v := group.get(name), Tensor) else v for name in names])
    try:
        hash(key)
    except TypeError:  # a list was written into the group since it was added
        prepare_group(group["rule"], group)
        return _settings_key(group, names)
    return key


def not_real(param: Tensor, name: str) -> MuonlabError:
    """The error for a parameter that no rule can update."""
    return MuonlabError(f"{name} is {param.dtype}; only real floating-point parameters can be optimized")
