"""A run's settings: checked whole, before anything heavy is imported, and passed on as one object."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast, overload

from annotated_types import Ge, Le

from muonlab.cli import options_of
from muonlab.errors import MuonlabError, shown, unknown_name
from muonlab.plugins import load_plugin, owner_of, plugin_sources
from muonlab.record.identity import run_identity
from muonlab.record.store import check_uri
from muonlab.registry import Registry
from muonlab.settings.address import refuse_password
from muonlab.settings.check import (
    Count,
    Named,
    NamedModel,
    NonNegative,
    PathText,
    Seed,
    Steps,
    Text,
    build,
    check,
)
from muonlab.settings.data import DATA_SETTINGS
from muonlab.settings.model import MODEL_SETTINGS
from muonlab.settings.optimizer import NAMES, OPTIMIZER_SETTINGS, MuonSettings
from muonlab.settings.schedule import SCHEDULE_SETTINGS

LightningPrecision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]
# muonlab's precision names -> Lightning's.
PRECISIONS: dict[str, LightningPrecision] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
    "bf16-true": "bf16-true",
    "fp64": "64-true",
}


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How a run is trained and looked at; units and the meaning of 0 are in conf/trainer/default.yaml."""

    max_steps: Count
    batch_size: Count
    accumulate: Count
    batch_order: Literal["random", "sequential"]
    grad_clip: NonNegative
    precision: Literal["fp32", "bf16", "fp16", "bf16-true", "fp64"]
    device: Literal["auto", "cpu", "cuda"]
    devices: Count
    strategy: Literal["auto", "ddp", "fsdp2"]
    compile: bool | Literal["auto"]
    num_threads: Annotated[int, Ge(1), Le(1024)]
    val_every: Steps
    val_batches: Count
    probe_every: Steps
    probe_batch_size: Count
    exact_every: Count
    spectra_every: Steps
    checkpoint_every: Steps
    progress: bool

    def __post_init__(self) -> None:
        if self.batch_size % self.devices:
            raise MuonlabError(
                f"trainer.batch_size={self.batch_size} does not divide evenly over trainer.devices={self.devices}"
            )
        if self.strategy == "fsdp2":
            self._check_sharding()

    def _check_sharding(self) -> None:
        for key, value in (("compile", True), ("precision", "fp16"), ("devices", 1)):
            if getattr(self, key) == value:
                raise MuonlabError(
                    f"trainer.strategy=fsdp2 needs several devices and supports neither compiling nor fp16;"
                    f" trainer.{key} is {shown(value)}"
                )

    @property
    def sequences(self) -> int:
        """Sequences of one optimizer step."""
        return self.batch_size * self.accumulate


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Where a run is shown besides its folder: nowhere, or in MLflow; study, trial and role are tags there."""

    name: Literal["mlflow", "none"]
    uri: Text | None = None
    experiment: Text = "muonlab"
    study: str | None = None
    trial: str | None = None
    role: str | None = None
    parent_run_id: str | None = None

    def __post_init__(self) -> None:
        if self.uri is not None:
            check_uri(self.uri, "tracking.uri")
            refuse_password(self.uri, "tracking.uri", "give the whole address in $MLFLOW_TRACKING_URI")


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    """runs: where run folders are made. cache: corpora and tokens; None is $MUONLAB_CACHE or .cache/muonlab."""

    runs: PathText
    cache: PathText | None = None


class ConfigValues(TypedDict):
    """A RunConfig as config.yaml keeps it."""

    model: dict[str, object]
    optimizer: dict[str, object]
    schedule: dict[str, object]
    data: dict[str, object]
    trainer: dict[str, object]
    tracking: dict[str, object]
    paths: dict[str, object]
    seed: int
    force: bool
    corpus: str
    plugins: dict[str, str] | None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run, and where it is kept.

    `model`, `optimizer`, `schedule` and `data` are the dataclasses of muonlab.settings, or that of a user-defined
    builder. `corpus` is the digest of the text that `data` names, 16 hex digits, "" until the text is read: a run on
    another text is another run. `plugins` are those that the run uses, {place: digest of the source} (see
    muonlab.plugins); None: none.
    """

    model: NamedModel
    optimizer: Named
    schedule: Named
    data: Named
    trainer: TrainerSettings
    tracking: TrackingSettings
    paths: PathSettings
    seed: Seed
    force: bool
    corpus: str = ""
    plugins: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        warmup, max_steps = getattr(self.schedule, "warmup", 0), self.trainer.max_steps
        if warmup > max_steps:
            raise MuonlabError(
                f"schedule.warmup={warmup} must be from 0 to the run's {max_steps} steps (trainer.max_steps)"
            )

    @property
    def name(self) -> str:
        """A readable name for tables: muonclip-lr3e-2-s1."""
        lr = getattr(self.optimizer, "lr", None)
        if not isinstance(lr, int | float):
            return f"{self.optimizer.name}-s{self.seed}"
        mantissa, exponent = f"{lr:.6e}".split("e")
        return f"{self.optimizer.name}-lr{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}-s{self.seed}"

    @property
    def identity(self) -> str:
        """The digest that distinguishes this run from others (see run_identity)."""
        return run_identity(self.as_dict())

    def as_dict(self) -> ConfigValues:
        """Plain values, as config.yaml keeps them."""
        return cast(ConfigValues, _plain(asdict(self)))

    def with_seed(self, seed: int) -> "RunConfig":
        """The same run with other weights and another batch order."""
        return replace(self, seed=seed)

    def tracked(self, **tags: str | None) -> "RunConfig":
        """The same run, shown in MLflow under these tags (study, trial, role, parent_run_id)."""
        return replace(self, tracking=replace(self.tracking, **tags))  # type: ignore[arg-type]


def read_config(values: Mapping[str, object]) -> RunConfig:
    """The checked settings of one run from a composed config.

    Raises MuonlabError in one sentence for a missing or unknown section or setting and for every value of a wrong type,
    range or shape, and for sizes that do not fit together.
    """
    known = [field.name for field in fields(RunConfig)]
    for key in values:
        if key not in known:
            raise unknown_name("config section", key, known)
    for key in known:
        if key not in values and key not in ("corpus", "plugins"):
            raise MuonlabError(f"the config has no '{key}'")
    plugins = _read_plugins(values.get("plugins"))
    config = RunConfig(
        model=read_section("model", values["model"]),
        optimizer=read_section("optimizer", values["optimizer"]),
        schedule=read_section("schedule", values["schedule"]),
        data=read_section("data", values["data"]),
        trainer=build(TrainerSettings, _mapping("trainer", values["trainer"]), "trainer"),
        tracking=build(TrackingSettings, _mapping("tracking", values["tracking"]), "tracking"),
        paths=build(PathSettings, _mapping("paths", values["paths"]), "paths"),
        seed=check(Seed, values["seed"], "seed"),
        force=check(bool, values["force"], "force"),
        corpus=check(str, values.get("corpus", ""), "corpus"),
        plugins=plugins or None,
    )
    for kind in ("model", "optimizer", "schedule", "data"):
        name = getattr(config, kind).name
        if (owner := owner_of(kind, name)) and owner.digest not in plugins.values():
            raise MuonlabError(
                f"{kind} '{name}' is that of the plug-in {owner.place}, which `plugins` does not name"
            )
    return config


def _read_plugins(values: object) -> dict[str, str]:
    """{place: digest} of the plug-ins in a list of places, or in such a mapping, which are imported."""
    places = check(Mapping[str, str] | Sequence[str] | None, values, "plugins") or ()
    digests = places if isinstance(places, Mapping) else dict.fromkeys(places, "")
    plugins = [load_plugin(place, digest) for place, digest in digests.items()]
    names = Counter(name for plugin in plugins for name in plugin_sources({plugin.place: plugin.digest}))
    if twice := [name for name, count in names.items() if count > 1]:
        raise MuonlabError(
            f"two plug-ins are called {twice[0].rpartition('/')[2]}, which a record cannot keep apart"
        )
    return {plugin.place: plugin.digest for plugin in plugins}


@overload
def read_section(kind: Literal["model"], values: object) -> NamedModel: ...


@overload
def read_section(kind: Literal["optimizer", "schedule", "data"], values: object) -> Named: ...


def read_section(kind: str, values: object) -> Named:
    """The checked settings of a model, optimizer, schedule or corpus; its `name` says which."""
    values = _mapping(kind, values)
    name = check(str, values.get("name"), f"{kind}.name")
    families = {
        "model": MODEL_SETTINGS,
        "optimizer": OPTIMIZER_SETTINGS,
        "schedule": SCHEDULE_SETTINGS,
        "data": DATA_SETTINGS,
    }[kind]
    section = families[name] if name in families else _registered(kind, name, families)
    settings: Any = build(section, values, kind)
    if isinstance(settings, MuonSettings):
        _check_names(settings)
    return settings


def _registered(kind: str, name: str, families: Iterable[str]) -> type:
    """The settings of a user-defined builder, known only once the packages that register it are imported.

    Those import torch, which takes seconds; a builder has a config of its name, so without one the name is unknown.
    """
    option = options_of(kind).get(name)
    here = "torch" in sys.modules or owner_of(kind, name) is not None
    if not here and (option is None or f"name: {name}" not in option.read_text("utf-8")):
        raise unknown_name(kind, name, families)
    from muonlab.data import DATA
    from muonlab.models.registry import MODELS
    from muonlab.optim.optimizers import OPTIMIZERS
    from muonlab.train.schedule import SCHEDULES

    registries: dict[str, Registry[Any]] = {
        "model": MODELS,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "data": DATA,
    }
    return registries[kind].section(name)


def _check_names(settings: MuonSettings) -> None:
    """Raise MuonlabError for a stage or rule that is neither the package's own nor registered.

    Registered ones are known once the files of muonlab/optim are imported, and torch with them; nobody waits for that
    because of a name that none of these files registers.
    """
    for setting, name in settings.names():
        if name in NAMES[setting]:
            continue
        files = (Path(__file__).parents[1] / "optim").glob("*.py")
        registration = f'"{name}"' if setting == "routes" else f"def {name}("
        if "torch" not in sys.modules and not any(registration in f.read_text("utf-8") for f in files):
            raise unknown_name(f"optimizer.{setting}", name, NAMES[setting])
        from muonlab.optim.optimizers import OPTIMIZERS
        from muonlab.optim.rules import RULES

        OPTIMIZERS.names()  # imports every file
        table = RULES if setting == "routes" else RULES["muon"].table(setting)
        if name not in table:
            raise unknown_name(f"optimizer.{setting}", name, table)


def _mapping(kind: str, values: object) -> Mapping[str, object]:
    if not isinstance(values, Mapping):
        raise MuonlabError(f"{kind} must be a mapping of settings, not {shown(values)}")
    return values


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
