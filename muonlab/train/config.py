"""A run's config, checked and made plain before anything heavy is imported."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from muonlab.errors import MuonlabError, unknown_name

# muonlab's precision names -> Lightning's.
PRECISIONS = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
    "bf16-true": "bf16-true",
    "fp64": "64-true",
}
DEVICES = ("auto", "cpu", "cuda")
BATCH_ORDERS = ("random", "sequential")
SECTIONS = {"model", "optimizer", "schedule", "data", "trainer", "tracking", "seed", "force", "paths"}


@dataclass
class TrainerConfig:
    """The `trainer` section; units and the meaning of 0 stand in conf/trainer/default.yaml."""

    max_steps: int
    batch_size: int
    accumulate: int
    batch_order: str
    grad_clip: float
    precision: str
    device: str
    devices: int
    strategy: str
    compile: bool
    num_threads: int
    val_every: int
    val_batches: int
    probe_every: int
    probe_batch_size: int
    exact_every: int
    spectra_every: int
    checkpoint_every: int
    progress: bool

    def check(self) -> None:
        """Raises MuonlabError for the first value out of range."""
        at_least_one = ("max_steps", "batch_size", "accumulate", "devices", "num_threads", "val_batches")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in (*at_least_one, "probe_batch_size", "exact_every") else 0
            if not isinstance(value, str) and value < least:
                raise MuonlabError(f"trainer.{field.name} must be at least {least}, not {value}")
        if self.precision not in PRECISIONS:
            raise unknown_name("trainer.precision", self.precision, PRECISIONS)
        if self.batch_order not in BATCH_ORDERS:
            raise unknown_name("trainer.batch_order", self.batch_order, BATCH_ORDERS)
        if self.device not in DEVICES:
            raise unknown_name("trainer.device", self.device, DEVICES)
        if self.batch_size % self.devices:
            raise MuonlabError(
                f"trainer.batch_size={self.batch_size} does not divide evenly over trainer.devices={self.devices}"
            )


def resolve(config: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """A plain, fully resolved config of one run, the same for Hydra's DictConfig and for a dict.

    Raises MuonlabError for a missing or unknown section, an unknown trainer key or a value of the wrong type.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise MuonlabError(str(error).splitlines()[0]) from error
    for key in plain.keys() ^ SECTIONS:
        if key in plain:
            raise unknown_name("config section", key, SECTIONS)
        raise MuonlabError(f"the config has no '{key}'")
    plain["trainer"] = _typed(plain["trainer"])
    if isinstance(plain["seed"], bool) or not isinstance(plain["seed"], int) or plain["seed"] < 0:
        raise MuonlabError(f"seed must be a whole number from 0 on, not {plain['seed']!r}")
    return plain


def _typed(section: dict[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(TrainerConfig)]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainerConfig), section)
        trainer: TrainerConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except ConfigKeyError as error:
        raise unknown_name("trainer setting", str(error.key), known) from error
    except ValidationError as error:
        key = error.full_key or "value"
        raise MuonlabError(f"trainer.{key}: {str(error).splitlines()[0]}") from error
    except OmegaConfBaseException as error:
        raise MuonlabError(f"trainer: {str(error).splitlines()[0]}") from error
    trainer.check()
    return asdict(trainer)


def run_name(config: dict[str, Any]) -> str:
    """A name that can be read in a table: muonclip-lr3e-2-s1."""
    mantissa, exponent = f"{config['optimizer']['lr']:.6e}".split("e")
    lr = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{config['optimizer']['name']}-lr{lr}-s{config['seed']}"
