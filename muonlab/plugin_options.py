"""What plug-ins register, as options of the command line: their settings and comments, and how plug-ins are named."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import OmegaConf

from muonlab.errors import MuonlabError
from muonlab.plugins import owner_of
from muonlab.registry import REGISTRIES
from muonlab.settings.check import annotations, defaults, describe


def plugin_places(override: Override) -> list[str]:
    """The plug-ins in an override of `plugins`. Raises MuonlabError for anything but a list of texts."""
    value = override.value()
    if not isinstance(value, list) or not all(isinstance(each, str | QuotedString) for each in value):
        raise MuonlabError(
            "plugins must be a list of files or installed names, such as plugins=[mine.py], not"
            f" {override.get_value_string()}"
        )
    return [each.text if isinstance(each, QuotedString) else each for each in value]


def plugins_override(places: list[str]) -> str:
    """The override that names these plug-ins."""
    quoted = (place.replace("\\", "\\\\").replace("'", "\\'") for place in places)
    return "plugins=[" + ",".join(f"'{place}'" for place in quoted) + "]"


def plugin_option(kind: str, name: str) -> dict[str, object]:
    """What choosing an entry of an imported plug-in puts into a config: the defaults of its settings, and over them
    what NAME.yaml beside the plug-in says. Raises MuonlabError for such a file that is not a mapping in YAML."""
    section = _section(kind, name)
    values = defaults(section)
    required = {spec.name: "???" for spec in fields(section) if spec.name not in values}
    option: dict[str, object] = {**required, **{key: _plain(value) for key, value in values.items()}}
    if (beside := file_beside(kind, name)) is not None:
        try:
            written = OmegaConf.to_container(OmegaConf.load(beside), resolve=False)
        except Exception as error:  # YAML's, OmegaConf's and the system's
            raise MuonlabError(f"{beside} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(written, dict):
            raise MuonlabError(f"{beside} must hold a mapping of settings")
        option |= {str(key): value for key, value in written.items()}
    return option | {"name": name}


def option_comments(kind: str, name: str) -> dict[str, str]:
    """What each setting of an entry of an imported plug-in may be, in words."""
    return {key: describe(each) for key, each in annotations(_section(kind, name)).items() if key != "name"}


def file_beside(kind: str, name: str) -> Path | None:
    """NAME.yaml in the folder of the plug-in that registered the entry, if there is one."""
    owner = owner_of(kind, name)
    beside = [] if owner is None else [path.with_name(f"{name}.yaml") for path in sorted(owner.paths)]
    return next((path for path in beside if path.is_file()), None)


def _section(kind: str, name: str) -> type:
    return next(each for each in REGISTRIES if each.kind == kind and name in each.added).section(name)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
