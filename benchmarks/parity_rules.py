"""The optimizers other than Muon that a package has too, with the settings under which the equations are the same."""

import torch
from parity import LR, Comparison, Training, with_torch
from torch import Tensor, nn

from muonlab.optim import SOAP, AdEMAMix, Lion, Muon, NAdamW, ScheduleFreeAdamW, Scion, Shampoo, Signum

DECAY = {"lr": LR, "weight_decay": 0.1}
RULE_SHAPES = ((64, 64), (64, 160))


def with_schedulefree(weight: Tensor, grads: list[Tensor]) -> Tensor:
    """The weights of training, y."""
    import schedulefree

    def build(param: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = schedulefree.AdamWScheduleFree([param], **DECAY)
        optimizer.train()
        return optimizer

    return with_torch(build)(weight, grads)


def lion_pytorch(param: nn.Parameter) -> torch.optim.Optimizer:
    from lion_pytorch import Lion as Theirs

    return Theirs([param], betas=(0.9, 0.99), **DECAY)


def lion(param: nn.Parameter) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion as Theirs

    return Theirs([param], betas=(0.9, 0.99), weight_decouple=True, **DECAY)


def signum(param: nn.Parameter) -> torch.optim.Optimizer:
    from pytorch_optimizer import SignSGD

    return SignSGD([param], momentum=0.9, weight_decouple=True, **DECAY)


def ademamix(param: nn.Parameter) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdEMAMix as Theirs

    return Theirs([param], alpha=5.0, betas=(0.9, 0.999, 0.9999), weight_decouple=True, **DECAY)


def soap(param: nn.Parameter) -> torch.optim.Optimizer:
    """Without decay, which comes after the step there."""
    from pytorch_optimizer import SOAP as Theirs

    return Theirs([param], lr=LR, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=1)


def scion(param: nn.Parameter) -> torch.optim.Optimizer:
    from pytorch_optimizer import SCION
    from pytorch_optimizer.optimizer.scion import LMONorm

    return SCION([param], lr=LR, momentum=0.1, constraint=True, norm_type=LMONorm.SPECTRAL, scale=50.0)


def shampoo(param: nn.Parameter) -> torch.optim.Optimizer:
    from pytorch_optimizer import Shampoo as Theirs

    return Theirs([param], lr=LR, matrix_eps=1e-6)


def normuon(param: nn.Parameter) -> torch.optim.Optimizer:
    from pytorch_optimizer import NorMuon

    return NorMuon([{"params": [param], "use_muon": True}], **DECAY)


def nadam(param: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.NAdam([param], decoupled_weight_decay=True, **DECAY)


def other(rule: str, package: str, ours: type, settings: dict, theirs: Training) -> Comparison:
    """A rule of ours with `settings` against theirs, on RULE_SHAPES."""
    return Comparison(
        rule, package, package, with_torch(lambda param: ours([param], **settings)), theirs, RULE_SHAPES
    )


OTHERS = (
    other("lion", "lion-pytorch", Lion, DECAY, with_torch(lion_pytorch)),
    other("lion", "pytorch_optimizer", Lion, DECAY, with_torch(lion)),
    other("signum", "pytorch_optimizer", Signum, DECAY, with_torch(signum)),
    other("ademamix", "pytorch_optimizer", AdEMAMix, DECAY | {"alpha": 5.0}, with_torch(ademamix)),
    other("nadamw", "torch", NAdamW, DECAY, with_torch(nadam)),
    other("schedulefree_adamw", "schedulefree", ScheduleFreeAdamW, DECAY, with_schedulefree),
    other("scion", "pytorch_optimizer", Scion, {"lr": LR, "radius": 50.0}, with_torch(scion)),
    other(
        "shampoo",
        "pytorch_optimizer",
        Shampoo,
        {"lr": LR, "betas": (0.0, 1.0), "eps": 1e-6},
        with_torch(shampoo),
    ),
    # Neurons are columns of wide matrices in ours, as in nanochat, and rows of all in theirs.
    Comparison(
        "normuon",
        "pytorch_optimizer",
        "pytorch_optimizer",
        with_torch(
            lambda param: Muon([param], after=["normuon"], beta2=0.95, scale_rule="original", **DECAY)
        ),
        with_torch(normuon),
        ((64, 64), (160, 64)),
    ),
    # Square alone: the covariance of 160 columns is singular at first, and its eigenvectors of 0 are anybody's choice.
    Comparison(
        "soap",
        "pytorch_optimizer",
        "pytorch_optimizer",
        with_torch(lambda param: SOAP([param], lr=LR, weight_decay=0.0, frequency=1)),
        with_torch(soap),
        ((64, 64),),
    ),
)
