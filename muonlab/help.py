"""The page that --help shows: groups, options, and every setting with its comment in conf/."""

from collections.abc import Mapping
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from muonlab.cli import Config, compose_config, option_names, options_of, plain, project_folder
from muonlab.plugin_options import file_beside, option_comments

Place = tuple[str, ...]


def help_page(config_name: str, overrides: list[str]) -> str:
    """The page for conf/<config_name>.yaml with these overrides. Raises what `compose_config` raises."""
    config = plain(compose_config(config_name, overrides))
    with initialize_config_dir(str(project_folder("conf")), version_base="1.3"):
        hydra = compose(config_name, overrides, return_hydra_config=True).hydra
        choices = dict(OmegaConf.to_container(hydra.runtime.choices))  # type: ignore[arg-type]
        header, footer = hydra.help.header.strip(), hydra.help.footer.rstrip()
    groups = [group for group in config if group in choices]
    lines = [header, "", "Groups (choose one option each):"]
    for group in groups:
        lines.append(f"  {group}: {', '.join(option_names(group))}")
    comments = file_comments(project_folder("conf") / f"{config_name}.yaml")
    for group in groups:
        of_group = _option_comments(group, str(choices[group]))
        comments |= {(group, *path): comment for path, comment in of_group.items()}
    lines += ["", "The config with your overrides:", *_commented(config, comments), "", footer]
    return "\n".join(lines)


def _option_comments(group: str, name: str) -> dict[Place, str]:
    """The comments of an option's file; for a plug-in's entry what each setting may be, or says the file beside it."""
    if name in options_of(group):
        return file_comments(options_of(group)[name])
    comments: dict[Place, str] = {(key,): words for key, words in option_comments(group, name).items()}
    beside = file_beside(group, name)
    return comments if beside is None else comments | file_comments(beside)


def file_comments(path: Path) -> dict[Place, str]:
    """The comment beside each setting of a YAML file, settings inherited through `defaults` included."""
    text = path.read_text(encoding="utf-8")
    comments: dict[Place, str] = {}
    for default in (yaml.safe_load(text) or {}).get("defaults", ()):
        if isinstance(default, str) and default != "_self_":
            comments |= file_comments(path.parent / f"{default.removesuffix('@_here_')}.yaml")
    _collect(yaml.compose(text), text.splitlines(), (), comments)
    return comments


def _collect(node: yaml.Node | None, lines: list[str], place: Place, comments: dict[Place, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = (*place, key.value)
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            _collect(value, lines, path, comments)
        elif value.start_mark.line == value.end_mark.line:
            _, sign, comment = lines[value.end_mark.line][value.end_mark.column :].partition("#")
            if sign:
                comments[path] = comment.strip()


def _commented(config: Config, comments: dict[Place, str]) -> list[str]:
    rows: list[tuple[str, str]] = []

    def add(section: Mapping[str, object], place: Place) -> None:
        indent = "  " * len(place)
        for key, value in section.items():
            path = (*place, str(key))
            if isinstance(value, dict) and value:
                rows.append((f"{indent}{key}:", ""))
                add(value, path)
            else:
                text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
                text = text.removesuffix("...\n").strip()
                rows.append((f"{indent}{key}: {text}", comments.get(path, "")))

    add(config, ())
    width = min(44, max(len(setting) for setting, _ in rows))
    return [f"{setting:<{width}}  # {comment}" if comment else setting for setting, comment in rows]
