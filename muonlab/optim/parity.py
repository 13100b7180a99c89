"""The settings under which our update is another implementation's, and learning rates translated between
them.

Equal means: the same equations, so the same weights in exact arithmetic. What stays different is rounding
(most of them iterate in bf16 or fp16; set `ns_dtype` for the same work dtype) and the epsilon which they add
to the norm and we need not, of relative size 1e-7 over the norm of the momentum.
"""

from collections.abc import Sequence
from typing import TypedDict

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.muon_rule import SCALE_RULES
from muonlab.optim.schedules import SCHEDULES, Coefficients


class ParitySettings(TypedDict, total=False):
    """Arguments of `Muon`; those that are missing have its defaults."""

    momentum: float
    momentum_kind: str
    nesterov: bool
    ns_schedule: Coefficients
    ns_steps: int
    scale_rule: str
    weight_decay: float
    weight_decay_kind: str
    cautious: bool
    before: Sequence[str]
    after: Sequence[str]
    beta2: float


# nanochat divides by 1.01 times the norm before rows that were fitted for 1.02.
_POLAR_EXPRESS = SCHEDULES["polar_express_1.02"].rows
_NANOCHAT_ROWS = (
    tuple(value / 1.01**power for value, power in zip(_POLAR_EXPRESS[0], (1, 3, 5), strict=True)),
    *_POLAR_EXPRESS[1:],
)

_JORDAN: ParitySettings = {"ns_schedule": "jordan", "ns_steps": 5}
_EMA: ParitySettings = {"momentum": 0.95, "momentum_kind": "ema", "nesterov": True}
_HEAVY_BALL: ParitySettings = {"momentum": 0.95, "momentum_kind": "heavy_ball", "nesterov": True}

_PARITY: dict[str, ParitySettings] = {
    "torch": {**_EMA, **_JORDAN, "scale_rule": "original", "weight_decay": 0.1},
    "keller_jordan": {**_EMA, **_JORDAN, "scale_rule": "original", "weight_decay": 0.0},
    "moonlight": {**_HEAVY_BALL, **_JORDAN, "scale_rule": "match_rms_adamw", "weight_decay": 0.1},
    "dion": {
        **_HEAVY_BALL,
        "nesterov": False,
        "ns_schedule": "polar_express_1.02",
        "ns_steps": 5,
        "scale_rule": "spectral",
        "weight_decay": 0.01,
    },
    "emerging_optimizers": {
        **_EMA,
        "nesterov": False,
        "ns_schedule": "you",
        "ns_steps": 5,
        "scale_rule": "unit_update_rms",
        "weight_decay": 0.01,
    },
    "optax": {
        **_EMA,
        **_JORDAN,
        "momentum_kind": "ema_corrected",
        "scale_rule": "original",
        "weight_decay": 0.0,
    },
    "gram_newton_schulz": {
        **_HEAVY_BALL,
        "ns_schedule": "polar_express_1.05",
        "ns_steps": 5,
        "scale_rule": "match_rms_adamw",
        "weight_decay": 0.1,
    },
    "nanochat": {
        **_EMA,
        "ns_schedule": _NANOCHAT_ROWS,
        "ns_steps": 5,
        "scale_rule": "original",
        "weight_decay": 0.28,
        "weight_decay_kind": "shape_scaled",
        "cautious": True,
        "before": ["equilibrate_rows"],
        "after": ["renormalise", "normuon"],
        "beta2": 0.9,
    },
    "pytorch_optimizer": {**_EMA, **_JORDAN, "scale_rule": "original", "weight_decay": 0.0},
    "heavyball": {
        **_HEAVY_BALL,
        "momentum": 0.9,
        "ns_schedule": "you",
        "ns_steps": 5,
        "scale_rule": "original",
        "weight_decay": 0.0,
    },
    "muon_fsdp2": {**_EMA, **_JORDAN, "scale_rule": "match_rms_adamw", "weight_decay": 0.0},
    "muonium": {
        **_HEAVY_BALL,
        "ns_schedule": "polar_express_1.02",
        "ns_steps": 5,
        "scale_rule": "original",
        "weight_decay": 0.1,
        "weight_decay_kind": "shape_scaled",
        "cautious": True,
    },
}


def list_parities() -> list[str]:
    """The implementations that `parity` knows, sorted."""
    return sorted(_PARITY)


def parity(name: str) -> ParitySettings:
    """Settings that make `Muon(params, lr=..., **parity(name))` the Muon of another implementation.

    They hold that implementation's default momentum, weight decay, iteration and scale, for (out, in)
    matrices; change one by `{**parity(name), "weight_decay": 0.0}`. Raises MuonlabError for an unknown name.

    - torch: torch.optim.Muon 2.13, adjust_lr_fn "original"; for its "match_rms_adamw" take that scale rule.
      It iterates in bf16 always.
    - keller_jordan: KellerJordan/Muon. Not equal for filters, whose scale it takes from the kernel, nor where
      a gradient is None, which it takes for zero and decays.
    - moonlight: Moonlight's toy_train.py.
    - dion: microsoft/dion's `Muon`, whose default is nesterov=False.
    - emerging_optimizers: NVIDIA's `Muon`, extra_scale_factor 1; its "independent" decay does not follow the
      learning-rate schedule, ours does.
    - optax: optax.contrib.muon, whose matrices are (in, out): transpose them.
    - gram_newton_schulz: Dao-AILab's `Muon`, which rounds the momentum to bf16 and iterates in fp16.
    - nanochat: its MuonAdamW for one parameter at a time with fixed momentum and decay; the schedules of both
      are in its training script. A wide matrix's neurons are columns there and here.
    - pytorch_optimizer: its `Muon` from 4.1 on, use_adjusted_lr False, foreach or not; before, the flag chose
      the opposite scale. It flattens stacks of experts, we do not.
    - heavyball: its `Muon` with heavyball_momentum=True. Its default looks ahead by g + m, m an average,
      which weighs the gradient by 1 and not by 1 - momentum; no setting here does that. fp32 rounds
      stochastically.
    - muon_fsdp2: its `Muon`, rms_scale True; None gradients are zeros there.
    - muonium: its `Muon`. An entry whose update is exactly 0 decays here and not there.
    """
    if name not in _PARITY:
        raise unknown_name("implementation", name, _PARITY)
    return _PARITY[name].copy()


def convert_lr(lr: float, source: str, target: str, shape: tuple[int, ...]) -> float:
    """The learning rate under `target` that moves a matrix of `shape` as `lr` does under `source`.

    `source` and `target` are names of implementations (`parity`) or of scale rules; `shape` ends in (rows,
    cols) = (out, in). The factor depends on the shape unless both scale alike, so one number serves matrices
    of one shape. To keep the decay too, multiply weight_decay by lr / convert_lr(...) where it is coupled to
    lr. Raises MuonlabError for an unknown name.
    """
    if len(shape) < 2:
        raise MuonlabError(f"convert_lr needs the shape of a matrix, not {tuple(shape)}")
    return lr * _scale(source, shape) / _scale(target, shape)


def _scale(name: str, shape: tuple[int, ...]) -> float:
    if name not in _PARITY and name not in SCALE_RULES:
        raise unknown_name("implementation or scale rule", name, [*_PARITY, *SCALE_RULES])
    rule = _PARITY[name]["scale_rule"] if name in _PARITY else name
    return SCALE_RULES[rule](*shape[-2:])
