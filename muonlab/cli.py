"""Hydra's command line over conf/: composition, sweeps, and one-sentence errors for whatever Hydra refuses."""

import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muonlab.command import SentenceParser, tell
from muonlab.errors import MuonlabError, shown, unknown_name
from muonlab.plugin_options import plugin_option, plugin_places
from muonlab.plugins import load_plugin, plugin_entries
from muonlab.settings.check import vanishing_number

Config = dict[str, object]  # composed and resolved, but not yet checked
Job = Callable[[Config, list[str]], int]


def project_folder(name: str) -> Path:
    """`conf` or `experiments`: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / name
    return beside if beside.is_dir() else package / name


def options_of(group: str) -> dict[str, Path]:
    """The files of a group of conf/, by the names of its options."""
    return {path.stem: path for path in sorted((project_folder("conf") / group).glob("*.yaml"))}


# ---------------------------------------------------------------------- composing
def compose_config(config_name: str, overrides: list[str]) -> DictConfig:
    """Hydra's composition of conf/<config_name>.yaml with overrides.

    Raises MuonlabError in one sentence, near-miss names included, for whatever Hydra refuses.
    """
    import_plugins(overrides)
    with initialize_config_dir(str(project_folder("conf")), version_base="1.3"):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "provider=hydra.searchpath")  # a folder that does not exist
                config = compose(config_name, overrides)
            _refuse_unresolvable(config, OmegaConf.to_container(config, resolve=False))
            OmegaConf.resolve(config)
            return config
        except MuonlabError:
            raise
        except (
            Exception
        ) as error:  # Hydra's, OmegaConf's, ANTLR's, YAML's and bare ones: all are about the overrides
            raise _explain(config_name, overrides, error) from error


def import_plugins(overrides: list[str]) -> None:
    """Import the plug-ins that the overrides name, so that what they register can be chosen like an option of conf/.

    Raises MuonlabError for an override that cannot be parsed, what `load_plugin` raises, and for a name that conf/ has.
    """
    for override in parse_overrides(overrides):
        if override.key_or_group == "plugins" and not override.is_delete():
            for place in plugin_places(override):
                for kind, name in load_plugin(place).entries:
                    if name in options_of(kind):
                        raise MuonlabError(
                            f"plug-in {place} registers the {kind} '{name}', a name of conf/{kind}"
                        )
                    ConfigStore.instance().store(name=name, node=plugin_option(kind, name), group=kind)


def option_names(group: str) -> list[str]:
    """The options of a group: its files in conf/ and the entries of imported plug-ins."""
    return sorted([*options_of(group), *(name for kind, name in plugin_entries() if kind == group)])


def _refuse_unresolvable(config: DictConfig, values: object, place: str = "") -> None:
    """Raises MuonlabError for the first interpolation that leads nowhere; OmegaConf's own error does not say where.

    `values`: those of the section `place`, not yet resolved.
    """
    if isinstance(values, str) and "${" in values:
        try:
            OmegaConf.select(config, place)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise MuonlabError(f"{place}={values} cannot be resolved: {reason}") from error
    entries = (
        enumerate(values) if isinstance(values, list) else values.items() if isinstance(values, dict) else ()
    )
    for key, value in entries:
        _refuse_unresolvable(config, value, f"{place}.{key}" if place else str(key))


def plain(config: DictConfig) -> Config:
    """A composed config as a resolved dict. Raises MuonlabError for a value that is still missing."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except Exception as error:
        raise MuonlabError(_first_sentence(str(error))) from error


def parse_overrides(overrides: list[str]) -> list[Override]:
    """The overrides, parsed by Hydra's own grammar. Raises MuonlabError for one that it cannot parse."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except Exception as error:  # Hydra's, ANTLR's, or a bare one for too many brackets or digits
            reason = " ".join(str(error).splitlines()[0].split()) if "=" in text else "it has no '='"
            raise MuonlabError(
                f"{shown(text)} is not an override ({reason}); write group=option, key=value, +key=value or ~key, and"
                " quote values that contain spaces or commas"
            ) from error
        if not parsed[-1].key_or_group:
            raise MuonlabError(f"{shown(text)} is not an override, since it names no key")
        if not parsed[-1].is_delete() and (number := vanishing_number(parsed[-1].get_value_string())):
            raise MuonlabError(
                f"{shown(text)} contains {number:.40}, which is too small for a floating-point number and would"
                " become 0"
            )
    return parsed


def _explain(config_name: str, overrides: list[str], error: Exception) -> MuonlabError:
    """Hydra's message as one sentence, with the near names."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    for override in parse_overrides(overrides):
        group, value = override.key_or_group, override.value()
        if (options := option_names(group)) and not override.is_delete() and not override.is_sweep_override():
            if not isinstance(value, str | list):
                return MuonlabError(
                    f"{group} must be the name of one of its options, not {override.get_value_string()};"
                    f" known: {', '.join(options)}"
                )
            if unknown := [
                name for name in ([value] if isinstance(value, str) else value) if name not in options
            ]:
                return unknown_name(group, str(unknown[0]), options)
    if "requires --multirun" in text or "Ambiguous value" in text:
        [several, *_] = [o for o in parse_overrides(overrides) if o.is_sweep_override()]
        quoted = f"{several.get_key_element()}='{several.get_value_string()}'"
        return MuonlabError(
            f"'{several.input_line}' has several values: add -m to run each of them, or, if it is a single text, write"
            f' "{quoted}"'
        )
    if key := re.search(r"Key '([^']+)' is not in struct[\s\S]*?full_key: ([\w.\[\]/-]+)", text):
        name, path = key.groups()
        return _unknown_key(config_name, overrides, path, path.removesuffix(name))
    if key := re.search(r"Could not (?:override|delete) '([^']+)'", text) or re.search(
        r"Could not delete from config\. '([^']+)'", text
    ):
        path = key.group(1)
        return _unknown_key(config_name, overrides, path, path.rpartition(".")[0])
    return MuonlabError(_first_sentence(texts[0]) or type(error).__name__)


def _first_sentence(text: str) -> str:
    """OmegaConf's sentence, with the key that it names further down."""
    sentence, *places = re.split(r"\s+(?:full_key: |object_type=)", text)
    place = (
        f"{places[0].split()[0]}: "
        if places and places[0].split() and places[0].split()[0] not in sentence
        else ""
    )
    return place + " ".join(sentence.split())


def _unknown_key(config_name: str, overrides: list[str], path: str, parent: str) -> MuonlabError:
    """What is wrong with a key, given those beside it in the config with the groups that the overrides choose."""
    parent = parent.strip(".")
    groups = [
        o.input_line or ""
        for o in parse_overrides(overrides)
        if (project_folder("conf") / o.key_or_group).is_dir() and isinstance(o.value(), str)
    ]
    try:
        config = compose(config_name, groups)
    except Exception:
        config = compose(config_name)
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        return MuonlabError(f"unknown config key '{path}': '{parent}' is a value, without keys of its own")
    return unknown_name(
        "config key", path, [f"{parent}.{name}" if parent else name for name in map(str, node)]
    )


# ---------------------------------------------------------------------- commands
def hydra_command(config_name: str, job: Job, base: Sequence[str] = ()) -> int:
    """Run `job` on conf/<config_name>.yaml with the overrides of the command line; the largest exit code of its jobs.

    `job` takes the composed config and the overrides that made it. `base`: overrides before those of the command line.

    `-m` runs every combination of the sweeps that Hydra's basic sweeper reads; a job that is wrongly configured is
    reported and does not stop the others. `--help` shows every setting with its comment; all other flags are Hydra's.
    """
    flags = get_args_parser()
    flags.__class__ = SentenceParser  # its errors are sentences
    arguments = flags.parse_args()
    _refuse_foreign(arguments)
    overrides: list[str] = arguments.overrides
    if arguments.help:
        from muonlab.help import help_page

        print(help_page(config_name, [*base, *overrides]))
        return 0
    if arguments.hydra_help or arguments.info or arguments.cfg or arguments.shell_completion:
        return _hydras_own(config_name, [*base, *overrides])
    jobs = split_sweeps(overrides) if arguments.multirun else [overrides]
    if len(jobs) == 1:
        return _run_job(job, config_name, base, jobs[0])
    codes, sentences = [], []
    for each in jobs:
        try:
            codes.append(_run_job(job, config_name, base, each))
        except MuonlabError as error:
            if str(error) not in sentences:
                tell(str(error))
            sentences.append(str(error))
            codes.append(2)
    if len(sentences) > 1:
        tell(f"{len(sentences)} of {len(jobs)} jobs could not be run")
    return max(codes)


def _refuse_foreign(arguments: Namespace) -> None:
    """Raises MuonlabError for Hydra flags and settings that would do nothing here, or something other than they say."""
    for flag in ("config_name", "config_path", "config_dir", "experimental_rerun"):
        if getattr(arguments, flag) is not None:
            raise MuonlabError(
                f"--{flag.replace('_', '-')} is not supported: this command reads conf/ and applies the overrides;"
                " --help lists what there is"
            )
    if (arguments.resolve or arguments.package) and not arguments.cfg:
        raise MuonlabError("--resolve and --package change what --cfg shows; add --cfg job")
    if arguments.multirun and (arguments.cfg or arguments.info):
        raise MuonlabError("--cfg and --info show a single config; leave out --multirun")
    for override in parse_overrides(arguments.overrides):
        key = override.key_or_group
        if re.match(r"hydra[./]", key) and key != "hydra.searchpath":
            raise MuonlabError(
                f"'{override.input_line}' configures Hydra itself, which only composes the config here: runs are kept"
                " in paths.runs, and -m runs one job after another"
            )


def split_sweeps(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a multirun, by Hydra's basic sweeper. Raises MuonlabError for what it refuses."""
    with initialize_config_dir(str(project_folder("conf")), version_base="1.3"):
        try:
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            [jobs] = BasicSweeper.split_arguments(parser.parse_overrides(overrides), max_batch_size=None)
        except HydraException as error:
            raise MuonlabError(" ".join(str(error).splitlines()[0].split())) from error
    if not jobs:
        raise MuonlabError("-m has nothing to run: one of the sweeps has no values")
    return [list(job) for job in jobs]


def _hydras_own(config_name: str, overrides: list[str]) -> int:
    import hydra

    # Reports a mistake in one sentence, before Hydra prints its own long message.
    compose_config(config_name, overrides)
    command = hydra.main(config_path=str(project_folder("conf")), config_name=config_name, version_base="1.3")
    code, page = 0, StringIO()  # Hydra mistakes a reader that left for an error of its own
    try:
        with redirect_stdout(page):
            command(lambda config: None)()
    except SystemExit as error:  # code 1, after a sentence, for a package that the config lacks
        code = 2 if error.code else 0
    print(page.getvalue(), end="")
    return code


def _run_job(job: Job, config_name: str, base: Sequence[str], overrides: list[str]) -> int:
    return job(plain(compose_config(config_name, [*base, *overrides])), overrides)
