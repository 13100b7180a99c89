"""Latent attention against its absorbed form, which never makes a key or a value, and under QK-Clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.models.attention import rotary_tables, rotate
from muonlab.models.latent_attention import LatentAttention
from muonlab.optim.qk_clip import QKClip

WIDTH, LENGTH = 12, 7
SIZES = dict(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)


def layer(num_heads=4, seed=0, **sizes):
    torch.manual_seed(seed)
    made = LatentAttention(WIDTH, num_heads, **SIZES | sizes).double()
    for norm in (made.query_norm, made.kv_norm):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return made


def inputs(made, batch=2, seed=1):
    x = torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cos, sin = (t.double().unsqueeze(1) for t in rotary_tables(made.rotary_dim, LENGTH, 10_000.0))
    return x, cos, sin


def absorbed(made, x, cos, sin):
    """Logits (B, H, T, T) and output (B, T, D) with W^UK folded into the query and W^UV applied after the sum.

    q^C . k^C = q^C . (W^UK c) = (W^UK' q^C) . c, so that a head's key and value is the latent c itself.
    """
    heads = made.num_heads
    read = x if made.query_down is None else made.query_norm(made.query_down(x))
    q_content = made.query_up(read).unflatten(-1, (heads, -1))
    q_rotary = rotate(made.query_rotary(read).unflatten(-1, (heads, -1)), cos, sin)
    latent = made.kv_norm(made.kv_down(x))
    key = rotate(made.key_rotary(x).unsqueeze(2), cos, sin).squeeze(2)
    w_key = made.key_up.weight.unflatten(0, (heads, -1))
    w_value = made.value_up.weight.unflatten(0, (heads, -1))
    query = torch.einsum("bthn,hnc->bthc", q_content, w_key)
    logits = torch.einsum("bthc,bsc->bhts", query, latent) + torch.einsum("bthr,bsr->bhts", q_rotary, key)
    logits = logits / (made.nope_dim + made.rotary_dim) ** 0.5
    logits = logits.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    mixed = torch.einsum("bhts,bsc->bthc", logits.softmax(-1), latent)
    return logits, made.output(torch.einsum("bthc,hvc->bthv", mixed, w_value).flatten(2))


@settings(max_examples=20)
@given(
    heads=st.integers(1, 4),
    q_rank=st.sampled_from([0, 1, 5]),
    kv_rank=st.integers(1, 5),
    nope=st.integers(1, 4),
    rope=st.sampled_from([2, 4]),
    v=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_materialised_equals_absorbed(heads, q_rank, kv_rank, nope, rope, v, seed):
    made = layer(
        heads,
        seed,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=v,
    )
    x, cos, sin = inputs(made, seed=seed)
    out = made(x, cos, sin)
    logits, expected = absorbed(made, x, cos, sin)
    torch.testing.assert_close(out.x, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.logits.extremes.highest, logits.amax((0, 2, 3)), rtol=1e-11, atol=1e-12)


def test_gradients_equal_those_of_the_absorbed_form():
    made = layer()
    x, cos, sin = inputs(made)
    gradients = []
    for form in (lambda: made(x, cos, sin).x, lambda: absorbed(made, x, cos, sin)[1]):
        gradients.append(torch.autograd.grad(form().square().sum(), list(made.parameters())))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("q_rank", [0, 6])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_clip_caps_every_head_at_tau_and_touches_no_other(q_rank, alpha):
    made = layer(q_lora_rank=q_rank)
    x, cos, sin = inputs(made)
    before = made(x, cos, sin).logits.extremes.highest
    tau = float(before.median())
    clip = QKClip([made.layout("layer_00")], tau=tau, alpha=alpha)
    shared = {n: p.detach().clone() for n, p in made.named_parameters()}
    clip.observe(before[None])
    clip.apply(0)
    after = made(x, cos, sin).logits.extremes.highest
    assert 0 < (before > tau).sum() < 4
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-13, atol=0)
    scaled = {"query_up.weight", "query_rotary.weight", "key_up.weight"}
    for name, parameter in made.named_parameters():
        assert name in scaled or torch.equal(parameter, shared[name]), name
