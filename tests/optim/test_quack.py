"""QuacK against the authors' algorithms, written with one parameter and one learning rate for each head."""

import copy
import math
import pickle

import pytest
import torch
from attention_oracle import columns, flat_layout, fused, interleaved, latent, separate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.models import build_model
from muonlab.optim import AdamW, Muon, QKClip, QuacK, build_optimizer

STEPS = 5


def gradients(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(STEPS)]


def algorithm_1(optimizer, q_heads, k_heads, tau, lr):
    """Set every head's rate, as the paper does before each step; for shared keys by their largest query."""
    group = len(q_heads) // len(k_heads)
    with torch.no_grad():
        key = [k.norm() for k in k_heads]
        query = [max(q.norm() for q in q_heads[g * group : (g + 1) * group]) for g in range(len(k_heads))]
    first = optimizer.__dict__.setdefault("first_norms", (query, key))
    for h in range(len(q_heads)):
        optimizer.param_groups[h]["lr"] = float(tau * lr * first[1][h // group] / key[h // group])
    for g in range(len(k_heads)):
        optimizer.param_groups[len(q_heads) + g]["lr"] = float(tau * lr * first[0][g] / query[g])


@settings(max_examples=8)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    tau=st.sampled_from([0.1, 1.0, 3.0]),
    rule=st.sampled_from(["adamw", "muon"]),
    decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_every_head_moves_as_if_its_learning_rate_were_the_papers(kv_heads, tau, rule, decay, seed):
    torch.manual_seed(seed)
    q, k = (nn.Parameter(torch.randn(3 * heads, 5, dtype=torch.float64)) for heads in (4, kv_heads))
    heads = [nn.Parameter(part.clone()) for part in (*q.detach().split(3), *k.detach().split(3))]
    layout = AttentionLayout("layer_00", 4, kv_heads, (HeadRows(q, 3),), (HeadRows(k, 3),))
    lr = 0.2
    if rule == "adamw":
        ours = AdamW([q, k], lr=lr, weight_decay=decay, quack=QuacK([layout], tau))
        theirs = torch.optim.AdamW(
            [{"params": [p]} for p in heads], lr=lr, betas=(0.9, 0.95), weight_decay=decay
        )
    else:
        cut = [{"params": [q], "row_blocks": 4}, {"params": [k], "row_blocks": kv_heads}]
        ours = Muon(cut, lr=lr, weight_decay=decay, quack=QuacK([layout], tau))
        theirs = Muon([{"params": [p]} for p in heads], lr=lr, weight_decay=decay)
    for q_grad, k_grad in gradients([q.shape, k.shape], seed):
        q.grad, k.grad = q_grad, k_grad
        for head, grad in zip(heads, (*q.grad.split(3), *k.grad.split(3)), strict=True):
            head.grad = grad.clone()
        algorithm_1(theirs, heads[:4], heads[4:], tau, lr)
        ours.step()
        theirs.step()
    tolerance = dict(rtol=1e-6, atol=1e-6) if rule == "muon" else dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([q, k]), torch.cat(heads), **tolerance)


LAYERS = [
    lambda: separate(4, 2, 3, bias=True),
    lambda: fused(4, 2, 3),
    lambda: interleaved(3, 4),
    lambda: columns(4, 4, 3),
]


def head_norms(blocks, heads):
    """The Frobenius norm of each head's rows of all its blocks, biases included."""
    parts = [
        [b.parameter.detach().movedim(b.dim, 0)[b.start(h) : b.start(h) + b.rows].flatten() for b in blocks]
        for h in range(heads)
    ]
    return torch.stack([torch.cat(part).norm() for part in parts])


@pytest.mark.parametrize("make", LAYERS)
def test_a_rate_times_the_others_norm_stays_the_first_ones(make):
    """What the lemma rests on: eta_Q |K| and eta_K |Q| are constants, in every layout of the rows."""
    torch.manual_seed(0)
    layout = make().layout
    quack, group = QuacK([layout], tau=0.5), layout.num_heads // layout.num_kv_heads

    def products():
        factors = quack.factors()
        q_norms = head_norms(layout.query, layout.num_heads).view(-1, group).amax(1)
        k_norms = head_norms(layout.key, layout.num_kv_heads)
        found = []
        for blocks, norms in (
            (layout.query, k_norms.repeat_interleave(group)),
            (layout.key, q_norms),
        ):
            for block in blocks:
                rows = factors[block.parameter].flatten()
                for h, norm in enumerate(norms):
                    own = rows[block.start(h) : block.start(h) + block.rows]
                    assert (own == own[0]).all()
                    found.append(own[0] * norm)
        return torch.stack(found), factors

    first, factors = products()
    owned = torch.cat([rows.flatten() for rows in factors.values()])
    assert set(owned.tolist()) <= {0.5, 1.0}
    with torch.no_grad():
        for block in (*layout.query, *layout.key):
            block.parameter.mul_(torch.rand_like(block.parameter) * 5)
    torch.testing.assert_close(products()[0], first, rtol=1e-12, atol=0)


def test_latent_attention_is_plain_attention_and_shared_rotary_attention():
    """Equations 22 without the down-projections, which a norm follows: by hand for each of the four maps."""
    torch.manual_seed(0)
    attention = build_model("moe", vocab_size=7, num_heads=2).double().blocks[0].attention
    quack = QuacK([attention.layout("layer_00")], tau=0.5)
    quack.factors()
    with torch.no_grad():
        attention.query_up.weight[:16] *= 4  # head 0
        attention.key_up.weight[16:] *= 5  # head 1
        attention.query_rotary.weight[:] = 1.0
        attention.query_rotary.weight[16:] *= 3  # head 1's is the largest
        attention.key_rotary.weight *= 2
    first = quack.state_dict()["initial"]
    factors = {id(p): rows.flatten() for p, rows in quack.factors().items()}
    assert id(attention.kv_down.weight) not in factors
    up, key, rotary, shared = (
        factors[id(m.weight)]
        for m in (attention.query_up, attention.key_up, attention.query_rotary, attention.key_rotary)
    )
    torch.testing.assert_close(up.view(2, 16)[:, 0], torch.tensor([0.5, 0.1]).double())
    torch.testing.assert_close(key.view(2, 16)[:, 0], torch.tensor([0.125, 0.5]).double())
    torch.testing.assert_close(rotary, torch.full_like(rotary, 0.25))
    largest = 3 * math.sqrt(16 * 64)
    torch.testing.assert_close(shared, torch.full_like(shared, 0.5 * float(first[-1]) / largest))


def dense(**values):
    torch.manual_seed(0)
    return build_model("nanogpt", vocab_size=31, context=8, d_model=16, num_layers=2, num_heads=2, **values)


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        x = torch.randint(31, (2, 8), generator=torch.Generator().manual_seed(step))
        model(x, x).loss.backward()
        if optimizer.clip is not None:
            optimizer.observe(model.max_logits())
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return model.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["adamw", "muon", "muonclip"])
def test_tau_1_changes_no_bit_of_the_first_step_and_values_keep_theirs(name):
    states = []
    for quack in (None, 1.0):
        model = dense(fused_qkv=True, bias=True)
        states.append(
            {
                k: v.clone()
                for k, v in train(model, build_optimizer(name, model, quack=quack), range(1)).items()
            }
        )
    assert same(*states)
    model = dense(fused_qkv=True)
    quack = build_optimizer(name, model, quack=0.1).quack
    (rows,) = {
        id(p): f for p, f in quack.factors().items() if p is model.blocks[0].attention.qkv.weight
    }.values()
    assert rows.flatten().tolist() == [pytest.approx(0.1)] * 32 + [1.0] * 16


@pytest.mark.parametrize("name", ["adamw", "adamwclip", "muon", "muonclip"])
def test_a_resumed_run_goes_on_to_the_last_bit(name, tmp_path):
    values = {"quack": 0.5, "lr": 0.05} | ({"tau": 0.1} if name.endswith("clip") else {})
    through = dense()
    expected = train(through, build_optimizer(name, through, **values), range(8))
    first = dense()
    optimizer = build_optimizer(name, first, **values)
    train(first, optimizer, range(4))
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    second = dense()
    second.load_state_dict(weights)  # so that first norms of its own would be others
    optimizer = build_optimizer(name, second, **values)
    optimizer.load_state_dict(state)
    assert same(train(second, optimizer, range(4, 8)), expected)
    plain = dense()
    assert not same(
        train(plain, build_optimizer(name, plain, **values | {"quack": None}), range(8)), expected
    )


def test_copies_and_pickles_go_on_alike():
    model = dense()
    optimizer = build_optimizer("muon", model, quack=0.5)
    train(model, optimizer, range(3))
    both = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    expected = train(model, optimizer, range(3, 6))
    for other, its in both:
        assert same(train(other, its, range(3, 6)), expected)


def test_frozen_weights_stay_and_their_partners_move():
    model = dense()
    attention = model.blocks[0].attention
    attention.key.weight.requires_grad_(False)
    key, query = attention.key.weight.clone(), attention.query.weight.clone()
    train(model, build_optimizer("adamw", model, quack=0.5), range(3))
    assert torch.equal(attention.key.weight, key)
    assert (attention.query.weight != query).all()


def test_schedulers_multiply_the_rates():
    model = dense()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = build_optimizer("muon", model, quack=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 1))
    assert same(train(model, optimizer, range(2), scheduler), before)
    assert not same(train(model, optimizer, range(2, 3), scheduler), before)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01] * len(optimizer.param_groups), 10)
    train(model, optimizer, range(3, 6), cycle)


def test_weights_below_fp32_are_rounded_once():
    """The change is scaled in fp32: a bf16 weight is the rounded fp32 update, not a scaled rounded one."""
    torch.manual_seed(0)
    q, k = (nn.Parameter(torch.randn(4, 3).bfloat16()) for _ in range(2))
    wide_q, wide_k = (nn.Parameter(p.detach().float()) for p in (q, k))
    grads = torch.randn(2, 4, 3).bfloat16()
    for a, b in ((q, k), (wide_q, wide_k)):
        layout = AttentionLayout("layer_00", 2, 2, (HeadRows(a, 2),), (HeadRows(b, 2),))
        a.grad, b.grad = (g.to(a.dtype) for g in grads)
        AdamW([a, b], lr=0.3, quack=QuacK([layout], tau=0.3)).step()
    assert torch.equal(q, wide_q.bfloat16())
    assert torch.equal(k, wide_k.bfloat16())


def test_a_state_saved_without_it_begins_with_the_loaded_weights():
    model = dense()
    plain = build_optimizer("muon", model)
    train(model, plain, range(2))
    optimizer = build_optimizer("muon", model, quack=0.5)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.quack.state_dict()["initial"] is None
    train(model, optimizer, range(2, 4))
    build_optimizer("muon", model).load_state_dict(optimizer.state_dict())


def zero_key():
    layout = flat_layout()
    with torch.no_grad():
        layout.key[0].parameter[2:] = 0
    return layout


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: QuacK([flat_layout()], tau=0.0),
            "tau is 0.0; QuacK's rate over lr must be finite and above 0",
        ),
        (lambda: QuacK([flat_layout()], tau=math.inf), "tau is inf"),
        (lambda: QuacK([]), "at least one AttentionLayout"),
        (
            lambda: QuacK([latent(2, 3, 2).layout]),
            "the key that the heads of layer_00 share; declare its shared_key",
        ),
        (lambda: QuacK([zero_key()]).factors(), "a key head of layer_00 begins with a norm of 0 or NaN"),
        (
            lambda: build_optimizer("muon", dense(qk_norm=True), quack=1.0),
            "QuacK cannot act on layer_00: QK-norm",
        ),
        (
            lambda: build_optimizer("adamw", nn.Linear(2, 2), quack=1.0),
            "no attention_layouts.*which QuacK cannot",
        ),
        (lambda: build_optimizer("adamw", dense(), quack=0.0), "optimizer.quack must be"),
        (lambda: build_optimizer("muon", dense(), quack=True), "optimizer.quack"),
        (
            lambda: build_optimizer("muon", dense(), quack=1.0, weight_norm="fixed"),
            "weight_norm='fixed' keeps",
        ),
        (
            lambda: AttentionLayout("a", 2, 2, *(flat_layout().query,) * 2, shared_key=flat_layout().key),
            "a: a shared_key is declared, but no query_shared_key",
        ),
    ],
)
def test_a_mistake_is_one_sentence(make, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_state_of_other_heads_or_shapes_changes_nothing():
    quack = QuacK([flat_layout()])
    quack.factors()
    before = quack.state_dict()["initial"].clone()
    with pytest.raises(MuonlabError, match="the layouts declare"):
        quack.load_state_dict(QuacK([flat_layout(4, 2)]).state_dict())
    with pytest.raises(MuonlabError, match="initial of the saved QuacK state is a float32 tensor"):
        quack.load_state_dict(quack.state_dict() | {"initial": torch.ones(3)})
    assert torch.equal(quack.state_dict()["initial"], before)


def test_a_clip_takes_over_where_the_logits_pass_tau_all_the_same():
    model = dense(qk_init_scale=6.0)
    layouts = model.attention_layouts()
    optimizer = AdamW(model.parameters(), lr=1e-6, clip=QKClip(layouts, tau=1.0), quack=QuacK(layouts))
    train(model, optimizer, range(4))
    assert (optimizer.clip.trace()["layer_00"]["first_trigger"] == 0).all()
    assert all(
        (rows > 1).any() for rows in optimizer.quack.factors().values()
    )  # smaller keys, faster queries
