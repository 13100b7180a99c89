"""Muon, the whole update on one page (Keller Jordan, 2024; with the variants that public implementations use).

With G the gradient of a matrix W (rows, cols), every line one stage:

    M <- average of past gradients; D = M, or Nesterov's look-ahead      momentum: momentum_kind
    O = NewtonSchulz(D)                                                   transform: orthogonal
    O <- scale(rows, cols) O                                              scale: scale_rule
    W <- (1 - share) W - lr O                                             apply: weight_decay_kind

From `CombinedOptimizer.step` (combined.py) it is two calls to the equations: `step` calls `MuonRule.update`, the chain
below, which calls the stages. A third call, from `orthogonal`, leads to newton_schulz.py, which has the iteration.
Where several ranks share the work, `Batch.matrices` gives each its share, and the chain stays the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.matrix_view import Group, MatrixSettings, MatrixView, State, moment_name
from muonlab.optim.newton_schulz import orthogonalise
from muonlab.optim.ranks import local_part
from muonlab.optim.rules import Batch, Rule, Stages, plain_value, register_rule, setting_names
from muonlab.optim.schedule_design import Row, Schedule
from muonlab.optim.schedules import SCHEDULES, Coefficients, resolve_schedule
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
# From settings, batch, scaled updates and the length of each to new weights, in place.
APPLY: Stages[Callable[[MuonRuleSettings, Batch, list[Tensor], float], None]] = Stages("weight_decay_kind")


@register_rule("muon")
class MuonRule(Rule):
    """Momentum, orthogonalisation, scale, decay and step. A stack (experts, rows, cols) is as many matrices."""

    settings = MuonRuleSettings
    buffers = ("momentum_buffer",)
    stages = (MOMENTUM_KINDS, SCALE_RULES, APPLY)

    def update(self, batch: Batch) -> None:
        """One step of every parameter, in place.

        What the matrices of one shape need is freed as the next shape's turn comes, so the extra memory is that of the
        largest shape.
        """
        s = batch.settings(MuonRuleSettings)
        for part in batch.by_shape():
            D = MOMENTUM_KINDS[s.momentum_kind](part.grads, part.states, s.momentum, s.nesterov)
            matrices = part.matrices(D, moments=_with_second_moments(s, part))
            O = orthogonal(s, matrices.stacks, matrices.moments)
            O, length = _scaled(s, part, O)
            APPLY[s.weight_decay_kind](s, part, matrices.join(O), length)

    def prepare(self, group: Group) -> None:
        """Check the settings; schedules and dtypes become names and numbers, which a checkpoint may hold."""
        if isinstance(group["ns_dtype"], torch.dtype):
            group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
        group["ns_schedule"] = plain_value(_plain_schedule(group["ns_schedule"]))
        super().prepare(group)
        resolve_schedule(group["ns_schedule"], group["ns_steps"])
        if group["weight_decay_kind"] == "shape_scaled" and isinstance(group["row_blocks"], tuple):
            raise MuonlabError(
                "shape_scaled weight decay needs blocks of one shape, but row_blocks has unequal sizes"
            )

    def state_shapes(self, shape: torch.Size, group: Group) -> dict[str, tuple[int, ...] | None]:
        """The momentum, the product of all momenta (`ema_corrected`), and NorMuon's second moments."""
        blocks = MatrixView.of(group).block_shapes(shape)
        moments = {moment_name(i): second_moment_shape(block) for i, block in enumerate(blocks)}
        return {**super().state_shapes(shape, group), "momentum_product": None, **moments}

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
def orthogonal(s: MuonRuleSettings, D: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
    """O = U f(S) Vᵀ near U Vᵀ, from stacks D = U S Vᵀ (..., rows, cols), with what evens it out before and after."""
    if s.equilibrate_rows:
        D = [equilibrate_rows(each) for each in D]
    dtype = None if s.ns_dtype is None else getattr(torch, s.ns_dtype)
    # Nesterov's look-ahead is a fresh tensor and may be written over; without it the direction is the buffer.
    O = orthogonalise(D, s.ns_schedule, s.ns_steps, dtype, s.ns_backend, out=D if s.nesterov else None)
    if s.renormalise:
        O = [renormalise(each) for each in O]
    if s.normuon_beta2 is not None:
        O = [normalise_neurons(each, v, s.normuon_beta2) for each, v in zip(O, moments, strict=True)]
    return O


def equilibrate_rows(D: Tensor) -> Tensor:
    """Before it: every row gets the RMS row norm (MuonEq, arXiv 2603.28254). Zero rows stay zero."""
    largest = D.abs().amax((-2, -1), keepdim=True)
    D = D / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    row_norm = torch.linalg.vector_norm(D, dim=-1, keepdim=True)
    target = row_norm.square().mean(-2, keepdim=True).sqrt()
    return D * torch.where(row_norm > 0, target / row_norm, 0.0)


def renormalise(O: Tensor) -> Tensor:
    """After it: Frobenius norm sqrt(min(rows, cols)), an orthogonal matrix's (Muon+, arXiv 2602.21545)."""
    norm = torch.linalg.vector_norm(O, dim=(-2, -1), keepdim=True)
    return O * (min(O.shape[-2:]) ** 0.5 / norm.clamp_min(1e-6))


def normalise_neurons(O: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """After it: divide each neuron by its running RMS (NorMuon, arXiv 2510.05491, algorithm 1).

    With v_i the mean square of neuron i's entries, s <- beta2 s + (1 - beta2) v and neuron i is divided by
    sqrt(s_i); then all are multiplied by one factor that restores the Frobenius norm. Neurons are rows of
    tall and square matrices and columns of wide ones, as in nanochat (the paper takes rows). Advances
    `second_moment`, of `second_moment_shape` and zero at first.
    """
    along = -1 if second_moment.shape[-1] == 1 else -2
    second_moment.lerp_(O.square().mean(along, keepdim=True), 1 - beta2)
    evened = O * second_moment.clamp_min(1e-10).rsqrt()
    before = torch.linalg.vector_norm(O, dim=(-2, -1), keepdim=True)
    after = torch.linalg.vector_norm(evened, dim=(-2, -1), keepdim=True)
    return evened * (before / after.clamp_min(1e-10))


def second_moment_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of `normalise_neurons`' state: one number per row of tall and square matrices, else per column."""
    *stack, rows, cols = shape
    return (*stack, rows, 1) if rows >= cols else (*stack, 1, cols)


def _with_second_moments(s: MuonRuleSettings, part: Batch) -> bool:
    """Whether there are second moments; they begin as zeros, and are whole on every rank, since they are small."""
    if s.normuon_beta2 is None:
        return False
    for state, view, W, g in zip(part.states, part.views, part.whole, part.grads, strict=True):
        for j, block in enumerate(view.block_shapes(W.shape)):
            if moment_name(j) not in state:
                state[moment_name(j)] = g.new_zeros(second_moment_shape(block))
    return True


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


def _scaled(s: MuonRuleSettings, part: Batch, O: list[Tensor]) -> tuple[list[Tensor], float]:
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


@APPLY.register
def decoupled(s: MuonRuleSettings, part: Batch, O: list[Tensor], length: float) -> None:
    """share = lr weight_decay: half the lr, half the decay. PyTorch's AdamW, Keller Jordan, Moonlight."""
    decay_and_step(s, part, O, length, [s.lr * s.weight_decay] * len(O))


@APPLY.register
def independent(s: MuonRuleSettings, part: Batch, O: list[Tensor], length: float) -> None:
    """share = weight_decay lr / peak_lr, peak_lr being the lr that the group was made with: tuning lr leaves it alone,
    only the schedule acts on it. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    peak_lr = part.groups[0]["peak_lr"]
    decay_and_step(s, part, O, length, [s.lr * (s.weight_decay / peak_lr if peak_lr else 0.0)] * len(O))


@APPLY.register
def shape_scaled(s: MuonRuleSettings, part: Batch, O: list[Tensor], length: float) -> None:
    """share = lr scale weight_decay, scale being the factor of the matrix's shape. nanochat, muonium."""
    decay_and_step(s, part, O, length, [s.lr * own[0] * s.weight_decay for own in _scales(s, part)])


def decay_and_step(
    s: MuonRuleSettings, part: Batch, O: list[Tensor], length: float, shares: Sequence[float]
) -> None:
    """W <- (1 - share) W - length O, in place; a share and the length are tensors where the lr is one.

    `cautious`: an entry decays only where the update pulls it the same way, W O >= 0 (arXiv 2510.12402).
    """
    W = part.params
    if s.weight_decay and s.cautious:
        for weight, update, share in zip(W, O, shares, strict=True):
            weight.sub_(weight * (weight * update >= 0) * share)
    elif s.weight_decay:
        torch._foreach_mul_(W, [1 - share for share in shares])
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
