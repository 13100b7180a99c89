"""Studies that are trained in seconds."""

import pytest
from tiny_designs import QUICK, design

from muonlab.study.study import Study


@pytest.fixture
def study(tmp_path):
    """study(conditions, overrides=..., **design) -> a Study whose runs stay below tmp_path."""

    def make(conditions, overrides=(), name="tiny", storage=None, **others):
        common = [*QUICK, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
        made = design(conditions, **{"common": common} | others)
        return Study(name, made, tuple(overrides), tmp_path / "studies" / name, "the command", storage)

    return make
