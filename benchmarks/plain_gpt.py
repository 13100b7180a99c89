"""NanoGPT as one would write it from the paper, for timing: materialised attention, autograd alone, no max logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.models import NanoGPT


class PlainGPT(nn.Module):
    """The same architecture and weights as `model`, which must be plain multi-head attention with a ReLU^2 or GELU MLP.

    Called with tokens and targets (B, T); gives the mean cross-entropy in nats per token.
    """

    def __init__(self, model: NanoGPT):
        super().__init__()
        self.embedding, self.head, self.final_norm = model.embedding, model.head, model.final_norm.weight
        self.blocks = nn.ModuleList(model.blocks)
        self.register_buffer("angle", torch.atan2(*self._first_rotation(model)))

    @staticmethod
    def _first_rotation(model: NanoGPT) -> tuple[Tensor, Tensor]:
        half = model.cos.shape[-1] // 2
        return model.sin[:, 0, half:], model.cos[:, 0, half:]  # (T, d / 2)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss; every (T, T) table of logits and weights is held for the backward."""
        x = self.embedding(tokens)
        length = tokens.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = x + self._attend(norm(x, block.attention_norm.weight), block.attention, future)
            h = norm(x, block.mlp_norm.weight) @ block.mlp.up.weight.T
            h = F.gelu(h) if block.mlp.activation is F.gelu else F.relu(h).square()
            x = x + h @ block.mlp.down.weight.T
        logits = norm(x, self.final_norm) @ self.head.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _attend(self, x: Tensor, attention: nn.Module, future: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads, head_dim = attention.num_heads, attention.head_dim
        q, k, v = (
            (x @ projection.weight.T).view(batch, length, heads, head_dim).transpose(1, 2)
            for projection in (attention.query, attention.key, attention.value)
        )
        q, k = self._rotate(q), self._rotate(k)
        logits = (q @ k.transpose(-1, -2) / math.sqrt(head_dim)).masked_fill(future, -torch.inf)
        out = logits.softmax(-1) @ v
        return out.transpose(1, 2).reshape(batch, length, width) @ attention.output.weight.T

    def _rotate(self, x: Tensor) -> Tensor:
        angle = self.angle[: x.shape[2]]
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm: x / sqrt(mean x^2) times the gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain
