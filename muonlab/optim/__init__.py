"""Optimizers for any PyTorch training loop: Muon, AdamW, QK-Clip and what is between them."""

from muonlab.optim.muon import AdamW, Muon, MuonClip
from muonlab.optim.newton_schulz import newton_schulz, orthogonalise
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.registry import build_optimizer, list_optimizers, register_optimizer
from muonlab.optim.routing import Route, format_routing

__all__ = [
    "AdamW",
    "Muon",
    "MuonClip",
    "QKClip",
    "Route",
    "build_optimizer",
    "format_routing",
    "list_optimizers",
    "newton_schulz",
    "orthogonalise",
    "register_optimizer",
]
