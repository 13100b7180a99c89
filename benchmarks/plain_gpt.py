"""nanoGPT as its users run it, for timing: a bare model of the same sizes under torch's own AdamW, nothing measured."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.settings.model import NanoGPTSettings, with_vocabulary


def seconds_each(step: Callable[[], None], count: int) -> float:
    """Seconds of one step, over `count` of them."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


class PlainGPT(nn.Module):
    """LayerNorm, learnt positions, one matrix for queries, keys and values, GELU and a head tied to the embedding.

    settings: the sizes; the same matrix products as the NanoGPT of these settings, but for the head's own weight.
    """

    def __init__(self, settings: NanoGPTSettings):
        super().__init__()
        s = with_vocabulary(settings)
        self.tokens = nn.Embedding(s.vocab_size, s.d_model)
        self.positions = nn.Embedding(s.context, s.d_model)
        self.blocks = nn.ModuleList(
            PlainBlock(s.d_model, s.num_heads, s.mlp_hidden) for _ in range(s.num_layers)
        )
        self.norm = nn.LayerNorm(s.d_model, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy (nats per token) of tokens and targets (B, T)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, d_model: int, num_heads: int, hidden: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(d_model, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D)."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class PlainLoop:
    """Its bare training step: a batch, forward, backward, AdamW."""

    def __init__(self, settings: NanoGPTSettings, data, batch_size: int):
        self.model, self.data = PlainGPT(settings), data
        self.shape, self.index = (batch_size, settings.context), 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def steps(self, count: int) -> float:
        """Seconds a step over `count` steps."""
        return seconds_each(self._step, count)

    def _step(self) -> None:
        tokens, targets = self.data.batch(1, self.index, *self.shape)
        self.index += 1
        self.model(tokens, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
