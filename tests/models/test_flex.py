"""FlexAttention's masks here; its kernel and its maxima on a GPU, against explicit attention (`make gpu-check`)."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import flex_attention

from muonlab.models import build_model, flex
from muonlab.models.attention import attend
from muonlab.models.explicit_attention import explicit_attention
from muonlab.models.flex import _block_mask, flex_attend, flex_highest, flex_supports
from muonlab.models.max_logits import LayerLogits, bounded_logits, logit_extremes, logit_range

DOCUMENTS = [False, True]


def random(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(length, device="cpu", dtype=torch.float32, head_dim=32, documents=False):
    """Four query heads on two key heads; documents begin at one position in four."""
    q = 3 * random(2, 4, length, head_dim, device=device, dtype=dtype)
    k, v = (random(2, 2, length, head_dim, seed=i, device=device, dtype=dtype) for i in (1, 2))
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.25
    return q, k, v, starts.long().cumsum(1).to(device) if documents else None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("length", [1, 130])
def test_the_block_mask_shows_what_explicit_attention_sees(documents, length):
    q, k, v, ids = inputs(length, documents=documents)
    out = flex_attention(q, k, v, block_mask=_block_mask(length, q.device, ids), enable_gqa=True)
    torch.testing.assert_close(out, explicit_attention(q, k, v, documents=ids)[0], rtol=1e-4, atol=1e-5)


def test_a_layer_whose_kernel_reports_its_highest_logit_needs_no_exact_pass_for_it(monkeypatch):
    """What a GPU does, with the CPU's exact pass in place of the kernel."""
    monkeypatch.setattr(
        "muonlab.models.max_logits.flex_highest", lambda q, k, documents: logit_range(q, k, documents).highest
    )
    q, k, _, _ = inputs(9)
    exact = logit_range(q, k)
    layer = LayerLogits(None, q, k, highest=exact.highest)
    for actual, expected in zip(logit_extremes([layer]), exact, strict=True):
        assert torch.equal(actual[0], expected)
    limit = exact.highest.median().item()
    signed, known = bounded_logits([layer], limit)
    assert torch.equal(signed.highest[0], exact.highest)  # what a signed clip acts on, whatever the cadence
    assert not known.any()  # its lowest are bounds still
    absolute, known = bounded_logits([layer], limit, absolute=True)
    assert torch.equal(absolute.absolute[known], exact.absolute[known[0]])
    assert known[0][exact.absolute >= limit].all()


# Of what its compiler itself does; torch hides them from users by another way than filters.
traced = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*should not be instantiated"
)


@pytest.fixture
def counter(monkeypatch):
    """FlexAttention on the CPU by its definition in place of the kernel, with maxima and gradients, traced as on a GPU;
    what counts the compilations."""
    options = torch_flex._apply_kernel_options

    def as_on_a_gpu(query, key, value, return_lse, kernel_options, return_aux=None):
        chosen = options(query, key, value, return_lse, kernel_options, None)
        return {**chosen, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": True}

    monkeypatch.setattr(torch_flex, "_apply_kernel_options", as_on_a_gpu)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr("muonlab.models.fused_attention.flex_supports", lambda q, v: True)
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", 0)
    counter = torch._dynamo.testing.CompileCounter()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **{"backend": counter, **options}))
    flex._compiled.cache_clear()
    torch.compiler.reset()
    yield counter
    flex._compiled.cache_clear()
    torch.compiler.reset()


@traced
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_maxima_sinks_and_gradients_by_flex_attentions_definition_are_explicit_attentions(counter, documents):
    q, k, v, ids = inputs(40, documents=documents)
    leaves = [x.requires_grad_() for x in (q, k, v, random(4, seed=4))]
    out, highest = flex_attend(q, k, v, ids, leaves[3])
    expected, _, extremes = explicit_attention(q, k, v, documents=ids, sink=leaves[3])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(highest, extremes.highest)
    torch.testing.assert_close(-flex_highest(-q, k, ids), extremes.lowest)
    gradients = [torch.autograd.grad(each.square().sum(), leaves) for each in (out, expected)]
    for own, explicit in zip(*gradients, strict=True):
        torch.testing.assert_close(own, explicit, rtol=1e-3, atol=1e-4)


def test_the_kernel_is_compiled_anew_for_more_shapes_than_torch_allows(counter):
    """Behind its limit torch would run unfused, with every logit in memory."""
    lengths = range(1, torch._dynamo.config.recompile_limit + 2)
    for length in lengths:
        q, k, _, _ = inputs(length)
        flex_highest(q, k, None)
    assert counter.frame_count == len(lengths)


@traced
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nanogpt", dict(num_heads=4, num_kv_heads=2, attention_sink="learnt")),
        ("moe", dict(num_experts=4, expert_hidden=16, balance="loss")),
    ],
)
def test_a_compiled_models_flex_attention_leaves_what_an_eager_ones_leaves(counter, name, settings):
    """Loss, gradient, maxima and measurements of a second forward: what a model assigns around the kernel is kept."""
    seen = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(name, vocab_size=61, context=24, d_model=32, num_layers=3, **settings)
        if compiled:
            model.compile(backend=counter, fullgraph=True)
        for seed in (1, 2):
            tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(seed))
            loss = model(tokens, tokens).loss
            bounds, exact = model.bounded_logits()
            assert not exact.any()
            maxima = model.logit_extremes()
        loss.backward()
        measured = [*model.measurements().values(), model.expert_loads()] if name == "moe" else []
        gradient = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        seen.append([loss, gradient, *bounds, *maxima, *measured])
    for eager, traced in zip(*seen, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_not_asked_for_what_it_cannot_do():
    q, _, v, _ = inputs(4)
    assert not flex_supports(q, v)  # the CPU
    meta = [x.to("meta") for x in (q, v)]
    assert not flex_supports(*meta)


gpu = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [16, 128, 300])
def test_flex_attention_and_its_maxima_are_explicit_attentions(device, documents, dtype, length):
    q, k, v, ids = inputs(length, device, dtype, documents=documents)
    assert flex_supports(q, v)
    out, highest = flex_attend(q, k, v, ids)
    expected, _, extremes = explicit_attention(q, k, v, documents=ids)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    # In natural units after scaling: a mistake of ln 2 or sqrt(d) would be far outside.
    torch.testing.assert_close(highest, extremes.highest, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(-flex_highest(-q, k, ids), extremes.lowest, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("head_dim", [8, 32])  # SDPA, FlexAttention
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_a_gpu_are_explicit_attentions(device, head_dim, documents, sunk, dtype):
    q, k, v, ids = inputs(130, device, dtype, head_dim=head_dim, documents=documents)
    sink = random(4, seed=4, device=device, dtype=dtype) if sunk else None
    given = [q, k, v] if sink is None else [q, k, v, sink]

    def gradients(attention, leaves):
        q, k, v, *sink = (leaf.detach().requires_grad_() for leaf in leaves)
        out = attention(q, k, v, documents=ids, sink=sink[0] if sink else None)[0]
        return torch.autograd.grad(out.float().square().sum(), [q, k, v, *sink])

    fused = gradients(attend, given)
    explicit = gradients(explicit_attention, [each.float() for each in given])
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for actual, expected in zip(fused, explicit, strict=True):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < tolerance


@pytest.mark.parametrize("device", [gpu])
@pytest.mark.parametrize("compiled", [False, True])
# head_dim 32 and 8: FlexAttention and SDPA
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (2, 1), (8, 8), (8, 2)])
def test_a_model_on_a_gpu_says_what_it_says_on_a_cpu(device, compiled, num_heads, num_kv_heads):
    torch.manual_seed(0)
    settings = dict(vocab_size=61, context=160, d_model=64, num_layers=2)
    settings |= dict(num_heads=num_heads, num_kv_heads=num_kv_heads)
    model = build_model("nanogpt", **settings)
    tokens = torch.randint(61, (3, 160), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens).loss.backward()
    expected = model.logit_extremes()
    gradient = model.blocks[0].attention.query.weight.grad.clone()
    model.zero_grad()
    model.to(device)
    if compiled:
        model.compile()
    model(tokens.to(device), tokens.to(device)).loss.backward()
    for actual, end in zip(model.logit_extremes(), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), end, rtol=1e-3, atol=1e-3)
    actual = model.blocks[0].attention.query.weight.grad.cpu()
    torch.testing.assert_close(actual, gradient, rtol=1e-2, atol=1e-4)
    bounds, exact = model.bounded_logits()
    assert exact.all()  # what is known of this forward stays known
    model(tokens.to(device), tokens.to(device))
    bounds, exact = model.bounded_logits()
    assert not exact.any()
    assert (bounds.highest.cpu() >= expected.highest - 1e-2).all()
    assert (bounds.lowest.cpu() <= expected.lowest + 1e-2).all()
