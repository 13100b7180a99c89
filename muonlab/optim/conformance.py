"""What every optimizer owes every training loop: the checks of `python -m muonlab.optim.check`, and of the tests.

A check takes a `Subject` and a dtype, trains a small attention model that declares all that an optimizer may know, and
raises `Violation` with what went wrong. It holds for every optimizer, so it knows no optimizer's name.
"""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from muonlab.errors import MuonlabError
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.optimizers import OPTIMIZERS, build_optimizer
from muonlab.optim.specimen import Specimen, backward, difference_of, train, weights

TAU = 2.0  # so low that a clip acts in the first steps
FALL, STEPS = 0.7, 80  # the loss must end below this share of its start after so many steps
RATES = (1.0, 3.0, 10.0, 30.0)  # times the default learning rate, of which one must make the loss fall


class Violation(Exception):
    """An optimizer does not do what a check asks for; its text says what happened instead."""


@dataclass(frozen=True)
class Subject:
    """A registered optimizer, built with its default settings, but for a clip's tau: so low that the clip acts."""

    name: str

    @property
    def clips(self) -> bool:
        """Whether it has a clip."""
        return "tau" in OPTIMIZERS.settings(self.name)

    def build(self, model: nn.Module, tau: float = TAU, **settings: object) -> CombinedOptimizer:
        """The optimizer of a model. Raises Violation for one that is no CombinedOptimizer."""
        optimizer = build_optimizer(self.name, model, **({"tau": tau} if self.clips else {}), **settings)
        if not isinstance(optimizer, CombinedOptimizer):
            raise Violation(f"its builder returns a {type(optimizer).__name__} and no CombinedOptimizer")
        return optimizer


Body = Callable[[Subject, torch.dtype], None]
CHECKS: dict[str, Body] = {}


def check(title: str) -> Callable[[Body], Body]:
    """Register the function below as the check that a table calls `title`."""

    def register(function: Body) -> Body:
        CHECKS[title] = function
        return function

    return register


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that are not equal to the bit."""
    return [name for name in before if not torch.equal(before[name], after[name])]


def require_same(before: dict[str, Tensor], after: dict[str, Tensor], what: str) -> None:
    """Raises Violation if a tensor differs; `what`: "training twice gives other weights"."""
    if names := changed(before, after):
        raise Violation(f"{what}: {', '.join(names)}")


def checkpoint(model: nn.Module, optimizer: CombinedOptimizer) -> io.BytesIO:
    """What a checkpoint on disk holds."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    return file


def _restored(subject: Subject, dtype: torch.dtype, file: io.BytesIO) -> tuple[Specimen, CombinedOptimizer]:
    model = Specimen(dtype)
    optimizer = subject.build(model)
    weights_of_model, state = torch.load(file, weights_only=True)
    model.load_state_dict(weights_of_model)
    optimizer.load_state_dict(state)
    return model, optimizer


# ---------------------------------------------------------------------- learning
@check("every parameter is routed once")
def routed(subject: Subject, dtype: torch.dtype) -> None:
    """The routing table has one row for each parameter, with a reason."""
    model = Specimen(dtype)
    routing = subject.build(model).routing
    if sorted(route.name for route in routing) != sorted(name for name, _ in model.named_parameters()):
        raise Violation(f"its groups hold {', '.join(route.name for route in routing)}")
    if not all(route.reason for route in routing):
        raise Violation("the routing gives no reason")


@check("the loss falls")
def falls(subject: Subject, dtype: torch.dtype) -> None:
    """At its default learning rate, or at a multiple of it: what a default is made for is not this model."""
    rate, shares = OPTIMIZERS.settings(subject.name).get("lr"), []
    settings = [{"lr": factor * rate} for factor in RATES] if isinstance(rate, float) else [{}]
    for given in settings:
        model = Specimen(dtype)
        losses = train(model, subject.build(model, **given), STEPS)
        shares.append(sum(losses[-3:]) / sum(losses[:3]))
        if shares[-1] < FALL:
            return
    ended = " and ".join(f"{share:.2f}" for share in shares)
    raise Violation(
        f"after {STEPS} steps the loss is {ended} of its start (at 1, 3, 10, 30 times the default rate), not < {FALL}"
    )


@check("training is deterministic")
def deterministic(subject: Subject, dtype: torch.dtype) -> None:
    """Two trainings give the same losses and weights to the bit."""
    models = Specimen(dtype), Specimen(dtype)
    losses = [train(model, subject.build(model), 8) for model in models]
    require_same(weights(models[0]), weights(models[1]), "training twice gives other weights")
    if losses[0] != losses[1]:
        raise Violation(f"training twice gives other losses: {losses[0][-1]} and {losses[1][-1]} at the end")


def _stays_finite(subject: Subject, dtype: torch.dtype, scale: float) -> None:
    model = Specimen(dtype)
    optimizer = subject.build(model)
    for _ in range(3):
        backward(model, optimizer)
        for parameter in model.parameters():
            assert parameter.grad is not None  # of the loss just before
            parameter.grad = parameter.grad.sign() * scale
        optimizer.step()
        if broken := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
            raise Violation(f"{', '.join(broken)} became infinite or NaN")


@check("gradients of 1e-30")
def tiny_gradients(subject: Subject, dtype: torch.dtype) -> None:
    """Their squares are 0 in fp32; weights stay finite."""
    _stays_finite(subject, dtype, 1e-30)


@check("gradients of 1e30")
def huge_gradients(subject: Subject, dtype: torch.dtype) -> None:
    """Their squares are infinite in fp32; weights stay finite."""
    _stays_finite(subject, dtype, 1e30)


@check("gradients that are None, frozen parameters")
def without_gradient(subject: Subject, dtype: torch.dtype) -> None:
    """What has no gradient does not move, by decay neither; the others do."""
    model = Specimen(dtype)
    model.value.requires_grad_(False)
    optimizer = subject.build(model, tau=1e9)
    before = weights(model)
    for step in range(3):
        backward(model, optimizer, step)
        model.embedding.weight.grad = None
        optimizer.step()
    moved = set(changed(before, weights(model)))
    if still := moved & {"value.weight", "embedding.weight"}:
        raise Violation(f"{', '.join(sorted(still))} moved without a gradient")
    if not moved:
        raise Violation("nothing moved where some parameters have no gradient")


@check("learning rate 0")
def rate_zero(subject: Subject, dtype: torch.dtype) -> None:
    """With a learning rate of 0 nothing moves."""
    model = Specimen(dtype)
    optimizer = subject.build(model, tau=1e9)
    if not any("lr" in group for group in optimizer.param_groups):
        return
    LambdaLR(optimizer, lambda _: 0.0)
    before = weights(model)
    train(model, optimizer, 3)
    require_same(before, weights(model), "it moves at a learning rate of 0")


# ---------------------------------------------------------------------- state
@check("state round trip to the bit")
def round_trip(subject: Subject, dtype: torch.dtype) -> None:
    """A state that was saved and loaded is the same, tensors in dtype and bits, numbers and settings."""
    model = Specimen(dtype)
    optimizer = subject.build(model)
    train(model, optimizer, 4)
    _, other = _restored(subject, dtype, checkpoint(model, optimizer))
    require_restored(optimizer, other)


def require_restored(optimizer: CombinedOptimizer, other: CombinedOptimizer, where: str = "") -> None:
    difference = (
        difference_of(_states(optimizer), _states(other), "state")
        or difference_of(_settings(optimizer), _settings(other), "param_groups")
        or difference_of(optimizer.state_dict(), other.state_dict(), "state_dict()")
    )
    if difference:
        raise Violation(f"{where}{difference} is not what was saved")


def _states(optimizer: CombinedOptimizer) -> list[object]:
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]


def _settings(optimizer: CombinedOptimizer) -> list[object]:
    return [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]


@check("resumed training is equal to the bit")
def resumes(subject: Subject, dtype: torch.dtype) -> None:
    """Four steps, a checkpoint read with weights_only, four steps: as eight steps at once."""
    straight = Specimen(dtype)
    optimizer = subject.build(straight)
    train(straight, optimizer, 4)
    file = checkpoint(straight, optimizer)
    expected = train(straight, optimizer, 4, first=4)
    resumed, other = _restored(subject, dtype, file)
    losses = train(resumed, other, 4, first=4)
    require_same(weights(straight), weights(resumed), "resumed training gives other weights")
    if losses != expected:
        raise Violation(f"the loss after the resume is {losses[-1]}, not {expected[-1]}")
    if (difference := difference_of(optimizer.gammas(), other.gammas(), "the clip's factors")) != "":
        raise Violation(f"{difference} differ after the resume")


@check("a state of other shapes is refused")
def refuses_other_shapes(subject: Subject, dtype: torch.dtype) -> None:
    """Before anything of the optimizer is changed."""
    model = Specimen(dtype)
    optimizer = subject.build(model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    shaped = [
        (entry, key)
        for entry in state["state"].values()
        for key, value in entry.items()
        if isinstance(value, Tensor) and value.ndim == 2
    ]
    if not shaped:
        return
    entry, key = shaped[0]
    entry[key] = entry[key][:-1]
    try:
        optimizer.load_state_dict(state)
    except MuonlabError:
        if difference := difference_of(before, optimizer.state_dict(), "the state"):
            raise Violation(f"{difference} changed although the state was refused") from None
        return
    raise Violation(f"a {key} of another shape is taken")


@check("deepcopy")
def deep_copies(subject: Subject, dtype: torch.dtype) -> None:
    """A copy of model and optimizer trains on like the original."""
    _same_after(subject, dtype, copy.deepcopy, "a deep copy")


@check("pickle")
def pickles(subject: Subject, dtype: torch.dtype) -> None:
    """A pickled model and optimizer train on like the original."""
    _same_after(subject, dtype, lambda both: pickle.loads(pickle.dumps(both)), "an unpickled copy")


def _same_after(subject: Subject, dtype: torch.dtype, copied: Callable[[tuple], tuple], what: str) -> None:
    model = Specimen(dtype)
    optimizer = subject.build(model)
    train(model, optimizer, 3)
    other, its_optimizer = copied((model, optimizer))
    train(model, optimizer, 3, first=3)
    train(other, its_optimizer, 3, first=3)
    require_same(weights(model), weights(other), f"{what} trains on differently")


# ---------------------------------------------------------------------- torch's contract
