"""The variants of Muon that the field knows as optimizers: Muon's chain with the stages and settings of their source.

Each is its settings, whose docstring says where they come from; the stages are in muon_stages.py and weight_norms.py.
Learning rates are in the unit of the scale rule beside them. The iteration is Muon's in all of them: the sources
differ in it by habit, not by their equation. Momentum is 0.95 with a look-ahead where the source has that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.optimizers import muon, register_optimizer
from muonlab.settings.check import NonNegative, Text
from muonlab.settings.optimizer import MuonSettings

Variant = TypeVar("Variant", bound=type[MuonSettings])


def variant(settings: Variant) -> Variant:
    """Decorator: the optimizer of this name is `muon` with these settings."""

    def build(model: nn.Module, settings: MuonSettings) -> CombinedOptimizer:
        return muon(model, settings)

    build.__doc__, build.__annotations__["settings"] = settings.__doc__, settings
    register_optimizer(settings.name)(build)
    return settings


@variant
@dataclass(frozen=True, kw_only=True)
class MuonHSettings(MuonSettings):
    """MuonH (Hyperball, arXiv 2606.16899), with the rate of track 3 of modded-nanogpt: of each weight's norm."""

    name: Literal["muonh"] = "muonh"  # type: ignore[assignment]
    lr: NonNegative = 0.018
    update_norm: str = "relative"
    weight_norm: str = "fixed"


@variant
@dataclass(frozen=True, kw_only=True)
class NorMuonSettings(MuonSettings):
    """NorMuon (arXiv 2510.05491), with the rate and scale of the authors' code."""

    name: Literal["normuon"] = "normuon"  # type: ignore[assignment]
    lr: NonNegative = 0.02
    scale_rule: str = "original"
    after: Sequence[Text] = ("normuon",)


@variant
@dataclass(frozen=True, kw_only=True)
class AdaMuonSettings(MuonSettings):
    """AdaMuon (arXiv 2507.11005), with the rate and decay of the authors' GPT-2 runs: those of AdamW."""

    name: Literal["adamuon"] = "adamuon"  # type: ignore[assignment]
    lr: NonNegative = 6e-4
    weight_decay: NonNegative = 0.1
    before: Sequence[Text] = ("sign",)
    after: Sequence[Text] = ("adamuon",)


@variant
@dataclass(frozen=True, kw_only=True)
class NAMOSettings(MuonSettings):
    """NAMO (arXiv 2602.17080), with the rate and decay of the authors' GPT-2 runs."""

    name: Literal["namo"] = "namo"  # type: ignore[assignment]
    lr: NonNegative = 0.012
    weight_decay: NonNegative = 0.1
    after: Sequence[Text] = ("namo",)


@variant
@dataclass(frozen=True, kw_only=True)
class ContraMuonSettings(MuonSettings):
    """Contra-Muon as its authors ran it in track 3: before NorMuon's rows, with a floor instead of decay."""

    name: Literal["contra_muon"] = "contra_muon"  # type: ignore[assignment]
    lr: NonNegative = 0.0375
    scale_rule: str = "original"
    after: Sequence[Text] = ("contra", "normuon")
    update_norm: str = "floor"


@variant
@dataclass(frozen=True, kw_only=True)
class Muon2Settings(MuonSettings):
    """Muon² (arXiv 2604.09967), with the default rate of the code in track 3, which ran it at 0.1."""

    name: Literal["muon2"] = "muon2"  # type: ignore[assignment]
    lr: NonNegative = 0.02
    scale_rule: str = "original"
    before: Sequence[Text] = ("muon2",)


@variant
@dataclass(frozen=True, kw_only=True)
class AuroraSettings(MuonSettings):
    """Aurora, with the rate and decay of the authors' code."""

    name: Literal["aurora"] = "aurora"  # type: ignore[assignment]
    lr: NonNegative = 0.05
    weight_decay: NonNegative = 0.025
    scale_rule: str = "original"
    before: Sequence[Text] = ("aurora",)


@variant
@dataclass(frozen=True, kw_only=True)
class PMuonSettings(MuonSettings):
    """PMuon, with the rate and decay of its authors' run in track 3."""

    name: Literal["pmuon"] = "pmuon"  # type: ignore[assignment]
    lr: NonNegative = 0.035
    weight_decay: NonNegative = 0.025
    scale_rule: str = "original"
    before: Sequence[Text] = ("pmuon",)
