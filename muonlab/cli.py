"""What the commands share: where the configs lie, and a user's mistake told in one sentence."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muonlab.errors import MuonlabError, unknown_name


def project_folder(name: str) -> Path:
    """`conf` or `experiments`: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / name
    return beside if beside.is_dir() else package / name


def compose_config(config_name: str, overrides: list[str]) -> DictConfig:
    """Hydra's composition of conf/<config_name>.yaml with overrides.

    Raises MuonlabError in one sentence, near-miss names included, for whatever Hydra refuses.
    """
    with initialize_config_dir(str(project_folder("conf")), version_base="1.3"):
        try:
            config = compose(config_name, overrides, return_hydra_config=False)
            OmegaConf.resolve(config)
            return config
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(config_name, overrides, error) from error


def _explain(config_name: str, overrides: list[str], error: Exception) -> MuonlabError:
    """Hydra's message, in one sentence and with the names that were near."""
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    if found := re.search(r"Could not find '(\w+(?:/\w+)*)/([^'/]+)'", text):
        group, option = found.groups()
        options = [path.stem for path in (project_folder("conf") / group).glob("*.yaml")]
        return unknown_name(group, option, options)
    if found := re.search(r"Key '([^']+)' is not in struct[\s\S]*?full_key: ([\w.\[\]/-]+)", text):
        key, path = found.groups()
        return unknown_name("config key", path, _sibling_keys(config_name, overrides, path.removesuffix(key)))
    if found := re.search(r"Could not override '([^']+)'", text):
        path = found.group(1)
        return unknown_name(
            "config key", path, _sibling_keys(config_name, overrides, path.rpartition(".")[0])
        )
    return MuonlabError(" ".join(texts[0].split()))


def _sibling_keys(config_name: str, overrides: list[str], parent: str) -> list[str]:
    parent = parent.strip(".")
    groups = [o for o in overrides if re.fullmatch(r"\+?[\w/]+=[\w/]+", o) and "." not in o.split("=")[0]]
    try:
        config = compose(config_name, groups)
    except (HydraException, OmegaConfBaseException):
        config = compose(config_name)
    node = OmegaConf.select(config, parent) if parent else config
    return [f"{parent}.{key}" if parent else str(key) for key in node] if isinstance(node, DictConfig) else []


def check_overrides(config_name: str, arguments: list[str]) -> None:
    """Compose once before Hydra's own main does, so that its long messages are never seen.

    Flags are left to Hydra. In a multirun the first value of each sweep is tried.
    """
    if any(a in ("--help", "-h", "--hydra-help", "--version", "--info", "-i") for a in arguments):
        return
    multirun = any(a in ("-m", "--multirun") for a in arguments)
    overrides = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    overrides = [o for o in overrides if not o.startswith(("hydra.", "hydra/"))]
    if multirun:
        overrides = [re.sub(r"=([^\[{(\"',]+),.*", r"=\1", o) for o in overrides if "(" not in o]
    compose_config(config_name, overrides)


def hydra_command(config_name: str, job: Callable[[dict[str, Any]], int]) -> int:
    """Run `job` under Hydra on conf/<config_name>.yaml and the command line; the largest of its exit codes.

    In a multirun a job that the user got wrong is told and does not end the others.
    """
    import hydra

    check_overrides(config_name, sys.argv[1:])
    configs: list[dict[str, Any]] = []

    # The jobs run after Hydra is done, so that they may compose configs themselves and its error handler stays out.
    @hydra.main(config_path=str(project_folder("conf")), config_name=config_name, version_base="1.3")
    def collect(config: DictConfig) -> None:
        configs.append(plain(config))

    collect()
    codes = [_run_job(job, config) for config in configs]
    return max(codes, default=0)


def _run_job(job: Callable[[dict[str, Any]], int], config: dict[str, Any]) -> int:
    try:
        return job(config)
    except MuonlabError as error:
        print(f"muonlab: {error}", file=sys.stderr)
        return 2


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's body and exit: 0 or what it returns; 2 with one sentence for a MuonlabError; 130 for Ctrl-C."""
    try:
        sys.exit(main() or 0)
    except MuonlabError as error:
        print(f"muonlab: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("muonlab: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


def plain(config: Any) -> dict[str, Any]:
    """A resolved dict of a composed config."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
