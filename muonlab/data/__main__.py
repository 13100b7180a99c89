"""Fetch, verify and tokenize a corpus: `python -m muonlab.data [name] [setting=value ...]`.

`python -m muonlab.data pack FILE [name] [setting=value ...]` also writes its tokens and tokenizer into one file, which
data=tokens reads on a machine without a network.
"""

import logging
import sys
import time
from pathlib import Path

from hydra.core.override_parser.types import OverrideType
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muonlab.cli import parse_overrides
from muonlab.command import argument_parser, run_command
from muonlab.data import DATA, list_data, make_data
from muonlab.data.packed import pack
from muonlab.errors import MuonlabError
from muonlab.settings.check import build, check


def main(arguments: list[str] | None = None) -> None:
    """Prepare the corpus in the cache and print its size; raises MuonlabError for a mistake in the arguments."""
    parser = argument_parser(
        "muonlab.data", "Fetch, verify and tokenize a corpus into the cache, or find it there."
    )
    parser.epilog = "settings: cache=FOLDER; " + "; ".join(map(_defaults, list_data()))
    parser.add_argument("name", nargs="?", default="shakespeare", help=f"one of {', '.join(list_data())}")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="as in conf/data/<name>.yaml")
    parser.usage = "%(prog)s [-h] [pack FILE] [name] [setting=value ...]"
    arguments = sys.argv[1:] if arguments is None else arguments
    packed = None
    if arguments[:1] == ["pack"]:
        if len(arguments) < 2 or "=" in arguments[1] or arguments[1] in list_data():
            raise MuonlabError(
                "pack needs the file to write, as in pack corpus.tokens shakespeare tokenizer=bpe"
            )
        packed, arguments = Path(arguments[1]), arguments[2:]
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    begin = time.perf_counter()
    section, values = DATA.section(options.name), read_settings(options.settings)
    cache = check(str | None, values.pop("cache", None), "cache")
    data = make_data(build(section, values, "data"), cache)
    for key, value in data.describe().items():
        print(f"{key:16} {f'{value:,}' if isinstance(value, int) else value}")
    if data.entropy_rate is None:
        print(f"{'train begins':16} {data.decode(data.train[:64])!r}")
        print(f"{'val begins':16} {data.decode(data.val[:64])!r}")
    if packed is not None:
        print(f"{'packed':16} {pack(data, packed):,} bytes in {packed}")
    print(f"ready in {time.perf_counter() - begin:.1f} s")


def read_settings(arguments: list[str]) -> dict[str, object]:
    """The values of `name=value` arguments, read as the other commands read theirs, by Hydra's grammar.

    Raises MuonlabError for an argument of another form, for a sweep over several values, and for an interpolation that
    cannot be resolved.
    """
    values = {}
    for override in parse_overrides(arguments):
        plain = override.type is OverrideType.CHANGE and override.package is None
        if not plain or override.is_sweep_override():
            raise MuonlabError(f"settings are written name=value, not '{override.input_line}'")
        values[override.key_or_group] = override.value()
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise MuonlabError(" ".join(str(error).splitlines()[0].split())) from error
    assert isinstance(resolved, dict)
    return {str(name): value for name, value in resolved.items()}


def _defaults(name: str) -> str:
    shown = (f"{key}={'null' if value is None else value}" for key, value in DATA.settings(name).items())
    return f"{name}: {', '.join(shown)}"


if __name__ == "__main__":
    run_command(main)
