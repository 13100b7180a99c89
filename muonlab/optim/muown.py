"""Muown: the length of every row of a weight apart from its direction (arXiv 2605.10797, by the authors' code).

With W = g V / ‖V‖ row by row, u = V / ‖V‖ and G the gradient of W:

    dg = Σ_j G_ij u_ij;  dV = (g / ‖V‖) (G - u dg)
    V <- V - lr scale polar(momentum of dV)                            Muon on directions
    g <- g - lr adam(dg)                                               Adam on lengths
    W <- g V / ‖V‖ - lr λ W                                            and g is what is left of its row

Only ‖V‖, a number a row, is kept of V. What else changes a weight between steps, such as a clip, is taken into g. The
authors cut a matrix of three times as many rows as columns into three; here its group says so (`row_blocks`).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.adamw_rule import adam, averages
from muonlab.optim.matrix_view import Group, State
from muonlab.optim.muon_rule import MuonRule, MuonRuleSettings
from muonlab.optim.ranks import is_sharded
from muonlab.optim.rules import Batch, register_rule
from muonlab.optim.whole_model import optimizer_of_its_name
from muonlab.settings.check import Average, NonNegative

# What Muon's chain does to whole weights has no meaning for directions.
UNUSED = {"update_norm": "scaled", "weight_norm": "free", "weight_decay_kind": "decoupled", "cautious": False}


@dataclass(frozen=True, kw_only=True)
class MuownSettings(MuonRuleSettings):
    """Muon's, with the rate of the authors' run in track 3 of modded-nanogpt, for directions and lengths alike.

    gain_betas, gain_eps: of Adam on the lengths, as in AdamW.
    """

    lr: NonNegative = 3.5e-3
    momentum_kind: str = "heavy_ball"
    gain_betas: tuple[Average, Average] = (0.9, 0.95)
    gain_eps: NonNegative = 1e-8


@optimizer_of_its_name
@register_rule("muown")
class MuownRule(MuonRule):
    """Muown for the hidden matrices, AdamW for the rest. A stage before or after the iteration acts on directions."""

    settings = MuownSettings
    buffers = ("momentum_buffer", "gain", "length", "gain_average", "gain_square")
    numbers: ClassVar = {"step": 0.0}

    def update(self, batch: Batch) -> None:
        """One step. Rows do not depend on each other but in the iteration, so a rank updates those it holds."""
        s = batch.settings(MuownSettings)
        for part in batch.by_shape():
            W, g, length = part.params, part.buffers("gain"), part.buffers("length")
            for w, gain, whole in zip(W, g, part.whole, strict=True):
                _follow(w, gain, whole.dtype)
            u = [torch.where(gain != 0, w / gain, 0.0) for w, gain in zip(W, g, strict=True)]
            dg = [(each * row).sum(-1, keepdim=True) for each, row in zip(part.grads, u, strict=True)]
            dV = [
                gain / n * (each - row * own)
                for gain, n, each, row, own in zip(g, length, part.grads, u, dg, strict=True)
            ]
            matrices, O, rate = self.chain(s, replace(part, grads=dV))
            U = matrices.join(O)
            m, v, t = part.buffers("gain_average"), part.buffers("gain_square"), part.buffers("step")
            averages(dg, m, v, t, s.gain_betas)
            if not isinstance(s.lr, Tensor) and s.lr == 0:
                continue  # putting a weight together again would round it
            V = [n * row - rate * each for n, row, each in zip(length, u, U, strict=True)]
            for w, gain, n, direction, step in zip(
                W, g, length, V, adam(m, v, t, s.gain_betas, s.gain_eps), strict=True
            ):
                gain.sub_(s.lr * step)
                n.copy_(row_norms(direction))
                w.copy_(gain * direction / n.clamp_min(1e-30) - s.lr * s.weight_decay * w)

    def prepare(self, group: Group) -> None:
        """Check the settings; those of Muon that act on whole weights must be left alone."""
        super().prepare(group)
        for name, value in {**UNUSED, "flatten": False}.items():
            if group[name] != value:
                raise MuonlabError(
                    f"muown has its own update of a weight, so {name} must be {value!r}, not {group[name]!r}"
                )

    def check_parameter(self, param: Tensor, name: str, group: Group) -> None:
        """Besides what Muon refuses: a weight with a row of zeros, which has no direction."""
        super().check_parameter(param, name, group)
        if not param.is_meta and not is_sharded(param) and not param.any(-1).all():
            raise MuonlabError(
                f"{name} has a row of zeros, which has no direction; initialise it or give it another rule"
            )

    def state_shapes(self, shape: torch.Size, group: Group) -> dict[str, tuple[int, ...] | None]:
        """As Muon's, with four numbers a row."""
        rows = dict.fromkeys(self.buffers[1:], (*shape[:-1], 1))
        return {**super().state_shapes(shape, group), **rows}

    def init_state(self, param: Tensor, dtype: torch.dtype) -> State:
        """Rows as long as the weight's."""
        norms = row_norms(param.to(dtype))
        rows = {"gain": norms, "length": norms.clone()}
        zeros = {name: torch.zeros_like(norms) for name in ("gain_average", "gain_square")}
        return {
            **super().init_state(param, dtype),
            **rows,
            **zeros,
            "step": torch.zeros((), device=param.device),
        }


def row_norms(X: Tensor) -> Tensor:
    """(..., rows, 1): the length of every row."""
    return torch.linalg.vector_norm(X, dim=-1, keepdim=True)


def _follow(w: Tensor, gain: Tensor, dtype: torch.dtype) -> None:
    """Take what else has changed a row's length into its gain, beyond the rounding of a weight in `dtype`."""
    norms = row_norms(w)
    moved = (norms - gain.abs()).abs() > 8 * torch.finfo(dtype).eps * norms
    gain.copy_(torch.where(moved, norms.copysign(gain), gain))
