"""The optimizers: Muon, MuonClip and AdamW for any PyTorch training loop, and builders for a whole model by name.

A file of this package registers its own builder with `@register_optimizer("NAME")`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.muon_rule import MuonRuleSettings
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.quack import QuacK
from muonlab.optim.routing import parameter_groups
from muonlab.optim.rules import setting_names
from muonlab.optim.schedules import Coefficients
from muonlab.optim.weight_averages import WeightAverages
from muonlab.registry import Registry
from muonlab.settings.optimizer import (
    AdamWClipSettings,
    AdamWGroup,
    AdamWSettings,
    ClipSettings,
    FormOfIteration,
    MuonClipSettings,
    MuonSettings,
    QuacKSettings,
)


class Muon(CombinedOptimizer):
    """Momentum orthogonalised by Newton-Schulz (Keller Jordan, 2024) for matrices, AdamW for the rest.

    One update of a matrix W (rows, cols) with gradient G:

        M <- average of past G;  D = M, or Nesterov's look-ahead
        O = scale(rows, cols) * NewtonSchulz(D)
        W <- (1 - lr * weight_decay) W - lr O

    and what the field has put before, after and around it (`before`, `after`, `update_norm`, `weight_norm`).

    params: matrices, (name, matrix) pairs, or parameter groups. A group {"params": [...], "rule": "adamw"} is
        updated by AdamW, every other by Muon; each may give any setting below for itself (an adamw group's
        are called lr, betas, eps, weight_decay). (experts, rows, cols) is a stack of matrices; what is not a
        matrix is refused.

    For matrices:

    lr: length of an update in the unit of `scale_rule`; with `match_rms_adamw` AdamW's learning rate. 0
        changes nothing. Sane: 1e-3 to 0.05, or 0.01 to 0.1 under `original`, `spectral` and `none`.
    momentum: weight of the past, in [0, 1); 0 orthogonalises every gradient by itself. Sane: 0.8 to 0.98. May
        be scheduled by changing it in the groups.
    momentum_kind: `ema`, `heavy_ball` or `ema_corrected` (`muonlab.optim.muon_rule`); without a momentum
        schedule all give the same updates, but for the first few of the last.
    nesterov: look one gradient ahead.
    ns_schedule, ns_steps: the iteration, as in `newton_schulz`: a name, a triple (a, b, c), a list of
        triples; steps None runs every row. More steps end closer to an orthogonal matrix. Sane: 4 to 10.
    ns_backend: "auto" by measured rules, or "plain" or "gram"; the same matrix up to rounding.
    ns_dtype: "float32", "bfloat16", "float16", "float64"; None: bf16 on CUDA, fp32 on every CPU; "auto": bf16 too on
        a CPU that is faster in it, so that machines may differ.
    scale_rule: `original`, `match_rms_adamw`, `unit_update_rms`, `spectral` or `none`
        (`muonlab.optim.muon_rule`).
    weight_decay: for `decoupled`, the share of a weight lost per step is lr * weight_decay; 0: none. Sane:
        0 to 0.2.
    weight_decay_kind: `decoupled`, `independent` or `shape_scaled` (`muonlab.optim.muon_rule`).
    cautious: an entry decays only where the update pulls it the same way.
    row_blocks, col_blocks, flatten: which blocks are orthogonalised separately, such as heads, and whether filters
        are flattened (`muonlab.optim.matrix_view`).
    before, after: lists of stages on whole matrices around the iteration, in their order
        (`muonlab.optim.muon_stages`); empty: none. Before: `equilibrate_rows` (MuonEq), `sign`, `muon2`, `pmuon`,
        `aurora`. After: `renormalise` (Muon+), `normuon`, `adamuon`, `namo`, `contra`, `spectral_power`.
    update_norm: `scaled`, `relative` (to the weight's norm) or `floor` (no less than a share of it).
    weight_norm: `free`, `fixed` (at its start; with `relative`, Hyperball) or `brake`
        (`muonlab.optim.weight_norms`).
    beta2, gamma, contra, power, floor, outward: settings that some of these stages read and no others; None: the
        stage's own (`muonlab.settings.optimizer.STAGE_SETTINGS`). beta2 in [0, 1) is the weight of the past in
        second moments; 0 looks at this step alone. Sane: 0.9 to 0.99. gamma: the power of PMuon's covariances, 0: none.
        contra: twice the share of the momentum that is taken off, 0: none. power: of the singular values, 0: Muon.
        floor: the least update over the weight, times lr. outward: the share of a norm's growth that remains; 1: all.

    For AdamW groups (arXiv 1711.05101):

    adamw_lr: RMS of an entry's change per step, early on; 0 changes nothing. Sane: 1e-4 to 1e-2.
    adamw_betas: weights of the past in the averages of the gradient and of its square, each in [0, 1).
    adamw_eps: added to the root of the second, in units of the gradient; with 0 an entry that never had a
        gradient becomes NaN.
    adamw_weight_decay: the share of a weight lost per step is adamw_lr * adamw_weight_decay; 0: none.

    clip: a `QKClip` that acts after every update (`MuonClip` makes one), or None.
    quack: a `QuacK` that sets the rates of query and key rows, or None.
    averages: a `WeightAverages` over the path of the weights, or None.

    The settings that name stages also take those of one's own (`muonlab.optim.rules`).

    Every scheduler of torch works; those that cycle the momentum (`OneCycleLR`, `CyclicLR`) cycle the first
    beta of adamw groups with it, and take a list with one max_lr per group.

    Buffers and updates are fp32 for 16-bit parameters. MuonlabError is raised for a wrong setting, and with
    the parameter's name for one that is complex or not a matrix and for a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        momentum: float = 0.95,
        momentum_kind: str = "ema",
        nesterov: bool = True,
        ns_schedule: Coefficients = "jordan",
        ns_steps: int | None = None,
        ns_backend: FormOfIteration = "auto",
        ns_dtype: str | torch.dtype | None = None,
        scale_rule: str = "match_rms_adamw",
        weight_decay: float = 0.0,
        weight_decay_kind: str = "decoupled",
        cautious: bool = False,
        row_blocks: int | Sequence[int] = 1,
        col_blocks: int = 1,
        flatten: bool = False,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        update_norm: str = "scaled",
        weight_norm: str = "free",
        beta2: float | None = None,
        gamma: float | None = None,
        contra: float | None = None,
        power: float | None = None,
        floor: float | None = None,
        outward: float | None = None,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        clip: QKClip | None = None,
        quack: QuacK | None = None,
        averages: WeightAverages | None = None,
    ):
        arguments = locals()  # before any other local
        muon = MuonRuleSettings(**{name: arguments[name] for name in setting_names(MuonRuleSettings)})
        adamw = AdamWGroup(lr=adamw_lr, betas=adamw_betas, eps=adamw_eps, weight_decay=adamw_weight_decay)
        super().__init__(params, "muon", {"muon": muon, "adamw": adamw}, clip, quack, averages)


class MuonClip(Muon):
    """Muon with QK-Clip (Kimi K2, arXiv 2507.20534): `observe(max_logits)` after each forward, then `step()`.

    layouts: one AttentionLayout per layer: which rows of which weights belong to which head.
    tau, alpha, maximum, per, windows: as in `QKClip`; clip_momentum, clip_power and clip_average are its `momentum`,
        `power` and `average`.
    settings: every argument of `Muon` but clip, by name, with the same defaults and checks: lr, momentum,
        ns_schedule, weight_decay, adamw_lr and the others that `help(Muon)` lists.
    """

    def __init__(
        self,
        params: ParamsT,
        layouts: Iterable[AttentionLayout],
        *,
        tau: float = 100.0,
        alpha: float = 0.5,
        maximum: str = "signed",
        per: str = "head",
        windows: Sequence[Sequence[int | None]] | None = None,
        clip_momentum: str = "keep",
        clip_power: float = 1.0,
        clip_average: float = 0.0,
        **settings: object,
    ):
        clip = QKClip(
            layouts, tau, alpha, maximum, per, windows, clip_momentum, power=clip_power, average=clip_average
        )
        super().__init__(params, clip=clip, **settings)  # type: ignore[arg-type]  # checked by the rules


class AdamW(CombinedOptimizer):
    """PyTorch's AdamW as a CombinedOptimizer, so that a clip can follow it and a training loop treats it like Muon.

    lr: RMS of an entry's change per step, early on; 0 changes nothing. Sane: 1e-4 to 1e-2.
    betas: weights of the past in the averages of the gradient and of its square, each in [0, 1); 0 looks at
        this gradient alone.
    eps: added to the root of the second, in units of the gradient; with 0 an entry that never had a gradient
        becomes NaN.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none. Sane: 0 to 0.2.
    clip: a `QKClip` that acts after every update, or None.
    quack: a `QuacK` that sets the rates of query and key rows, or None.
    averages: a `WeightAverages` over the path of the weights, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: QKClip | None = None,
        quack: QuacK | None = None,
        averages: WeightAverages | None = None,
    ):
        adamw = AdamWGroup(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, "adamw", {"adamw": adamw}, clip, quack, averages)


# ---------------------------------------------------------------- by name, for a whole model
OPTIMIZERS: Registry[CombinedOptimizer] = Registry("optimizer", package="muonlab.optim")
register_optimizer = OPTIMIZERS.register
list_optimizers = OPTIMIZERS.names


def build_optimizer(name: str, model: nn.Module, **settings: object) -> CombinedOptimizer:
    """The optimizer of all parameters of `model`, routed by their roles.

    `name` is one of `list_optimizers()`, `settings` are its builder's. Raises MuonlabError for an unknown name or
    setting, with the near ones, and for a value of a wrong type, range or shape.
    """
    return OPTIMIZERS.build(name, settings, model)


@register_optimizer("adamw")
def adamw(model: nn.Module, settings: AdamWSettings, clip: QKClip | None = None) -> CombinedOptimizer:
    """AdamW for every parameter."""
    groups = parameter_groups(model, "adamw", lr_scale=settings.lr_scale, other_lr=settings.other_lr)
    return CombinedOptimizer(
        groups, "adamw", {"adamw": settings}, clip, _quack(model, settings), WeightAverages.of(settings)
    )


@register_optimizer("adamwclip")
def adamwclip(model: nn.Module, settings: AdamWClipSettings) -> CombinedOptimizer:
    """AdamW followed by QK-Clip."""
    return adamw(model, settings, _clip(model, settings))


@register_optimizer("muon")
def muon(model: nn.Module, settings: MuonSettings, clip: QKClip | None = None) -> CombinedOptimizer:
    """Muon for the hidden matrices, AdamW for the rest."""
    s = settings
    groups = parameter_groups(model, "muon", s.routes, s.lr_scale, s.per_head, s.split_qkv)
    defaults = {"muon": MuonRuleSettings.of(s), "adamw": s.adamw}
    return CombinedOptimizer(groups, "muon", defaults, clip, _quack(model, s), WeightAverages.of(s))


@register_optimizer("muonclip")
def muonclip(model: nn.Module, settings: MuonClipSettings) -> CombinedOptimizer:
    """Muon followed by QK-Clip."""
    return muon(model, settings, _clip(model, settings))


def _layouts(model: nn.Module, what: str) -> Sequence[AttentionLayout]:
    declare = getattr(model, "attention_layouts", None)
    if declare is None:
        raise MuonlabError(
            f"{type(model).__name__} declares no attention_layouts(), without which {what} cannot act"
        )
    return declare()


def _quack(model: nn.Module, settings: QuacKSettings) -> QuacK | None:
    return None if settings.quack is None else QuacK(_layouts(model, "QuacK"), settings.quack)


def _clip(model: nn.Module, settings: ClipSettings) -> QKClip:
    s = settings
    return QKClip(
        _layouts(model, "QK-Clip"),
        s.tau,
        s.alpha,
        s.maximum,
        s.per,
        s.windows,
        s.clip_momentum,
        power=s.clip_power,
        average=s.clip_average,
    )
