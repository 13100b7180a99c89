"""The page on MuonClip in somebody else's loop runs as it is written."""

import doctest
from pathlib import Path

import muonlab.optim


def test_the_page_on_muonclip_in_a_plain_loop_runs():
    page = Path(muonlab.optim.__file__).with_name("README.md")
    results = doctest.testfile(str(page), module_relative=False)
    assert results.attempted > 15
    assert results.failed == 0
