"""Muon, AdamW and MuonClip, usable in any PyTorch training loop."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from muonlab.layout import AttentionLayout
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.qk_clip import QKClip


class Muon(CombinedOptimizer):
    """Momentum orthogonalised by Newton-Schulz (Keller Jordan 2024) for matrices, AdamW for the rest.

    One update of a matrix W of shape (rows, cols) with gradient G:

        M <- momentum average of G;  D = M, or Nesterov's look-ahead
        O = scale(rows, cols) * NewtonSchulz(D)
        W <- (1 - lr * weight_decay) W - lr O

    params: a list of matrices, of (name, matrix) pairs, or of parameter groups. A group {"params": [...], "rule":
    "adamw"} is updated by AdamW; every other is under Muon. Every setting below may be given in a group too; in
    an adamw group the last four are called lr, betas, eps and weight_decay. A (experts, rows, cols) parameter is a stack of
    matrices; what is not a matrix is refused.

    Settings of the matrices:

    - lr: length of an update in the unit of `scale_rule`; with `match_rms_adamw` AdamW's learning rate. 0 changes
      nothing. Sane: 1e-3 to 0.05 (0.02 to 0.1 for `original`, `spectral` and `none`).
    - momentum: weight of the past in [0, 1); 0 orthogonalises each gradient alone. Sane: 0.8 to 0.98. May be
      changed in the groups at any step.
    - momentum_kind: `ema`, `heavy_ball` or `ema_corrected`; see `muonlab.optim.momentum`. The three differ only
      while the momentum changes or, the last, in the first steps.
    - nesterov: look one gradient ahead.
    - ns_schedule, ns_steps: the iteration, as in `newton_schulz`: a name, one triple or a list of triples; None runs all
      rows. More steps come closer to an orthogonal matrix; sane: 4 to 10.
    - ns_dtype: "float32", "bfloat16", "float16" or "float64"; None: bf16 on CUDA, fp32 elsewhere.
    - scale_rule: `original`, `match_rms_adamw`, `unit_update_rms`, `spectral` or `none`; see `muonlab.optim.scale_rules`.
    - weight_decay: in units of 1/lr per step for `decoupled`; 0: none. Sane: 0 to 0.2.
    - weight_decay_kind: `decoupled`, `independent` or `shape_scaled`; see `muonlab.optim.weight_decay`.
    - cautious: let an entry decay only where the update moves it the same way.
    - row_blocks, col_blocks, flatten: which blocks are orthogonalised apart (heads, fused weights), and whether filters are
      flattened; see `muonlab.optim.matrix_view`.
    - equilibrate_rows, renormalise, normuon_beta2: even out rows before and after; None or false: off, normuon_beta2 0.9 to
      0.95 where it is on; see `muonlab.optim.normuon`.

    Settings of AdamW groups (arXiv 1711.05101):

    - adamw_lr: RMS of an entry's change per step; 0 changes nothing. Sane: 1e-4 to 1e-2.
    - adamw_betas: weights of the past in the two averages, each in [0, 1).
    - adamw_eps: added to the root of the second average, in units of the gradient.
    - adamw_weight_decay: as weight_decay, always decoupled.

    clip: a `QKClip` to apply after every update (`MuonClip` makes one), or None.

    Invalid settings, parameters that are complex or no matrix, and sparse gradients raise MuonlabError.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        momentum: float = 0.95,
        momentum_kind: str = "ema",
        nesterov: bool = True,
        ns_schedule: str | Sequence[float] | Sequence[Sequence[float]] = "jordan",
        ns_steps: int | None = None,
        ns_dtype: str | None = None,
        scale_rule: str = "match_rms_adamw",
        weight_decay: float = 0.0,
        weight_decay_kind: str = "decoupled",
        cautious: bool = False,
        row_blocks: int | Sequence[int] = 1,
        col_blocks: int = 1,
        flatten: bool = False,
        equilibrate_rows: bool = False,
        renormalise: bool = False,
        normuon_beta2: float | None = None,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        clip: QKClip | None = None,
    ):
        muon = {
            "lr": lr,
            "momentum": momentum,
            "momentum_kind": momentum_kind,
            "nesterov": nesterov,
            "ns_schedule": ns_schedule,
            "ns_steps": ns_steps,
            "ns_dtype": str(ns_dtype).removeprefix("torch.")
            if isinstance(ns_dtype, torch.dtype)
            else ns_dtype,
            "scale_rule": scale_rule,
            "weight_decay": weight_decay,
            "weight_decay_kind": weight_decay_kind,
            "cautious": cautious,
            "row_blocks": row_blocks,
            "col_blocks": col_blocks,
            "flatten": flatten,
            "equilibrate_rows": equilibrate_rows,
            "renormalise": renormalise,
            "normuon_beta2": normuon_beta2,
        }
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        super().__init__(params, "muon", {"muon": muon, "adamw": adamw}, clip)


class MuonClip(Muon):
    """Muon with a QK-Clip (Kimi K2, arXiv 2507.20534): `observe(max_logits)` after every training forward, then `step()`.

    layouts: one AttentionLayout a layer, the declaration of which rows make which head.
    tau, alpha, maximum, per, windows: as in `QKClip`; clip_momentum is its `momentum`.
    settings: every setting of `Muon`.
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
        **settings: Any,
    ):
        clip = QKClip(layouts, tau, alpha, maximum, per, windows, clip_momentum)
        super().__init__(params, clip=clip, **settings)


class AdamW(CombinedOptimizer):
    """PyTorch's AdamW in the same object as Muon, so that a clip can follow it and every loop treats both alike.

    lr: RMS of an entry's change per step; 0 changes nothing. Sane: 1e-4 to 1e-2.
    betas: weights of the past in the two averages, each in [0, 1). eps: in units of the gradient.
    weight_decay: in units of 1/lr per step; 0: none.
    clip: a `QKClip` to apply after every update, or None.
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
    ):
        adamw = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, "adamw", {"adamw": adamw}, clip)
