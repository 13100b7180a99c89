"""Muon, the whole update on one page (Keller Jordan, 2024; with the variants that public implementations use).

With G the gradient of a matrix W (rows, cols), every line one stage:

    M <- average of past gradients; D = M, or Nesterov's look-ahead      momentum           MOMENTUM_KINDS
    O = NewtonSchulz(D)                                                   transform          _orthogonal
    O <- scale(rows, cols) O                                              scale              SCALE_RULES
    W <- (1 - share) W                                                    decay              WEIGHT_DECAY_KINDS
    W <- W - lr O                                                         step

From `CombinedOptimizer.step` it is three calls to the last line: `step` -> `_update` (combined.py: which parameters go
together) -> `MuonRule.update` (here: the chain) -> a stage (here: the equations). `newton_schulz.py` has the iteration.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.matrix_view import MatrixView
from muonlab.optim.newton_schulz import orthogonalise
from muonlab.optim.ownership import transform_matrices
from muonlab.optim.rules import Batch, MatrixSettings, Rule, plain_value, register_rule
from muonlab.optim.schedule_design import Row, Schedule
from muonlab.optim.schedules import SCHEDULES, Coefficients, resolve_schedule
from muonlab.optim.sharded import check_placement, is_sharded, local_part
from muonlab.settings.optimizer import MuonGroup

ADAMW_RMS = 0.2  # RMS of a typical AdamW update over lr: Moonlight, arXiv 2502.16982, section 2.2


@dataclass(frozen=True, kw_only=True)
class MuonRuleSettings(MuonGroup, MatrixSettings):
    """The settings of one group; `Muon` explains them."""


@register_rule("muon")
class MuonRule(Rule):
    """Momentum, orthogonalisation, scale, decay, step. A stack (experts, rows, cols) is as many matrices."""

    settings = MuonRuleSettings
    buffers = ("momentum_buffer",)

    def update(self, batch: Batch) -> None:
        """One step of every parameter, in place.

        Matrices of one shape, or of one and its transpose, go through together. What a class of shapes needs is freed
        before the next begins, so the extra memory is that of the largest class.
        """
        s = batch.settings(MuonRuleSettings)
        for part in _by_shape(batch):
            views = [_view(group) for group in part.groups]
            D = MOMENTUM_KINDS[s.momentum_kind](part.grads, part.states, s.momentum, s.nesterov)
            scales = [_scales(s, view, W.shape) for view, W in zip(views, part.whole, strict=True)]
            factors = {factor for own in scales for factor in own}
            # One factor for all goes into the length of the step, and not into every entry.
            length, scale = (
                (s.lr * factors.pop(), None) if len(factors) == 1 else (s.lr, SCALE_RULES[s.scale_rule])
            )
            O = transform_matrices(part, views, D, _orthogonal(s, scale), _second_moments(s, part, views, D))
            if s.weight_decay:
                share = WEIGHT_DECAY_KINDS[s.weight_decay_kind]
                peak_lr = part.groups[0]["peak_lr"]
                # shape_scaled, which alone looks at the scale, has blocks of one shape.
                decay(
                    part.params,
                    O,
                    [share(s.lr, s.weight_decay, peak_lr, own[0]) for own in scales],
                    s.cautious,
                )
            _step(part.params, O, length)

    def prepare(self, group: dict[str, Any]) -> None:
        """Check the settings; schedules and dtypes become names and numbers, which a checkpoint may hold."""
        if isinstance(group["ns_dtype"], torch.dtype):
            group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
        group["ns_schedule"] = plain_value(_plain_schedule(group["ns_schedule"]))
        super().prepare(group)
        resolve_schedule(group["ns_schedule"], group["ns_steps"])
        view = _view(group)
        if group["weight_decay_kind"] == "shape_scaled" and isinstance(view.row_blocks, tuple):
            raise MuonlabError(
                "shape_scaled weight decay needs blocks of one shape, but row_blocks has unequal sizes"
            )

    def check_parameter(self, param: Tensor, name: str, group: dict[str, Any]) -> None:
        """Refuse what has no such view as matrices, or is sharded in an unknown way."""
        check_placement(param, name)
        _view(group).check(param.shape, name)

    def describe_view(self, shape: torch.Size, group: dict[str, Any]) -> str:
        """The matrices that are orthogonalised separately."""
        return _view(group).describe(shape)

    def state_shapes(self, shape: torch.Size, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        """The momentum, the product of all momenta (`ema_corrected`), and NorMuon's second moments."""
        blocks = _view(group).block_shapes(shape)
        moments = {f"second_moment_{i}": second_moment_shape(block) for i, block in enumerate(blocks)}
        return {**super().state_shapes(shape, group), "momentum_product": None, **moments}

    def init_state(self, param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """A zero momentum, contiguous so that the iteration reads it fast."""
        return {
            "momentum_buffer": torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        }


# ---------------------------------------------------------------- momentum
# With g the gradient, m the buffer, mu the momentum of this step and d the direction that is orthogonalised. From a
# zero start and with a constant mu, heavy_ball is ema times 1/(1 - mu), which orthogonalisation removes. Under a
# momentum schedule they differ: ema weighs each gradient by the 1 - mu of its own step, heavy_ball weighs all alike.
# No stage writes to a gradient. Without Nesterov the directions are the buffers themselves: read only.


def ema(g: list[Tensor], states: list[dict[str, Any]], mu: float, nesterov: bool) -> Sequence[Tensor]:
    """m <- mu m + (1 - mu) g; Nesterov: d = mu m + (1 - mu) g. PyTorch, Keller Jordan, Emerging-Optimizers."""
    m = _momenta(states)
    torch._foreach_lerp_(m, g, 1 - mu)
    return torch._foreach_lerp(g, m, mu) if nesterov else m


def heavy_ball(g: list[Tensor], states: list[dict[str, Any]], mu: float, nesterov: bool) -> Sequence[Tensor]:
    """m <- mu m + g; Nesterov: d = g + mu m. Moonlight, dion, gram-newton-schulz."""
    m = _momenta(states)
    torch._foreach_mul_(m, mu)
    torch._foreach_add_(m, g)
    return torch._foreach_add(g, torch._foreach_mul(m, mu)) if nesterov else m


def ema_corrected(
    g: list[Tensor], states: list[dict[str, Any]], mu: float, nesterov: bool
) -> Sequence[Tensor]:
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


MOMENTUM_KINDS = {kind.__name__: kind for kind in (ema, heavy_ball, ema_corrected)}


def _momenta(states: list[dict[str, Any]]) -> list[Tensor]:
    return [local_part(state["momentum_buffer"]) for state in states]


# ---------------------------------------------------------------- transform
def _orthogonal(
    s: MuonRuleSettings, scale: Callable[[int, int], float] | None
) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
    """The transform of stacks (..., rows, cols) of whole matrices, given the second moments of each or none.

    Without a scale its results are left to be scaled.
    """

    def transform(stacks: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
        if s.equilibrate_rows:
            stacks = [equilibrate_rows(D) for D in stacks]
        dtype = None if s.ns_dtype is None else getattr(torch, s.ns_dtype)
        # Nesterov's look-ahead is a fresh tensor and may be written over; without it the direction is the buffer.
        out = stacks if s.nesterov else None
        stacks = orthogonalise(stacks, s.ns_schedule, s.ns_steps, dtype, s.ns_backend, out=out)
        if s.renormalise:
            stacks = [renormalise(O) for O in stacks]
        if s.normuon_beta2 is not None:
            stacks = [normalise_neurons(O, v, s.normuon_beta2) for O, v in zip(stacks, moments, strict=True)]
        if scale is not None:
            torch._foreach_mul_(stacks, [scale(*O.shape[-2:]) for O in stacks])
        return stacks

    return transform


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


def _second_moments(
    s: MuonRuleSettings, batch: Batch, views: Sequence[MatrixView], directions: Sequence[Tensor]
) -> bool:
    """Whether there are second moments, zero where there were none yet: whole on every rank, since they are small."""
    if s.normuon_beta2 is None:
        return False
    for state, view, W, D in zip(batch.states, views, batch.whole, directions, strict=True):
        for j, block in enumerate(view.block_shapes(W.shape)):
            if f"second_moment_{j}" not in state:
                state[f"second_moment_{j}"] = D.new_zeros(second_moment_shape(block))
    return True


# ---------------------------------------------------------------- scale
# An orthogonal (rows, cols) matrix has spectral norm 1, Frobenius norm sqrt(min(rows, cols)) and entries of RMS
# 1/sqrt(max(rows, cols)). Each rule keeps another of these fixed over shapes, and so gives lr its unit.


def original(rows: int, cols: int) -> float:
    """sqrt(max(1, rows/cols)): lr is the spectral norm of a wide update. Keller Jordan, Muon, 2024."""
    return math.sqrt(max(1.0, rows / cols))


def match_rms_adamw(rows: int, cols: int) -> float:
    """0.2 sqrt(max(rows, cols)): entries move by 0.2 lr, as AdamW's do. arXiv 2502.16982, equation 4."""
    return ADAMW_RMS * math.sqrt(max(rows, cols))


def unit_update_rms(rows: int, cols: int) -> float:
    """sqrt(max(rows, cols)): lr is the RMS of the entries' change. "spectral" in Emerging-Optimizers."""
    return math.sqrt(max(rows, cols))


def spectral(rows: int, cols: int) -> float:
    """sqrt(rows/cols): lr is the RMS-to-RMS operator norm, alike at every width. arXiv 2310.17813."""
    return math.sqrt(rows / cols)


def none(rows: int, cols: int) -> float:
    """1: lr is the spectral norm of the update, whatever the shape."""
    return 1.0


SCALE_RULES: dict[str, Callable[[int, int], float]] = {
    rule.__name__: rule for rule in (original, match_rms_adamw, unit_update_rms, spectral, none)
}


def _scales(s: MuonRuleSettings, view: MatrixView, shape: torch.Size) -> list[float]:
    return [SCALE_RULES[s.scale_rule](*block[-2:]) for block in view.block_shapes(shape)]


# ---------------------------------------------------------------- decay and step
# The share of a weight that one update takes away; 0 for weight_decay 0 and for lr 0.


def decoupled(lr: float, weight_decay: float, peak_lr: float, scale: float) -> float:
    """lr weight_decay: half the lr, half the decay. PyTorch's AdamW, Keller Jordan, Moonlight."""
    return lr * weight_decay


def independent(lr: float, weight_decay: float, peak_lr: float, scale: float) -> float:
    """weight_decay lr / peak_lr, peak_lr being the lr that the group was made with: tuning lr leaves it alone, only the
    schedule acts on it. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    return lr * (weight_decay / peak_lr if peak_lr else 0.0)


def shape_scaled(lr: float, weight_decay: float, peak_lr: float, scale: float) -> float:
    """lr scale weight_decay, scale being the factor of the matrix's shape. nanochat, muonium."""
    return lr * scale * weight_decay


WEIGHT_DECAY_KINDS = {kind.__name__: kind for kind in (decoupled, independent, shape_scaled)}


def decay(weights: list[Tensor], updates: list[Tensor], shares: Sequence[float], cautious: bool) -> None:
    """W <- (1 - share) W, in place; `cautious`: only entries that the update pulls the same way, W O >= 0 (arXiv
    2510.12402). `updates` are subtracted from the weights after it; a share may be a tensor, where the lr is one."""
    if not cautious:
        torch._foreach_mul_(weights, [1 - share for share in shares])
        return
    for W, O, share in zip(weights, updates, shares, strict=True):
        W.sub_(W * (W * O >= 0) * share)


def _step(weights: list[Tensor], updates: list[Tensor], length: float) -> None:
    """W <- W - length O, in place."""
    if isinstance(length, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(updates, length))
    else:
        torch._foreach_add_(weights, updates, alpha=-length)


# ---------------------------------------------------------------- matrices and settings
def _by_shape(batch: Batch) -> list[Batch]:
    """The parameters by the shapes of their matrices. Ranks that share the work take all at once, since a few matrices
    of one shape could not be dealt out evenly, and keep the directions of all, as much memory as the momentum."""
    if batch.process_group is not None or is_sharded(batch.whole[0]):
        return [batch]
    classes: dict[frozenset, list[int]] = defaultdict(list)
    for i, (W, group) in enumerate(zip(batch.whole, batch.groups, strict=True)):
        classes[frozenset(frozenset(block[-2:]) for block in _view(group).block_shapes(W.shape))].append(i)
    return [batch.subset(members) for members in classes.values()]


def _view(group: dict[str, Any]) -> MatrixView:
    """How the parameters of this group are seen as matrices."""
    return MatrixView(group["row_blocks"], group["col_blocks"], group["flatten"])


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
