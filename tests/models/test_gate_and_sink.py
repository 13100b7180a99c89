"""The attention's output gate and its sinks, against their equations written out in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.models import build_model
from muonlab.models.attention import attend
from muonlab.models.explicit_attention import explicit_attention
from muonlab.models.fused_attention import fused_attention
from muonlab.optim import build_optimizer

SETTINGS = dict(vocab_size=61, context=160, d_model=32, num_layers=2, num_heads=4)
FAMILIES = {
    "nanogpt": {"num_kv_heads": 2, "bias": True},
    "mla": {"attention": "mla"},
    "mha": {"attention": "mha"},
}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(family, **values):
    torch.manual_seed(0)
    return build_model("nanogpt" if family == "nanogpt" else "moe", **SETTINGS, **FAMILIES[family], **values)


def tokens(length=160):
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(0))


def with_sink(q, k, v, sink, documents=None):
    """a_ij = exp(s_ij) / (exp(b_h) + sum_j exp(s_ij)) over the visible j, o_i = sum_j a_ij v_j, in plain loops."""
    batch, heads, length, head_dim = q.shape
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for i in range(length):
                visible = [j for j in range(i + 1) if documents is None or documents[b, j] == documents[b, i]]
                e = [math.exp(q[b, h, i] @ k[b, g, j] / math.sqrt(head_dim)) for j in visible]
                below = math.exp(sink[h]) + sum(e)
                out[b, h, i] = sum(x / below * v[b, g, j] for x, j in zip(e, visible, strict=True))
    return out


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    kv_heads=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 7),
    widths=st.sampled_from([(4, 4), (6, 4), (4, 6)]),
    documents=st.booleans(),
    kernel=st.sampled_from(["explicit", "fused"]),
)
def test_a_sink_takes_weight_as_its_equation_says(seed, kv_heads, length, widths, documents, kernel):
    q, k = random(2, 4, length, widths[0], seed=seed), random(2, kv_heads, length, widths[0], seed=seed + 1)
    v, sink = random(2, kv_heads, length, widths[1], seed=seed + 2), 3 * random(4, seed=seed + 3)
    ids = (random(2, length, seed=seed) > 0).long().cumsum(1) if documents else None
    if kernel == "explicit":
        out = explicit_attention(q, k, v, documents=ids, sink=sink)[0]
    else:
        out = fused_attention(q, k, v, ids, sink)[0]
    torch.testing.assert_close(out, with_sink(q, k, v, sink, ids), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [1, 9, 130])
def test_the_fused_kernel_with_a_sink_has_the_explicit_ones_gradients(length, documents):
    leaves = [3 * random(2, 4, length, 8), random(2, 2, length, 8, seed=1), random(2, 2, length, 6, seed=2)]
    leaves = [x.requires_grad_() for x in (*leaves, 2 * random(4, seed=3))]
    ids = (random(2, length, seed=4) > 0.5).long().cumsum(1) if documents else None
    weight = random(2, 4, length, 6, seed=5)
    fused = fused_attention(*leaves[:3], ids, leaves[3])[0]
    explicit = explicit_attention(*leaves[:3], documents=ids, sink=leaves[3])[0]
    torch.testing.assert_close(fused, explicit, rtol=1e-10, atol=1e-12)
    for ours, plain in zip(
        torch.autograd.grad((fused * weight).sum(), leaves),
        torch.autograd.grad((explicit * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


def test_a_sink_far_below_the_logits_is_none_and_one_far_above_leaves_nothing():
    q, k, v = random(1, 2, 9, 4), random(1, 2, 9, 4, seed=1), random(1, 2, 9, 4, seed=2)
    for kernel in (explicit_attention, fused_attention):
        plain = kernel(q, k, v)[0]
        torch.testing.assert_close(kernel(q, k, v, sink=torch.tensor([-1e4, -1e4]).double())[0], plain)
        assert kernel(q, k, v, sink=torch.tensor([1e4, 1e4]).double())[0].abs().max() == 0


@pytest.mark.parametrize("length", [16, 160])  # explicit attention, fused attention
@pytest.mark.parametrize("family", FAMILIES)
def test_the_max_logits_are_those_of_the_products_whatever_the_sink(family, length):
    plain, sunk = model(family), model(family, attention_sink="learnt")
    with torch.no_grad():
        for block in sunk.blocks:
            block.attention.sink.fill_(50.0)
    first = []
    for each in (plain, sunk):
        loss = each(tokens(length), tokens(length)).loss
        first.append((each.logit_extremes().highest[0], each.logit_extremes().lowest[0], loss))
    assert torch.equal(first[0][0], first[1][0])
    assert torch.equal(first[0][1], first[1][1])
    assert first[0][2] != first[1][2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learnt_sink_starts_as_a_zero_one_and_learns(family):
    zero, learnt = model(family, attention_sink="zero"), model(family, attention_sink="learnt")
    loss = learnt(tokens(), tokens()).loss
    assert torch.equal(loss, zero(tokens(), tokens()).loss)
    assert not torch.equal(loss, model(family)(tokens(), tokens()).loss)
    loss.backward()
    for block in learnt.blocks:
        assert block.attention.sink.shape == (4,)
        assert (block.attention.sink.grad != 0).all()
    assert not [name for name, _ in zero.named_parameters() if "sink" in name]
    assert not [name for name in zero.state_dict() if "sink" in name]


def test_a_zero_sink_is_one_more_in_the_denominator():
    q, k, v = random(1, 1, 1, 2), random(1, 1, 1, 2, seed=1), random(1, 1, 1, 2, seed=2)
    e = torch.exp((q * k).sum() / math.sqrt(2))
    torch.testing.assert_close(attend(q, k, v, sink=torch.zeros(1))[0], v * e / (1 + e))


@pytest.mark.parametrize("kind", ["head", "element"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_multiplies_each_heads_output_before_the_output_map(family, kind):
    """y = W^O concat_h(sigmoid(W_h x) * o_h), with o_h taken from the same weights without a gate."""
    attention = model(family, attention_gate=kind).double().blocks[0].attention
    ungated = model(family).double().blocks[0].attention
    ungated.load_state_dict(attention.state_dict(), strict=False)
    x, size = random(2, 16, 32), attention.rotary_dim
    cos, sin = random(16, 1, size, seed=1), random(16, 1, size, seed=2)
    heads = []
    ungated.output.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    ungated(x, cos, sin)
    bias = 0 if attention.gate.bias is None else attention.gate.bias
    expected = heads[0].clone()
    width = expected.shape[-1] // 4
    for b in range(2):
        for t in range(16):
            logits = attention.gate.weight @ x[b, t] + bias
            for h in range(4):
                gate = 1 / (1 + torch.exp(-logits))
                gate = gate[h] if kind == "head" else gate[h * width : (h + 1) * width]
                expected[b, t, h * width : (h + 1) * width] *= gate
    torch.testing.assert_close(attention(x, cos, sin).x, attention.output(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_sink_are_adamws_and_the_sink_does_not_decay(family):
    sunk = model(family, attention_gate="element", attention_sink="learnt")
    routes = {r.name: r for r in build_optimizer("muon", sunk).routing}
    assert routes["blocks.0.attention.gate.weight"].rule == "adamw"
    assert routes["blocks.0.attention.gate.weight"].group == "gate"
    assert routes["blocks.0.attention.sink"].group == "sink"
    assert routes["blocks.0.attention.sink"].reason.endswith("no decay")
    cut = {r.name: r for r in build_optimizer("muon", sunk, routes={"gate": "muon"}, per_head=True).routing}
    assert cut["blocks.0.attention.gate.weight"].rule == "muon"


def test_every_other_weight_starts_the_same_with_a_sink():
    plain, sunk = model("nanogpt").state_dict(), model("nanogpt", attention_sink="learnt").state_dict()
    assert all(torch.equal(value, sunk[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("nanogpt", {"attention_gate": "heads"}, "attention_gate.*did you mean 'head'"),
        ("nanogpt", {"attention_gate": True}, "attention_gate"),
        ("moe", {"attention_sink": "learned"}, "attention_sink.*did you mean 'learnt'"),
        ("nanogpt", {"swiglu_clamp": 7.0}, "swiglu_clamp=7 is for model.activation=swiglu, not relu2"),
        ("moe", {"swiglu_clamp": -1.0}, "swiglu_clamp must be a finite number of at least 0"),
        ("moe", {"swiglu_clamp": math.inf}, "swiglu_clamp"),
    ],
)
def test_a_mistake_is_one_sentence(name, setting, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        build_model(name, **SETTINGS, **setting)
    assert "\n" not in str(caught.value)
