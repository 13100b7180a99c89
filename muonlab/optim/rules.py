"""A rule says how the parameters of a group are updated; RULES holds every rule by name.

A rule is a chain of stages: momentum, transform (orthogonalise, precondition, sign), scale, apply (decay, step).
`muon_rule.py` and `adamw_rule.py` are two of them. A new one is one file, in this folder or in a user's own code: a
class with its settings, its buffers and `update`, registered under a name. Polyak's heavy ball (1964), whole:

    @dataclass(frozen=True, kw_only=True)
    class HeavyBallSettings:
        lr: NonNegative = 0.1
        momentum: Average = 0.9
        weight_decay: NonNegative = 0.0

    @optimizer_of_its_name
    @register_rule("heavy_ball")
    class HeavyBallRule(Rule):
        settings = HeavyBallSettings
        buffers = ("momentum_buffer",)

        def update(self, batch):
            s, W, g, m = batch.settings(HeavyBallSettings), batch.params, batch.grads, batch.buffers("momentum_buffer")
            torch._foreach_mul_(m, s.momentum)
            torch._foreach_add_(m, g)                            # m <- mu m + g
            torch._foreach_mul_(W, 1 - s.lr * s.weight_decay)    # W <- (1 - lr λ) W - lr m
            torch._foreach_add_(W, m, alpha=-s.lr)

Its groups are then `{"params": [...], "rule": "heavy_ball", "lr": 0.1}`, in any of the package's optimizers, and
`build_optimizer("heavy_ball", model)` (whole_model.py) puts a whole model under it. A rule whose settings derive from
`MatrixSettings` gets the hidden matrices of a model; `batch.matrices` gives them to it whole, however they are cut into
heads or spread over ranks.

A stage that a setting chooses by name is one function in a `Stages` table: `@SCALE_RULES.register` (`muon_rule.py`)
makes `Muon(..., scale_rule="NAME")` of the function NAME, from any file.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.matrix_view import Group, Matrices, MatrixSettings, MatrixView, State, matrices
from muonlab.optim.ranks import Ranks, check_placement, local_part
from muonlab.settings.check import Average, NonNegative, check

Settings = TypeVar("Settings")
RuleClass = TypeVar("RuleClass", bound="type[Rule]")
Stage = TypeVar("Stage", bound=Callable[..., object])
# What a group may hold besides settings: its description, and what torch's schedulers write into it.
DESCRIPTION = ("params", "param_names", "rule", "name", "reasons")
SCHEDULED = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
# From NumPy's kinds of numbers to Python's.
_PLAIN = ((np.bool_, bool), (np.integer, int), (np.floating, float), (np.str_, str))


@dataclass(frozen=True)
class Batch:
    """Parameters that are updated together: of one device and dtype, under equal settings.

    params: what the update is written to, in fp32 at least; a sharded parameter is this rank's rows of it.
    grads: their gradients, in the same dtype and never written to.
    states: the entries that the rule keeps for each, to be written to.
    groups: the parameter group of each; all have equal settings, but for how they are seen as matrices.
    whole: the parameters before sharding, for their shapes.
    ranks: those that share the work on matrices; None: this process does it all.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    groups: list[Group]
    whole: list[Tensor]
    ranks: Ranks | None = None

    def settings(self, kind: type[Settings]) -> Settings:
        """The settings that the batch has in common; a number may be a tensor that a captured graph reads."""
        return kind(**{name: self.groups[0][name] for name in setting_names(kind)})

    def buffers(self, name: str) -> list[Tensor]:
        """One buffer of every parameter, as views to be written to: the rows that `params` has."""
        return [local_part(state[name]) for state in self.states]

    @property
    def betas(self) -> tuple[float, ...]:
        """The `betas` of the groups; the first is the `momentum` that a scheduler wrote into them, if one did."""
        first, *rest = self.groups[0]["betas"]
        return self.groups[0].get("momentum", first), *rest

    @property
    def views(self) -> list[MatrixView]:
        """How each parameter is seen as matrices, under a rule with MatrixSettings."""
        return [MatrixView.of(group) for group in self.groups]

    def matrices(self, tensors: Sequence[Tensor], entries: Sequence[str] = ()) -> Matrices:
        """The whole matrices of tensors that are held like `params`: all of them, or this rank's share.

        entries: with what the states keep of each block of matrices under these names, the same on every rank after
        `join`.
        """
        if self.ranks is None:
            return matrices(tensors, self.views, self.states, entries)
        return self.ranks.matrices(tensors, [W.shape for W in self.whole], self.views, self.states, entries)

    def by_shape(self) -> "list[Batch]":
        """One batch for each shape of matrices; one of a shape and of its transpose are together.

        Ranks that share the work keep one batch, because a few matrices of one shape could not be dealt out evenly.
        """
        if self.ranks is not None:
            return [self]
        classes: dict[frozenset[frozenset[int]], list[int]] = defaultdict(list)
        for i, (view, W) in enumerate(zip(self.views, self.whole, strict=True)):
            classes[frozenset(frozenset(block[-2:]) for block in view.block_shapes(W.shape))].append(i)
        return [self._subset(members) for members in classes.values()]

    def _subset(self, members: Sequence[int]) -> "Batch":
        return Batch(
            params=[self.params[i] for i in members],
            grads=[self.grads[i] for i in members],
            states=[self.states[i] for i in members],
            groups=[self.groups[i] for i in members],
            whole=[self.whole[i] for i in members],
            ranks=self.ranks,
        )

    def by_number(self, name: str) -> "list[tuple[int, Batch]]":
        """Each value that a plain number of the states has, with the batch of the parameters that have it."""
        classes: dict[int, list[int]] = defaultdict(list)
        for i, state in enumerate(self.states):
            classes[state[name]].append(i)
        return [(value, self._subset(members)) for value, members in sorted(classes.items())]


class Stages(dict[str, Stage], Generic[Stage]):
    """The functions that can be one stage of a rule, by name; the setting `setting` of a group chooses one."""

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting

    def register(self, function: Stage) -> Stage:
        """Decorator of a stage, whose name is the function's. Raises MuonlabError if the name is taken."""
        name = function.__name__
        if name in self:
            raise MuonlabError(f"a {self.setting} '{name}' is already registered")
        self[name] = function
        return function


ShapeOf = Callable[[Sequence[int]], tuple[int, ...]]  # of an entry, from that of a stack (..., rows, cols)


class MatrixStages(Stages[Stage]):
    """Stages on whole matrices, any number of which a setting chains, with what each keeps from step to step."""

    def __init__(self, setting: str):
        super().__init__(setting)
        self.entries: dict[str, dict[str, ShapeOf]] = {}
        self.read_gradients: set[str] = set()
        self.on_host: set[str] = set()

    def keeping(
        self, gradient: bool = False, host: bool = False, **entries: ShapeOf
    ) -> Callable[[Stage], Stage]:
        """Decorator: `register` for a stage that keeps `entries` of every stack of matrices, zero at first, or reads
        its gradient. Every rank keeps them whole, also of parameters that FSDP2 shards.

        host: whether a part of it runs on the host, so that no captured graph can repeat it."""

        def add(stage: Stage) -> Stage:
            self.register(stage)
            self.entries[stage.__name__] = entries
            if gradient:
                self.read_gradients.add(stage.__name__)
            if host:
                self.on_host.add(stage.__name__)
            return stage

        return add


def chosen(value: str | Sequence[str]) -> tuple[str, ...]:
    """The names of stages that a setting holds: one, or a list of them."""
    return (value,) if isinstance(value, str) else tuple(value)


class Rule(ABC):
    """How parameters are updated. `register_rule` makes one instance, which holds no state of its own.

    name: the name that it is registered under.
    settings: the dataclass of a group's settings and their defaults; annotations say what is allowed.
    buffers: entries of a parameter's state that have its shape and dtype (fp32 at least), zero at first and sharded as
        it is. The first is the momentum, which a clip may scale.
    numbers: entries that are one fp32 number each, with their first values, such as a count of steps.
    stages: the tables of the stages that settings choose by name.
    """

    name: ClassVar[str]
    settings: ClassVar[type]
    buffers: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[Mapping[str, float]] = {}
    stages: ClassVar[tuple[Stages[Any], ...]] = ()

    @property
    def is_average(self) -> bool:
        """Whether evaluation reads something else than the weights."""
        return type(self).readout is not Rule.readout

    @property
    def takes_matrices(self) -> bool:
        """Whether it updates matrices alone."""
        return issubclass(self.settings, MatrixSettings)

    def table(self, setting: str) -> Stages[Any]:
        """The table of the stages that `setting` chooses from."""
        return next(table for table in self.stages if table.setting == setting)

    def prepare(self, group: Group) -> None:
        """Check the settings of a group, plain values (`plain_value`), in place; raises MuonlabError."""
        for name, annotation in _annotations(self.settings).items():
            group[name] = check_setting(annotation, group[name], f"{name} of {group_under(self.name)}")
        for table in self.stages:
            for stage in chosen(group[table.setting]):
                if stage not in table:
                    raise unknown_name(f"{table.setting} of {group_under(self.name)}", stage, table)
        if "momentum" in group:  # a setting, or what a scheduler writes into the groups of all rules
            check_setting(Average, group["momentum"], f"momentum of {group_under(self.name)}")
        if self.takes_matrices:
            MatrixView.of(group)

    def check_parameter(self, param: Tensor, name: str, group: Group) -> None:
        """Raise MuonlabError if the rule cannot update this parameter."""
        if self.takes_matrices:
            check_placement(param, name)
            MatrixView.of(group).check(param.shape, name)

    def describe_view(self, shape: torch.Size, group: Group) -> str:
        """In words, which matrices the rule sees, for the routing table; "-": entry by entry."""
        return MatrixView.of(group).describe(shape) if self.takes_matrices else "-"

    def state_shapes(self, shape: torch.Size, group: Group) -> dict[str, tuple[int, ...] | None]:
        """The shapes of all entries that a parameter's state may have; None for a number."""
        return {**dict.fromkeys(self.buffers, tuple(shape)), **dict.fromkeys(self.numbers, ())}

    def required_state(self) -> tuple[str, ...]:
        """The entries that the state of every updated parameter has."""
        return (*self.buffers, *self.numbers)

    def host_part(self, group: Group) -> str | None:
        """What of an update runs on the host, so that no captured graph can repeat it: a stage; None: nothing."""
        for table in self.stages:
            for stage in chosen(group[table.setting]):
                if isinstance(table, MatrixStages) and stage in table.on_host:
                    return f"{table.setting}={stage}"
        return None

    def init_state(self, param: Tensor, dtype: torch.dtype) -> State:
        """The state before the first update."""
        numbers = {
            name: torch.full((), value, dtype=torch.float32, device=param.device)
            for name, value in self.numbers.items()
        }
        return {**numbers, **{name: torch.zeros_like(param, dtype=dtype) for name in self.buffers}}

    def readout(self, W: Tensor, state: State, group: Group) -> Tensor | None:
        """What evaluation reads in place of the weights, in a new tensor held like W; None: the weights."""
        return None

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """One step of every parameter of the batch, in place."""


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


def prepare_group(rule: str, group: Group) -> None:
    """Make the settings of a group plain values, in place, and check them; raises MuonlabError."""
    group.update(plain_settings(group))
    RULES[rule].prepare(group)
    for name in (*SCHEDULED, "peak_lr"):
        if name in group:
            check_setting(NonNegative, group[name], name)


def plain_settings(group: Group) -> Group:
    """What a group holds besides its description, as plain values."""
    return {name: plain_value(value) for name, value in group.items() if name not in DESCRIPTION}


def parameter_names(group: Group) -> list[str]:
    """What to call a group's parameters: their own names, or their places."""
    return group.get("param_names") or [f"{group['name']}[{i}]" for i in range(len(group["params"]))]


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


def check_setting(annotation: Any, value: object, place: str) -> Any:
    """The value as its annotation has it; raises MuonlabError, in a sentence that begins with `place`, if it cannot be.

    A one-element tensor passes unread: a learning rate that a captured graph reads from the device.
    """
    return value if isinstance(value, Tensor) and value.numel() == 1 else check(annotation, value, place)


def plain_value(value: object) -> Any:
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
