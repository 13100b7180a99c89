"""One torch.optim.Optimizer for all parameters of a run: each group under its own rule, then an optional QK-Clip.

One object means one step count, one state dict and one learning-rate schedule, and a training loop that never
asks which optimizer it has.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from muonlab.errors import MuonlabError
from muonlab.optim import adamw_rule, muon_rule
from muonlab.optim.checks import check_choice, check_number, check_settings
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.routing import Route

RULES = {"muon": muon_rule, "adamw": adamw_rule}
# Keys of a group that are not settings of its rule: torch's own, and what says where a group came from.
_ANY_GROUP = ("params", "param_names", "rule", "name", "reasons", "initial_lr", "peak_lr", "lr_scale")
# Groups that differ in these only are updated together.
_NOT_SHARED = (
    "params",
    "param_names",
    "name",
    "reasons",
    "initial_lr",
    "row_blocks",
    "col_blocks",
    "flatten",
)


class CombinedOptimizer(torch.optim.Optimizer):
    """Parameter groups under the rules `muon` and `adamw`; `Muon` and `AdamW` are its two faces.

    params: tensors, (name, tensor) pairs, or groups {"params": ..., "rule": "muon" | "adamw", "name": ..., settings}.
    rule: the rule of groups that name none.
    defaults: for every rule that groups may have, its settings and what they are where a group does not set them.
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
        """Add parameters; raises MuonlabError for an unknown rule or setting and for a parameter that the rule refuses."""
        group = dict(param_group)
        rule = group.setdefault("rule", self._rule)
        check_choice("rule of a parameter group", rule, self._rule_defaults)
        settings = self._rule_defaults[rule]
        check_settings(f"setting of a {rule} group", group, [*settings, *_ANY_GROUP, *self.defaults])
        group = {**settings, **group}
        factor = group.pop("lr_scale", 1.0)
        check_number("lr_scale", factor)
        RULES[rule].prepare(group)
        group["lr"] = group["lr"] * factor
        group.setdefault("peak_lr", float(group["lr"]))
        group.setdefault("name", f"group_{len(self.param_groups)}")
        super().add_param_group(group)
        names = group.get("param_names") or [
            f"parameter {i} of group '{group['name']}'" for i in range(len(group["params"]))
        ]
        for param, name in zip(group["params"], names, strict=True):
            if param.is_complex():
                raise MuonlabError(f"{name} is complex ({param.dtype}); only real parameters are optimized")
            RULES[rule].check_parameter(param, name, group)

    @property
    def routing(self) -> list[Route]:
        """One row a parameter: name, shape, group, rule, matrix view and why it is there."""
        rows = []
        for group in self.param_groups:
            names = group.get("param_names") or [f"{group['name']}[{i}]" for i in range(len(group["params"]))]
            reasons = group.get("reasons") or ["given in this group"] * len(names)
            for name, param, reason in zip(names, group["params"], reasons, strict=True):
                view = RULES[group["rule"]].view_of(param.shape, group)
                rows.append(Route(name, tuple(param.shape), group["name"], group["rule"], view, reason))
        return rows

    def observe(self, max_logits: Mapping[str, Tensor]) -> None:
        """Tell the clip the max logits, (heads,) per layer, of one training forward; nothing without a clip.

        Call it after every micro-batch's forward of the step, not after evaluation passes.
        """
        if self.clip is not None:
            self.clip.observe(max_logits)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, clip by the observed max logits, and forget those.

        A parameter without a gradient is left alone: no decay, no momentum. Gradients are never written to.
        Returns what the closure returned. Raises MuonlabError for a sparse gradient.
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
        """torch's state dict and the step count and clip history: everything that a resumed run needs."""
        state = super().state_dict()
        state["steps_done"] = self.steps_done
        if self.clip is not None:
            state["clip"] = self.clip.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`'s answer exactly, also into parameters of another dtype.

        Buffers keep at least fp32, whatever the dtype of the parameters. A state saved without a clip loads into an
        optimizer with one, whose history then starts empty, and the reverse. Raises MuonlabError where a group is
        under another rule.
        """
        for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if saved.get("rule") != ours["rule"]:
                raise MuonlabError(
                    f"the saved group '{saved.get('name')}' is under {saved.get('rule')}, "
                    f"but group '{ours['name']}' here is under {ours['rule']}"
                )
        super().load_state_dict(state_dict)
        # torch casts buffers to the parameters' dtype, which loses bits of bf16 parameters' fp32 buffers.
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    dtype = value.dtype if name == "step" else _state_dtype(param)
                    self.state[param][name] = value.to(param.device, dtype, copy=True)
        self.steps_done = state_dict["steps_done"]
        if self.clip is not None and "clip" in state_dict:
            self.clip.load_state_dict(state_dict["clip"])

    def _buckets(self) -> list[tuple[list[nn.Parameter], list[dict[str, Any]]]]:
        """Parameters with gradients, together where device, dtype, rule and settings are the same."""
        buckets: dict[tuple, tuple[list[nn.Parameter], list[dict[str, Any]]]] = defaultdict(lambda: ([], []))
        for group in self.param_groups:
            settings = tuple(
                id(value) if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name not in _NOT_SHARED
            )
            for i, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    name = (
                        group["param_names"][i]
                        if "param_names" in group
                        else f"parameter {i} of '{group['name']}'"
                    )
                    raise MuonlabError(
                        f"the gradient of {name} is sparse; only dense gradients are supported"
                    )
                params, groups = buckets[(param.device, param.dtype, param.grad.dtype, settings)]
                params.append(param)
                groups.append(group)
        return list(buckets.values())

    def _update(self, params: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
        """Advance one bucket; parameters below fp32 are updated in fp32 and rounded once."""
        rule = RULES[groups[0]["rule"]]
        dtype = _state_dtype(params[0])
        for param in params:
            if not self.state[param]:
                self.state[param] = rule.init_state(param, dtype)
        work = [param if param.dtype is dtype else param.to(dtype) for param in params]
        rule.update(work, [p.grad.to(dtype) for p in params], [self.state[p] for p in params], groups)
        if work[0] is not params[0]:
            torch._foreach_copy_(params, work)

    def _momentum_of(self, param: nn.Parameter) -> Tensor | None:
        state = self.state.get(param, {})
        return state.get("momentum_buffer", state.get("exp_avg"))


def _state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's buffers and of its update: its own, but at least fp32."""
    return torch.promote_types(param.dtype, torch.float32)
