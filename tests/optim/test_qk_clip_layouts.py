"""The clip's invariants in fp64 on every layout: MHA, GQA, MQA, (partial) rotary, fused, interleaved, MLA."""

from collections.abc import Callable

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import NAME, OracleLayer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim.qk_clip import QKClip

LAYERS: dict[str, Callable[[], OracleLayer]] = {
    "mha": lambda: oracle.separate(4, 4, 6),
    "gqa": lambda: oracle.separate(6, 2, 4),
    "mqa": lambda: oracle.separate(4, 1, 5),
    "bias": lambda: oracle.separate(4, 2, 4, bias=True),
    "rotary": lambda: oracle.separate(4, 2, 6, rotary_dim=6),
    "partial_rotary": lambda: oracle.separate(4, 4, 6, rotary_dim=2, bias=True),
    "fused": lambda: oracle.fused(4, 2, 4),
    "interleaved": lambda: oracle.interleaved(3, 4),
    "columns": lambda: oracle.columns(4, 2, 4),
    "mla": lambda: oracle.latent(4, 4, 2),
}


def tokens(batch: int = 2, time: int = 7) -> Tensor:
    return torch.randn(batch, time, oracle.WIDTH, dtype=torch.float64)


def middle(maxima: Tensor) -> float:
    """A threshold that the upper half of the heads pass and the others do not, well above 0."""
    ordered = maxima.sort().values
    half = len(ordered) // 2
    return max(0.1, float(ordered[half - 1] + ordered[half]) / 2) if half else 0.5 * float(ordered[0].abs())


def clip(layer: OracleLayer, x: Tensor, tau: float, **settings: object) -> Tensor:
    """Observe and apply with no optimizer step between; returns gamma."""
    qk_clip = QKClip([layer.layout], tau=tau, **settings)
    qk_clip.observe(layer.max_logits(x, absolute=qk_clip.maximum == "absolute"))
    return qk_clip.apply(0)[0]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> OracleLayer:
    torch.manual_seed(3)
    return LAYERS[request.param]()


def test_the_new_max_logit_is_the_old_one_or_tau(layer: OracleLayer):
    x = tokens()
    before = layer.max_logits(x)[0]
    tau = middle(before)
    gamma = clip(layer, x, tau)
    assert 0 < (before > tau).sum() < len(before)
    torch.testing.assert_close(layer.max_logits(x)[0], before.clamp(max=tau), rtol=1e-13, atol=0)
    torch.testing.assert_close(gamma, (tau / before).where(before > tau, 1.0), rtol=1e-15, atol=0)


def test_every_logit_of_a_head_falls_by_gamma(layer: OracleLayer):
    x = tokens()
    before = layer.logits(x).detach()
    gamma = clip(layer, x, middle(layer.max_logits(x)[0]))
    torch.testing.assert_close(
        layer.logits(x).detach(), gamma[:, None, None] * before, rtol=1e-12, atol=1e-13
    )


def test_unclipped_heads_attend_as_before_to_the_last_bit(layer: OracleLayer):
    x = tokens()
    attention, maxima = layer.attention(x), layer.max_logits(x)[0]
    tau = middle(maxima)
    clip(layer, x, tau)
    innocent, after = maxima <= tau, layer.attention(x)
    assert torch.equal(after[:, innocent], attention[:, innocent])
    assert not torch.equal(after[:, ~innocent], attention[:, ~innocent])


def test_rows_without_a_guilty_head_keep_their_bits(layer: OracleLayer):
    x = tokens()
    maxima = layer.max_logits(x)[0]
    tau = middle(maxima)
    guilty = (maxima > tau).tolist()
    layout = layer.layout
    group = layout.num_heads // layout.num_kv_heads
    guilty_keys = [all(guilty[g * group : (g + 1) * group]) for g in range(layout.num_kv_heads)]
    before = {id(weight): weight.detach().clone() for weight in (*layer.weights, *layer.bystanders)}
    clip(layer, x, tau)
    may_move = {id(weight): torch.zeros(weight.shape, dtype=torch.bool) for weight in layer.weights}
    for blocks, heads in (
        (layout.query, guilty),
        (layout.query_shared_key, guilty),
        (layout.key, guilty_keys),
    ):
        for block in blocks:
            for head, clipped in enumerate(heads):
                if clipped:
                    may_move[id(block.parameter)].narrow(block.dim, block.start(head), block.rows).fill_(True)
    for weight in layer.weights:
        kept = ~may_move[id(weight)]
        assert torch.equal(weight[kept], before[id(weight)][kept])
        assert (weight[~kept] != before[id(weight)][~kept]).all()
    for weight in layer.bystanders:
        assert torch.equal(weight, before[id(weight)])


def test_clipping_twice_is_clipping_once(layer: OracleLayer):
    x = tokens()
    tau = middle(layer.max_logits(x)[0])
    clip(layer, x, tau)
    once = [weight.detach().clone() for weight in layer.weights]
    gamma = clip(layer, x, tau)
    torch.testing.assert_close(gamma, torch.ones_like(gamma), rtol=0, atol=1e-13)
    for weight, expected in zip(layer.weights, once, strict=True):
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_moves_the_scale_between_query_and_key_and_no_logit(layer: OracleLayer, alpha: float):
    x = tokens()
    tau = middle(layer.max_logits(x)[0])
    start = [weight.detach().clone() for weight in layer.weights]
    clip(layer, x, tau, alpha=0.5)
    expected = layer.logits(x).detach()
    for weight, old in zip(layer.weights, start, strict=True):
        weight.data.copy_(old)
    clip(layer, x, tau, alpha=alpha)
    torch.testing.assert_close(layer.logits(x).detach(), expected, rtol=1e-12, atol=1e-13)


def test_the_absolute_maximum_bounds_both_signs(layer: OracleLayer):
    x = tokens()
    before = layer.max_logits(x, absolute=True)[0]
    tau = middle(before)
    clip(layer, x, tau, maximum="absolute")
    after = layer.max_logits(x, absolute=True)[0]
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-13, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    half_dim=st.integers(1, 4),
    rotary=st.booleans(),
    bias=st.booleans(),
    alpha=st.floats(0, 1),
    share=st.floats(0.05, 1.5),
)
def test_any_shape_is_capped_at_tau(seed, kv_heads, group, half_dim, rotary, bias, alpha, share):
    torch.manual_seed(seed)
    layer = oracle.separate(kv_heads * group, kv_heads, 2 * half_dim, 2 * (half_dim // 2) * rotary, bias)
    x = tokens(1, 5)
    before, attention = layer.max_logits(x)[0], layer.attention(x)
    tau = share * float(before.abs().max())
    clip(layer, x, tau, alpha=alpha)
    torch.testing.assert_close(layer.max_logits(x)[0], before.clamp(max=tau), rtol=1e-12, atol=0)
    innocent = before <= tau
    assert torch.equal(layer.attention(x)[:, innocent], attention[:, innocent])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 5),
    nope=st.integers(1, 6),
    half_rope=st.integers(1, 3),
    value=st.integers(1, 5),
    alpha=st.floats(0, 1),
    share=st.floats(0.05, 1.5),
)
def test_any_latent_attention_is_capped_absorbed_as_materialised(
    seed, heads, nope, half_rope, value, alpha, share
):
    torch.manual_seed(seed)
    layer = oracle.latent(heads, nope, 2 * half_rope, value)
    x = tokens(1, 5)
    before = layer.max_logits(x)[0]
    tau = share * float(before.abs().max())
    values = layer.layout.key[0].parameter.unflatten(0, (heads, -1))[:, nope:].detach().clone()
    clip(layer, x, tau, alpha=alpha)
    torch.testing.assert_close(layer.max_logits(x)[0], before.clamp(max=tau), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.absorbed(x), layer.logits(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.layout.key[0].parameter.unflatten(0, (heads, -1))[:, nope:], values)


def test_mla_scales_both_paths_by_the_paper_and_never_the_shared_rotary_key():
    torch.manual_seed(0)
    layer = oracle.latent(heads=2, nope=4, rope=2, value=3)
    q_up, kv_up = layer.weights[0], layer.weights[1]
    q_before, kv_before = q_up.detach().clone(), kv_up.detach().clone()
    rotary_key = layer.bystanders[1].detach().clone()
    qk_clip = QKClip([layer.layout], tau=25.0, alpha=0.25)
    qk_clip.observe(torch.tensor([100.0, 20.0])[None])
    qk_clip.apply(0)
    q_ratio = (q_up.detach() / q_before)[:, 0]
    kv_ratio = (kv_up.detach() / kv_before)[:, 0]
    query, rotary, key = 0.25**0.25, 0.25, 0.25**0.75
    expected_q = torch.tensor([query] * 4 + [rotary] * 2 + [1.0] * 6, dtype=torch.float64)
    expected_kv = torch.tensor([key] * 4 + [1.0] * 3 + [1.0] * 7, dtype=torch.float64)
    torch.testing.assert_close(q_ratio, expected_q, rtol=1e-14, atol=0)
    torch.testing.assert_close(kv_ratio, expected_kv, rtol=1e-14, atol=0)
    assert torch.equal(layer.bystanders[1], rotary_key)


def test_scaling_commutes_with_rotation():
    q = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    gamma = torch.rand(3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(
        oracle.rotate(gamma * q, 4), gamma * oracle.rotate(q, 4), rtol=1e-14, atol=1e-15
    )


def test_a_soft_cap_is_clipped_by_the_maximum_before_it():
    torch.manual_seed(0)
    layer, x, cap = oracle.separate(4, 4, 6), tokens(), 2.0
    before = layer.max_logits(x)[0]
    tau = middle(before)
    clip(layer, x, tau)
    capped = cap * (layer.max_logits(x)[0] / cap).tanh()
    torch.testing.assert_close(capped, cap * (before.clamp(max=tau) / cap).tanh(), rtol=1e-13, atol=0)


def test_alibi_is_clipped_by_the_maximum_of_the_product_alone():
    torch.manual_seed(0)
    layer, x = oracle.separate(4, 4, 6), tokens(2, 7)
    distance = (torch.arange(7)[:, None] - torch.arange(7)).clamp(min=0).double()
    bias = -(0.5 ** torch.arange(1, 5).double())[:, None, None] * distance
    tau = middle(layer.max_logits(x)[0])
    gamma = clip(layer, x, tau)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    biased = (layer.logits(x).detach() + bias).masked_fill(future, -torch.inf).amax((0, 2, 3))
    assert (gamma < 1).any()
    assert (biased <= tau * (1 + 1e-13)).all()


def test_qk_norm_with_a_gain_per_head_is_clipped_through_its_gains():
    """Normalised rows forget their weights' scale; the gains behind the norm still set it."""
    torch.manual_seed(0)
    heads, dim, x = 3, 4, tokens()
    q, k = oracle.parameter(heads * dim, oracle.WIDTH), oracle.parameter(heads * dim, oracle.WIDTH)
    q_gain, k_gain = oracle.parameter(heads, dim), oracle.parameter(heads, dim)

    def normalised(weight: Tensor, gain: Tensor) -> Tensor:
        rows = oracle.heads_of(x @ weight.mT, heads)
        return torch.nn.functional.rms_norm(rows, (dim,)) * gain[:, None]

    layout = AttentionLayout(NAME, heads, heads, (HeadRows(q_gain, 1),), (HeadRows(k_gain, 1),))
    layer = OracleLayer(
        layout, lambda _: oracle.products(normalised(q, q_gain), normalised(k, k_gain)), [q, k]
    )
    before = layer.max_logits(x)[0]
    tau = float(before.median())
    clip(layer, x, tau)
    torch.testing.assert_close(layer.max_logits(x)[0], before.clamp(max=tau), rtol=1e-13, atol=0)
