"""What QK-Clip saw and did, per head, since the beginning of training."""

import torch
from torch import Tensor

from muonlab.errors import MuonlabError

NEVER = -1


class ClipHistory:
    """One entry per head (heads of all layers in a row); no update waits for the device.

    `max_logit`: the last maximum (NaN before the first). `gamma`: the last factor (1: not clipped).
    `log_cumulative_gamma`: sum of log gamma over all steps, fp64 because tens of thousands of factors near 1 would
    underflow as a product (0: never clipped). `first_trigger`, `last_trigger`: optimizer steps, -1 for never.
    `triggers`: number of steps in which the head was clipped.
    Every update makes new tensors, so that a reference kept by a recorder stays what it was.
    """

    _fields = ("max_logit", "gamma", "log_cumulative_gamma", "first_trigger", "last_trigger", "triggers")

    def __init__(self, heads: int, dtype: torch.dtype):
        self.max_logit = torch.full((heads,), torch.nan, dtype=dtype)
        self.gamma = torch.ones(heads, dtype=dtype)
        self.log_cumulative_gamma = torch.zeros(heads, dtype=torch.float64)
        self.first_trigger = torch.full((heads,), NEVER)
        self.last_trigger = torch.full((heads,), NEVER)
        self.triggers = torch.zeros(heads, dtype=torch.long)

    def record(self, step: int, max_logit: Tensor, gamma: Tensor) -> None:
        """Enter one optimizer step: maxima and factors, (heads,)."""
        clipped = gamma < 1
        self.max_logit = max_logit
        self.gamma = gamma
        self.log_cumulative_gamma = self.log_cumulative_gamma + gamma.double().log()
        self.first_trigger = torch.where(clipped & (self.first_trigger == NEVER), step, self.first_trigger)
        self.last_trigger = torch.where(clipped, step, self.last_trigger)
        self.triggers = self.triggers + clipped

    def record_again(self, step: int, max_logit: Tensor, gamma: Tensor) -> None:
        """Enter a second clip of the same step: its factors multiply the first ones, and no trigger counts twice."""
        already = self.gamma < 1
        product, triggers = self.gamma * gamma, self.triggers
        self.record(step, max_logit, gamma)
        self.gamma, self.triggers = product, triggers + ((product < 1) & ~already)

    def to(self, device: torch.device) -> None:
        """Move every tensor to `device`."""
        for field in self._fields:
            setattr(self, field, getattr(self, field).to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name; they restore the history exactly."""
        return {field: getattr(self, field) for field in self._fields}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`'s answer. Raises MuonlabError if a tensor is missing or of another shape."""
        for field in self._fields:
            present = getattr(self, field)
            saved = state.get(field)
            if saved is None or saved.shape != present.shape:
                given = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
                raise MuonlabError(
                    f"the saved clip history's {field} {given}; expected {tuple(present.shape)}"
                )
            setattr(self, field, saved.to(present.device, present.dtype, copy=True))
