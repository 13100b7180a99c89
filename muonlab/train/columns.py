"""The columns of every run: losses, max logits, the update and progress; and those of models with experts."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from muonlab.optim.ranks import whole
from muonlab.train.providers import Columns, Step, provider


# ---------------------------------------------------------------------- before the step
@provider("validation", at="start", every=lambda trainer: trainer.val_every)
def validation(step: Step) -> Columns:
    """`val_loss` of the weights before the update."""
    return Columns({"val_loss": step.module.validate()})


@provider("probe", at="start", every=lambda trainer: trainer.probe_every)
def probe(step: Step) -> Columns:
    """`probe_loss`, `log_partition`, attention entropy and one-hot share of the fixed batch, of the weights before the
    update. Output logits that diverge move `log_partition` away from 0 (Wortsman et al., arXiv 2309.14322, Fig 3)."""
    loss, log_partition, entropy, one_hot = step.module.probe()
    return Columns(
        {"probe_loss": loss, "log_partition": log_partition}, {"entropy": entropy, "one_hot": one_hot}
    )


# ---------------------------------------------------------------------- with the gradients
@provider("gradient norm", at="gradients")
def gradient_norm(step: Step) -> Columns:
    """`grad_norm`: the 2-norm of all gradients together, before they are clipped."""
    # Read from the groups: a walk over the modules takes as long as the norms.
    groups = step.module.optimizer.param_groups
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return Columns({"grad_norm": whole(torch.nn.utils.get_total_norm(gradients))})


@provider("second-moment lag", at="gradients", every=lambda trainer: trainer.probe_every)
def second_moment_lag(step: Step) -> Columns:
    """`second_moment_lag`: RMS of sqrt(v / (1 - beta2^t)) over RMS of the gradient, v being AdamW's before this step.

    Over all parameters that AdamW updates; above 1 where v remembers larger gradients than today's, which is what
    arXiv 2506.04805 calls lag. No column before the first step, and where nothing is under AdamW.
    """
    optimizer = step.module.optimizer
    remembered, today = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if parameter.grad is not None and {"exp_avg_sq", "step"} <= state.keys() and "betas" in group:
                bias = 1 - group["betas"][1] ** state["step"]
                remembered.append(whole((state["exp_avg_sq"] / bias).sum()))
                today.append(whole(parameter.grad.double().square().sum()))
    if not remembered:
        return Columns()
    return Columns({"second_moment_lag": (torch.stack(remembered).sum() / torch.stack(today).sum()).sqrt()})


@provider("learning rate", at="gradients")
def learning_rate(step: Step) -> Columns:
    """`lr` of this very update, as `base_rate` reads it; no column where no group has a rate."""
    rate = base_rate(step.module.optimizer)
    return Columns() if rate is None else Columns({"lr": rate})


def base_rate(optimizer: torch.optim.Optimizer) -> Tensor | float | None:
    """The learning rate at this moment of the groups that began with the optimizer's own.

    If there is no such group (all have an `lr_scale`), that of the first group that has a rate. None if no group has a
    rate.
    """
    groups = [group for group in optimizer.param_groups if "lr" in group]
    own = optimizer.defaults.get("lr")
    followed = [group for group in groups if group.get("initial_lr", group["lr"]) == own] or groups
    if not followed:
        return None
    rate: Tensor | float = followed[0]["lr"]
    return rate.detach().clone() if isinstance(rate, Tensor) else rate  # a scheduler writes into a tensor


# ---------------------------------------------------------------------- after the update
@provider("loss")
def loss(step: Step) -> Columns:
    """`train_loss`: the mean cross-entropy of the step's micro-batches on all ranks, in nats per token."""
    mean = torch.stack(step.losses).mean() if len(step.losses) > 1 else step.losses[0]
    return Columns({"train_loss": step.over_ranks(mean, "mean")})


@provider("max logits")
def max_logits(step: Step) -> Columns:
    """Each head's largest logit and largest |logit| in the step's forwards, and whether they are exact or bounds."""
    assert step.logits is not None
    heads = {
        "max_logit": step.over_ranks(step.logits.highest, "max"),
        "max_logit_abs": step.over_ranks(step.logits.absolute, "max"),
    }
    if step.exact is not None:  # the whole's are exact where every rank's are
        heads["exact"] = step.over_ranks((~step.exact).float(), "max") == 0
    return Columns(heads=heads)


@provider("clip factors")
def clip_factors(step: Step) -> Columns:
    """`gamma` of each head, applied after the update; 1: not clipped. No column without a clip."""
    gammas = step.module.optimizer.gammas()
    return Columns() if gammas is None else Columns(heads={"gamma": gammas})


@provider("expert loads")
def expert_loads(step: Step) -> Columns:
    """Each expert's share of the step's choices, over all micro-batches and ranks."""
    if (experts := step.module.experts) is None:
        return Columns()
    loads = experts.expert_loads()
    return Columns(loads=dict(zip(experts.expert_layers, loads / loads.sum(-1, keepdim=True), strict=True)))


@provider("expert measurements", every=lambda trainer: trainer.probe_every)
def expert_measurements(step: Step) -> Columns:
    """The scalars of MixtureModel.measurements."""
    if (experts := step.module.experts) is None:
        return Columns()
    return Columns({**_of_all_ranks(step, experts.measurements())})


@provider("optimizer memory", every=lambda trainer: trainer.probe_every)
def optimizer_memory(step: Step) -> Columns:
    """`optimizer_bytes`: of the tensors in the optimizer's state, of all shards together, without a clip's own."""
    states = step.module.optimizer.state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Columns({"optimizer_bytes": float(size)})


@provider("update size", every=lambda trainer: trainer.probe_every, compares_weights=True)
def update_size(step: Step) -> Columns:
    """`update_rms/<group>` and `weight_rms/<group>`: root mean squares of the step's change and of the weights."""
    change: dict[str, list[Tensor]] = defaultdict(list)
    weight: dict[str, list[Tensor]] = defaultdict(list)
    count: dict[str, int] = defaultdict(int)
    groups = {route.name: route.group for route in step.module.optimizer.routing}
    for name, parameter in step.module.model.named_parameters():
        group = groups[name]
        change[group].append(whole((parameter.detach() - step.weights_before[name]).square().sum()))
        weight[group].append(whole(parameter.detach().square().sum()))
        count[group] += parameter.numel()
    sizes: dict[str, Tensor | float] = {}
    for group, size in count.items():
        sizes[f"update_rms/{group}"] = (torch.stack(change[group]).sum() / size).sqrt()
        sizes[f"weight_rms/{group}"] = (torch.stack(weight[group]).sum() / size).sqrt()
    return Columns(sizes)


@provider("progress")
def progress(step: Step) -> Columns:
    """`tokens`, `flops` and `seconds` of training, up to the end of this step."""
    steps = step.number + 1
    return Columns({"tokens": steps * step.tokens, "flops": steps * step.flops, "seconds": step.seconds()})


def _of_all_ranks(step: Step, measurements: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Measurements of the ranks' equal shares of a batch as those of the whole, by the rule of MixtureModel."""
    if step.trainer.world_size == 1:
        return dict(measurements)
    values = torch.stack([*measurements.values()])
    mean = step.over_ranks(values.clone(), "mean")
    squares = step.over_ranks(values.square(), "mean")
    highest = step.over_ranks(values.clone(), "max")
    whole_batch = {}
    for i, name in enumerate(measurements):
        quantity = name.split("/")[1]
        if quantity.startswith("max_"):
            whole_batch[name] = highest[i]
        else:
            whole_batch[name] = squares[i].sqrt() if quantity.endswith("_norm") else mean[i]
    return whole_batch
