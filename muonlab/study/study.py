"""A study: a design, the overrides of all its runs, and the folder and storage that its workers share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import yaml

from muonlab.cli import compose_config, import_plugins, parse_overrides, plain
from muonlab.command import tell
from muonlab.errors import MuonlabError, located
from muonlab.plugin_options import plugin_places, plugins_override
from muonlab.plugins import find_plugin
from muonlab.record.files import remove_leftovers, set_aside, write_atomic
from muonlab.record.identity import HARDWARE
from muonlab.settings.address import public_address, with_password
from muonlab.settings.check import Named, check
from muonlab.study.design import Design, searches
from muonlab.study.reading import fault, make_design
from muonlab.study.slots import Level, Slot, keys, slots
from muonlab.train.config import RunConfig, read_config

FILE = "study.yaml"
END = b"...\n"  # of a YAML document: a file without it was cut short
Definition = Mapping[str, Mapping[str, object]]  # {section: {setting: value}}


@dataclass(frozen=True)
class Study:
    """What to run, and where.

    name: the name of its folder, its Optuna studies and its MLflow run. design: conditions, and how they are judged.
    overrides: Hydra overrides of every run, after the design's own. folder: holds study.yaml, the queue's journal and
    the logs. command: the command line that repeats it. storage: an Optuna URL; None: the journal. workers: runs at a
    time on this machine; None: as many as it has GPUs, or else cores.
    """

    name: str
    design: Design
    overrides: tuple[str, ...]
    folder: Path
    command: str
    storage: str | None = None
    workers: int | None = None

    def compose(self, overrides: Sequence[str]) -> RunConfig:
        """The settings of one run, exactly as `python -m muonlab.train` would compose them from the overrides."""
        config = self.settings(overrides)
        config = replace(config, corpus=_corpus(config.data, config.paths.cache))
        return config.tracked(study=self.name) if config.tracking.name != "none" else config

    @staticmethod
    def settings(overrides: Sequence[str]) -> RunConfig:
        """The same without the corpus' digest, which takes no time and no network."""
        return read_config(_composed(tuple(overrides)))

    def slots(self, tuned: Mapping[str, Mapping[str, Level]] | None = None) -> list[Slot]:
        """Its runs; those of tuned conditions only if `tuned` has the best levels of their searches."""
        return list(self._untuned if tuned is None else self._slots(tuned))

    @cached_property
    def _untuned(self) -> list[Slot]:
        return self._slots(None)

    def _slots(self, tuned: Mapping[str, Mapping[str, Level]] | None) -> list[Slot]:
        return [_tagged(slot) for slot in slots(self.design, self.compose, self.overrides, tuned)]

    def base(self) -> RunConfig:
        """The settings of its first slot: where runs are kept, and what all of them share."""
        return self.slots()[0].config

    @property
    def searches(self) -> bool:
        """Whether any condition is searched by a sampler."""
        return any(section.search is not None for section in self.design.conditions.values())

    def save(self) -> None:
        """Write study.yaml into the study's folder, where other workers find it.

        Raises MuonlabError if the folder holds another study or one of an older muonlab, or cannot be written.
        """
        if (self.folder / "sweep.yaml").exists() and not (self.folder / FILE).exists():
            raise MuonlabError(
                f"{self.folder} is a study of muonlab 0.1, which this version cannot resume; choose another name with"
                " study=NAME, or move the folder away (its runs can still be read)"
            )
        values: dict[str, object] = {
            "name": self.name,
            "command": self.command,
            "overrides": list(self.overrides),
            "storage": public_address(self.storage) if self.storage else None,
            "design": self.design.as_mapping(),
        }
        other = (self.folder / FILE).exists() and not self._torn()
        if self.searches:
            values["definition"] = definition = self.definition()
            if other:
                before = _read(self.folder / FILE).get("definition", {})
                _refuse_other(self.name, check(Definition, before, "definition"), definition)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, explicit_end=True)
        write_atomic(self.folder / FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        remove_leftovers(self.folder)

    def _torn(self) -> bool:
        """Set aside a file that was cut short; whether it was."""
        path = self.folder / FILE
        if path.read_bytes().endswith(END):
            return False
        tell(f"{path} was torn; it is kept as {set_aside(path).name} and written again")
        return True

    def definition(self) -> Definition:
        """What identifies a search: everything that its runs share, except hardware, and every space."""
        shared = self.base().as_dict()
        trainer = {key: value for key, value in shared["trainer"].items() if key not in HARDWARE}
        sections = {key: shared[key] for key in ("model", "schedule", "data")} | {"trainer": trainer}
        if shared["plugins"]:
            sections["plug-in"] = {Path(place).name: digest for place, digest in shared["plugins"].items()}
        for condition, section in self.design.conditions.items():
            if section.search is None:
                continue
            search = searches(self.design, condition)
            sections["sampler"] = {"name": search.sampler, "seed": search.seed}
            for name, space in search.optimizers.items():
                sections[f"search space of {name}"] = dict(space.space)
                sections[f"published setting of {name}"] = dict(space.published)
        return sections


def load_study(folder: Path) -> Study:
    """The study in a folder. Raises MuonlabError if there is none that this version can read."""
    if not (folder / FILE).exists():
        older = " (it was made by muonlab 0.1)" if (folder / "sweep.yaml").exists() else ""
        raise MuonlabError(f"no study in {folder}: it has no {FILE}{older}")
    values = _read(folder / FILE)
    for key in ("name", "command", "overrides", "storage", "design"):
        if key not in values:
            raise MuonlabError(f"{folder / FILE} lacks '{key}'; rerun the study's own command")
    with located(str(folder / FILE)):
        overrides = check(tuple[str, ...], values["overrides"], "overrides")
        import_plugins(list(overrides))  # the design may name their measures
        return Study(
            name=check(str, values["name"], "name"),
            design=make_design(values["design"], FILE),
            overrides=overrides,
            folder=folder,
            command=check(str, values["command"], "command"),
            storage=with_password(check(str | None, values["storage"], "storage")),
        )


def _read(path: Path) -> dict[str, object]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MuonlabError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise MuonlabError(f"{path} is not YAML: {fault(error)}") from error
    if not isinstance(values, dict):
        raise MuonlabError(
            f"{path} is damaged and holds no study; delete it and rerun the study's own command"
        )
    return values


def _refuse_other(name: str, before: Definition, now: Definition) -> None:
    for key in {**before, **now}:
        old, new = before.get(key, {}), now.get(key, {})
        if old != new:
            changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            raise MuonlabError(
                f"study {name} was created with a different {key} ({', '.join(changed)}); choose another study name"
            )


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, object]:
    # The same settings with another seed are composed alike, and composing takes a tenth of a second.
    return plain(compose_config("train", list(overrides)))


@cache
def _corpus(settings: Named, cache_folder: str | None) -> str:
    from muonlab.data import corpus_digest

    return corpus_digest(settings, cache_folder)


def _tagged(slot: Slot) -> Slot:
    if slot.config.tracking.name == "none":
        return slot
    config = slot.config.tracked(trial=slot.name, role=f"{slot.condition}/{slot.arm}")
    return replace(slot, config=config)


def overrides_for_runs(overrides: Sequence[str], own: Sequence[str]) -> list[str]:
    """The overrides except those of the command's own keys: those in `own`, or below them; plug-ins by their absolute
    paths, since workers may have other working folders."""
    return [
        _absolute(override)
        for override in overrides
        if not any(key == name or key.startswith(f"{name}.") for key in keys([override]) for name in own)
    ]


def _absolute(override: str) -> str:
    [parsed] = parse_overrides([override])
    if parsed.key_or_group != "plugins" or parsed.is_delete():
        return override
    return plugins_override([find_plugin(place).place for place in plugin_places(parsed)])
