"""What torch promises of an optimizer and users rely on: schedulers, closures, hooks, groups added later, compiled
steps and rates that are tensors. CHECKS has these and those of `muonlab.optim.conformance`."""

import logging
from functools import partial

import torch
from torch import Tensor, nn

from muonlab.optim.conformance import CHECKS, Subject, Violation, check, require_restored, require_same
from muonlab.optim.specimen import SCHEDULERS, WIDTH, Specimen, backward, train, weights

__all__ = ["CHECKS"]


@check("torch's schedulers")
def scheduled(subject: Subject, dtype: torch.dtype) -> None:
    """Each changes the learning rate of every group, and training goes on with finite weights."""
    for name, make in SCHEDULERS.items():
        model = Specimen(dtype)
        optimizer = subject.build(model)
        if not any("lr" in group for group in optimizer.param_groups):
            return
        scheduler, rates = make(optimizer), []
        for step in range(5):
            loss = train(model, optimizer, 1, first=step)
            rates.append([group["lr"] for group in optimizer.param_groups if "lr" in group])
            scheduler.step(*loss if name == "ReduceLROnPlateau" else ())  # type: ignore[attr-defined]
        moves = [len(set(group)) > 1 or not any(group) for group in zip(*rates, strict=True)]
        if name != "ReduceLROnPlateau" and not all(moves):
            raise Violation(f"{name} does not change the learning rate of every group")
        if not all(p.isfinite().all() for p in model.parameters()):
            raise Violation(f"under {name} a weight became infinite or NaN")


@check("closures")
def closures(subject: Subject, dtype: torch.dtype) -> None:
    """step(closure) returns the closure's loss and does what step() does after it."""
    plain, closed = Specimen(dtype), Specimen(dtype)
    one, other = subject.build(plain), subject.build(closed)
    for step in range(3):
        loss = backward(plain, one, step)
        one.step()
        returned = other.step(partial(backward, closed, other, step))
        if returned is None or not torch.equal(returned, loss):
            raise Violation(f"step(closure) returns {returned} and not the closure's loss")
    require_same(weights(plain), weights(closed), "step(closure) gives other weights than step()")


@check("hooks of a step")
def hooks(subject: Subject, dtype: torch.dtype) -> None:
    """torch's hooks run before and after every step."""
    model, seen = Specimen(dtype), []
    optimizer = subject.build(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, 2)
    if seen != ["before", "after"] * 2:
        raise Violation(f"in two steps its hooks ran {len(seen)} times")


@check("groups added later")
def later_groups(subject: Subject, dtype: torch.dtype) -> None:
    """A group that is added between two steps is updated and saved like the others."""
    model = Specimen(dtype)
    optimizer = subject.build(model)
    train(model, optimizer, 1)
    late = nn.Parameter(torch.eye(WIDTH, dtype=dtype))
    optimizer.add_param_group({"params": [("late", late)]})
    for step in (1, 2):
        backward(model, optimizer, step)
        late.grad = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
    if torch.equal(late.detach(), torch.eye(WIDTH, dtype=dtype)):
        raise Violation("a parameter of a group that was added later does not move")
    other = subject.build(Specimen(dtype))
    other.add_param_group({"params": [("late", nn.Parameter(late.detach().clone()))]})
    other.load_state_dict(optimizer.state_dict())
    require_restored(optimizer, other, "with a group that was added later, ")


@check("compiled steps")
def compiled_steps(subject: Subject, dtype: torch.dtype) -> None:
    """A step that torch.compile traced is the step."""
    eager, traced = Specimen(dtype), Specimen(dtype)
    train(eager, subject.build(eager), 3)
    optimizer = subject.build(traced)
    torch.compiler.reset()  # a function that others compiled too often runs without
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    logging.disable(logging.WARNING)  # torch's remarks on its profiler
    try:
        train(traced, optimizer, 3)
    finally:
        logging.disable(logging.NOTSET)
    _require_close(weights(eager), weights(traced), "a compiled step gives other weights than step()")


@check("learning rate as a tensor")
def tensor_rate(subject: Subject, dtype: torch.dtype) -> None:
    """A learning rate that is a tensor, which compiled and captured steps read, does what its number does."""
    plain, tensor = Specimen(dtype), Specimen(dtype)
    train(plain, subject.build(plain), 3)
    optimizer = subject.build(tensor)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    train(tensor, optimizer, 3)
    _require_close(weights(plain), weights(tensor), "a learning rate as a tensor gives other weights")


def _require_close(first: dict[str, Tensor], second: dict[str, Tensor], what: str) -> None:
    """Raises Violation unless the weights agree up to one rounding and a thousandth of how far they moved."""
    for name, start in weights(Specimen(next(iter(first.values())).dtype)).items():
        moved, apart = ((w - first[name]).abs().max() for w in (start, second[name]))
        if not apart <= 1e-3 * moved + torch.finfo(start.dtype).eps * first[name].abs().max():
            raise Violation(f"{what}: {name} differs by {apart:.2g} and moved by {moved:.2g}")
