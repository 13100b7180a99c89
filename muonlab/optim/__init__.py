"""Optimizers for any PyTorch training loop: Muon, AdamW, QK-Clip and what is between them."""

from muonlab.optim.adamw_rule import AdamWRule
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.dion import DionRule
from muonlab.optim.entrywise import AdEMAMix, Lion, NAdamW, Signum
from muonlab.optim.kronecker import SOAP, SOAPMuon
from muonlab.optim.muon_rule import MuonRule
from muonlab.optim.muown import MuownRule
from muonlab.optim.newton_schulz import newton_schulz, orthogonalise
from muonlab.optim.optimizers import (
    AdamW,
    Muon,
    MuonClip,
    build_optimizer,
    list_optimizers,
    register_optimizer,
)
from muonlab.optim.parity import convert_lr, parity
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.quack import QuacK
from muonlab.optim.routing import Route, format_routing
from muonlab.optim.rules import Rule, register_rule
from muonlab.optim.schedule_design import design_schedule
from muonlab.optim.schedule_free import ScheduleFreeAdamW
from muonlab.optim.schedules import describe_schedule, list_schedules
from muonlab.optim.scion import Scion
from muonlab.optim.shampoo import KLShampoo, Shampoo
from muonlab.optim.weight_averages import WeightAverages
from muonlab.optim.whole_model import optimizer_of_its_name

__all__ = [
    "SOAP",
    "AdEMAMix",
    "AdamW",
    "AdamWRule",
    "CombinedOptimizer",
    "DionRule",
    "KLShampoo",
    "Lion",
    "Muon",
    "MuonClip",
    "MuonRule",
    "MuownRule",
    "NAdamW",
    "QKClip",
    "QuacK",
    "Route",
    "Rule",
    "SOAPMuon",
    "ScheduleFreeAdamW",
    "Scion",
    "Shampoo",
    "Signum",
    "WeightAverages",
    "build_optimizer",
    "convert_lr",
    "describe_schedule",
    "design_schedule",
    "format_routing",
    "list_optimizers",
    "list_schedules",
    "newton_schulz",
    "optimizer_of_its_name",
    "orthogonalise",
    "parity",
    "register_optimizer",
    "register_rule",
]
