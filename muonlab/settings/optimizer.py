"""The settings of each registered optimizer, checked before torch is imported; `Muon`, `AdamW` and `QKClip` document
each one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from muonlab.errors import MuonlabError, unknown_name
from muonlab.settings.check import Average, Count, NonNegative, Positive, Share, Steps, Text

Row = tuple[float, float, float]
# The names that muonlab.optim.schedules resolves; minimax may carry its floor, "minimax:0.01".
NS_SCHEDULES = (
    "aol",
    "aol_dion",
    "cans",
    "cubic",
    "deepseek",
    "jordan",
    "minimax",
    "polar_express",
    "polar_express_1.01",
    "polar_express_1.02",
    "polar_express_1.05",
    "svd",
    "you",
    "you6",
)
FormOfIteration = Literal["auto", "plain", "gram"]
# The package's own stages of Muon, and its rules, by the setting that names them. Others may be registered.
NAMES = {
    "momentum_kind": ("ema", "heavy_ball", "ema_corrected"),
    "scale_rule": ("original", "match_rms_adamw", "unit_update_rms", "spectral", "none"),
    "before": ("equilibrate_rows", "sign", "muon2", "pmuon", "aurora"),
    "after": ("renormalise", "normuon", "adamuon", "namo", "contra", "spectral_power"),
    "update_norm": ("scaled", "relative", "floor"),
    "weight_decay_kind": ("decoupled", "independent", "shape_scaled"),
    "weight_norm": ("free", "fixed", "brake"),
    "routes": ("muon", "adamw"),
}
# The settings that only some stages read, and the value of each where it is null: that of the stage's source.
STAGE_SETTINGS = {
    "beta2": {"muon2": 0.95, "pmuon": 0.95, "normuon": 0.95, "adamuon": 0.95, "namo": 0.99},
    "gamma": {"pmuon": 0.3},
    "contra": {"contra": 0.4},
    "power": {"spectral_power": 0.25},
    "floor": {"floor": 0.35},
    "outward": {"brake": 0.5},
}
Power = Annotated[float, Ge(-1), Le(1)]
Factors = Mapping[str, NonNegative]
Routes = Mapping[str, Text]


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """QK-Clip's settings, in addition to those of the optimizer that it follows; `clip_momentum`, `clip_power` and
    `clip_average` are QKClip's `momentum`, `power` and `average`."""

    tau: Positive = 100.0
    alpha: Share = 0.5
    maximum: Literal["signed", "absolute"] = "signed"
    per: Literal["head", "layer"] = "head"
    windows: Sequence[tuple[Steps, Steps | None]] | None = None
    clip_momentum: Literal["keep", "scale", "project"] = "keep"
    clip_power: Annotated[float, Gt(0), Le(1)] = 1.0
    clip_average: Average = 0.0

    def __post_init__(self) -> None:
        for first, last in self.windows or ():
            if not first < (math.inf if last is None else last):
                raise MuonlabError(
                    f"optimizer.windows contains {[first, last]}; a window is [first step, last step) with first < last"
                )


@dataclass(frozen=True, kw_only=True)
class QuacKSettings:
    """quack: QuacK's tau, the rate of queries and keys over lr at the first step, which falls as a head's key or query
    grows (muonlab.optim.quack); null: no QuacK."""

    quack: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class AverageSettings:
    """Averages over the path of the weights, around any rule (muonlab.optim.weight_averages).

    lookahead: EMA-Nesterov's beta, how far ahead of the weights gradients are taken, in average moves of a step; it
        falls with the learning rate. 0: at the weights. Sane: 0.3 to 0.6.
    lookahead_memory: the weight of the past in the average move.
    lookahead_from, lookahead_until: the first step, from 0, whose gradients are taken ahead, and the first that are
        not again; null: to the end. The source leaves out warm-up and the last third.
    tail_share: the share of the tail average in what evaluation reads; 0: no such average. Sane: 0.6.
    tail_horizon: the steps that the tail average looks back over.
    tail_from: the steps after which it begins, best where the rate falls; 0: with the first.
    """

    lookahead: NonNegative = 0.0
    lookahead_memory: Average = 0.99
    lookahead_from: Steps = 0
    lookahead_until: Steps | None = None
    tail_share: Share = 0.0
    tail_horizon: Count = 150
    tail_from: Steps = 0


@dataclass(frozen=True, kw_only=True)
class AdamWGroup:
    """The settings of one parameter group under AdamW."""

    lr: NonNegative = 3e-3
    weight_decay: NonNegative = 0.0
    betas: tuple[Average, Average] = (0.9, 0.95)
    eps: NonNegative = 1e-8


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(AdamWGroup, QuacKSettings, AverageSettings):
    """AdamW for every parameter (arXiv 1711.05101), in one group per role.

    lr_scale: {role: factor} multiplies the learning rate of a role; 0 freezes it. other_lr: the learning rate of
    embeddings, head, norms and biases, as Muon's `adamw_lr`; null: lr.
    """

    name: Literal["adamw"] = "adamw"
    lr_scale: Factors | None = None
    other_lr: NonNegative | None = None


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """Which rule updates which parameter, and as which matrices.

    routes: {role or parameter-name pattern: rule} overrides the default, for instance {"head": "muon"} or
        {"query": "adamw", "key": "adamw"}; a rule is "muon", "adamw" or one that is registered (muonlab.optim.rules).
    lr_scale: {role: factor} multiplies the learning rate of a role; 0 freezes it.
    per_head: orthogonalise every head of query, key, value and output separately.
    split_qkv: orthogonalise query, key and value of a fused weight separately; false takes it as one matrix.
    """

    routes: Routes | None = None
    lr_scale: Factors | None = None
    per_head: bool = False
    split_qkv: bool = True


@dataclass(frozen=True, kw_only=True)
class BesideAdamW:
    """The settings of the parameters that a rule for matrices leaves to AdamW."""

    adamw_lr: NonNegative = 3e-3
    adamw_betas: tuple[Average, Average] = (0.9, 0.95)
    adamw_eps: NonNegative = 1e-8
    adamw_weight_decay: NonNegative = 0.0

    @property
    def adamw(self) -> AdamWGroup:
        """The settings of the groups that AdamW updates."""
        return AdamWGroup(
            lr=self.adamw_lr,
            betas=self.adamw_betas,
            eps=self.adamw_eps,
            weight_decay=self.adamw_weight_decay,
        )


@dataclass(frozen=True, kw_only=True)
class MuonGroup:
    """The settings of one parameter group under Muon, except how its parameters are viewed as matrices.

    momentum_kind, scale_rule and weight_decay_kind name stages of muonlab.optim.muon_rule, before and after chains of
    those of muon_stages.py, update_norm and weight_norm those of weight_norms.py; a user's own are included. Settings
    in STAGE_SETTINGS are read by the stages named there alone, and null is the value there.
    """

    lr: NonNegative = 0.01
    weight_decay: NonNegative = 0.0
    momentum: Average = 0.95
    momentum_kind: str = "ema"
    nesterov: bool = True
    ns_schedule: str | Row | Sequence[Row] = "jordan"
    ns_steps: Count | None = None
    ns_backend: FormOfIteration = "auto"
    ns_dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] | None = None
    scale_rule: str = "match_rms_adamw"
    weight_decay_kind: str = "decoupled"
    cautious: bool = False
    before: Sequence[Text] = ()
    after: Sequence[Text] = ()
    update_norm: str = "scaled"
    weight_norm: str = "free"
    beta2: Average | None = None
    gamma: NonNegative | None = None
    contra: NonNegative | None = None
    power: Power | None = None
    floor: Positive | None = None
    outward: Share | None = None

    def value(self, setting: str, stage: str) -> float:
        """A setting of one stage: what was given, or the stage's own."""
        own = getattr(self, setting)
        return STAGE_SETTINGS[setting][stage] if own is None else own

    def check_stages(self) -> None:
        """Raise MuonlabError for a setting that no chosen stage reads, and for stages that contradict each other."""
        chosen = {*self.before, *self.after, self.update_norm, self.weight_norm}
        known = {name for names in NAMES.values() for name in names}
        for setting, stages in STAGE_SETTINGS.items():
            value = getattr(self, setting)
            if value is not None and not chosen & stages.keys() and chosen <= known:
                readers = " or ".join(f"'{stage}'" for stage in stages)
                raise MuonlabError(
                    f"{setting}={value} is read by the stage {readers} alone, which is not chosen"
                )
        for setting in ("before", "after"):
            names = getattr(self, setting)
            if len(set(names)) < len(names):
                raise MuonlabError(f"{setting}={list(names)} names a stage twice")
        if self.weight_norm == "fixed" and self.weight_decay:
            raise MuonlabError(
                "weight_norm='fixed' keeps the norm of every weight, so weight_decay must be 0, not"
                f" {self.weight_decay}"
            )
        if "namo" in self.after and (self.before or self.momentum_kind != "ema"):
            raise MuonlabError(
                "the stage 'namo' compares the momentum's norm with the gradient's, so it needs momentum_kind='ema' and"
                f" before=[], not {self.momentum_kind!r} and {list(self.before)}"
            )


@dataclass(frozen=True, kw_only=True)
class MuonSettings(MuonGroup, RoutingSettings, BesideAdamW, QuacKSettings, AverageSettings):
    """Muon for the hidden matrices, AdamW for embeddings, head, norms, biases, router, gates and filters."""

    name: Literal["muon"] = "muon"

    def __post_init__(self) -> None:
        schedule = self.ns_schedule
        if isinstance(schedule, str) and schedule.partition(":")[0] not in NS_SCHEDULES:
            raise unknown_name("optimizer.ns_schedule", schedule, NS_SCHEDULES)
        if not schedule:
            raise MuonlabError(
                "optimizer.ns_schedule must be a name, one triple (a, b, c) or a list of them, not empty"
            )
        if self.per_head and not self.split_qkv:
            raise MuonlabError(
                "optimizer.per_head cuts a fused QKV weight into its heads, so optimizer.split_qkv=false cannot"
                " leave it whole"
            )
        self.check_stages()
        if self.quack is not None and self.weight_norm == "fixed":
            raise MuonlabError(
                "optimizer.quack divides rates by norms, which optimizer.weight_norm='fixed' keeps as they are; use"
                " optimizer.lr_scale={query: ..., key: ...}"
            )

    def names(self) -> list[tuple[str, str]]:
        """(setting, name) of every stage, and of the rule of every route."""
        values = {setting: getattr(self, setting) for setting in NAMES if setting != "routes"}
        stages = [
            (setting, name)
            for setting, value in values.items()
            for name in ((value,) if isinstance(value, str) else value)
        ]
        return stages + [("routes", rule) for rule in (self.routes or {}).values()]


@dataclass(frozen=True, kw_only=True)
class AdamWClipSettings(AdamWSettings, ClipSettings):
    """AdamW followed by QK-Clip."""

    name: Literal["adamwclip"] = "adamwclip"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class MuonClipSettings(MuonSettings, ClipSettings):
    """Muon followed by QK-Clip (Kimi K2, arXiv 2507.20534)."""

    name: Literal["muonclip"] = "muonclip"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        MuonSettings.__post_init__(self)
        ClipSettings.__post_init__(self)


OPTIMIZER_SETTINGS: dict[str, type] = {
    "adamw": AdamWSettings,
    "adamwclip": AdamWClipSettings,
    "muon": MuonSettings,
    "muonclip": MuonClipSettings,
}
