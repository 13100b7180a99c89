"""How the processes of a run share it: Lightning's strategies, with places assigned by muonlab."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from muonlab.optim.ranks import gathered, spread_like
from muonlab.train.config import PRECISIONS, LightningPrecision, TrainerSettings
from muonlab.train.place import Place


class Started(ClusterEnvironment):
    """Processes started by muonlab or another launcher, each at its place."""

    def __init__(self, place: Place):
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Where the processes meet."""
        return self.place.address

    @property
    def main_port(self) -> int:
        """The port of it."""
        return self.place.port

    @staticmethod
    def detect() -> bool:
        """Lightning never selects it by itself."""
        return False

    def world_size(self) -> int:
        """Processes on all machines."""
        return self.place.world

    def set_world_size(self, size: int) -> None:
        """The launcher has set it."""

    def global_rank(self) -> int:
        """Of this process."""
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has set it."""

    def local_rank(self) -> int:
        """Of this process on its machine."""
        return self.place.local_rank

    def node_rank(self) -> int:
        """Of its machine."""
        return self.place.node


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints that are one process's.

    `LanguageModel.configure_model` shards the model. A checkpoint holds whole weights and whole buffers of the
    optimizer, gathered on rank 0, and every rank reads it and keeps its rows, so it loads at any number of processes.
    """

    def __init__(self, world: int):
        super().__init__(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """By `load_optimizer_state_dict`, as in one process."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0; a collective."""
        assert self.lightning_module is not None
        return gathered(dict(self.lightning_module.state_dict()), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state with whole buffers on rank 0; a collective."""
        return gathered(
            super(ModelParallelStrategy, self).optimizer_state(optimizer), keep=self.is_global_zero
        )

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The whole checkpoint, on every rank."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Whole weights into the rows that are here."""
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        state = {
            name: spread_like(own[name], value) if isinstance(own.get(name), Tensor) else value
            for name, value in checkpoint["state_dict"].items()
        }
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Whole buffers into the rows that are here."""
        super(ModelParallelStrategy, self).load_optimizer_state_dict(checkpoint)


class Shared(NamedTuple):
    """The arguments by which Lightning's Trainer knows the processes of a run."""

    strategy: str | Strategy
    num_nodes: int
    precision: LightningPrecision | None
    plugins: Sequence[ClusterEnvironment | DoublePrecision]


def make_strategy(settings: TrainerSettings, place: Place) -> Shared:
    """How the processes of a run share it, this one being at `place`."""
    precision = PRECISIONS[settings.precision]
    if settings.devices == 1:
        return Shared("auto", 1, precision, [LightningEnvironment()])
    nodes = place.world // settings.devices
    if settings.strategy != "fsdp2":
        return Shared(DDPStrategy(), nodes, precision, [Started(place)])
    strategy = FullyShardedStrategy(place.world)
    if precision == "64-true":  # which Lightning accepts for sharded models only as a plugin
        return Shared(strategy, nodes, None, [Started(place), DoublePrecision()])
    return Shared(strategy, nodes, precision, [Started(place)])
