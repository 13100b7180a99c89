"""One torch.optim.Optimizer for all parameters of a run: every group under its own rule, then an optional
clip.

One object means one step count, one state dict, one learning-rate schedule, and a training loop that never
asks which optimizer it has.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim import adamw_rule, muon_rule
from muonlab.optim.checks import check_choice, check_number
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.routing import Route

RULES = {"muon": muon_rule, "adamw": adamw_rule}
# What a group may hold besides settings, and in what groups that are updated together may differ.
_NOT_SETTINGS = ("params", "param_names", "rule", "name", "reasons", "initial_lr", "peak_lr", "lr_scale")
_VIEW_SETTINGS = ("row_blocks", "col_blocks", "flatten")
_PER_GROUP = {"params", "param_names", "name", "reasons", "initial_lr", *_VIEW_SETTINGS}


class CombinedOptimizer(torch.optim.Optimizer):
    """Parameter groups under the rules `muon` and `adamw`; `Muon` and `AdamW` are its two faces.

    params: tensors, (name, tensor) pairs, or groups {"params": ..., "rule": "muon" | "adamw", "name": ...,
        settings}, where "lr_scale" multiplies the group's lr.
    rule: the rule of groups that name none.
    defaults: for every rule that groups may have, the settings that a group does not give.
    clip: a QKClip that acts after every update, or None.
    """

    def __init__(
        self, params: ParamsT, rule: str, defaults: Mapping[str, dict[str, Any]], clip: QKClip | None = None
    ):
        self._rule, self._rule_defaults = rule, dict(defaults)
        self.clip = clip
        self.steps_done = 0
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; raises MuonlabError for unknown rules or settings and what cannot be updated."""
        rule = param_group.get("rule", self._rule)
        check_choice("rule of a parameter group", rule, self._rule_defaults)
        defaults = self._rule_defaults[rule]
        for name in param_group:
            if name not in defaults and name not in _NOT_SETTINGS:
                raise unknown_name(f"setting of a {rule} group", name, defaults)
        group = {"name": f"group_{len(self.param_groups)}", **defaults, **param_group, "rule": rule}
        RULES[rule].prepare(group)
        scale = group.pop("lr_scale", 1.0)
        check_number("lr_scale", scale)
        if scale != 1.0:  # else keep a tensor that a captured graph reads
            group["lr"] = group["lr"] * scale
        group.setdefault("peak_lr", float(group["lr"]))
        super().add_param_group(group)
        try:
            self._check_parameters(group)
        except MuonlabError:
            self.param_groups.pop()
            raise

    def _check_parameters(self, group: dict[str, Any]) -> None:
        if len(set(group["params"])) < len(group["params"]):
            raise MuonlabError(
                f"group '{group['name']}' holds a parameter twice, which would update it twice"
            )
        for param, name in zip(group["params"], _names(group), strict=True):
            if not param.is_floating_point():
                raise MuonlabError(
                    f"{name} is {param.dtype}; only real floating-point parameters are optimized"
                )
            RULES[group["rule"]].check_parameter(param, name, group)

    @property
    def routing(self) -> list[Route]:
        """One row a parameter: its name, shape, group, rule, matrix view and why it is there."""
        rows = []
        for group in self.param_groups:
            reasons = group.get("reasons") or ["given in this group"] * len(group["params"])
            for name, param, reason in zip(_names(group), group["params"], reasons, strict=True):
                view = RULES[group["rule"]].describe_view(param.shape, group)
                rows.append(Route(name, tuple(param.shape), group["name"], group["rule"], view, reason))
        return rows

    def observe(self, max_logits: Mapping[str, Tensor]) -> None:
        """Tell the clip the max logits, (heads,) per layer, of one training forward; nothing without a clip.

        Call it after the forward of every micro-batch of a step, not after evaluation.
        """
        if self.clip is not None:
            self.clip.observe(max_logits)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then clip by the observed max logits and forget those.

        A parameter whose gradient is None is left alone: no decay, no momentum. Gradients are never written
        to. Returns what the closure returned. Raises MuonlabError for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for params, groups in self._buckets():
            self._update(params, groups)
        if self.clip is not None:
            self.clip.apply(self.steps_done, self._momentum_of)
        self.steps_done += 1
        return loss

    def gammas(self) -> dict[str, Tensor]:
        """The (heads,) factors of the last step per layer, 1 where nothing was clipped; {} without a clip."""
        return {} if self.clip is None else self.clip.gammas()

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict with the step count and the clip's history: all that a resumed run needs."""
        state = super().state_dict()
        state["steps_done"] = self.steps_done
        if self.clip is not None:
            state["clip"] = self.clip.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned exactly, also into parameters of another dtype.

        Buffers keep at least fp32, whatever the parameters. A state saved without a clip loads into an
        optimizer with one, whose history then begins empty, and the other way round. Raises MuonlabError for
        a state of other groups, parameters or rules.
        """
        _check_same_groups(self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        # torch has cast buffers to the parameters' dtype: fp32 buffers of bf16 parameters lost bits.
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    dtype = value.dtype if name == "step" else _state_dtype(param)
                    self.state[param][name] = value.to(param.device, dtype, copy=True)
        self.steps_done = state_dict["steps_done"]
        if self.clip is not None and "clip" in state_dict:
            self.clip.load_state_dict(state_dict["clip"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("_rule", "_rule_defaults", "clip", "steps_done")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _buckets(self) -> list[tuple[list[nn.Parameter], list[dict[str, Any]]]]:
        """Parameters that have gradients, together where device, dtype, rule and settings are the same."""
        buckets: dict[tuple, tuple[list[nn.Parameter], list[dict[str, Any]]]] = defaultdict(lambda: ([], []))
        for group in self.param_groups:
            settings = tuple(
                id(value) if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name not in _PER_GROUP
            )
            for i, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    raise MuonlabError(
                        f"the gradient of {_names(group)[i]} is sparse; only dense ones are supported"
                    )
                params, groups = buckets[param.device, param.dtype, group["rule"], settings]
                params.append(param)
                groups.append(group)
        return list(buckets.values())

    def _update(self, params: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
        """Update one bucket; parameters below fp32 are updated in fp32 and rounded once."""
        rule, dtype = RULES[groups[0]["rule"]], _state_dtype(params[0])
        for param in params:
            if not self.state[param]:
                self.state[param] = rule.init_state(param, dtype)
        grads = [p.grad if p.grad.dtype is dtype else p.grad.to(dtype) for p in params]
        work = params if params[0].dtype is dtype else [param.to(dtype) for param in params]
        rule.update(work, grads, [self.state[p] for p in params], groups)
        if work is not params:
            torch._foreach_copy_(params, work)

    def _momentum_of(self, param: nn.Parameter) -> Tensor | None:
        state = self.state.get(param, {})
        return state.get("momentum_buffer", state.get("exp_avg"))


def _state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's buffers and of its update: its own, but at least fp32."""
    return torch.promote_types(param.dtype, torch.float32)


def _names(group: dict[str, Any]) -> list[str]:
    """What to call a group's parameters: their own names, or their places."""
    return group.get("param_names") or [f"{group['name']}[{i}]" for i in range(len(group["params"]))]


def _check_same_groups(ours: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Raise MuonlabError unless the saved groups hold the same parameters under the same rules."""
    if len(ours) != len(saved):
        raise MuonlabError(f"the saved state has {len(saved)} parameter groups, this optimizer {len(ours)}")
    for here, there in zip(ours, saved, strict=True):
        label = f"parameter group '{here['name']}'"
        if there.get("rule") != here["rule"]:
            raise MuonlabError(f"{label} is under {here['rule']}, but was saved under {there.get('rule')}")
        names = here.get("param_names"), there.get("param_names")
        if len(there["params"]) != len(here["params"]) or (all(names) and names[0] != names[1]):
            raise MuonlabError(f"{label} holds other parameters than the saved state")
