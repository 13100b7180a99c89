"""QK-Clip: after the optimizer's update, scale back the query and key weights whose logits passed tau.

Kimi K2 (arXiv 2507.20534), section 2.1 and algorithm 1. With S_h the largest logit of head h in the step's
own forward, gamma_h = min(1, tau / S_h). Key head g serves the query heads of its group, and

    kappa_g = (max over h in group g of gamma_h)^(1 - alpha)     scales the key rows of g
    gamma_h / kappa_g                                            scales the query rows of h

so every head's logits fall by exactly gamma_h, and a key head moves only if all its query heads passed tau.
With one query head a group this is the paper's rule: gamma^alpha on the query, gamma^(1 - alpha) on the key.
Query rows that meet a key shared by all heads (MLA's rotary part) carry gamma_h alone, as in the paper.

A softer clip is gamma_h = min(1, tau / S_h)^power, which takes back a share of the excess each step, and one that takes
for S_h a running average of the steps' maxima, so that no single batch decides. Both are this package's own.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name
from muonlab.layout import AttentionLayout
from muonlab.optim.clip_history import ClipHistory
from muonlab.optim.clip_rows import ClipRows, MomentumOf, head_groups
from muonlab.optim.matrix_view import State
from muonlab.optim.saved_state import check_entries, check_tensor, describe


def head_gammas(max_logits: Tensor, tau: float, power: float = 1.0) -> Tensor:
    """gamma = min(1, tau / S)^power, as tau / max(tau, S): exactly 1 for every S <= tau, also for S <= 0.

    An S that is infinite or NaN gives 1 too: training has diverged, which no factor may hide.
    """
    finite = max_logits.nan_to_num(nan=tau, posinf=tau, neginf=tau)
    gamma = torch.full_like(finite, tau) / finite.clamp(min=tau)
    return gamma if power == 1 else gamma**power


class QKClip:
    """The clip, beside any optimizer: `observe` after each training forward, `apply` after the update.

    layouts: one AttentionLayout per attention layer; one that says why it is `inert` is refused.
    tau: the logit above which a head is clipped; K2 uses 100, small models 30 to 100.
    alpha: in [0, 1], the share of gamma (as an exponent) on the query, the rest being on the key; K2 uses
        0.5. 0: all on the key where its whole group passed tau; 1: all on the query. Logits do not depend
        on it.
    maximum: what the caller has to pass as max logits (read it there): "signed" (K2), the largest logit, or
        "absolute", the largest magnitude.
    per: "head" (K2), or "layer": all heads of a layer take the factor of its largest logit, K2's first
        version.
    windows: the optimizer steps in which it acts, [[first, last), ...] counted from 0, last None for no
        end. None: always; []: never, which keeps the trace.
    momentum: what happens to a clipped head's momentum: "keep" (every published implementation), "scale" by
        the weight's factor, or "project" out its part along the head's weights.
    process_group: the ranks that hold the same heads (data and context parallel); None: all ranks.
    power: in (0, 1], the exponent of gamma; 1 is K2's clip, which takes all of the excess back at once. Of a logit p
        times tau, p^(1 - power) times tau is left. Sane: 0.1 to 1.
    average: in [0, 1), the weight of the past in the running average A <- average A + (1 - average) S that takes the
        place of S, beginning at the first S; 0: this step's S alone, as in K2. It goes on outside the windows, and
        needs the exact maximum of every head, not only of those above tau. Sane: 0 to 0.99.

    Max logits, gammas and ratios are (layers, heads) tensors: one row per layout, in the order of `layouts`, and as
    many columns as the layer with the most heads has. Where a layer has fewer, its other columns are
    not read; gammas hold 1 there and ratios -inf.

    Settings, layers and shapes that do not fit raise MuonlabError.
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
        power: float = 1.0,
        average: float = 0.0,
    ):
        self.layouts = tuple(layouts)
        if not self.layouts:
            raise MuonlabError("QK-Clip needs at least one AttentionLayout")
        for layout in self.layouts:
            if layout.inert:
                raise MuonlabError(f"QK-Clip cannot act on {layout.name}: {layout.inert}")
        if not 0 < tau < math.inf:
            raise MuonlabError(f"tau is {tau}; the clip threshold must be finite and above 0")
        if not 0 <= alpha <= 1:
            raise MuonlabError(f"alpha is {alpha}; the query's share of the clip must lie in [0, 1]")
        if not 0 < power <= 1:
            raise MuonlabError(f"power is {power}; the exponent of the clip's factor must lie in (0, 1]")
        if not 0 <= average < 1:
            raise MuonlabError(
                f"average is {average}; the weight of the past in the average of max logits must lie in [0, 1)"
            )
        for name, value, allowed in (
            ("maximum", maximum, ("signed", "absolute")),
            ("per", per, ("head", "layer")),
            ("momentum", momentum, ("keep", "scale", "project")),
        ):
            if value not in allowed:
                raise unknown_name(f"value of QK-Clip's {name}", value, allowed)
        self.tau, self.alpha, self.maximum, self.per, self.momentum = tau, alpha, maximum, per, momentum
        self.power, self.average = power, average
        self.windows = None if windows is None else tuple(_window(window) for window in windows)
        self.process_group = process_group
        self._heads = {layout.name: layout.num_heads for layout in self.layouts}
        self._shape = (len(self.layouts), max(self._heads.values()))
        # The place of each head in the flattened (layers, heads) tensor; all places, if layers have equally many heads.
        self._cells = torch.cat(
            [i * self._shape[1] + torch.arange(n) for i, n in enumerate(self._heads.values())]
        )
        if len(self._heads) < len(self.layouts):
            raise MuonlabError(
                "two attention layouts have the same name; saved states and traces need a name for each"
            )
        self._rows = ClipRows(self.layouts)
        if momentum == "project" and self._rows.sharded:
            raise MuonlabError("momentum='project' needs whole weights, but these are sharded (DTensor)")
        self._dtype = self._rows.promoted(torch.float32)
        self._history = ClipHistory(sum(self._heads.values()), self._dtype)
        self._average = torch.full_like(
            self._history.max_logit, torch.nan
        )  # of the max logits; NaN before the first
        group_sizes = [
            each.num_heads // each.num_kv_heads for each in self.layouts for _ in range(each.num_kv_heads)
        ]
        self._layers = head_groups(list(self._heads.values()))
        self._key_groups = head_groups(group_sizes)
        self._device = torch.device("cpu")
        self._running: Tensor | None = None
        self._step: int | None = None
        self._momentum_of: MomentumOf | None = None

    @torch.no_grad()
    def observe(self, max_logits: Tensor) -> None:
        """Take the maxima of one training forward into the running maximum that the next `apply` clips by.

        `max_logits`: (layers, heads), the maximum over the batch and the visible (query, key) pairs of the scaled
        product q.k, before soft-cap and additive biases (ALiBi), which no weight can scale; in fp32 if possible,
        since bf16 has steps of 0.5 near 100. Call it once per micro-batch, and never for an evaluation pass. A
        forward that activation checkpointing repeats changes nothing. Raises MuonlabError for another shape.
        """
        self._place()
        maxima = self._flatten(max_logits)
        self._running = maxima if self._running is None else torch.maximum(self._running, maxima)

    def forget(self) -> None:
        """Drop what was observed: for a step that is skipped, as a gradient scaler does after an overflow."""
        self._running = None

    def acts(self, step: int) -> bool:
        """Whether the optimizer step `step` lies in a window."""
        return self.windows is None or any(first <= step < last for first, last in self.windows)

    def require_maxima(self, step: int) -> None:
        """Raise MuonlabError if `apply(step)` would: it lies in a window and nothing was observed.

        Call it before the optimizer's update, so that a refusal leaves the weights as they were.
        """
        self._place()
        if self._running is None and self.acts(step):
            raise MuonlabError(
                f"QK-Clip has seen no max logits for step {step}; call observe(max_logits) after every"
                " training forward"
            )

    @torch.no_grad()
    def apply(self, step: int, momentum_of: MomentumOf | None = None) -> Tensor:
        """Scale the declared weights in place by the maxima observed since the last call, and forget those.

        `step`: the optimizer step just taken, from 0. `momentum_of`: gives the momentum buffer of a
        parameter, in its shape, or None; momentum="scale" and "project" need it. Returns the gammas,
        (layers, heads), 1 where nothing was clipped. With torch.distributed, the maxima of all layers go over the
        ranks in one reduction. Nothing waits for the device. Raises MuonlabError if the step lies in a
        window and nothing was observed, because a clip that could not act would look like one that was not
        needed; `require_maxima` raises it before the update.
        """
        self.require_maxima(step)
        self._step, self._momentum_of = step, momentum_of
        observed, self._running = self._running, None
        unseen = torch.full_like(self._history.max_logit, torch.nan)
        maxima = unseen if observed is None else self._over_ranks(observed)
        sizes = self._averaged(maxima) if self.average else maxima
        gamma = self._clip(sizes) if self.acts(step) else torch.ones_like(maxima)
        self._history.record(step, maxima, gamma)
        return self.gammas()

    @torch.no_grad()
    def verify(self, remeasure: Callable[[], Tensor], again: bool = False) -> Tensor:
        """Measure what `apply` achieved: the max logits of the new weights over tau, (layers, heads).

        `apply` scales the updated weights by logits of the weights before the update, so tau is not exactly
        kept. `remeasure` runs the model on the step's batch, without gradients, and returns its max logits.
        `again`: clip once more by these themselves, whatever `average` is, if the step lies in a window;
        `gammas()` and `trace()` then hold the product of both. Raises MuonlabError before the first `apply`.
        """
        if self._step is None:
            raise MuonlabError("QK-Clip has nothing to verify; call apply(step) first")
        measured = remeasure()
        self.forget()  # a model that reports its forwards by itself has just reported this one
        maxima = self._over_ranks(self._flatten(measured))
        if again and self.acts(self._step):
            self._history.record_again(self._step, self._clip(maxima))
        return self._by_layer(maxima / self.tau, fill=-math.inf)

    def gammas(self) -> Tensor:
        """The factors of the last step, (layers, heads); 1 where nothing was clipped."""
        return self._by_layer(self._history.gamma, fill=1.0)

    def trace(self) -> dict[str, dict[str, Tensor]]:
        """Per layer, the (heads,) columns of ClipHistory: the last step's, and the totals since step 0."""
        sizes = list(self._heads.values())
        columns = {name: values.split(sizes) for name, values in self._history.state_dict().items()}
        return {
            layer: {name: column[i] for name, column in columns.items()}
            for i, layer in enumerate(self._heads)
        }

    def state_dict(self) -> State:
        """The history, and the running average where there is one.

        Maxima observed but not yet applied are not part of it, as gradients are not.
        """
        state = {"heads": dict(self._heads), "history": self._history.state_dict()}
        return state | {"average": self._average} if self.average else state

    def check_state(self, state: State) -> None:
        """Raise MuonlabError unless `load_state_dict` can take it whole; changes nothing."""
        check_entries("the saved clip state", state, ("heads", "history"))
        if state["heads"] != self._heads:
            raise MuonlabError(
                f"the saved clip state has heads {state['heads']}; the layouts declare {self._heads}"
            )
        self._history.check_state(state["history"])
        if self.average and "average" in state:
            check_tensor("average of the saved clip state", state["average"], self._average)

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict()`'s answer exactly. Raises MuonlabError for other layers or head counts.

        A state that was saved without a running average begins one.
        """
        self.check_state(state)
        self._history.load_state_dict(state["history"])
        beginning = torch.full_like(self._average, torch.nan)
        self._average = state["average"].to(beginning) if self.average and "average" in state else beginning
        self.forget()

    def _place(self) -> None:
        """Follow weights that were moved to another device or made more precise."""
        device, dtype = self._rows.parameters[0].device, self._rows.promoted(self._dtype)
        if device != self._device:
            self._rows.to(device)
            self._layers, self._key_groups = self._layers.to(device), self._key_groups.to(device)
            self._cells = self._cells.to(device)
        if device != self._device or dtype is not self._dtype:
            self._history.to(device, dtype)
            self._running = None if self._running is None else self._running.to(device, dtype)
            self._average = self._average.to(device, dtype)
            self._device, self._dtype = device, dtype

    def _flatten(self, max_logits: Tensor) -> Tensor:
        """A copy of the maxima of all heads in a row, layer by layer."""
        if not isinstance(max_logits, Tensor) or max_logits.shape != self._shape:
            raise MuonlabError(
                f"the max logits are {describe(max_logits)}; QK-Clip needs a tensor of shape"
                f" (layers, heads) = {self._shape}, a row for each of {', '.join(self._heads)}"
            )
        return max_logits.to(self._device, self._dtype).flatten()[self._cells]

    def _over_ranks(self, maxima: Tensor) -> Tensor:
        """The maximum over the ranks of the process group; what is NaN on one rank becomes inf on all."""
        if (
            not dist.is_available()
            or not dist.is_initialized()
            or dist.get_world_size(self.process_group) == 1
        ):
            return maxima
        # Backends disagree on whether the maximum of NaN and 1 is NaN; none loses an infinity.
        maxima = torch.where(maxima.isnan(), math.inf, maxima)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.process_group)
        return maxima

    def _averaged(self, maxima: Tensor) -> Tensor:
        """Take the maxima of a step into the running average; a maximum that is not finite stands for itself."""
        past = torch.where(self._average.isnan(), maxima, self._average)
        # A <- average A + (1 - average) S
        average = torch.where(maxima.isfinite(), past.lerp(maxima, 1 - self.average), self._average)
        self._average = average
        return torch.where(maxima.isfinite(), average, maxima)

    def _clip(self, maxima: Tensor) -> Tensor:
        """Scale the weights by these maxima; returns gamma, like the maxima over the heads of all layers."""
        if self.per == "layer":
            maxima = maxima[self._layers.members].amax(1)[self._layers.owner]
        gamma = head_gammas(maxima, self.tau, self.power)
        kappa = gamma[self._key_groups.members].amax(1) ** (1 - self.alpha)
        factors = torch.cat([gamma.new_ones(1), gamma / kappa[self._key_groups.owner], gamma, kappa])
        if self.momentum == "project":
            self._rows.project(factors, self._buffers())
        self._rows.scale(factors, self._buffers() if self.momentum == "scale" else None)
        return gamma

    def _buffers(self) -> MomentumOf:
        if self._momentum_of is None:
            raise MuonlabError(f"momentum='{self.momentum}' needs the optimizer's buffers: pass momentum_of")
        return self._momentum_of

    def _by_layer(self, values: Tensor, fill: float) -> Tensor:
        """Values of all heads in a row as (layers, heads), `fill` where a layer has no such head."""
        if len(values) == math.prod(self._shape):
            return values.view(self._shape)
        padded = values.new_full((math.prod(self._shape),), fill)
        return padded.index_copy(0, self._cells, values).view(self._shape)


def _window(window: Sequence[int | None]) -> tuple[int, float]:
    """A checked [first, last), an open end as infinity."""
    try:
        first, last = window
        end = math.inf if last is None else last
        if first is not None and 0 <= first < end:
            return first, end
    except (TypeError, ValueError):
        pass
    raise MuonlabError(f"QK-Clip window {window}: expected [first step, last step) with 0 <= first < last")
