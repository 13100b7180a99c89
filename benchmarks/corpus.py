"""python benchmarks/corpus.py FILE [--megabytes N]: prose and code for a machine without a network, in one file.

The prose is data=english (10.6 MB: Shakespeare, Milton, the King James Bible). The code is the Python source of the
packages that requirements.lock pins, as they are installed here, so that the same lock gives the same code. Files are
put in the order of the digests of their names, each once, and the last twentieth is held out. 50 MB are 12.7 million
tokens of 32,768 byte pairs and 26 MB in the file. On the other machine: data=tokens data.path=FILE
"""

import argparse
import hashlib
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from muonlab.command import run_command
from muonlab.data import build_data, open_corpus
from muonlab.data.packed import pack
from muonlab.settings.data import EnglishSettings

# Packages whose wheels hold the same Python files on every platform; of some, the tests outweigh the rest.
PACKAGES = (
    "torch",
    "sympy",
    "networkx",
    "pandas",
    "scipy",
    "sqlalchemy",
    "mlflow",
    "lightning",
    "matplotlib",
    "optuna",
)
VOCABULARY = 32_768


def main() -> None:
    """Collect, tokenize, pack, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=float, default=50, help="of text, prose first")
    parser.add_argument(
        "--vocabulary", type=int, default=VOCABULARY, help="tokens of the byte-pair tokenizer"
    )
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        size = collect(Path(folder), int(given.megabytes * 1e6))
        settings = {"tokenizer": "bpe", "bpe_vocab_size": given.vocabulary, "val_fraction": 0.05}
        data = build_data("text", path=folder, cache=Path(folder, "cache"), **settings)
        packed = pack(data, given.file)
    tokens = len(data.train) + len(data.val)
    print(
        f"{size:,} bytes of text, {tokens:,} tokens ({size / tokens:.2f} bytes each), {packed:,} bytes in {given.file}"
    )


def collect(folder: Path, limit: int) -> int:
    """Write one .txt per text, up to `limit` bytes in all; returns how many bytes there are."""
    prose = open_corpus(EnglishSettings())
    size = 0
    for place, piece in enumerate([*prose.train(), *prose.val()]):
        size += write(folder, f"prose {place}", piece)
    seen: set[bytes] = set()
    for name, path in sorted(code(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if digest not in seen and size + len(text) <= limit:
            seen.add(digest)
            size += write(folder, name, text)
    return size


def code() -> list[tuple[str, Path]]:
    """The Python files of PACKAGES by their names below site-packages; tests and generated tables are left out."""
    site = Path(sysconfig.get_path("purelib"))
    paths = (path for package in PACKAGES for path in (site / package).rglob("*.py"))
    named = ((path.relative_to(site).as_posix(), path) for path in paths)
    return [
        (name, path) for name, path in named if "/tests/" not in name and 500 < path.stat().st_size < 200_000
    ]


def write(folder: Path, name: str, text: bytes) -> int:
    """Write a text under the digest of its name."""
    (folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.txt").write_bytes(text)
    return len(text)


if __name__ == "__main__":
    run_command(main)
