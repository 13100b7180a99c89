"""One regression test for every defect known of a public QK-Clip implementation, named after it.

The list is from reading and running those projects in 2026; each test shows the input that they get wrong.
Defects of the measurement itself (masked pairs counted, rotary left out, 1/d for 1/sqrt(d)) belong to the
models' tests.
"""

import math

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import NAME, WIDTH, OracleLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim.qk_clip import QKClip


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def apply_once(layer: OracleLayer, maxima: Tensor, **clip_settings: object) -> Tensor:
    qk_clip = QKClip([layer.layout], **clip_settings)
    qk_clip.observe(maxima[None])
    return qk_clip.apply(0)[0]


def head_factors(before: Tensor, after: Tensor, heads: int) -> Tensor:
    """The one factor by which each head's rows were scaled."""
    ratio = (after.detach() / before).reshape(heads, -1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-14, atol=0)
    return ratio[:, 0]


def test_megatron_gqa_group_maximum_scales_innocent_query_heads():
    layer = oracle.separate(4, 2, 3)
    q = layer.weights[0]
    before = q.detach().clone()
    apply_once(layer, doubles(40, 10, 5, 5), tau=20.0)
    assert head_factors(before, q, 4).tolist() == [0.5, 1, 1, 1]


def test_gad_cell_gqa_scales_a_key_that_an_innocent_query_reads():
    layer = oracle.separate(4, 2, 3)
    q, k = layer.weights
    q_before, k_before = q.detach().clone(), k.detach().clone()
    apply_once(layer, doubles(40, 10, 80, 40), tau=20.0)
    key = head_factors(k_before, k, 2)
    torch.testing.assert_close(key, doubles(1, 0.5**0.5), rtol=1e-14, atol=0)
    logits = head_factors(q_before, q, 4) * key.repeat_interleave(2)
    torch.testing.assert_close(logits, doubles(0.5, 1, 0.25, 0.5), rtol=1e-14, atol=0)


def test_maxtext_x_transformers_and_axion66_know_one_kind_of_attention_only():
    for layer in (oracle.separate(4, 2, 3), oracle.separate(4, 1, 3), oracle.latent(4, 3, 2)):
        assert apply_once(layer, doubles(40, 10, 10, 10), tau=20.0).tolist() == [0.5, 1, 1, 1]


@pytest.mark.parametrize("maximum", [0.0, -0.0, -3.0, -1e300, -math.inf])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_megatron_7382_a_non_positive_maximum_beside_a_clipped_head_gives_nan(maximum: float, alpha: float):
    """Also MaxText, x-transformers, GAD-cell and Primus (NaN), and axion66 (a Python complex number)."""
    layer = oracle.separate(2, 2, 3)
    before = [weight.detach().clone() for weight in layer.weights]
    gamma = apply_once(layer, doubles(40, maximum), tau=20.0, alpha=alpha)
    assert gamma.tolist() == [0.5, 1]
    for weight, old in zip(layer.weights, before, strict=True):
        assert weight.isfinite().all()
        assert torch.equal(weight[3:], old[3:])


def test_simpletuner_clips_heads_of_negative_gamma():
    layer = oracle.separate(2, 2, 3)
    assert apply_once(layer, doubles(-40, -500), tau=20.0).tolist() == [1, 1]


def test_a_diverged_maximum_is_not_hidden_by_zeroed_or_nan_weights():
    layer = oracle.separate(3, 3, 2)
    before = [weight.detach().clone() for weight in layer.weights]
    qk_clip = QKClip([layer.layout], tau=20.0)
    qk_clip.observe(doubles(math.inf, math.nan, 10)[None])
    qk_clip.observe(doubles(1, 1, 1)[None])
    assert qk_clip.apply(0)[0].tolist() == [1, 1, 1]
    assert all(torch.equal(weight, old) for weight, old in zip(layer.weights, before, strict=True))
    seen = qk_clip.trace()[NAME]["max_logit"]
    assert seen[0] == math.inf
    assert seen[1].isnan()


def test_transformer_engine_rounds_the_maximum_to_the_activation_dtype():
    """In bf16 a maximum of 100.2 is 100.0: the head would never be clipped."""
    weights = [nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16)) for _ in range(2)]
    layout = AttentionLayout(NAME, 1, 1, *((HeadRows(weight, 2),) for weight in weights))
    qk_clip = QKClip([layout], tau=100.0)
    qk_clip.observe(torch.tensor([100.2])[None])
    torch.testing.assert_close(qk_clip.apply(0)[0], torch.tensor([100 / 100.2]), rtol=1e-6, atol=0)
    assert torch.tensor(100.2).bfloat16() == 100


def test_under_autocast_the_fp32_weights_that_the_optimizer_owns_are_clipped():
    """Megatron has to clip its bf16 weight and its fp32 master; one that is forgotten undoes the other."""
    torch.manual_seed(0)
    q, k = nn.Parameter(torch.randn(8, WIDTH)), nn.Parameter(torch.randn(8, WIDTH))
    layout = AttentionLayout(NAME, 2, 2, (HeadRows(q, 4),), (HeadRows(k, 4),))
    x = torch.randn(2, 7, WIDTH)

    def maxima() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            rows = [oracle.heads_of(nn.functional.linear(x, weight), 2) for weight in (q, k)]
            return oracle.products(*rows).float().amax((0, 2, 3))

    tau = float(maxima().min()) / 2
    qk_clip = QKClip([layout], tau=tau)
    qk_clip.observe(maxima()[None])
    qk_clip.apply(0)
    torch.testing.assert_close(maxima(), torch.full((2,), tau), rtol=2e-2, atol=0)


def test_megatron_clips_although_the_step_was_skipped():
    layer = oracle.separate(2, 2, 3)
    before = [weight.detach().clone() for weight in layer.weights]
    qk_clip = QKClip([layer.layout], tau=20.0)
    qk_clip.observe(doubles(math.inf, 400)[None])
    qk_clip.forget()  # the gradient scaler found an overflow and took no step
    qk_clip.observe(doubles(10, 40)[None])
    assert qk_clip.apply(0)[0].tolist() == [1, 0.5]
    assert torch.equal(layer.weights[0][:3], before[0][:3])


class NoHostRead(TorchDispatchMode):
    """Fails where Python reads a tensor's value, which on a GPU waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


def test_megatron_and_axion66_read_every_layer_or_head_on_the_host():
    layers = [oracle.separate(4, 2, 3, bias=True, name=f"layer_{number:02d}") for number in range(3)]
    for settings in ({}, {"per": "layer"}, {"momentum": "scale"}, {"momentum": "project"}):
        qk_clip = QKClip([layer.layout for layer in layers], tau=20.0, **settings)
        maxima = doubles(80, 40, 10, -1).expand(3, 4)
        with NoHostRead():
            qk_clip.observe(maxima)
            qk_clip.apply(0, momentum_of=torch.zeros_like)
            qk_clip.verify(lambda maxima=maxima: maxima, again=True)
            qk_clip.trace()
    with pytest.raises(AssertionError), NoHostRead():
        torch.ones(1).item()


def test_megatron_logs_a_negative_maximum_as_zero_and_gad_cell_a_large_one_as_tau():
    layer = oracle.separate(2, 2, 3)
    qk_clip = QKClip([layer.layout], tau=20.0)
    qk_clip.observe(doubles(-3.5, 400)[None])
    qk_clip.apply(0)
    assert qk_clip.trace()[NAME]["max_logit"].tolist() == [-3.5, 400]


class ReportingAttention(nn.Module):
    """Somebody's attention, which reports its training forwards to the clip by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(WIDTH, 8, bias=False, dtype=torch.float64) for _ in range(2))
        layout = AttentionLayout(NAME, 2, 2, (HeadRows(self.q.weight, 4),), (HeadRows(self.k.weight, 4),))
        self.clip = QKClip([layout], tau=0.5)
        self.reports: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = oracle.products(oracle.heads_of(self.q(x), 2), oracle.heads_of(self.k(x), 2))
        if self.training:
            self.reports.append(logits.detach().amax((0, 2, 3)))
            self.clip.observe(self.reports[-1][None])
        return logits.softmax(-1).square().sum()


def test_megatron_counts_evaluation_forwards_into_the_maximum():
    torch.manual_seed(0)
    module, x = ReportingAttention(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    module(x)
    module.eval()
    module(100 * x)
    module.clip.apply(0)
    assert torch.equal(module.clip.trace()[NAME]["max_logit"], module.reports[0])
    assert len(module.reports) == 1


def test_an_activation_recomputation_is_counted_once():
    torch.manual_seed(0)
    plain, recomputed = ReportingAttention(), ReportingAttention()
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain(x).backward()
    checkpoint(recomputed, x.clone().requires_grad_(), use_reentrant=False).backward()
    assert (len(plain.reports), len(recomputed.reports)) == (1, 2)
    gammas = [module.clip.apply(0)[0] for module in (plain, recomputed)]
    assert torch.equal(*gammas)
    assert (gammas[0] < 1).any()
    assert torch.equal(plain.q.weight, recomputed.q.weight)


def test_megatron_and_simpletuner_clip_behind_qk_norm_where_it_has_no_effect():
    weight = nn.Parameter(torch.ones(4, 3))
    rows, reason = (HeadRows(weight, 2),), "QK-norm divides the scale of its rows out again"
    layout = AttentionLayout(NAME, 2, 2, rows, rows, inert=reason)
    with pytest.raises(MuonlabError, match=f"QK-Clip cannot act on layer_00: {reason}"):
        QKClip([layout])


def test_megatron_leaves_the_qkv_bias_unscaled():
    torch.manual_seed(0)
    layer, x = oracle.separate(3, 3, 4, bias=True), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.layout.query[1].parameter.mul_(10)
        layer.layout.key[1].parameter.mul_(10)
    before = layer.max_logits(x)[0]
    tau = float(before.min().clamp(min=1)) / 2
    apply_once(layer, before, tau=tau)
    torch.testing.assert_close(layer.max_logits(x)[0], before.clamp(max=tau), rtol=1e-13, atol=0)


def test_megatron_7382_and_primus_break_on_layers_without_attention():
    """A hybrid model declares its attention layers, whatever their numbers, and any head counts."""
    layers = [oracle.separate(4, 2, 3, name="layer_03"), oracle.separate(2, 2, 3, name="layer_11")]
    qk_clip = QKClip([layer.layout for layer in layers], tau=20.0)
    qk_clip.observe(oracle.by_layer(doubles(80, 10, 10, 10), doubles(10, 40)))
    assert qk_clip.apply(0).tolist() == [[0.25, 1, 1, 1], [1, 0.5, 1, 1]]
    ratios = qk_clip.verify(lambda: oracle.by_layer(doubles(80, 10, 10, 10), doubles(10, 40)), again=True)
    assert ratios.tolist() == [[4, 0.5, 0.5, 0.5], [0.5, 2, -math.inf, -math.inf]]
    assert qk_clip.trace()["layer_11"]["gamma"].tolist() == [1, 0.25]


def test_maxtext_refuses_a_soft_cap_and_others_measure_behind_it():
    """Behind a cap of 15 no maximum can pass tau = 20, so the maximum before the cap is what is asked for."""
    torch.manual_seed(0)
    layer, x, cap = oracle.separate(2, 2, 4), torch.randn(2, 7, WIDTH, dtype=torch.float64), 15.0
    with torch.no_grad():
        layer.weights[0].mul_(60 / layer.max_logits(x)[0].max())
    before = layer.max_logits(x)[0]
    assert (cap * (before / cap).tanh() < 20).all()
    apply_once(layer, before, tau=20.0)
    torch.testing.assert_close(layer.max_logits(x)[0].max(), doubles(20)[0], rtol=1e-13, atol=0)


def test_axion66_wants_a_parameter_where_its_readme_passes_a_linear_layer():
    linear = nn.Linear(4, 4)
    layout = AttentionLayout(
        NAME, 2, 1, (HeadRows(linear.weight, 2),), (HeadRows(nn.Linear(4, 2).weight, 2),)
    )
    assert QKClip([layout]).layouts == (layout,)
    with pytest.raises(MuonlabError, match="head rows of a Linear; expected a weight or bias tensor"):
        HeadRows(linear, 2)


def test_akuldatta_scales_the_columns_of_a_linear_layer():
    linear = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    before = linear.weight.detach().clone()
    layout = AttentionLayout(
        NAME, 2, 2, (HeadRows(linear.weight, 3),), (HeadRows(nn.Parameter(torch.ones(6, 6)), 3),)
    )
    apply_once(OracleLayer(layout, torch.zeros_like, []), doubles(80, 10), tau=20.0, alpha=1.0)
    assert torch.equal(linear.weight[:3], 0.25 * before[:3])
    assert torch.equal(linear.weight[3:], before[3:])


def test_gad_cell_clips_by_the_last_micro_batch_only():
    layer = oracle.separate(2, 2, 3)
    qk_clip = QKClip([layer.layout], tau=20.0)
    for maxima in (doubles(40, 5), doubles(6, 7)):
        qk_clip.observe(maxima[None])
    assert qk_clip.apply(0)[0].tolist() == [0.5, 1]


def test_apaz_never_resets_its_maxima():
    layer = oracle.separate(2, 2, 3)
    qk_clip = QKClip([layer.layout], tau=20.0)
    qk_clip.observe(doubles(40, 40)[None])
    qk_clip.apply(0)
    qk_clip.observe(doubles(5, 5)[None])
    assert qk_clip.apply(1)[0].tolist() == [1, 1]
    assert qk_clip.trace()[NAME]["max_logit"].tolist() == [5, 5]


def test_apaz_trains_without_a_clip_because_its_layers_are_never_filled_in():
    with pytest.raises(MuonlabError, match="at least one AttentionLayout"):
        QKClip([])
    with pytest.raises(MuonlabError, match="no max logits for step 0"):
        QKClip([oracle.separate(2, 2, 3).layout]).apply(0)


def test_clipping_by_the_step_before_lets_the_new_weights_pass_tau_unless_verified():
    """All but GAD-cell clip W_t by logits of W_{t-1}; none reports what that leaves."""
    torch.manual_seed(0)
    layer, x = oracle.separate(2, 2, 4), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    tau = float(layer.max_logits(x)[0].min()) / 2
    qk_clip = QKClip([layer.layout], tau=tau)
    qk_clip.observe(layer.max_logits(x))
    with torch.no_grad():
        layer.weights[0].mul_(1.5)
    qk_clip.apply(0)
    over = qk_clip.verify(lambda: layer.max_logits(x), again=True)[0]
    torch.testing.assert_close(over, doubles(1.5, 1.5), rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.max_logits(x)[0], doubles(tau, tau), rtol=1e-13, atol=0)


def test_nobody_rescales_momentum():
    layer = oracle.separate(2, 2, 3)
    momentum = {weight: torch.ones_like(weight) for weight in layer.weights}
    qk_clip = QKClip([layer.layout], tau=20.0, momentum="scale")
    qk_clip.observe(doubles(80, 10)[None])
    qk_clip.apply(0, momentum_of=momentum.get)
    for buffer in momentum.values():
        assert buffer[:, 0].tolist() == [0.5] * 3 + [1] * 3


def test_nobody_checkpoints_the_clip_history():
    layer = oracle.separate(2, 2, 3)
    before = QKClip([layer.layout], tau=20.0)
    before.observe(doubles(80, 10)[None])
    before.apply(17)
    after = QKClip([layer.layout], tau=20.0)
    after.load_state_dict(before.state_dict())
    assert after.trace()[NAME]["first_trigger"].tolist() == [17, -1]
    torch.testing.assert_close(
        after.trace()[NAME]["log_cumulative_gamma"].exp(), doubles(0.25, 1), rtol=1e-15, atol=0
    )
