"""Averages over the path of the weights, around any rule: a look ahead in training, and a tail average that evaluation
reads.

EMA-Nesterov (Yau et al., arXiv 2605.25395, algorithm 1): with A one step of the optimizer, its clip included, the
gradients of step t are taken ahead of the weights x, at y, where the parameters are in training:

    y_t = x_t + beta_t m_t;  x_{t+1} = A(y_t);  m_{t+1} = gamma m_t + (1 - gamma) (x_{t+1} - x_t);  x_0 = y_0, m_0 = 0

Tail average (modded-nanogpt, pull request 325): e begins as the weights x after T + 1 steps, and after every later one

    e <- e + (x - e) / horizon;  evaluation reads (1 - share) x + share e

The source leaves the token embedding out of it; here every parameter has one.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from muonlab.optim.matrix_view import Group, State
from muonlab.optim.ranks import local_part
from muonlab.optim.saved_state import LENGTH, MOVES, TAIL, state_dtype
from muonlab.settings.optimizer import AverageSettings


@dataclass
class WeightAverages:
    """The averages of a CombinedOptimizer: `CombinedOptimizer(..., averages=WeightAverages(settings))`.

    settings: an `AverageSettings`, which says what each number is and what 0 means.

    Within `optimizer.averaged()` the parameters are what evaluation reads; checkpoints have y and what leads back to x.
    A parameter without a gradient is left alone, its averages too. Each average is a buffer like its parameter, and a
    look ahead takes a copy of the weights within a step. A state saved without an average begins it anew, and one saved
    ahead of its weights goes on from there where nothing looks ahead any more.
    """

    settings: AverageSettings

    @classmethod
    def of(cls, settings: AverageSettings) -> "WeightAverages | None":
        """None where the settings ask for no average."""
        return cls(settings) if settings.lookahead or settings.tail_share else None

    def origin(self, param: Tensor, state: State) -> Tensor:
        """x, in a new tensor in the dtype of the buffers, of a parameter that may be ahead of it."""
        W = local_part(param.detach()).to(state_dtype(param), copy=True)
        ahead = self.settings.lookahead and MOVES in state
        return W.sub_(local_part(state[MOVES]) * state[LENGTH]) if ahead else W

    def origins(self, params: Iterable[Tensor], states: Mapping[Tensor, State]) -> dict[Tensor, Tensor]:
        """x of each parameter before a step, where a look ahead needs it."""
        return (
            {param: self.origin(param, states[param]) for param in params} if self.settings.lookahead else {}
        )

    def follow(self, param: Tensor, origin: Tensor | None, state: State, group: Group, step: int) -> None:
        """Average over step `step`, counted from 0, which has brought `param` from y to x, and put it ahead of x.

        origin: x before the step, from `origins`; None where nothing looks ahead.
        """
        s, dtype, here = self.settings, state_dtype(param), local_part(param)
        x = here.to(dtype)
        if s.tail_share and step + 1 > s.tail_from:
            if TAIL not in state:
                state[TAIL] = param.detach().to(dtype, copy=True)
            local_part(state[TAIL]).lerp_(x, 1 / s.tail_horizon)
        if origin is not None:
            if MOVES not in state:
                state[MOVES] = torch.zeros_like(param, dtype=dtype)
                state[LENGTH] = torch.zeros((), dtype=dtype, device=param.device)
            moves = local_part(state[MOVES]).lerp_(x - origin, 1 - s.lookahead_memory)
            state[LENGTH].fill_(self._length(group, step + 1))
            here.copy_(x + moves * state[LENGTH])

    def _length(self, group: Group, step: int) -> float | Tensor:
        """beta_t = beta lr_t / lr_max within the window; the rate is that of the step before, which a scheduler changes
        after the weights have moved."""
        s = self.settings
        if not s.lookahead_from <= step < (math.inf if s.lookahead_until is None else s.lookahead_until):
            return 0.0
        return s.lookahead * (group["lr"] / group["peak_lr"] if group.get("peak_lr") else 1.0)

    def readout(self, param: Tensor, state: State) -> Tensor:
        """What evaluation reads in place of a parameter: x, or a share of the tail average in it."""
        x, share = self.origin(param, state), self.settings.tail_share
        return x.lerp_(local_part(state[TAIL]), share) if share and TAIL in state else x
