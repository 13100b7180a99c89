"""What optimizers are checked on: a small attention model, its data, a training loop, how two states differ, and
torch's schedulers."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from muonlab.layout import AttentionLayout, HeadRows, ParameterRole
from muonlab.optim.combined import CombinedOptimizer

VOCABULARY, WIDTH, HEADS = 11, 8, 2


class Specimen(nn.Module):
    """A causal attention layer over embedded tokens with a head, declaring all that an optimizer may know."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.query, self.key, self.value, self.output = (
            nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(4)
        )
        self.norm = nn.RMSNorm(WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter."""
        heads = {name: ParameterRole(name, HEADS) for name in ("query", "key", "value", "output")}
        one = {name: ParameterRole(name) for name in ("embedding", "norm", "head")}
        roles = {f"{name}.weight": role for name, role in (heads | one).items()}
        return roles | {"head.bias": ParameterRole("bias")}

    def attention_layouts(self) -> list[AttentionLayout]:
        """The rows of each head's query and key."""
        query, key = (
            HeadRows(layer.get_parameter("weight"), WIDTH // HEADS) for layer in (self.query, self.key)
        )
        return [AttentionLayout("layer_00", HEADS, HEADS, (query,), (key,))]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of predicting each token from those before it, max logits (1, HEADS))."""
        x = self.embedding(tokens)
        q, k, v = (
            f(self.norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        logits = (8 * q @ k.mT).masked_fill(~visible, -torch.inf)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        predicted = self.head(x + self.output(mixed))[:, :-1]
        loss = nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, logits.detach().amax((0, 2, 3)).float()[None]


def tokens(step: int = 0) -> Tensor:
    """Sequences in which each token, but for the first, follows from the one before it."""
    first = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(step))
    return (first * 2 ** torch.arange(9)) % VOCABULARY


def backward(model: Specimen, optimizer: CombinedOptimizer, step: int = 0) -> Tensor:
    """The loss of a step, whose gradients are there and whose max logits are observed."""
    optimizer.zero_grad()
    loss, max_logits = model(tokens(step))
    loss.backward()
    optimizer.observe(max_logits)
    return loss


def train(model: Specimen, optimizer: CombinedOptimizer, steps: int, first: int = 0) -> list[float]:
    """The loss before each of some steps."""
    losses = []
    for step in range(first, first + steps):
        losses.append(backward(model, optimizer, step).item())
        optimizer.step()
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference_of(a: object, b: object, place: str) -> str:
    """The first place at which two states differ; "" if they are equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype is b.dtype and torch.equal(a, b)
        return "" if same else place
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        return next((d for key in a if (d := difference_of(a[key], b[key], f"{place}[{key!r}]"))), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference_of(x, y, f"{place}[{i}]"))), "")
    return "" if a == b else place


# ---------------------------------------------------------------------- torch's schedulers
def _cycles(optimizer: torch.optim.Optimizer) -> bool:
    """torch refuses to cycle a momentum that an optimizer does not have."""
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1), schedulers.StepLR(o, 1)], [2]
    ),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1), schedulers.StepLR(o, 1)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, [rate / 10 for rate in _rates(o)], _rates(o), step_size_up=2, cycle_momentum=_cycles(o)
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, _rates(o), total_steps=7, cycle_momentum=_cycles(o)),
    "SWALR": lambda o: SWALR(o, [rate / 2 for rate in _rates(o)], 2),  # type: ignore[arg-type]  # a list is taken
}
