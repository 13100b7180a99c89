"""Count a model without building it: `python -m muonlab.models NAME [setting=value ...]`."""

from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import OverrideType

from muonlab.cli import compose_config, options_of, parse_overrides, plain
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError, unknown_name
from muonlab.models.counts import Count, model_counts, total
from muonlab.settings.check import build, check
from muonlab.settings.model import MODEL_SETTINGS, with_vocabulary


def main(arguments: list[str] | None = None) -> None:
    """Print parameters, active parameters and FLOPs per token of a config of conf/model, part by part.

    Raises MuonlabError for an unknown name or setting.
    """
    names = list(options_of("model"))
    parser = argument_parser(
        "muonlab.models", "Count a model's parameters and floating-point operations without building it."
    )
    parser.add_argument("name", metavar="name", help=f"one of {', '.join(names)}")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="as in conf/model/<name>.yaml")
    options = parser.parse_args(arguments)
    if options.name not in names:
        raise unknown_name("model config", options.name, names)
    if odd := [setting for setting in options.settings if "=" not in setting]:
        raise MuonlabError(f"settings are written name=value, not '{odd[0]}'")
    for override in parse_overrides(options.settings):
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            raise MuonlabError(f"settings are written name=value, not '{override.input_line}'")
    overrides = [f"model={options.name}", *(f"++model.{setting}" for setting in options.settings)]
    values = check(Mapping[str, object], plain(compose_config("train", overrides))["model"], "model")
    name = check(str, values.get("name"), "model.name")
    section = MODEL_SETTINGS.get(name) or _registered(name)
    settings = with_vocabulary(build(section, values, "model"))
    print(format_counts(model_counts(settings)))
    print(
        f"\nvocabulary {settings.vocab_size:,}, context {settings.context:,}; active: what one token uses;"
        " FLOPs: of one training token, forward and backward"
    )


def _registered(name: str) -> Any:
    """The settings of a model that muonlab.settings.model does not list; they come with torch."""
    from muonlab.models.registry import MODELS

    return MODELS.section(name)


def format_counts(counts: dict[str, Count]) -> str:
    """The table: one row per part, then their sum."""
    rows: list[tuple[str, ...]] = [("part", "parameters", "active", "FLOPs")]
    for part, count in (*counts.items(), ("total", total(counts.values()))):
        rows.append((part, *map(short, (count.parameters, count.active, count.flops))))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def short(number: float) -> str:
    """Three digits and a unit: 1.03 T, 31.7 B, 225 K, 64."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:
            return f"{float(f'{number / size:.3g}'):g} {unit}"
    return f"{number:g}"


if __name__ == "__main__":
    run_command(main)
