"""One torch.optim.Optimizer for all parameters of a run: every group under its own rule, then an optional
clip.

One object means one step count, one state dict, one learning-rate schedule, and a training loop that never
asks which optimizer it has.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.buckets import Bucket, not_real, together
from muonlab.optim.matrix_view import Group, State
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.quack import QuacK, slowed_weights
from muonlab.optim.ranks import Ranks, local_part
from muonlab.optim.routing import Route
from muonlab.optim.rules import (
    DESCRIPTION,
    RULES,
    SCHEDULED,
    Batch,
    check_setting,
    group_under,
    parameter_names,
    plain_settings,
    prepare_group,
    setting_names,
)
from muonlab.optim.saved_state import check_entries, checked_state, moved, restore_buffers, state_dtype
from muonlab.optim.weight_averages import WeightAverages
from muonlab.settings.check import NonNegative

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NOT_SETTINGS = (*DESCRIPTION, *SCHEDULED, "peak_lr", "lr_scale")


class CombinedOptimizer(torch.optim.Optimizer):
    """Parameter groups under any of the registered rules; `Muon`, `AdamW` and others are its faces.

    params: tensors, (name, tensor) pairs, or groups {"params": ..., "rule": "muon", "name": ..., settings}, where
        "lr_scale" multiplies the group's lr.
    rule: the rule of groups that name none.
    defaults: by rule, an object with all its settings, which its groups have where they give none; None and rules
        that are not here: the rule's own defaults.
    clip: a QKClip that acts after every update, or None.
    quack: a QuacK that sets the rates of query and key rows within every update, or None.
    averages: a WeightAverages over the path of the weights, or None; a rule that is itself an average is refused.

    process_group: an attribute, None at first: then this process orthogonalises every matrix. Set it to the ranks of
    torch.distributed that hold the same parameters and receive equal gradients, as under DDP
    (`torch.distributed.group.WORLD`), and each orthogonalises its share of the matrices and gets the results of the
    others. All of them must then take the same steps. Copies and pickles begin with None. Parameters that FSDP2 has
    sharded bring their ranks along; their buffers are sharded too, and NorMuon's second moments whole on every rank.

    Every scheduler of torch works. `OneCycleLR` and `CyclicLR` cycle the momentum of muon groups and the first
    beta of adamw groups alike: a `momentum` that they write into an adamw group beside muon groups replaces
    its first beta. A single number for lr or momentum goes to all groups; a list has one
    number per group. (Their `max_lr` replaces a group's lr; `peak_lr` stays the lr that the group was made with.)

    A CUDA graph may hold forward, backward and step, captured after a step has made the state; a learning rate that
    is to change must be a tensor, written in place. Replays are not counted: `steps_done`, and of a clip the totals and
    triggers of `trace()`, stay behind. What would not be a step in a replay is refused at the capture.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str,
        defaults: Mapping[str, object] | None = None,
        clip: QKClip | None = None,
        quack: QuacK | None = None,
        averages: WeightAverages | None = None,
    ):
        self._rule, self.averages = rule, averages
        self._rule_defaults: dict[str, Group] = {}
        for name, settings in {rule: None, **(defaults or {})}.items():
            self._add_rule(name, settings)
        self.clip, self.quack = clip, quack
        self.process_group: ProcessGroup | None = None
        self.steps_done = 0
        super().__init__(params, dict(self._rule_defaults[rule]))

    def _add_rule(self, rule: str, settings: object = None) -> None:
        """Take the settings of a rule as defaults of its groups; None: the rule's own."""
        if rule not in RULES:
            raise unknown_name("rule of a parameter group", rule, RULES)
        if self.averages is not None and RULES[rule].is_average:
            raise MuonlabError(
                f"{rule} is an average of the weights itself; use it without lookahead and tail_share"
            )
        kind = RULES[rule].settings
        source = kind() if settings is None else settings
        values = {name: getattr(source, name) for name in setting_names(kind)}
        prepare_group(rule, values)
        self._rule_defaults[rule] = values

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; raises MuonlabError for unknown rules or settings and what cannot be updated.

        NumPy numbers become Python's and lists tuples.
        """
        rule = param_group.get("rule", self._rule)
        if rule not in self._rule_defaults:
            self._add_rule(rule)
        defaults = self._rule_defaults[rule]
        # Beside a scheduler's bounds, a momentum is the scheduler's; see the class.
        allowed = {*defaults, *_NOT_SETTINGS} | ({"momentum"} if "max_momentum" in param_group else set())
        for name in param_group:
            if name not in allowed:
                raise unknown_name(f"setting of {group_under(rule)}", name, defaults)
        group = {"name": f"group_{len(self.param_groups)}", **defaults, **param_group, "rule": rule}
        if not isinstance(group["name"], str):
            raise MuonlabError(f"the name of a parameter group must be text, not {group['name']!r}")
        prepare_group(rule, group)
        scale = group.pop("lr_scale", 1.0)
        check_setting(NonNegative, scale, "lr_scale")
        if scale != 1.0:  # else keep a tensor that a captured graph reads
            if "lr" not in group:
                raise MuonlabError(f"{group_under(rule)} has no learning rate that lr_scale could multiply")
            group["lr"] = group["lr"] * scale
        if "lr" in group:
            group.setdefault("peak_lr", float(group["lr"]))
        own = set(group)
        super().add_param_group(group)
        for name in self.defaults.keys() - own:  # torch gives every group the first rule's defaults
            del group[name]
        try:
            self._check_parameters(group)
        except MuonlabError:
            self.param_groups.pop()
            raise

    def _check_parameters(self, group: Group) -> None:
        if len(set(group["params"])) < len(group["params"]):
            raise MuonlabError(
                f"group '{group['name']}' lists the same parameter twice, which would update it twice"
            )
        for param, name in zip(group["params"], parameter_names(group), strict=True):
            if not param.is_floating_point():
                raise not_real(param, name)
            RULES[group["rule"]].check_parameter(param, name, group)

    @property
    def routing(self) -> list[Route]:
        """One row per parameter: its name, shape, group, rule, matrix view, and why it is there."""
        rows = []
        for group in self.param_groups:
            reasons = group.get("reasons") or ["listed in this group"] * len(group["params"])
            for name, param, reason in zip(parameter_names(group), group["params"], reasons, strict=True):
                view = RULES[group["rule"]].describe_view(param.shape, group)
                rows.append(Route(name, tuple(param.shape), group["name"], group["rule"], view, reason))
        return rows

    def observe(self, max_logits: Tensor) -> None:
        """Pass the max logits of one training forward, (layers, heads), to the clip; without a clip do nothing.

        Call it after the forward of every micro-batch of a step, not after evaluation.
        """
        if self.clip is not None:
            self.clip.observe(max_logits)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then clip by the observed max logits and forget those.

        A parameter whose gradient is None is left alone: no decay, no change of momentum. Gradients are never written
        to. Buffers follow parameters that were moved or changed their dtype (`model.double()`) since the last
        step, and keep at least fp32. Returns what the closure returned. Raises MuonlabError, before anything is
        updated, for a sparse gradient, a parameter made complex, and for max logits that a clip needs and has
        not seen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling() and torch.cuda.is_initialized():
            self._require_capturable()
        buckets = together(self.param_groups, self._rule_defaults)
        if self.clip is not None:
            self.clip.require_maxima(self.steps_done)
        factors = {} if self.quack is None else self.quack.factors()
        origins: dict[Tensor, Tensor] = {}
        for bucket in buckets:
            batch = self._batch(bucket)
            if self.averages is not None:
                origins |= self.averages.origins(bucket.params, self.state)
            slowed = slowed_weights(batch.params, [factors.get(param) for param in bucket.params])
            RULES[bucket.rule].update(batch)
            for weight in slowed:
                weight.slow()
            if bucket.below_fp32:
                torch._foreach_copy_(list(map(local_part, bucket.params)), batch.params)
        if self.clip is not None:
            self.clip.apply(self.steps_done, self._momentum_of)
        if self.averages is not None:
            for bucket in buckets:
                for param, group in zip(bucket.params, bucket.groups, strict=True):
                    self.averages.follow(param, origins.get(param), self.state[param], group, self.steps_done)
        self.steps_done += 1
        return loss

    def _require_capturable(self) -> None:
        """Raise MuonlabError if a CUDA graph is being captured whose replays would silently not be steps."""
        if not torch.cuda.is_current_stream_capturing():
            return
        parts = [RULES[group["rule"]].host_part(group) for group in self.param_groups]
        on_host = [part for part in parts if part is not None]
        if self.averages is not None:
            on_host.append("lookahead or a tail average")
        if self.clip is not None and (self.clip.windows is not None or self.clip.average):
            on_host.append("a clip with windows or a running average")
        if on_host:
            raise MuonlabError(
                f"a CUDA graph cannot hold a step with {on_host[0]}, a part of which runs on the host and not in"
                " replays; capture the forward and backward alone and call step() after each replay"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, parameters are what their rules evaluate at; after it, what they were, to the bit.

        Most rules evaluate at the weights, which are then left alone; schedule-free AdamW and `averages` do not.
        """
        kept = []
        try:
            for group in self.param_groups:
                rule = RULES[group["rule"]]
                for param in group["params"]:
                    if state := self.state.get(param):
                        here = local_part(param.detach())
                        averages = self.averages
                        value = (
                            rule.readout(here, state, group)
                            if averages is None
                            else averages.readout(param, state)
                        )
                        if value is not None:
                            kept.append((here, here.clone()))
                            here.copy_(value)
            yield
        finally:
            for here, weights in kept:
                here.copy_(weights)

    def gammas(self) -> Tensor | None:
        """The clip's factors of the last step, (layers, heads), 1 where nothing was clipped; None without a clip."""
        return None if self.clip is None else self.clip.gammas()

    def state_dict(self) -> State:
        """torch's state dict with the step count and the clip's history: all that a resumed run needs.

        It holds tensors and plain Python values alone, also where a scheduler wrote NumPy numbers into groups.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update(plain_settings(group))
        state["steps_done"] = self.steps_done
        if self.clip is not None:
            state["clip"] = self.clip.state_dict()
        if self.quack is not None:
            state["quack"] = self.quack.state_dict()
        return state

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what `state_dict()` returned exactly, also into parameters of another dtype.

        Buffers keep at least fp32, whatever the parameters. Whole buffers load into sharded parameters, where every
        rank keeps its rows. A state saved without a clip loads into an
        optimizer with one, whose history then begins empty, and the other way round; so does one saved without QuacK,
        whose first norms are then those of the next step. Raises MuonlabError, and
        changes nothing, for a state that is incomplete or of other groups, parameters, shapes or rules.
        """
        check_entries("the saved optimizer state", state_dict, ())
        loaded: State = {}

        # As torch's own hooks, so that the user's run before the check and after the restoration.
        def check(_: torch.optim.Optimizer, state: State) -> State:
            loaded.update(checked_state(state, self.param_groups, self._rule_defaults))
            if self.clip is not None and "clip" in state:
                self.clip.check_state(state["clip"])
            if self.quack is not None and "quack" in state:
                self.quack.check_state(state["quack"])
            return loaded

        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True),
        )
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _restore(self, state: State) -> None:
        """Restore what torch does not: fp32 buffers of bf16 parameters exactly, the step count, the clip."""
        restore_buffers(state, self.param_groups, self.state)
        self.steps_done = state["steps_done"]
        if self.clip is not None and "clip" in state:
            self.clip.load_state_dict(state["clip"])
        if self.quack is not None and "quack" in state:
            self.quack.load_state_dict(state["quack"])

    def __getstate__(self) -> State:
        own = ("_rule", "_rule_defaults", "clip", "quack", "averages", "steps_done")
        state = {**super().__getstate__(), **{name: getattr(self, name) for name in own}}
        return {**state, "process_group": None}  # no other process could use it

    def _batch(self, bucket: Bucket) -> Batch:
        """What the rule of a bucket updates; parameters below fp32 as copies in fp32."""
        params = bucket.params
        rule, dtype = RULES[bucket.rule], state_dtype(params[0])
        for param in params:
            state = self.state.get(param)
            if not state:
                self.state[param] = rule.init_state(param, dtype)
            elif any(
                state[name].dtype is not dtype or state[name].device != param.device
                for name in rule.buffers[:1]
            ):
                self.state[param] = moved(state, param, rule)
        work = [param.to(dtype) for param in params] if bucket.below_fp32 else params
        return Batch(
            params=[local_part(param) for param in work],
            grads=[local_part(grad.to(dtype)) for grad in bucket.grads],  # no copy where the dtype is right
            states=[self.state[param] for param in params],
            groups=bucket.groups,
            whole=params,
            ranks=Ranks.of(params, self.process_group) if rule.takes_matrices else None,
        )

    def _momentum_of(self, param: Tensor) -> Tensor | None:
        state = self.state.get(param, {})
        names = [name for rule in self._rule_defaults for name in RULES[rule].buffers[:1]]
        return next((state[name] for name in names if name in state), None)
