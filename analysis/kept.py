"""Reading what the folder of an experiment's results keeps; a file that is missing or damaged is one sentence."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml

from muonlab.errors import MuonlabError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a reader of this file raises into MuonlabError."""
    try:
        yield
    except FileNotFoundError as error:
        raise MuonlabError(f"the results in {path.parent} are damaged: they have no {path.name}") from error
    # ValueError: no UTF-8, no JSON, or no table; KeyError: a table without the column that was asked for.
    except (OSError, ValueError, KeyError, yaml.YAMLError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise MuonlabError(
            f"the results in {path.parent} are damaged: {path.name} cannot be read: {reason}"
        ) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises MuonlabError for a file that holds none."""
    with reading(path):
        text = path.read_text(encoding="utf-8")
        held = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(held, dict):
        raise MuonlabError(f"the results in {path.parent} are damaged: {path.name} holds no mapping")
    return held


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """The list of mappings in a JSON file. Raises MuonlabError for a file that holds none."""
    with reading(path):
        held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, list) or not all(isinstance(row, Mapping) for row in held):
        raise MuonlabError(f"the results in {path.parent} are damaged: {path.name} holds no list of rows")
    return held


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """The table in a CSV or Parquet file, or some of its columns. Raises MuonlabError for a file that holds none."""
    with reading(path):
        if path.suffix == ".parquet":
            return pd.read_parquet(path, columns=columns)
        return pd.read_csv(path, usecols=columns)
