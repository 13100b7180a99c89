"""Max logits: the exact pass against every pair, fused against explicit attention, and what the bounds promise."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from muonlab.models import build_model, fused_attention, max_logits
from muonlab.models.attention import Attention, attend
from muonlab.models.explicit_attention import explicit_attention
from muonlab.models.fused_attention import fused_attention as fuse
from muonlab.models.max_logits import LayerLogits, bounded_logits, logit_bounds, logit_extremes, logit_range

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float64, size=1.0):
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def packed(batch, length, seed):
    """Document ids as packing makes them: texts of random length one after the other, the last one being padding."""
    return (torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.3).long().cumsum(1)


def looped_extremes(q, k, documents=None):
    """max and min over batch and visible j <= i of q_i . k_j / sqrt(d), one pair at a time."""
    batch, heads, length, head_dim = q.shape
    group = heads // k.shape[1]
    values = [
        [
            float(q[b, h, i] @ k[b, h // group, j]) / math.sqrt(head_dim)
            for b in range(batch)
            for i in range(length)
            for j in range(i + 1)
            if documents is None or documents[b, i] == documents[b, j]
        ]
        for h in range(heads)
    ]
    return torch.tensor([max(v) for v in values], dtype=q.dtype), torch.tensor(
        [min(v) for v in values], dtype=q.dtype
    )


SHAPES = dict(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 80),
    head_dim=st.sampled_from([2, 4, 10, 16]),
    size=st.sampled_from([0.1, 1.0, 30.0]),
    documents=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)


def draw(batch, kv_heads, group, length, head_dim, size, documents, dtype, seed):
    q = random(batch, kv_heads * group, length, head_dim, seed=seed, dtype=dtype, size=size)
    k, v = (random(batch, kv_heads, length, head_dim, seed=seed + i, dtype=dtype) for i in (1, 2))
    return q, k, v, packed(batch, length, seed) if documents else None


@settings(max_examples=25)
@given(
    **SHAPES | {"length": st.integers(1, 9), "dtype": st.just(torch.float64)},
    shift=st.sampled_from([-9, 0, 9]),
)
def test_extremes_are_those_of_every_visible_pair(shift, **shape):
    q, k, _, documents = draw(**shape)
    q, k = q + shift, k + abs(shift)  # all logits positive, mixed, or all negative
    expected = looped_extremes(q, k, documents)
    for extremes in (logit_range(q, k, documents), explicit_attention(q, k, k, documents=documents)[2]):
        for actual, end in zip(extremes, expected, strict=True):
            torch.testing.assert_close(actual, end, rtol=1e-12, atol=1e-9)


@settings(max_examples=60)
@given(**SHAPES)
def test_fused_maxima_are_those_of_explicit_attention(**shape):
    q, k, v, documents = draw(**shape)
    extremes = explicit_attention(q, k, v, documents=documents)[2]
    actual = logit_extremes([fuse(q, k, v, documents)[1]])
    assert actual.highest.dtype == torch.promote_types(q.dtype, torch.float32)
    # Relative to the products that a logit is the sum of: a logit near 0 is the small difference of larger numbers.
    norms = max_logits.at_least_fp32(q).norm(dim=-1).max() * max_logits.at_least_fp32(k).norm(dim=-1).max()
    for ours, theirs in zip(actual, extremes, strict=True):
        torch.testing.assert_close(
            ours[0], theirs, rtol=1e-6, atol=3e-7 * norms.item() / math.sqrt(q.shape[-1])
        )


@settings(max_examples=60)
@given(**SHAPES)
@example(
    batch=3,
    kv_heads=3,
    group=3,
    length=1,
    head_dim=2,
    size=30.0,
    documents=False,
    dtype=torch.bfloat16,
    seed=460,
).via("a norm that bf16 rounded down")
def test_bounds_hold_and_the_upper_one_is_within_ln_n(**shape):
    q, k, v, documents = draw(**shape)
    layer = fuse(q, k, v, documents)[1]
    exact, bound = logit_range(q, k, documents), logit_bounds(layer)
    assert (exact.highest <= bound.highest).all()
    assert (bound.lowest <= exact.lowest).all()
    n = q.shape[2] if documents is None else max(torch.bincount(row).max().item() for row in documents)
    slack = 2 * max_logits.ROUNDING * (1 + bound.highest.abs())
    assert (bound.highest <= exact.highest + math.log(n) + slack).all()


@settings(max_examples=40)
@given(**SHAPES | {"dtype": st.sampled_from(DTYPES[:2])})
def test_fused_and_explicit_attention_agree_with_their_gradients(**shape):
    q, k, v, documents = draw(**shape)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for out in (fuse(q, k, v, documents)[0], explicit_attention(q, k, v, documents=documents)[0]):
        gradients = torch.autograd.grad((out * random(*out.shape, seed=9, dtype=out.dtype)).sum(), inputs)
        results.append((out, *gradients))
    tolerance = 1e-9 if q.dtype == torch.float64 else 2e-3
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=tolerance, atol=tolerance)


def test_values_may_be_narrower_or_wider_than_queries():
    q, k = random(2, 4, 9, 6), random(2, 2, 9, 6, seed=1)
    for width in (4, 6, 10):
        v = random(2, 2, 9, width, seed=2)
        torch.testing.assert_close(fuse(q, k, v)[0], explicit_attention(q, k, v)[0], rtol=1e-12, atol=1e-12)


def test_extremes_do_not_depend_on_the_chunks(monkeypatch):
    q, k, documents = random(2, 4, 13, 4), random(2, 2, 13, 4, seed=1), packed(2, 13, 0)
    for mask in (None, documents):
        whole = logit_range(q, k, mask)
        with monkeypatch.context() as patch:
            patch.setattr(max_logits, "CPU_ROWS", 3)
            chunked = logit_range(q, k, mask)
        for one, other in zip(whole, chunked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@settings(max_examples=40)
@given(**SHAPES, quantile=st.floats(0, 1), absolute=st.booleans())
def test_heads_that_may_reach_the_limit_are_exact_to_the_bit(quantile, absolute, **shape):
    layers = [fuse(*draw(**shape | {"seed": shape["seed"] + 10 * i}))[1] for i in range(3)]
    exact = logit_extremes(layers)
    values = exact.absolute if absolute else exact.highest
    limit = values.flatten().double().quantile(quantile).item()
    actual, known = bounded_logits(layers, limit, absolute)
    reach = values >= limit
    assert known[reach].all()
    assert torch.equal((actual.absolute if absolute else actual.highest)[reach], values[reach])
    for ours, theirs in zip(actual, exact, strict=True):
        assert torch.equal(ours[known], theirs[known])


def test_without_a_limit_nothing_is_computed_and_nothing_called_exact(monkeypatch):
    layer = fuse(random(1, 2, 5, 4), random(1, 2, 5, 4, seed=1), random(1, 2, 5, 4, seed=2))[1]
    monkeypatch.setattr(max_logits, "logit_range", None)
    assert not bounded_logits([layer])[1].any()
    assert not bounded_logits([layer], limit=1e6)[1].any()
    explicit = LayerLogits(logit_bounds(layer))
    assert bounded_logits([layer, explicit])[1].tolist() == [[False] * 2, [True] * 2]


def test_a_logit_that_is_not_a_number_is_looked_at():
    q, k = random(1, 2, 5, 4), random(1, 2, 5, 4, seed=1)
    q[0, 1, 3] = math.nan
    actual, known = bounded_logits([fuse(q, k, k)[1]], limit=1e6)
    assert known.tolist() == [[False, True]]
    assert actual.highest[0, 1].isnan()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm under autocast
@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 2}, {"qk_norm": True}, {"rotary_fraction": 0.5}])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_model_says_the_same_whichever_attention_it_runs(settings, precision, monkeypatch):
    """The maxima are those of the queries and keys that the kernel multiplied, rounded as it got them."""
    torch.manual_seed(0)
    model = build_model(
        "nanogpt", vocab_size=61, context=16, d_model=32, num_layers=2, num_heads=4, **settings
    )
    model = model.bfloat16() if precision == "bf16" else model
    tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
    documents = packed(3, 16, 0)
    actual = []
    for context in (0, 128):
        monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", context)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(tokens, tokens, documents=documents).loss
        assert loss.dtype == torch.float32
        actual.append(model.logit_extremes())
    for fused, explicit in zip(*actual, strict=True):
        assert fused.dtype == torch.float32
        torch.testing.assert_close(fused[0], explicit[0], rtol=1e-6, atol=1e-7)
        # The second layer's input has gone through a 16-bit attention, which rounds otherwise in each kernel.
        tolerance = 1e-5 if precision == "fp32" else 0.05
        torch.testing.assert_close(fused[1], explicit[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("context", [0, 128])
def test_a_document_is_as_if_alone(context, monkeypatch):
    """Packed or by themselves, texts have the same logits, and their maxima are the larger of both."""
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", context)
    torch.manual_seed(0)
    model = build_model("nanogpt", vocab_size=61, context=16, d_model=32, num_layers=1, num_heads=4).double()
    tokens = torch.randint(61, (1, 16), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[7] * 10 + [2] * 6])
    # Rotary positions go on over a boundary; only differences of positions matter.
    packed_logits, packed_range = model(tokens, documents=documents).logits, model.logit_extremes()
    alone, ranges = [], []
    for part in (tokens[:, :10], tokens[:, 10:]):
        alone.append(model(part).logits)
        ranges.append(model.logit_extremes())
    torch.testing.assert_close(packed_logits, torch.cat(alone, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        packed_range.highest, torch.maximum(*(r.highest for r in ranges)), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        packed_range.lowest, torch.minimum(*(r.lowest for r in ranges)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_position_without_a_target_counts_for_nothing(z_loss):
    torch.manual_seed(0)
    model = build_model(
        "nanogpt", vocab_size=61, context=8, d_model=16, num_layers=1, num_heads=2, z_loss=z_loss
    )
    tokens = torch.randint(61, (1, 8), generator=torch.Generator().manual_seed(0))
    targets = tokens.clone()
    targets[:, 5:] = -100
    padded = model(tokens, targets, documents=torch.tensor([[0] * 5 + [1] * 3]))
    short = model(tokens[:, :5], tokens[:, :5])
    torch.testing.assert_close(padded.loss, short.loss)
    torch.testing.assert_close(padded.cross_entropy, short.cross_entropy)


def test_kernels_that_cannot_be_used_here_leave_the_bound_of_norms():
    """CUDA's plain kernel reports nothing: the bound is Cauchy-Schwarz's, and holds."""
    q, k = random(2, 4, 9, 6), random(2, 2, 9, 6, seed=1)
    bound, exact = logit_bounds(LayerLogits(None, q, k)), logit_range(q, k)
    assert (exact.absolute <= bound.absolute).all()
    norms = q.norm(dim=-1).amax((0, 2)) * k.norm(dim=-1).amax((0, 2)).repeat_interleave(2) / math.sqrt(6)
    torch.testing.assert_close(bound.highest, norms, rtol=1e-3, atol=1e-3)


def test_weights_are_measured_whatever_the_kernel(monkeypatch):
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", 0)
    q = random(1, 2, 5, 4)
    assert attend(q, q, q)[2] is None
    assert attend(q, q, q)[1].extremes is None
    assert attend(q, q, q, measure_weights=True)[2].shape == (1, 2, 5, 5)
    assert Attention(8, 2).eval()(torch.zeros(1, 5, 8), *torch.ones(2, 5, 1, 4)).logits is None
    assert fused_attention.flex_supports(q, q) is False
