"""What every registered model must do."""

import math

import pytest
import torch

from muonlab.errors import MuonlabError
from muonlab.models import MixtureModel, MoE, build_model, list_models
from muonlab.models.contract import as_causal_model
from muonlab.record.logit_peak import logit_peak

SETTINGS = dict(vocab_size=61, context=16, d_model=32, num_layers=2, num_heads=4)
VARIANTS = {
    "nanogpt": {
        "plain": {},
        "grouped_query": {"num_kv_heads": 2},
        "multi_query": {"num_kv_heads": 1},
        "fused": {"fused_qkv": True, "bias": True},
        "fused_grouped_query": {"fused_qkv": True, "num_kv_heads": 2},
        "qk_norm": {"qk_norm": True},
        "soft_cap": {"attention_soft_cap": 5.0},
        "biases": {"bias": True},
        "no_norm": {"norm": "none"},
        "bf16_softmax": {"softmax_dtype": "bfloat16"},
        "head_gate": {"attention_gate": "head", "bias": True},
        "element_gate_learnt_sink": {
            "attention_gate": "element",
            "attention_sink": "learnt",
            "num_kv_heads": 2,
        },
        "zero_sink": {"attention_sink": "zero"},
        "clamped_swiglu": {"activation": "swiglu", "swiglu_clamp": 1.0},
        "partial_rotary": {"rotary_fraction": 0.5},
        "no_positions": {"rotary_fraction": 0.0},
        "swiglu": {"activation": "swiglu"},
        "gelu_tied_zloss": {"activation": "gelu", "tied_head": True, "z_loss": 1e-3},
    },
    "moe": {
        "plain": {},
        "latent_queries": {"q_lora_rank": 24},
        "multi_head": {"attention": "mha"},
        "qk_norm": {"attention": "mha", "qk_norm": True},
        "soft_cap": {"attention_soft_cap": 5.0},
        "loss_balance": {"balance": "loss"},
        "no_norm": {"norm": "none"},
        "bf16_softmax": {"softmax_dtype": "bfloat16"},
        "element_gate_clamp": {"attention_gate": "element", "swiglu_clamp": 1.0},
        "head_gate_learnt_sink": {"attention": "mha", "attention_gate": "head", "attention_sink": "learnt"},
        "latent_learnt_sink": {"attention_sink": "learnt"},
        "no_dense_no_shared": {"num_dense_layers": 0, "num_shared_experts": 0},
        "sparse_tied_zloss": {"sparsity": 4, "experts_per_token": 3, "tied_head": True, "z_loss": 1e-3},
    },
}


def test_every_model_is_tested():
    assert list_models() == sorted(VARIANTS)


@pytest.fixture(params=[(n, v) for n in VARIANTS for v in VARIANTS[n]], ids=lambda p: f"{p[0]}-{p[1]}")
def model(request):
    torch.manual_seed(0)
    name, variant = request.param
    return build_model(name, **SETTINGS, **VARIANTS[name][variant])


def tokens(batch=3, length=16, seed=0):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_model_keeps_the_contract(model):
    """Every member of CausalModel, with the shapes that its docstrings say."""
    causal = as_causal_model(model, "any")
    x, shape = tokens(), (2, 4)
    causal.train()
    output = causal(x, x, measure_entropy=True)
    assert output.logits.shape == (3, 16, 61)
    assert output.loss.ndim == output.cross_entropy.ndim == 0
    extremes = causal.logit_extremes()
    bounds, exact = causal.bounded_logits(torch.inf, absolute=True)
    assert {t.shape for t in (*extremes, *bounds, exact)} == {shape}
    assert exact.dtype == torch.bool
    assert (bounds.highest >= extremes.highest).all()
    assert (bounds.lowest <= extremes.lowest).all()
    assert causal.attention_entropy().shape == causal.one_hot_share().shape == shape
    assert len(causal.attention_layouts()) == len(list(causal.layers)) == 2
    assert causal.flops_per_token(16) > causal.flops_per_token(8) > 0
    assert isinstance(model, MixtureModel) == isinstance(model, MoE)


def test_a_mixture_keeps_its_contract():
    model = build_model("moe", **SETTINGS)
    model(tokens(), tokens())
    assert list(model.expert_layers) == [1]
    loads = model.expert_loads()
    assert loads.shape == (1, 16)
    assert loads.sum() == tokens().numel() * 2
    assert all(name.endswith("/layer_01") and value.ndim == 0 for name, value in model.measurements().items())
    model.update_balance()
    assert torch.equal(model.expert_loads(), loads)


def test_the_watched_queries_and_keys_are_those_that_make_the_logits(model):
    if model.settings.attention_soft_cap:
        pytest.skip("the cap lies between the products and the logits")
    peaks = []
    with model.watch_attention(lambda queries, keys: peaks.append(logit_peak(queries, keys).max_logit)):
        model(tokens())
    torch.testing.assert_close(torch.stack(peaks).float(), model.max_logits().amax(1), rtol=1e-5, atol=1e-6)
    model(tokens())
    assert len(peaks) == 2  # it ends with the block


def test_a_model_without_some_of_it_is_named_with_what_it_lacks():
    with pytest.raises(
        MuonlabError, match=r"model 'mine' cannot be trained: it lacks parameter_roles, attention_"
    ):
        as_causal_model(torch.nn.Linear(2, 2), "mine")


def test_no_position_sees_a_later_token(model):
    model.eval()
    x = tokens()
    before = model(x).logits
    for position in (1, 8, 15):
        changed = x.clone()
        changed[:, position] = (changed[:, position] + 1) % 61
        after = model(changed).logits
        # A changed token changes how many rows some experts multiply, and so how their products round.
        rounding = dict(rtol=1e-5, atol=1e-7) if isinstance(model, MoE) else dict(rtol=0, atol=0)
        torch.testing.assert_close(after[:, :position], before[:, :position], **rounding)
        assert not torch.equal(after[:, position:], before[:, position:])


def test_initial_loss_is_that_of_a_uniform_guess(model):
    loss = model(tokens(64), tokens(64, seed=1)).cross_entropy
    assert abs(loss.item() / math.log(61) - 1) < 0.02


def test_every_parameter_has_a_role_and_a_gradient(model):
    model(tokens(), tokens(seed=1)).loss.backward()
    names = {name for name, _ in model.named_parameters()}
    assert set(model.parameter_roles()) == names
    assert all(p.grad is not None for p in model.parameters())


def test_max_logits_are_those_of_the_last_training_forward(model):
    model(tokens(), tokens())
    kept = model.max_logits()
    assert kept.shape == (len(model.attention_layouts()), 4)
    model.eval()
    model(tokens(seed=5))
    assert torch.equal(kept, model.max_logits())
    model.train()
    model(tokens(seed=5))
    assert not torch.equal(kept, model.max_logits())


def test_absolute_max_logits_are_the_larger_of_both_ends(model):
    model(tokens(), tokens())
    highest, lowest = model.logit_extremes()
    absolute = model.max_logits(absolute=True)
    assert torch.equal(absolute, torch.maximum(highest, -lowest))


def test_max_logits_before_any_training_forward_are_an_error(model):
    with pytest.raises(MuonlabError, match="training mode"):
        model.max_logits()


def test_scaling_the_declared_rows_scales_the_logits(model):
    """The layout is right: gamma on head 1's query rows scales head 1's logits of layer 0 and no other's."""
    layout = model.attention_layouts()[0]
    if layout.inert:
        pytest.skip(layout.inert)
    model(tokens())
    before = model.max_logits()[0]
    with torch.no_grad():
        for rows in (*layout.query, *layout.query_shared_key):
            rows.parameter[rows.start(1) : rows.start(1) + rows.rows] *= 0.25
    model(tokens())
    expected = before * torch.tensor([1.0, 0.25, 1.0, 1.0])
    torch.testing.assert_close(model.max_logits()[0], expected)


def grouped_flops(a, b, *others, **settings):
    """Of a (M, in) with a stack b (E, in, out), or of a (in, M) with b (M, out), cut into groups along M."""
    return 2 * a[0] * a[1] * b[-1]


def test_flops_are_those_that_torch_counts(model):
    from torch.utils.flop_counter import FlopCounterMode

    x = tokens(2)
    with (
        FlopCounterMode(
            display=False, custom_mapping={torch.ops.muonlab.grouped_mm: grouped_flops}
        ) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(x, x, measure_entropy=True).loss.backward()
    # The counter sees no gradient flow into the tokens, and so skips nothing: every product has two backward products.
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token(16) * x.numel(), rel=1e-6)


def test_a_sequence_longer_than_the_context_is_refused(model):
    with pytest.raises(MuonlabError, match="context of 16"):
        model(tokens(length=17))


def test_a_misspelt_model_names_the_near_ones():
    with pytest.raises(MuonlabError, match="did you mean 'nanogpt'"):
        build_model("nanogtp")


def test_logits_can_be_forced_to_a_size():
    """Every head's largest |logit| is kappa whatever the weights, and the loss still teaches them."""
    torch.manual_seed(0)
    model = build_model("nanogpt", **SETTINGS, forced_max_logit=100.0)
    model(tokens(), tokens(seed=1)).loss.backward()
    absolute = model.max_logits(absolute=True)
    torch.testing.assert_close(absolute, torch.full((2, 4), 100.0))
    assert model.blocks[0].attention.query.weight.grad.abs().max() > 0
    assert all("forced_max_logit" in layout.inert for layout in model.attention_layouts())


def test_query_and_key_can_start_larger_than_the_rest():
    """The first logits grow with the square of qk_init_scale; every other weight is the same draw."""
    models = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        models.append(build_model("nanogpt", **SETTINGS, qk_init_scale=scale))
        models[-1](tokens())
    torch.testing.assert_close(models[1].max_logits()[0], 16 * models[0].max_logits()[0])
    assert torch.equal(models[0].blocks[0].mlp.up.weight, models[1].blocks[0].mlp.up.weight)
