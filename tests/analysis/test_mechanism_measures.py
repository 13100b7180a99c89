"""Measures of why logits grow, on the columns that a real run records."""

import numpy as np
import pytest

from analysis.frames import collect
from analysis.measures import MEASURES, Part, parts_by_seed, read_quantity
from muonlab.errors import MuonlabError
from muonlab.train.run import train


def measured(text, part):
    return read_quantity(text).value(part)


@pytest.fixture
def part(tiny):
    run = tiny("optimizer=muon", "optimizer.lr=0.1", "trainer.spectra_every=4", "trainer.max_steps=24")
    return parts_by_seed(collect([train(run).folder]))[1]


def test_norms_and_cosine_share_the_growth_of_the_recorded_logit(part):
    read = part.steps.set_index("step").loc[[4, 20]]  # the first reading after warm-up and the last
    grown = np.log(read["probe_max_logit"]).diff().iloc[-1]
    assert grown > np.log(1.1)
    norms = np.log(read["argmax_query_norm"] * read["argmax_key_norm"]).diff().iloc[-1]
    share, _ = measured("norm_share", part)
    assert share == pytest.approx(norms / grown)


def test_an_average_is_over_the_readings_and_not_over_the_steps(part):
    readings = part.steps.set_index("step")["overlap/query"].loc[[0, 4, 8, 12, 16, 20]]
    assert measured({"name": "average", "column": "overlap/query"}, part)[0] == pytest.approx(readings.mean())


def test_the_higher_share_counts_matrices_by_their_end(tiny):
    """Two runs whose matrices are the same, but for those that are pushed above or below by hand."""
    run = train(tiny("optimizer=muon", "trainer.spectra_every=4", "trainer.max_steps=8")).folder
    baseline = parts_by_seed(collect([run]))[1]
    names = [name for name in baseline.steps if name.startswith("matrix_svd_entropy/")]
    assert len(names) > 8
    moved = baseline.steps.copy()
    moved[names[:3]] += 0.1
    moved[names[3:]] -= 0.1
    share = MEASURES["higher_share"].function
    assert share(Part(baseline.runs, moved), baseline) == pytest.approx(3 / len(names))
    assert share(baseline, baseline) == 0, "equal is not higher"
    with pytest.raises(MuonlabError, match="spectra_every"):
        share(baseline, baseline, column="no_such/*")
