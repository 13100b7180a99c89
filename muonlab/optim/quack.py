"""QuacK: a head's query moves the less the larger its key has grown, and its key the less the larger its query.

Anson and Aitchison (arXiv 2511.21377), algorithm 1. Before each step, with Frobenius norms and the first of them,

    eta_Q^h = tau eta |K_h(0)| / |K_h|        eta_K^h = tau eta |Q_h(0)| / |Q_h|

so that what a step changes in a logit, about dQ K + Q dK, does not grow with the weights. Several query heads on one
key count with their largest norm, as the heads on a shared rotary key do in algorithm 2:

    eta_K^g = tau eta max_h |Q_h(0)| / max_h |Q_h|        over the query heads h of key head g

The rotary rows of latent attention are such a layer of their own, of one key. Algorithm 2 divides by the norms of the
down-projections too, and slows those by the others'; behind a normalised latent they do not reach the logits, so that
here they are left out and keep their rate. Biases are further columns of their weights.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout
from muonlab.optim.clip_rows import ClipRows, head_groups
from muonlab.optim.matrix_view import State
from muonlab.optim.saved_state import check_entries, check_tensor


class QuacK:
    """The rates of query and key rows, for any rule of a CombinedOptimizer: `CombinedOptimizer(..., quack=QuacK(...))`.

    A step's whole change of a row, decay included, is multiplied by its rate over the group's lr. That is the paper's
    rule for every update that is proportional to lr; it is not for one that brings weights back to a norm, nor for
    one that computes them from its buffers, as schedule-free does.

    layouts: one AttentionLayout per attention layer; one that says why it is `inert` is refused, and latent attention
        must declare its `shared_key`.
    tau: the rate at the first step over lr, above 0; the paper tunes it within 0.01 to 10. 1: lr.

    The first norms are those before the first step; a state saved with them restores them exactly. Whole weights on one
    device are needed. What does not fit raises MuonlabError.
    """

    def __init__(self, layouts: Iterable[AttentionLayout], tau: float = 1.0):
        if not 0 < tau < math.inf:
            raise MuonlabError(f"tau is {tau}; QuacK's rate over lr must be finite and above 0")
        self.tau = tau
        self._parts = [part for layout in layouts for part in _parts(layout)]
        if not self._parts:
            raise MuonlabError("QuacK needs at least one AttentionLayout")
        self._rows = ClipRows(self._parts)
        if self._rows.sharded:
            raise MuonlabError("QuacK needs whole query and key weights, but these are sharded (DTensor)")
        self._heads = sum(part.num_heads for part in self._parts)
        self._groups = head_groups(
            [part.num_heads // part.num_kv_heads for part in self._parts for _ in range(part.num_kv_heads)]
        )
        self._initial: Tensor | None = None

    @torch.no_grad()
    def factors(self) -> dict[Tensor, Tensor]:
        """For each declared weight the factor of each of its rows, shaped to multiply it; 1 for rows of no head.

        Nothing waits for the device after the first call. Raises MuonlabError at the first for a head without norm.
        """
        norms = self._opposite_norms()
        if self._initial is None:
            self._check_first(norms)
            self._initial = norms
        initial = self._initial = self._initial.to(norms)
        rates = self.tau * torch.where(norms > 0, initial / norms, 1.0)  # eta_Q and eta_K over eta
        query, key = rates.split((self._heads, len(rates) - self._heads))
        # ClipRows keeps a place between them for rows on shared keys, which are query rows of their own part here.
        return self._rows.factors_of(torch.cat([query.new_ones(1), query, torch.ones_like(query), key]))

    def state_dict(self) -> State:
        """The first norms; None before the first step."""
        return {"heads": self._names(), "initial": self._initial}

    def check_state(self, state: State) -> None:
        """Raise MuonlabError unless `load_state_dict` can take it whole; changes nothing."""
        check_entries("the saved QuacK state", state, ("heads", "initial"))
        if state["heads"] != self._names():
            raise MuonlabError(
                f"the saved QuacK state has heads {state['heads']}; the layouts declare {self._names()}"
            )
        if state["initial"] is not None:
            entries = self._heads + len(self._groups.members)
            check_tensor("initial of the saved QuacK state", state["initial"], torch.empty(entries))

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict()`'s answer exactly. Raises MuonlabError for other layers or head counts."""
        self.check_state(state)
        initial = state["initial"]
        self._initial = None if initial is None else initial.clone()

    def _names(self) -> dict[str, list[int]]:
        return {part.name: [part.num_heads, part.num_kv_heads] for part in self._parts}

    def _opposite_norms(self) -> Tensor:
        """For each query head the norm of its key, then for each key head the largest norm of its queries."""
        device = self._rows.parameters[0].device
        self._rows.to(device)
        norms = self._rows.norms(1 + 2 * self._heads + len(self._groups.members))
        query, key = norms[1 : 1 + self._heads], norms[1 + 2 * self._heads :]
        groups = self._groups = self._groups.to(device)
        return torch.cat([key[groups.owner], query[groups.members].amax(1)])

    def _check_first(self, norms: Tensor) -> None:
        if (norms > 0).all():
            return
        entry = int((~(norms > 0)).nonzero()[0])
        names = [part.name for part in self._parts for _ in range(part.num_heads)]
        names += [part.name for part in self._parts for _ in range(part.num_kv_heads)]
        raise MuonlabError(
            f"QuacK's rates are relative to the first norms, and a {'key' if entry < self._heads else 'query'} head of"
            f" {names[entry]} begins with a norm of 0 or NaN"
        )


def _parts(layout: AttentionLayout) -> list[AttentionLayout]:
    """The layers of plain attention that a layout is made of: its heads, and those on a key that all share."""
    if layout.inert:
        raise MuonlabError(f"QuacK cannot act on {layout.name}: {layout.inert}")
    plain = replace(layout, query_shared_key=(), shared_key=()) if layout.query else None
    if not layout.query_shared_key:
        return [plain] if plain else []
    if not layout.shared_key:
        raise MuonlabError(
            f"QuacK needs the rows of the key that the heads of {layout.name} share; declare its shared_key"
        )
    shared = AttentionLayout(
        f"{layout.name} shared", layout.num_heads, 1, layout.query_shared_key, layout.shared_key
    )
    return [plain, shared] if plain else [shared]


@dataclass(frozen=True)
class SlowedWeight:
    """A weight about to be updated, as it was, and the factor of its update."""

    weight: Tensor
    before: Tensor
    factor: Tensor

    def slow(self) -> None:
        """W <- W_before + factor (W - W_before), which is W where the factor is 1."""
        self.weight.copy_(self.before.lerp(self.weight, self.factor.to(self.weight.dtype)))


def slowed_weights(weights: Sequence[Tensor], factors: Sequence[Tensor | None]) -> list[SlowedWeight]:
    """Those of the weights that have a factor, before their update."""
    pairs = zip(weights, factors, strict=True)
    return [SlowedWeight(W, W.clone(), factor) for W, factor in pairs if factor is not None]
