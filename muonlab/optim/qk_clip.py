"""QK-Clip: after the optimizer's update, scale back the query and key weights of heads whose logits passed tau.

Kimi K2 (arXiv 2507.20534), section 2.1 and algorithm 1. With S_h the largest logit of head h in the step's own
forward, gamma_h = min(1, tau / S_h). Key head g serves the query heads of its group, and

    kappa_g = (max over h in group g of gamma_h)^(1 - alpha)         scales the key rows of g
    gamma_h / kappa_g                                                scales the query rows of h

so every head's logits fall by exactly gamma_h, and a key head moves only if all its query heads passed tau. With
one query head a group this is the paper's rule (gamma^alpha on the query, gamma^(1 - alpha) on the key). Query
rows that meet a key shared by all heads (MLA's rotary part) carry gamma_h alone, as in the paper's MLA rule.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name
from muonlab.layout import AttentionLayout
from muonlab.optim.clip_history import ClipHistory
from muonlab.optim.clip_rows import ClipRows, MomentumOf


def head_gammas(max_logits: Tensor, tau: float) -> Tensor:
    """gamma = min(1, tau / S): exactly 1 where S <= tau, so also for S <= 0, and where S is infinite or NaN.

    A logit that is not finite says that training has diverged; no factor would mend it, and hiding it would
    only delay the news.
    """
    return torch.where((max_logits > tau) & max_logits.isfinite(), tau / max_logits, 1.0)


class QKClip:
    """The clip as an object beside any optimizer: `observe` after each training forward, `apply` after its update.

    layouts: one AttentionLayout per attention layer; a layout that says why it is `inert` is refused.
    tau: the logit above which a head is clipped; K2 uses 100, small models 30 to 100; inf only keeps the trace.
    alpha: in [0, 1], the share of a head's factor that its query carries, the key the rest; 0.5 in K2, 0 all on the
        key, 1 all on the query. Logits do not depend on it.
    maximum: what the caller passes as max logits: "signed" (K2) the largest logit, "absolute" the largest magnitude.
    per: "head" (K2), or "layer": every head of a layer takes the factor of its largest logit, K2's first version.
    windows: optimizer steps in which it acts, [[first, last), ...] counted from 0; last None: to the end of
        training; None: always; []: never.
    momentum: what a clipped head's momentum does: "keep" (every published implementation), "scale" by the weight's
        factor, "project" out its part along the head's weights.
    process_group: the ranks which hold the same heads (data and context parallel); None: all ranks.

    Layers, shapes and settings that do not fit raise MuonlabError.
    """

    def __init__(
        self,
        layouts: Iterable[AttentionLayout],
        tau: float = 100.0,
        alpha: float = 0.5,
        maximum: str = "signed",
        per: str = "head",
        windows: Sequence[Sequence[int | None]] | None = None,
        momentum: str = "keep",
        process_group: dist.ProcessGroup | None = None,
    ):
        self.layouts = tuple(layouts)
        if not self.layouts:
            raise MuonlabError("QK-Clip needs at least one AttentionLayout")
        for layout in self.layouts:
            if layout.inert:
                raise MuonlabError(f"QK-Clip cannot act on {layout.name}: {layout.inert}")
        if not tau > 0:
            raise MuonlabError(f"tau is {tau}; the clip threshold must be above 0")
        if not 0 <= alpha <= 1:
            raise MuonlabError(f"alpha is {alpha}; the query's share of the clip must lie in [0, 1]")
        for name, value, known in (
            ("maximum", maximum, ("signed", "absolute")),
            ("per", per, ("head", "layer")),
            ("momentum", momentum, ("keep", "scale", "project")),
        ):
            if value not in known:
                raise unknown_name(f"QK-Clip setting {name}", value, known)
        self.tau, self.alpha, self.maximum, self.per, self.momentum = tau, alpha, maximum, per, momentum
        self.windows = None if windows is None else tuple(_window(window) for window in windows)
        self.process_group = process_group
        self._rows = ClipRows(self.layouts)
        self._heads = {layout.name: layout.num_heads for layout in self.layouts}
        if len(self._heads) < len(self.layouts):
            raise MuonlabError("two attention layouts have one name; max logits are told apart by it")
        # Factors in the weights' precision, never below fp32: bf16 has steps of 0.4 % just under 1.
        self._dtype = torch.float32
        for weight in self._rows.weights.values():
            self._dtype = torch.promote_types(self._dtype, weight.parameter.dtype)
        self._history = ClipHistory(sum(self._heads.values()), self._dtype)
        shared = [
            size
            for each in self.layouts
            for size in [each.num_heads // each.num_kv_heads] * each.num_kv_heads
        ]
        self._members = {"layer": _membership(list(self._heads.values())), "group": _membership(shared)}
        self._device = torch.device("cpu")
        self._running: Tensor | None = None
        self._step = -1

    def observe(self, max_logits: Mapping[str, Tensor]) -> None:
        """Take the maxima of one training forward into the running maximum that the next `apply` clips by.

        `max_logits`: for every declared layer a (heads,) tensor, the maximum over the batch and the visible
        (query, key) pairs of the scaled product q.k, before soft-cap and additive biases (a weight's scale moves
        neither), in fp32 if possible. Call it once per micro-batch, never for an evaluation pass; a forward that
        activation checkpointing repeats changes nothing, because the maximum of equal values is that value.
        """
        self._place()
        maxima = self._flatten(max_logits)
        self._running = maxima if self._running is None else torch.maximum(self._running, maxima)

    def forget(self) -> None:
        """Drop what was observed: call it where an optimizer step is skipped (a gradient scaler's overflow)."""
        self._running = None

    def acts(self, step: int) -> bool:
        """Whether the optimizer step `step` lies in a window."""
        return self.windows is None or any(first <= step < last for first, last in self.windows)

    @torch.no_grad()
    def apply(self, step: int, momentum_of: MomentumOf | None = None) -> dict[str, Tensor]:
        """Scale the declared weights in place by the maxima observed since the last call, and forget those.

        `step`: the optimizer step just taken, from 0. `momentum_of`: the momentum buffer of a parameter, in its
        shape, or None; needed for momentum="scale" and "project". Returns (heads,) gammas per layer, 1 where
        nothing was clipped. With torch.distributed the maxima of all layers are reduced over the ranks in one
        call. Nothing waits for the device. Raises MuonlabError if the step lies in a window and nothing was observed:
        a clip that cannot act would pass for one that was not needed.
        """
        self._place()
        self._step = step
        maxima, self._running = self._running, None
        if maxima is None:
            if self.acts(step):
                raise MuonlabError(
                    f"QK-Clip has no max logits for step {step}; call observe(max_logits) after every training forward"
                )
            maxima = torch.full_like(self._history.max_logit, torch.nan)
        else:
            maxima = self._over_ranks(maxima)
        gamma = self._clip(maxima, momentum_of) if self.acts(step) else torch.ones_like(maxima)
        self._history.record(step, maxima, gamma)
        return self.gammas()

    @torch.no_grad()
    def verify(
        self,
        remeasure: Callable[[], Mapping[str, Tensor]],
        again: bool = False,
        momentum_of: MomentumOf | None = None,
    ) -> dict[str, Tensor]:
        """Measure what `apply` achieved: the max logits of the new weights over tau, (heads,) per layer.

        `apply` clips the updated weights by logits of the weights before the update, so the result can lie a little
        above 1. `remeasure` runs the model on the step's batch and returns its max logits. `again`: clip once more by
        these, unless the step lies outside the windows; `gammas()` and the trace then hold the product of both.
        """
        measured = remeasure()
        self.forget()  # a model that reports its own forwards has just reported this one
        maxima = self._over_ranks(self._flatten(measured))
        if again and self.acts(self._step):
            self._history.record_again(self._step, maxima, self._clip(maxima, momentum_of))
        return self._per_layer(maxima / self.tau)

    def gammas(self) -> dict[str, Tensor]:
        """(heads,) factors of the last step per layer; 1 where nothing was clipped."""
        return self._per_layer(self._history.gamma)

    def trace(self) -> dict[str, dict[str, Tensor]]:
        """Per layer, (heads,) tensors of ClipHistory: the last max_logit and gamma, and the totals since step 0."""
        columns = {name: self._per_layer(values) for name, values in self._history.state_dict().items()}
        return {layer: {name: column[layer] for name, column in columns.items()} for layer in self._heads}

    def state_dict(self) -> dict[str, Any]:
        """The history. Maxima observed but not yet applied are not part of it, as gradients are not."""
        return {"heads": dict(self._heads), "history": self._history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`'s answer exactly. Raises MuonlabError for another set of layers or heads."""
        if dict(state["heads"]) != self._heads:
            raise MuonlabError(
                f"the saved clip state is for heads {dict(state['heads'])}; this one has {self._heads}"
            )
        self._history.load_state_dict(state["history"])
        self.forget()

    def _place(self) -> None:
        """Follow weights that were moved to another device after the clip was made."""
        device = self._rows.device
        if device != self._device:
            self._history.to(device)
            self._members = {
                k: tuple(index.to(device) for index in pair) for k, pair in self._members.items()
            }
            self._running = None if self._running is None else self._running.to(device)
            self._device = device

    def _flatten(self, max_logits: Mapping[str, Tensor]) -> Tensor:
        """The maxima of all layers in a row, checked against the layouts."""
        for name in max_logits:
            if name not in self._heads:
                raise unknown_name("attention layer", name, self._heads)
        for name, heads in self._heads.items():
            if name not in max_logits:
                raise MuonlabError(f"no max logits for {name}; every declared layer needs them in each call")
            given = max_logits[name]
            if not isinstance(given, Tensor) or given.shape != (heads,):
                shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise MuonlabError(f"max logits of {name} are {shape}; expected a tensor of shape ({heads},)")
        rows = [max_logits[name].detach().to(self._device, self._dtype) for name in self._heads]
        return torch.cat(rows)

    def _over_ranks(self, maxima: Tensor) -> Tensor:
        """The maximum over the ranks of the process group; a NaN on any rank comes back as inf."""
        if (
            not dist.is_available()
            or not dist.is_initialized()
            or dist.get_world_size(self.process_group) == 1
        ):
            return maxima
        # Reductions disagree on whether the maximum of NaN and 1 is NaN; none loses an infinity.
        maxima = torch.where(maxima.isnan(), torch.inf, maxima)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.process_group)
        return maxima

    def _clip(self, maxima: Tensor, momentum_of: MomentumOf | None) -> Tensor:
        """Scale the weights by these maxima and return gamma, both over the heads of all layers."""
        if self.momentum != "keep" and momentum_of is None:
            raise MuonlabError(
                f"momentum='{self.momentum}' needs the optimizer's momentum buffers (momentum_of)"
            )
        if self.per == "layer":
            members, layer_of = self._members["layer"]
            maxima = maxima[members].amax(1)[layer_of]
        gamma = head_gammas(maxima, self.tau)
        members, group_of = self._members["group"]
        kappa = gamma[members].amax(1) ** (1 - self.alpha)
        factors = torch.cat([gamma.new_ones(1), gamma / kappa[group_of], gamma, kappa])
        if self.momentum == "project":
            self._rows.project(factors, momentum_of)
        self._rows.scale(factors, momentum_of if self.momentum == "scale" else None)
        return gamma

    def _per_layer(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._heads, values.split(list(self._heads.values())), strict=True))


def _membership(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """For consecutive groups of these sizes: members (groups, widest), short rows repeating their last, and owners."""
    first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    size = torch.tensor(sizes)
    members = first[:, None] + torch.minimum(torch.arange(max(sizes)), size[:, None] - 1)
    return members, torch.arange(len(sizes)).repeat_interleave(size)


def _window(window: Sequence[int | None]) -> tuple[int, float]:
    """A checked [first, last) with an open end as infinity."""
    try:
        first, last = window
        last = math.inf if last is None else last
        if 0 <= first < last:
            return first, last
    except (TypeError, ValueError):
        pass
    raise MuonlabError(f"QK-Clip window {window}: expected [first step, last step) with 0 <= first < last")
