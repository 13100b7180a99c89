"""A rule says how the parameters of a group are updated; RULES holds every rule by name.

A rule is a chain of stages: momentum, transform (orthogonalise, precondition, sign), scale, and what is done to the
weights (decay, step). `muon_rule.py` and `adamw_rule.py` are two of them. A new one is one file, in the package or in a
user's own code: a class with its settings, its buffers and `update`, registered under a name. Lion (Chen et al., arXiv
2302.06675, algorithm 2), whole:

    @dataclass(frozen=True, kw_only=True)
    class LionSettings:
        lr: NonNegative = 1e-4
        betas: tuple[Average, Average] = (0.9, 0.99)
        weight_decay: NonNegative = 0.0

    @register_rule("lion")
    class LionRule(Rule):
        settings = LionSettings
        buffers = ("momentum_buffer",)

        def update(self, batch):
            s, W, g, m = batch.settings(LionSettings), batch.params, batch.grads, batch.buffers("momentum_buffer")
            c = torch._foreach_lerp(m, g, 1 - s.betas[0])    # c = beta1 m + (1 - beta1) g
            torch._foreach_lerp_(m, g, 1 - s.betas[1])       # m <- beta2 m + (1 - beta2) g
            torch._foreach_mul_(W, 1 - s.lr * s.weight_decay)
            torch._foreach_add_(W, [x.sign_() for x in c], alpha=-s.lr)

Its groups are then `{"params": [...], "rule": "lion", "lr": 1e-4}`, in any of the package's optimizers, and
`parameter_groups(model, "lion")` puts a whole model under it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.sharded import local_part
from muonlab.settings.check import check

if TYPE_CHECKING:  # a torch without distributed has no such class
    from torch.distributed import ProcessGroup

Settings = TypeVar("Settings")
RuleClass = TypeVar("RuleClass", bound="type[Rule]")
# From NumPy's kinds of numbers to Python's.
_PLAIN = ((np.bool_, bool), (np.integer, int), (np.floating, float), (np.str_, str))


@dataclass(frozen=True)
class Batch:
    """Parameters that are updated together: of one device and dtype, under equal settings.

    params: what the update is written to, in fp32 at least; a sharded parameter is this rank's rows of it.
    grads: their gradients, in the same dtype and never written to.
    states: the entries that the rule keeps for each, to be written to.
    groups: the parameter group of each; all have equal settings, but for how they are seen as matrices.
    whole: the parameters before sharding, for their shapes and ranks.
    process_group: the ranks that hold the same parameters and share the work; None: this process does it all.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    whole: list[Tensor]
    process_group: "ProcessGroup | None" = None

    def settings(self, kind: type[Settings]) -> Settings:
        """The settings that the batch has in common; a number may be a tensor that a captured graph reads."""
        return kind(**{name: self.groups[0][name] for name in setting_names(kind)})

    def buffers(self, name: str) -> list[Tensor]:
        """One buffer of every parameter, as views to be written to: the rows that `params` has."""
        return [local_part(state[name]) for state in self.states]

    def subset(self, members: Sequence[int]) -> "Batch":
        """Some of the parameters, by their places."""
        return Batch(
            params=[self.params[i] for i in members],
            grads=[self.grads[i] for i in members],
            states=[self.states[i] for i in members],
            groups=[self.groups[i] for i in members],
            whole=[self.whole[i] for i in members],
            process_group=self.process_group,
        )


@dataclass(frozen=True, kw_only=True)
class MatrixSettings:
    """Settings of a rule that sees its parameters as matrices, as in `MatrixView`; a rule whose `settings` derive from
    it takes no other parameters, and is routed the hidden matrices of a model alone."""

    row_blocks: Any = 1
    col_blocks: Any = 1
    flatten: bool = False


class Rule:
    """How parameters are updated. `register_rule` makes one instance, which holds no state of its own.

    name: the name that it is registered under.
    settings: the dataclass of a group's settings and their defaults; annotations say what is allowed.
    buffers: entries of a parameter's state that have its shape and dtype (fp32 at least), zero at first and sharded as
        it is. The first is the momentum, which a clip may scale.
    """

    name: ClassVar[str]
    settings: ClassVar[type]
    buffers: ClassVar[tuple[str, ...]] = ()

    @property
    def takes_matrices(self) -> bool:
        """Whether it updates matrices alone."""
        return issubclass(self.settings, MatrixSettings)

    def prepare(self, group: dict[str, Any]) -> None:
        """Check the settings of a group, plain values (`plain_value`), in place; raises MuonlabError."""
        for name, annotation in _annotations(self.settings).items():
            group[name] = check_setting(annotation, group[name], f"{name} of {group_under(self.name)}")

    def check_parameter(self, param: Tensor, name: str, group: dict[str, Any]) -> None:
        """Raise MuonlabError if the rule cannot update this parameter."""

    def describe_view(self, shape: torch.Size, group: dict[str, Any]) -> str:
        """In words, which matrices the rule sees, for the routing table; "-": entry by entry."""
        return "-"

    def state_shapes(self, shape: torch.Size, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        """The shapes of all entries that a parameter's state may have; None for a number."""
        return dict.fromkeys(self.buffers, tuple(shape))

    def required_state(self) -> tuple[str, ...]:
        """The entries that the state of every updated parameter has."""
        return self.buffers

    def init_state(self, param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The state before the first update."""
        return {name: torch.zeros_like(param, dtype=dtype) for name in self.buffers}

    def update(self, batch: Batch) -> None:
        """One step of every parameter of the batch, in place."""
        raise NotImplementedError


RULES: dict[str, Rule] = {}


def register_rule(name: str) -> Callable[[RuleClass], RuleClass]:
    """Decorator of a Rule's class. Raises MuonlabError if the name is taken."""

    def add(rule: RuleClass) -> RuleClass:
        if name in RULES:
            raise MuonlabError(f"an update rule '{name}' is already registered")
        rule.name = name
        RULES[name] = rule()
        return rule

    return add


def group_under(rule: str) -> str:
    """ "a muon group", "an adamw group": what errors call a group."""
    return f"{'an' if rule[0] in 'aeiou' else 'a'} {rule} group"


def setting_names(settings: type) -> tuple[str, ...]:
    """The names of a rule's settings, in their order."""
    return tuple(settings.__dataclass_fields__)  # type: ignore[attr-defined]  # not fields(), for compiled steps


@cache
def _annotations(settings: type) -> dict[str, Any]:
    hints = get_type_hints(settings, include_extras=True)
    return {name: hints[name] for name in setting_names(settings)}


def check_setting(annotation: Any, value: Any, place: str) -> Any:
    """The value as its annotation has it; raises MuonlabError, in a sentence that begins with `place`, if it cannot be.

    A one-element tensor passes unread: a learning rate that a captured graph reads from the device.
    """
    return value if isinstance(value, Tensor) and value.numel() == 1 else check(annotation, value, place)


def plain_value(value: Any) -> Any:
    """The same value without NumPy's types and lists, so that `torch.load(weights_only=True)` takes it.

    NumPy's numbers become Python's, exactly but for those of more than 64 bits; arrays, lists and tuples become
    tuples of plain values. Tensors, names, dicts and everything else stay what they are.
    """
    if isinstance(value, np.generic):
        kind = next((plain for numpy, plain in _PLAIN if isinstance(value, numpy)), None)
        return value if kind is None else kind(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(map(plain_value, value)) if isinstance(value, list | tuple) else value
