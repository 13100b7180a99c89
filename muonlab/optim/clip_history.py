"""What QK-Clip saw and did, per head, since the beginning of training."""

import torch
from torch import Tensor

from muonlab.optim.matrix_view import State
from muonlab.optim.saved_state import check_entries, check_tensor

NEVER = -1  # of an optimizer step


class ClipHistory:
    """What the clip saw and did, per head, since the beginning of training; no update waits for the device.

    Every entry is (heads,), the heads of all layers in a row. `max_logit`: the last maximum observed (NaN before the
    first). `gamma`: the last factor (1: not clipped). `log_cumulative_gamma`: sum of log gamma over all steps (0: never
    clipped), a logarithm because the product of three thousand factors of 0.97 underflows. `first_trigger`,
    `last_trigger`: optimizer steps, -1 for never. Every update makes new tensors, so that a reference kept by a
    recorder stays what it was.
    """

    fields = ("max_logit", "gamma", "log_cumulative_gamma", "first_trigger", "last_trigger")

    def __init__(self, heads: int, dtype: torch.dtype):
        self.max_logit = torch.full((heads,), torch.nan, dtype=dtype)
        self.gamma = torch.ones(heads, dtype=dtype)
        self.log_cumulative_gamma = torch.zeros(heads, dtype=dtype)
        self.first_trigger = torch.full((heads,), NEVER)
        self.last_trigger = torch.full((heads,), NEVER)

    def record(self, step: int, max_logit: Tensor, gamma: Tensor) -> None:
        """Enter one optimizer step: its maxima and factors, (heads,)."""
        self.max_logit = max_logit
        self.gamma = gamma
        self.log_cumulative_gamma = self.log_cumulative_gamma + gamma.log()
        self.last_trigger = torch.where(gamma < 1, step, self.last_trigger)
        self.first_trigger = torch.where(self.first_trigger == NEVER, self.last_trigger, self.first_trigger)

    def record_again(self, step: int, gamma: Tensor) -> None:
        """Enter a second clip of the same step, whose factors (heads,) multiply those of the first."""
        product = self.gamma * gamma
        self.record(step, self.max_logit, gamma)
        self.gamma = product

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move every tensor to `device`, and those that hold logits and factors to `dtype`."""
        for name, values in self.state_dict().items():
            setattr(self, name, values.to(device, dtype if values.is_floating_point() else values.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name; they restore the history exactly."""
        return {name: getattr(self, name) for name in self.fields}

    def check_state(self, state: State) -> None:
        """Raise MuonlabError unless `load_state_dict` can take it whole; changes nothing."""
        check_entries("the saved clip history", state, self.fields)
        for name, present in self.state_dict().items():
            check_tensor(f"{name} of the saved clip history", state[name], present)

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict()`'s answer. Raises MuonlabError for what `check_state` refuses."""
        self.check_state(state)
        for name, present in self.state_dict().items():
            setattr(self, name, state[name].to(present.device, present.dtype))
