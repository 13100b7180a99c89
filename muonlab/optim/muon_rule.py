"""Muon, the whole update on one page (Keller Jordan, 2024; with the variants that public implementations use).

With G the gradient of a matrix W (rows, cols), every line one stage:

    M <- average of past gradients; D = M, or Nesterov's look-ahead      momentum: momentum_kind
    O = after(polar(before(D)))                                           transform: before, after (muon_stages.py)
    O <- scale(rows, cols) O, stretched to a norm                         scale: scale_rule, update_norm
    W <- (1 - share) W - lr O, brought to a norm                          apply: weight_decay_kind, weight_norm

From `CombinedOptimizer.step` (combined.py) it is two calls to the equations: `step` calls `MuonRule.update`, the chain
below, which calls the stages. A third call, from `orthogonal`, leads to newton_schulz.py, which has the iteration.
`update_norm` and `weight_norm` are in weight_norms.py.
Where several ranks share the work, `Batch.matrices` gives each its share, and the chain stays the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.matrix_view import Group, Matrices, MatrixSettings, MatrixView, State, entry_name
from muonlab.optim.muon_stages import AFTER, BEFORE, norm, polar
from muonlab.optim.ranks import is_sharded, local_part
from muonlab.optim.rules import (
    Batch,
    MatrixStages,
    Rule,
    Stages,
    chosen,
    plain_value,
    register_rule,
    setting_names,
)
from muonlab.optim.schedule_design import Row, Schedule
from muonlab.optim.schedules import SCHEDULES, Coefficients, resolve_schedule
from muonlab.optim.weight_norms import UPDATE_NORMS, WEIGHT_NORMS
from muonlab.settings.optimizer import MuonGroup

ADAMW_RMS = 0.2  # RMS of a typical AdamW update over lr: Moonlight, arXiv 2502.16982, section 2.2


@dataclass(frozen=True, kw_only=True)
class MuonRuleSettings(MuonGroup, MatrixSettings):
    """The settings of one group; `Muon` explains them."""

    @classmethod
    def of(cls, settings: MuonGroup) -> "MuonRuleSettings":
        """These settings, for parameters that are whole matrices."""
        return cls(**{name: getattr(settings, name) for name in setting_names(MuonGroup)})


# From gradients, states, momentum and whether to look ahead to the directions; they advance the momentum.
MOMENTUM_KINDS: Stages[Callable[[list[Tensor], list[State], float, bool], Sequence[Tensor]]] = Stages(
    "momentum_kind"
)
# From rows and columns to a factor.
SCALE_RULES: Stages[Callable[[int, int], float]] = Stages("scale_rule")
# From settings, the lr that the group was made with and the scale of a matrix to the share of it that a step takes.
DECAYS: Stages[Callable[[MuonRuleSettings, float, float], float]] = Stages("weight_decay_kind")


@register_rule("muon")
class MuonRule(Rule):
    """Momentum, orthogonalisation, scale, decay and step. A stack (experts, rows, cols) is as many matrices."""

    settings = MuonRuleSettings
    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    matrix_stages: ClassVar[tuple[MatrixStages[Any], ...]] = (BEFORE, AFTER, UPDATE_NORMS, WEIGHT_NORMS)
    stages = (MOMENTUM_KINDS, SCALE_RULES, DECAYS, *matrix_stages)

    def update(self, batch: Batch) -> None:
        """One step of every parameter, in place.

        What the matrices of one shape need is freed as the next shape's turn comes, so the extra memory is that of the
        largest shape.
        """
        s = batch.settings(MuonRuleSettings)
        for part in batch.by_shape():
            apply(s, part, *self.chain(s, part))

    def chain(self, s: MuonRuleSettings, part: Batch) -> tuple[Matrices, list[Tensor], float]:
        """The chain up to the step: the matrices, their scaled updates and the length of each."""
        D = MOMENTUM_KINDS[s.momentum_kind](part.grads, part.states, s.momentum, s.nesterov)
        matrices = part.matrices(D, self.entries(s, part))
        reads = BEFORE.read_gradients & {*s.before} or AFTER.read_gradients & {*s.after}
        G = part.matrices(part.grads).stacks if reads else matrices.stacks
        return matrices, *scaled(s, part, orthogonal(s, matrices, G))

    def prepare(self, group: Group) -> None:
        """Check the settings; schedules and dtypes become names and numbers, which a checkpoint may hold."""
        if isinstance(group["ns_dtype"], torch.dtype):
            group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
        group["ns_schedule"] = plain_value(_plain_schedule(group["ns_schedule"]))
        super().prepare(group)
        resolve_schedule(group["ns_schedule"], group["ns_steps"])
        MuonGroup(**{name: group[name] for name in setting_names(MuonGroup)}).check_stages()
        if group["weight_decay_kind"] == "shape_scaled" and isinstance(group["row_blocks"], tuple):
            raise MuonlabError(
                "shape_scaled weight decay needs blocks of one shape, but row_blocks has unequal sizes"
            )

    def check_parameter(self, param: Tensor, name: str, group: Group) -> None:
        """Besides what every rule for matrices refuses: a weight of zeros whose norm is to stay."""
        super().check_parameter(param, name, group)
        kept = group["update_norm"] == "relative" or group["weight_norm"] == "fixed"
        if kept and not param.is_meta and not is_sharded(param) and not param.any():
            raise MuonlabError(
                f"{name} begins as zeros, and update_norm={group['update_norm']!r} with"
                f" weight_norm={group['weight_norm']!r} would keep it there; initialise it or give it another rule"
            )

    def state_shapes(self, shape: torch.Size, group: Group) -> dict[str, tuple[int, ...] | None]:
        """The momentum, the product of all momenta (`ema_corrected`), and what stages keep of every block."""
        blocks = MatrixView.of(group).block_shapes(shape)
        kept = {
            entry_name(entry, j): shape_of(block)
            for table in self.matrix_stages
            for entries in table.entries.values()
            for entry, shape_of in entries.items()
            for j, block in enumerate(blocks)
        }
        return {**super().state_shapes(shape, group), "momentum_product": None, **kept}

    def entries(self, s: MuonRuleSettings, part: Batch) -> tuple[str, ...]:
        """The names of what the chosen stages keep of every block; where it is not there yet, it begins as zeros."""
        kept = {
            entry: shape_of
            for table in self.matrix_stages
            for stage in chosen(getattr(s, table.setting))
            for entry, shape_of in table.entries.get(stage, {}).items()
        }
        for state, view, W, g in zip(part.states, part.views, part.whole, part.grads, strict=True):
            for j, block in enumerate(view.block_shapes(W.shape) if kept else ()):
                for entry, shape_of in kept.items():
                    if entry_name(entry, j) not in state:
                        state[entry_name(entry, j)] = g.new_zeros(shape_of(block))
        return tuple(kept)

    def init_state(self, param: Tensor, dtype: torch.dtype) -> State:
        """A zero momentum, contiguous so that the iteration reads it fast."""
        return {
            "momentum_buffer": torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        }


# ---------------------------------------------------------------- momentum
# With g the gradient, m the buffer, mu the momentum of this step and d the direction that is orthogonalised. From a
# zero start and with a constant mu, heavy_ball is ema times 1/(1 - mu), which orthogonalisation removes. Under a
# momentum schedule they differ: ema weighs each gradient by the 1 - mu of its own step, heavy_ball weighs all alike.
# No stage writes to a gradient. Without Nesterov the directions are the buffers themselves: read only.


@MOMENTUM_KINDS.register
def ema(g: list[Tensor], states: list[State], mu: float, nesterov: bool) -> Sequence[Tensor]:
    """m <- mu m + (1 - mu) g; Nesterov: d = mu m + (1 - mu) g. PyTorch, Keller Jordan, Emerging-Optimizers."""
    m = _momenta(states)
    torch._foreach_lerp_(m, g, 1 - mu)
    return torch._foreach_lerp(g, m, mu) if nesterov else m


@MOMENTUM_KINDS.register
def heavy_ball(g: list[Tensor], states: list[State], mu: float, nesterov: bool) -> Sequence[Tensor]:
    """m <- mu m + g; Nesterov: d = g + mu m. Moonlight, dion, gram-newton-schulz."""
    m = _momenta(states)
    torch._foreach_mul_(m, mu)
    torch._foreach_add_(m, g)
    return torch._foreach_add(g, torch._foreach_mul(m, mu)) if nesterov else m


@MOMENTUM_KINDS.register
def ema_corrected(g: list[Tensor], states: list[State], mu: float, nesterov: bool) -> Sequence[Tensor]:
    """ema with Adam's bias correction; Nesterov as in NAdam (Dozat 2016, algorithm 2). optax.

    d = (1 - mu) g / (1 - P) + mu m / (1 - P mu), P being the product of all mu so far; without Nesterov d is m, whose
    correction is one factor that orthogonalisation removes.
    """
    m = _momenta(states)
    torch._foreach_lerp_(m, g, 1 - mu)
    if not nesterov:
        return m
    directions = []
    for gradient, buffer, state in zip(g, m, states, strict=True):
        P = state["momentum_product"] = plain_value(state.get("momentum_product", 1.0) * mu)
        directions.append(gradient * ((1 - mu) / (1 - P)) + buffer * (mu / (1 - P * mu)))
    return directions


def _momenta(states: list[State]) -> list[Tensor]:
    return [local_part(state["momentum_buffer"]) for state in states]


# ---------------------------------------------------------------- transform
def orthogonal(s: MuonRuleSettings, matrices: Matrices, G: list[Tensor]) -> list[Tensor]:
    """O = after(polar(before(D))) of stacks D (..., rows, cols), G being their gradients."""
    D, kept = matrices.stacks, matrices.kept
    for name in s.before:
        D = [BEFORE[name](s, *each) for each in zip(D, G, kept, strict=True)]
    # Nesterov's look-ahead is a fresh tensor and may be written over; without it the direction is the buffer.
    O = polar(s, D, out=D if s.nesterov and not s.after else None)
    for name in s.after:
        O = [AFTER[name](s, *each) for each in zip(O, D, G, kept, strict=True)]
    return O


# ---------------------------------------------------------------- scale
# An orthogonal (rows, cols) matrix has spectral norm 1, Frobenius norm sqrt(min(rows, cols)) and entries of RMS
# 1/sqrt(max(rows, cols)). Each rule keeps another of these fixed over shapes, and so gives lr its unit.


@SCALE_RULES.register
def original(rows: int, cols: int) -> float:
    """sqrt(max(1, rows/cols)): lr is the spectral norm of a wide update. Keller Jordan, Muon, 2024."""
    return math.sqrt(max(1.0, rows / cols))


@SCALE_RULES.register
def match_rms_adamw(rows: int, cols: int) -> float:
    """0.2 sqrt(max(rows, cols)): entries move by 0.2 lr, as AdamW's do. arXiv 2502.16982, equation 4."""
    return ADAMW_RMS * math.sqrt(max(rows, cols))


@SCALE_RULES.register
def unit_update_rms(rows: int, cols: int) -> float:
    """sqrt(max(rows, cols)): lr is the RMS of the entries' change. "spectral" in Emerging-Optimizers."""
    return math.sqrt(max(rows, cols))


@SCALE_RULES.register
def spectral(rows: int, cols: int) -> float:
    """sqrt(rows/cols): lr is the RMS-to-RMS operator norm, alike at every width. arXiv 2310.17813."""
    return math.sqrt(rows / cols)


@SCALE_RULES.register
def none(rows: int, cols: int) -> float:
    """1: lr is the spectral norm of the update, whatever the shape."""
    return 1.0


def scaled(s: MuonRuleSettings, part: Batch, O: list[Tensor]) -> tuple[list[Tensor], float]:
    """Updates and their length: lr times the scale where all have the same one, instead of a pass over every entry."""
    scales = {scale for own in _scales(s, part) for scale in own}
    if len(scales) == 1:
        return O, s.lr * scales.pop()
    if O:  # a rank may have no matrix
        torch._foreach_mul_(O, [SCALE_RULES[s.scale_rule](*each.shape[-2:]) for each in O])
    return O, s.lr


def _scales(s: MuonRuleSettings, part: Batch) -> list[list[float]]:
    """The scale of every block of every parameter."""
    scale = SCALE_RULES[s.scale_rule]
    return [
        [scale(*block[-2:]) for block in view.block_shapes(W.shape)]
        for view, W in zip(part.views, part.whole, strict=True)
    ]


# ---------------------------------------------------------------- apply
# The kinds differ in the share of a weight that one update takes away; it is 0 for weight_decay 0 and for lr 0.


@DECAYS.register
def decoupled(s: MuonRuleSettings, peak_lr: float, scale: float) -> float:
    """lr weight_decay: half the lr, half the decay. PyTorch's AdamW, Keller Jordan, Moonlight."""
    return s.lr * s.weight_decay


@DECAYS.register
def independent(s: MuonRuleSettings, peak_lr: float, scale: float) -> float:
    """weight_decay lr / peak_lr, peak_lr being the lr that the group was made with: tuning lr leaves it alone, only the
    schedule acts on it. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    return s.lr * (s.weight_decay / peak_lr if peak_lr else 0.0)


@DECAYS.register
def shape_scaled(s: MuonRuleSettings, peak_lr: float, scale: float) -> float:
    """lr scale weight_decay, scale being the factor of the matrix's shape. nanochat, muonium."""
    return s.lr * scale * s.weight_decay


def apply(s: MuonRuleSettings, part: Batch, matrices: Matrices, O: list[Tensor], length: float) -> None:
    """New weights from scaled updates and their length; entry by entry where no stage looks at whole weights."""
    share, peak_lr = DECAYS[s.weight_decay_kind], part.groups[0]["peak_lr"]
    if s.update_norm == "scaled" and s.weight_norm == "free" and not (s.weight_decay and "namo" in s.after):
        shares = [share(s, peak_lr, own[0]) for own in _scales(s, part)]
        decay_and_step(s, part.params, matrices.join(O), length, shares)
    else:
        W, scale = part.matrices(part.params).stacks, SCALE_RULES[s.scale_rule]
        for w, o, kept in zip(W, O, matrices.kept, strict=True):
            if not isinstance(length, Tensor) and length == 0:
                break  # lr 0 must not even round a weight
            old = norm(w)
            o *= UPDATE_NORMS[s.update_norm](s, old, norm(o) * (length / s.lr))
            decay = share(s, peak_lr, scale(*w.shape[-2:])) * kept.get("gain", 1.0)
            decay_and_step(s, [w], [o], length, [decay])
            w *= WEIGHT_NORMS[s.weight_norm](s, old, norm(w), kept)
        torch._foreach_copy_(part.params, matrices.join(W))


def decay_and_step(
    s: MuonRuleSettings, W: list[Tensor], O: list[Tensor], length: float, shares: Sequence[float | Tensor]
) -> None:
    """W <- (1 - share) W - length O, in place; a share and the length are tensors where the lr is one.

    `cautious`: an entry decays only where the update pulls it the same way, W O >= 0 (arXiv 2510.12402).
    """
    if s.weight_decay and s.cautious:
        for weight, update, share in zip(W, O, shares, strict=True):
            weight.sub_(weight * (weight * update >= 0) * share)
    elif s.weight_decay:
        torch._foreach_mul_(W, [1 - share for share in shares])  # type: ignore[misc]  # numbers or tensors
    if isinstance(length, Tensor):
        torch._foreach_sub_(W, torch._foreach_mul(O, length))
    else:
        torch._foreach_add_(W, O, alpha=-length)


# ---------------------------------------------------------------- settings
def _plain_schedule(schedule: Coefficients) -> str | tuple[Row, ...]:
    """The name of a schedule, or its rows with the margin in the first: p(x / s) has a/s, b/s³, c/s⁵."""
    if isinstance(schedule, str):
        return schedule
    if isinstance(schedule, Schedule) and (schedule.exact or SCHEDULES.get(schedule.name) == schedule):
        return schedule.name
    resolved = resolve_schedule(schedule)
    if resolved.row_rescaling:
        raise MuonlabError("pass a schedule with row rescaling to an optimizer by its name")
    (a, b, c), *rest = resolved.rows
    s = resolved.margin
    return ((a / s, b / s**3, c / s**5), *rest)
