"""What a sweep was asked to do: its config, its folder, and the config of each of its runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError, unknown_name
from muonlab.record import run_identity

# What may change while the study stays the same: how much and where, not what.
FREE = ("trials", "workers", "replicate_seeds", "storage")


@dataclass(frozen=True)
class Plan:
    """A resolved sweep config with the full optimizer sections filled in.

    `optimizers` maps each name to its whole config section; the searched settings replace values in it.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    optimizers: dict[str, dict[str, Any]]

    @property
    def search(self) -> dict[str, Any]:
        """The `search` section."""
        return self.config["search"]

    def run_config(
        self, optimizer: str, settings: dict[str, Any], seed: int, **tracking: Any
    ) -> dict[str, Any]:
        """The config of one run, exactly what `python -m muonlab.train` would compose for it."""
        sections = {key: self.config[key] for key in ("model", "schedule", "data", "trainer")}
        paths = {key: self.config["paths"][key] for key in ("runs", "cache")}
        return sections | {
            "optimizer": self.optimizers[optimizer] | settings,
            "tracking": self.config["tracking"] | {"study": self.name} | tracking,
            "paths": paths,
            "seed": seed,
            "force": False,
        }

    def fairness(self) -> str:
        """The rule under which the optimizers are compared, in one paragraph."""
        search, trainer = self.search, self.config["trainer"]
        tokens = (
            trainer["max_steps"]
            * trainer["batch_size"]
            * trainer["accumulate"]
            * self.config["model"]["context"]
        )
        searched = {name: ", ".join(section["space"]) for name, section in search["optimizers"].items()}
        settings = "; ".join(f"{name}: {keys}" for name, keys in searched.items())
        if len(set(searched.values())) == 1:
            settings = next(iter(searched.values()))
        seeds = ", ".join(map(str, search["replicate_seeds"]))
        return (
            f"Fairness: {search['trials']} trials of each optimizer ({search['sampler']}, published setting first), "
            f"{tokens:,} tokens each, searched settings {settings}; the best by validation loss repeated on the "
            f"fresh seeds {seeds}, which alone enter the comparison."
        )

    def save(self) -> None:
        """Keep the plan in the study's folder, where other workers find it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "sweep.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
        except OSError as error:
            raise MuonlabError(f"cannot write the study's folder {self.folder}: {error.strerror}") from error


def make_plan(config: dict[str, Any]) -> Plan:
    """Check a composed sweep config and fill in the optimizers' sections.

    Raises MuonlabError for an unknown optimizer or setting, spaces of different size, seeds used twice.
    """
    search, optimizers = config["search"], {}
    if search["trials"] < 1:
        raise MuonlabError(f"search.trials must be at least 1, not {search['trials']}")
    if search["seed"] in search["replicate_seeds"]:
        raise MuonlabError(
            f"search.seed={search['seed']} is among search.replicate_seeds; a search seed never enters a claim"
        )
    for name, section in search["optimizers"].items():
        optimizers[name] = plain(compose_config("train", [f"optimizer={name}"]))["optimizer"]
        for key in (*section["space"], *section["published"]):
            if key not in optimizers[name]:
                raise unknown_name(f"setting of optimizer {name}", key, optimizers[name])
        if missing := section["space"].keys() - section["published"].keys():
            raise MuonlabError(
                f"search.optimizers.{name}.published lacks the searched {', '.join(sorted(missing))}"
            )
    sizes = {name: len(section["space"]) for name, section in search["optimizers"].items()}
    if len(set(sizes.values())) > 1:
        raise MuonlabError(f"the optimizers do not get equal search effort: {sizes} searched settings")
    fixed = {key: config[key] for key in ("model", "schedule", "data", "trainer")}
    fixed |= {"search": {k: v for k, v in search.items() if k not in FREE}, "optimizers": optimizers}
    name = config["study"] or f"{config['model']['name']}-{run_identity(fixed)[:6]}"
    folder = Path(config["paths"]["studies"]) / name
    plan = Plan(name, folder, config, optimizers)
    if (folder / "sweep.yaml").exists():
        before = yaml.safe_load((folder / "sweep.yaml").read_text())
        for key in ("model", "schedule", "data", "trainer"):
            if before[key] != config[key]:
                changed = [k for k in config[key] if before[key].get(k) != config[key][k]]
                raise MuonlabError(
                    f"study {name} was made with another {key} ({', '.join(changed)}); name another study"
                )
    return plan


def load_plan(folder: Path) -> Plan:
    """The plan of an existing study. Raises MuonlabError where there is none."""
    path = folder / "sweep.yaml"
    if not path.exists():
        raise MuonlabError(f"no study in {folder}: it has no sweep.yaml")
    return make_plan(yaml.safe_load(path.read_text()) | {"study": folder.name})
