"""A run that nobody disturbed."""

import pytest

from muonlab.train.run import train, with_corpus


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody disturbed, and how to ask for one like it elsewhere."""
    from tiny_runs import TINY

    from muonlab.cli import compose_config, plain
    from muonlab.train.config import read_config

    def ask(place, *overrides):
        paths = [f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"]
        return with_corpus(read_config(plain(compose_config("train", [*TINY, *paths, *overrides]))))

    return train(ask(tmp_path_factory.mktemp("whole"))).folder, ask
