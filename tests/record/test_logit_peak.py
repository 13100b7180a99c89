"""The peak against a loop over every causal pair, and its decomposition against the logit itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.record import logit_peak as module
from muonlab.record.logit_peak import logit_peak


@st.composite
def projections(draw):
    batch, groups, kv_heads, length, head_dim = (draw(st.integers(1, n)) for n in (3, 3, 2, 5, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = (length, head_dim)
    q = torch.randn(batch, groups * kv_heads, *shape, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, *shape, generator=generator, dtype=torch.float64)
    return q, k


def every_pair(q, k):
    """(logit, b, h, i, j) of every causal pair, one after the other."""
    batch, heads, length, head_dim = q.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                for j in range(i + 1):
                    key = k[b, h * k.shape[1] // heads, j]
                    yield (q[b, h, i] @ key).item() / math.sqrt(head_dim), b, h, i, j


@settings(max_examples=40)
@given(projections(), st.booleans())
def test_the_peak_is_the_largest_causal_logit_and_its_parts_multiply_to_it(projected, one_at_a_time):
    q, k = projected
    with pytest.MonkeyPatch.context() as patch:
        if one_at_a_time:
            patch.setattr(module, "_ELEMENTS", 1)
        peak = logit_peak(q, k)
    logit, b, h, i, j = max(every_pair(q, k))
    kv_head = h * k.shape[1] // q.shape[1]
    assert peak.max_logit.item() == pytest.approx(logit, rel=1e-12)
    assert peak.head == h
    assert peak.query_norm.item() == pytest.approx(q[b, h, i].norm().item())
    assert peak.key_norm.item() == pytest.approx(k[b, kv_head, j].norm().item())
    cosine = torch.cosine_similarity(q[b, h, i], k[b, kv_head, j], dim=0)
    assert peak.cosine.item() == pytest.approx(cosine.item())
    parts = peak.query_norm * peak.key_norm * peak.cosine / math.sqrt(q.shape[-1])
    assert parts.item() == pytest.approx(peak.max_logit.item(), rel=1e-14)
    if peak.max_logit > 0:
        logs = peak.query_norm.log() + peak.key_norm.log() + peak.cosine.log() - math.log(q.shape[-1]) / 2
        assert logs.item() == pytest.approx(peak.max_logit.log().item(), abs=1e-12)
    assert peak.query_rms.item() == pytest.approx(q[:, h].square().sum(-1).mean().sqrt().item())
    assert peak.key_rms.item() == pytest.approx(k[:, kv_head].square().sum(-1).mean().sqrt().item())


def test_the_future_is_not_looked_at():
    q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    q[0, 0, 0, 0], q[0, 0, 1, 0] = 5.0, 1.0
    k[0, 0, 1, 0] = 2.0  # 5 * 2 is the product of a query with a later key
    assert logit_peak(q, k).max_logit.item() == pytest.approx(2 / math.sqrt(2))


def test_a_negative_largest_logit_keeps_its_sign_and_zeros_give_no_nan():
    ones = torch.ones(1, 1, 2, 4)
    peak = logit_peak(ones, -ones)
    assert (peak.max_logit.item(), peak.cosine.item()) == (pytest.approx(-2), pytest.approx(-1))
    assert [value.item() for value in logit_peak(0 * ones, ones)] == [0, 0, 2, 0, 0, 2, 0]


def test_nan_gives_nan():
    q = torch.ones(2, 1, 3, 4)
    q[1, 0, 2, 1] = torch.nan
    peak = logit_peak(q, torch.ones(2, 1, 3, 4))
    assert peak.max_logit.isnan()
    assert peak.query_rms.isnan()


def test_bf16_projections_are_compared_without_rounding_their_logits_to_bf16():
    q = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    k = torch.tensor([[[[256, 0.5], [256, 1]]]], dtype=torch.bfloat16)  # 256.5 and 257 are both 256 in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        peak = logit_peak(q, k)
    assert peak.max_logit.item() == pytest.approx(257 / math.sqrt(2), rel=1e-15)
