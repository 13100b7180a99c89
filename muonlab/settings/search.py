"""The settings of a search: its effort, its sampler, and the space from which each optimizer's settings are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen

from muonlab.errors import MuonlabError
from muonlab.settings.address import refuse_password
from muonlab.settings.check import Count, Seed

Setting = dict[str, object]  # one trial's: {key of the optimizer: value}


@dataclass(frozen=True, kw_only=True)
class SpaceSettings:
    """published: the setting that is tried first, {key: value}. space: the searched ranges, {key: range}, in Hydra's
    syntax: `tag(log, interval(3e-4, 3e-2))`, `choice(a, b)` or `range(1, 9)`."""

    published: Mapping[str, object] = field(default_factory=dict)
    space: Annotated[Mapping[str, str], MinLen(1)]

    def __post_init__(self) -> None:
        if missing := [key for key in self.space if key not in self.published]:
            raise MuonlabError(
                f"the published setting lacks {', '.join(missing)}, which the space searches; it is tried first"
            )


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The effort of a search, the same for every optimizer.

    trials: settings of each optimizer, the published one included. sampler: `quasi_random` fixes the settings in
    advance; the others are Optuna's and adapt. seed: that of the sampler and of every search run; never used to judge.
    replicate_seeds: fresh seeds on which the best setting of each is repeated and judged. workers: runs at a time on
    this machine; None: as many as it has GPUs, or else cores. storage: an Optuna URL that other machines can reach,
    without a password; None is $MUONLAB_STORAGE, or else a journal file in the study's folder.
    """

    trials: Annotated[int, Ge(1), Le(10_000)]
    sampler: Literal["quasi_random", "tpe", "random", "cmaes", "gp"]
    seed: Seed
    replicate_seeds: Annotated[tuple[Seed, ...], MinLen(1)]
    workers: Count | None = None
    storage: str | None = None
    optimizers: Annotated[Mapping[str, SpaceSettings], MinLen(1)]

    def __post_init__(self) -> None:
        instead = "give the whole address in $MUONLAB_STORAGE, or the password in $PGPASSWORD or ~/.pgpass"
        refuse_password(self.storage, "search.storage", instead)
        if len(set(self.replicate_seeds)) < len(self.replicate_seeds):
            raise MuonlabError(f"search.replicate_seeds repeats a seed: {list(self.replicate_seeds)}")
        if self.seed in self.replicate_seeds:
            raise MuonlabError(
                f"search.seed={self.seed} is among search.replicate_seeds; a search's seed must not judge its result"
            )
        sizes = {name: len(section.space) for name, section in self.optimizers.items()}
        if len(set(sizes.values())) > 1:
            raise MuonlabError(f"the optimizers do not get equal search effort: {sizes} searched settings")

    @property
    def adaptive(self) -> bool:
        """Whether a setting depends on the results of earlier ones."""
        return self.sampler != "quasi_random"
