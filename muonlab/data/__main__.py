"""Fetch, verify and tokenize a corpus: `python -m muonlab.data [name] [setting=value ...]`."""

import argparse
import logging
import sys
import time

import yaml

from muonlab.data import DATA, build_data, list_data
from muonlab.errors import MuonlabError


def main(arguments: list[str] | None = None) -> int:
    """Make the corpus ready in the cache and say what it holds; exit code 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m muonlab.data",
        description="Fetch, verify and tokenize a corpus into the cache, or find it there.",
        epilog="settings: "
        + "; ".join(
            f"{name}: {', '.join(f'{k}={v}' for k, v in DATA.settings(name).items())}" for name in list_data()
        ),
    )
    parser.add_argument("name", nargs="?", default="shakespeare", help=f"one of {', '.join(list_data())}")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="as in conf/data/<name>.yaml")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    begin = time.perf_counter()
    try:
        data = build_data(chosen.name, **dict(map(_setting, chosen.settings)))
    except MuonlabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, value in data.describe().items():
        print(f"{key:16} {f'{value:,}' if isinstance(value, int) else value}")
    if data.entropy_rate is None:
        print(f"{'train begins':16} {data.decode(data.train[:64])!r}")
        print(f"{'val begins':16} {data.decode(data.val[:64])!r}")
    print(f"ready in {time.perf_counter() - begin:.1f} s")
    return 0


def _setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise MuonlabError(f"settings are written name=value, not '{text}'")
    return name, yaml.safe_load(value)


if __name__ == "__main__":
    sys.exit(main())
