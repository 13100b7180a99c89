"""The clip's rule, its settings, what it remembers, and what it refuses."""

import math

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import NAME, by_layer, clip_once, doubles, factors, flat_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim.qk_clip import QKClip, head_gammas


def plain_qk_clip(layouts: list[AttentionLayout], max_logits: list[Tensor], tau: float, alpha: float) -> None:
    """The rule head by head, as the equations stand in qk_clip.py: what the indexed form must equal."""
    for layout, maxima in zip(layouts, max_logits, strict=True):
        gamma = [min(1.0, tau / s) if s > tau else 1.0 for s in maxima.tolist()]
        size = layout.num_heads // layout.num_kv_heads
        kappa = [max(gamma[g * size : (g + 1) * size]) ** (1 - alpha) for g in range(layout.num_kv_heads)]
        scaled = [
            (block, h, gamma[h] / kappa[h // size]) for block in layout.query for h in range(len(gamma))
        ]
        scaled += [(block, h, gamma[h]) for block in layout.query_shared_key for h in range(len(gamma))]
        scaled += [(block, g, kappa[g]) for block in layout.key for g in range(len(kappa))]
        for block, head, factor in scaled:
            block.parameter.data.narrow(block.dim, block.start(head), block.rows).mul_(factor)


def test_gamma_is_tau_over_s_above_tau_and_exactly_one_elsewhere():
    maxima = doubles(50, 25, 25.0000001, 0, -3, -math.inf, math.inf, math.nan)
    gamma = head_gammas(maxima, 25.0)
    torch.testing.assert_close(gamma[2], doubles(25 / 25.0000001)[0], rtol=1e-15, atol=0)
    assert gamma[[0, 1, 3, 4, 5, 6, 7]].tolist() == [0.5, 1, 1, 1, 1, 1, 1]


def test_a_query_head_with_its_own_key_shares_gamma_by_alpha():
    layout = flat_layout()
    gamma = clip_once(layout, [80, 10], tau=20.0, alpha=0.5)
    query, key = factors(layout)
    assert gamma[0].tolist() == [0.25, 1]
    assert (query.tolist(), key.tolist()) == ([0.5, 1], [0.5, 1])


def test_a_key_head_moves_only_by_what_all_its_queries_need():
    layout = flat_layout(heads=4, kv_heads=2)
    clip_once(layout, [80, 20 / 0.64, 40, 10], tau=20.0, alpha=0.5)
    query, key = factors(layout)
    torch.testing.assert_close(key, doubles(0.8, 1), rtol=1e-15, atol=0)
    torch.testing.assert_close(query, doubles(0.25 / 0.8, 0.8, 0.5, 1), rtol=1e-15, atol=0)


@pytest.mark.parametrize(("alpha", "query", "key"), [(0.0, 1.0, 0.25), (1.0, 0.25, 1.0)])
def test_alpha_puts_all_of_gamma_on_one_side(alpha: float, query: float, key: float):
    layout = flat_layout()
    clip_once(layout, [80, 10], tau=20.0, alpha=alpha)
    assert [each.tolist() for each in factors(layout)] == [[query, 1], [key, 1]]


def test_per_layer_gives_every_head_of_that_layer_the_factor_of_its_largest_logit():
    layouts = [flat_layout(2, 1, "layer_00"), flat_layout(3, 3, "layer_01")]
    qk_clip = QKClip(layouts, tau=20.0, per="layer")
    qk_clip.observe(by_layer(doubles(80, 10), doubles(10, 5, 2)))
    gammas = qk_clip.apply(0)
    assert gammas.tolist() == [[0.25, 0.25, 1], [1, 1, 1]]
    query, key = factors(layouts[0])
    assert (query.tolist(), key.tolist()) == ([0.5, 0.5], [0.5])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    alpha=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_the_indexed_clip_equals_the_plain_one(shapes, alpha, dtype, seed):
    torch.manual_seed(seed)
    layouts, copies, maxima = [], [], []
    for number, (kv_heads, group, interleaved) in enumerate(shapes):
        heads, name = kv_heads * group, f"layer_{number:02d}"
        fused = nn.Parameter(torch.randn(4 * heads * 3 + kv_heads * 3, 5, dtype=dtype))
        stride = 9 if interleaved else 0
        for layers, weight in ((layouts, fused), (copies, nn.Parameter(fused.detach().clone()))):
            query = HeadRows(weight, 3, stride=stride)
            key = HeadRows(weight, 3, offset=4 * heads * 3)
            shared = HeadRows(weight, 2, offset=3 if interleaved else heads * 3, stride=stride)
            layers.append(AttentionLayout(name, heads, kv_heads, (query,), (key,), (shared,)))
        maxima.append(100 * torch.randn(heads, dtype=dtype))
    qk_clip = QKClip(layouts, tau=30.0, alpha=alpha)
    qk_clip.observe(by_layer(*maxima))
    qk_clip.apply(0)
    plain_qk_clip(copies, maxima, tau=30.0, alpha=alpha)
    for fast, plain in zip(layouts, copies, strict=True):
        weight, expected = fast.query[0].parameter.detach(), plain.query[0].parameter.detach()
        torch.testing.assert_close(weight, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


@given(
    alpha=st.floats(0, 1), heads=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=30, deadline=None)
def test_where_nothing_passes_tau_no_bit_changes(alpha, heads, dtype):
    layout = AttentionLayout(
        NAME,
        heads,
        heads,
        (HeadRows(nn.Parameter(torch.randn(2 * heads, 3).to(dtype)), 2),),
        (HeadRows(nn.Parameter(torch.randn(2 * heads, 3).to(dtype)), 2),),
    )
    before = [block.parameter.detach().clone() for block in (*layout.query, *layout.key)]
    clip_once(layout, [30.0] * heads, tau=30.0, alpha=alpha)
    for block, expected in zip((*layout.query, *layout.key), before, strict=True):
        assert torch.equal(block.parameter.view(torch.uint8), expected.view(torch.uint8))


def test_maxima_run_over_micro_batches_in_any_order_to_the_same_bits():
    batches = [doubles(30, -5), doubles(10, 45), doubles(25, 44)]
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        layout = flat_layout()
        qk_clip = QKClip([layout], tau=20.0)
        for batch in order:
            qk_clip.observe(batches[batch][None])
        results.append((*qk_clip.apply(0), *factors(layout)))
    assert results[0][0].tolist() == head_gammas(doubles(30, 45), 20.0).tolist()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_caller_may_reuse_its_buffer_after_observe():
    layout, buffer = flat_layout(), doubles(40, 10)
    qk_clip = QKClip([layout], tau=20.0)
    qk_clip.observe(buffer[None])
    buffer.fill_(1000)
    assert qk_clip.apply(0)[0].tolist() == [0.5, 1]


def test_windows_say_in_which_steps_it_acts():
    layout = flat_layout()
    qk_clip = QKClip([layout], tau=20.0, windows=[[1, 3], (5, None)])
    acted = []
    for step in range(8):
        qk_clip.observe(doubles(40, 10)[None])
        acted.append(qk_clip.apply(step)[0].tolist() == [0.5, 1])
    assert acted == [False, True, True, False, False, True, True, True]
    torch.testing.assert_close(factors(layout)[0], doubles(0.5**2.5, 1), rtol=1e-14, atol=0)
    assert qk_clip.trace()[NAME]["max_logit"].tolist() == [40, 10]


def test_no_window_at_all_is_a_run_without_clip_that_needs_no_maxima():
    layout = flat_layout()
    qk_clip = QKClip([layout], windows=[])
    assert qk_clip.apply(0)[0].tolist() == [1, 1]
    assert qk_clip.trace()[NAME]["max_logit"].isnan().all()


def test_the_trace_counts_per_head():
    layout = flat_layout()
    qk_clip = QKClip([layout], tau=20.0)
    for step, maxima in enumerate([doubles(5, -1), doubles(40, 10), doubles(80, 25), doubles(15, 7)]):
        qk_clip.observe(maxima[None])
        qk_clip.apply(step)
    trace = qk_clip.trace()[NAME]
    assert trace["max_logit"].tolist() == [15, 7]
    assert trace["gamma"].tolist() == [1, 1]
    assert trace["first_trigger"].tolist() == [1, 2]
    assert trace["last_trigger"].tolist() == [2, 2]
    torch.testing.assert_close(trace["log_cumulative_gamma"].exp(), doubles(0.125, 0.8), rtol=1e-15, atol=0)


def test_a_kept_trace_or_gamma_does_not_change_with_later_steps():
    qk_clip = QKClip([flat_layout()], tau=20.0)
    qk_clip.observe(doubles(40, 10)[None])
    gamma, trace = qk_clip.apply(0)[0], qk_clip.trace()[NAME]
    qk_clip.observe(doubles(80, 80)[None])
    qk_clip.apply(1)
    assert gamma.tolist() == [0.5, 1]
    assert trace["last_trigger"].tolist() == [0, -1]


def test_a_resumed_clip_continues_to_the_last_bit(tmp_path):
    maxima = [50 * torch.rand(2, dtype=torch.float64) for _ in range(12)]

    def run(qk_clip: QKClip, steps: range) -> None:
        for step in steps:
            qk_clip.observe(maxima[step][None])
            qk_clip.apply(step)

    through, first, second = (QKClip([flat_layout()], tau=20.0) for _ in range(3))
    run(through, range(12))
    run(first, range(7))
    first.observe(maxima[7][None])  # not applied before the kill, so the resumed run measures it again
    torch.save(first.state_dict(), tmp_path / "clip.pt")
    second.load_state_dict(torch.load(tmp_path / "clip.pt", weights_only=True))
    run(second, range(7, 12))
    for name, values in through.trace()[NAME].items():
        assert torch.equal(second.trace()[NAME][name], values)


def test_two_clips_that_loaded_one_state_stay_apart():
    first, second = QKClip([flat_layout()], tau=20.0), QKClip([flat_layout()], tau=20.0)
    second.load_state_dict(first.state_dict())
    first.observe(doubles(40, 40)[None])
    first.apply(0)
    assert second.trace()[NAME]["last_trigger"].tolist() == [-1, -1]


def test_verify_reports_what_the_clip_achieved_and_clips_the_rest():
    torch.manual_seed(0)
    layer, x = oracle.separate(4, 4, 6), torch.randn(2, 7, oracle.WIDTH, dtype=torch.float64)
    before = layer.max_logits(x)[0]
    tau = float(before.median())
    qk_clip = QKClip([layer.layout], tau=tau)
    qk_clip.observe(layer.max_logits(x))
    for weight in layer.weights:  # the optimizer's step, which the observed maxima know nothing of
        weight.data.mul_(1.1)
    first = qk_clip.apply(3)[0]
    overshoot = qk_clip.verify(lambda: layer.max_logits(x))[0]
    torch.testing.assert_close(overshoot, 1.1**2 * before.clamp(max=tau) / tau, rtol=1e-13, atol=0)
    reported = qk_clip.verify(lambda: layer.max_logits(x), again=True)[0]
    assert torch.equal(reported, overshoot)
    after = layer.max_logits(x)[0]
    torch.testing.assert_close(after, (overshoot * tau).clamp(max=tau), rtol=1e-13, atol=0)
    total = (1.1**2 * before / after).reciprocal()
    torch.testing.assert_close(qk_clip.gammas()[0], total, rtol=1e-13, atol=0)
    trace = qk_clip.trace()[NAME]
    torch.testing.assert_close(trace["log_cumulative_gamma"], total.log(), rtol=1e-12, atol=1e-15)
    assert torch.equal(trace["max_logit"], before)
    assert trace["last_trigger"].tolist() == torch.where(total < 1, 3, -1).tolist()
    assert (first >= total).all()


def test_verify_leaves_nothing_observed_and_clips_only_inside_the_windows():
    layout = flat_layout()
    qk_clip = QKClip([layout], tau=20.0, windows=[[5, 6]])

    def remeasure() -> dict[str, Tensor]:
        qk_clip.observe(doubles(400, 400)[None])
        return doubles(40, 10)[None]

    qk_clip.apply(0)
    assert qk_clip.verify(remeasure, again=True)[0].tolist() == [2, 0.5]
    assert qk_clip.gammas()[0].tolist() == [1, 1]
    qk_clip.observe(doubles(10, 10)[None])
    assert qk_clip.apply(5)[0].tolist() == [1, 1]
    assert factors(layout)[0].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["keep", "scale", "project"])
def test_momentum_of_clipped_heads_is_kept_scaled_or_projected(kind: str):
    torch.manual_seed(1)
    layer = oracle.fused(4, 2, 3)
    weight, bias = layer.weights
    momentum = {weight: torch.randn_like(weight), bias: torch.randn_like(bias)}
    expected = {parameter: buffer.clone() for parameter, buffer in momentum.items()}
    maxima, tau = doubles(80, 40, 40, 10), 20.0
    gamma, kappa = [0.25, 0.5, 0.5, 1.0], [0.5**0.5, 1.0]
    blocks = [(range(3 * h, 3 * h + 3), gamma[h] / kappa[h // 2]) for h in range(4)]
    blocks += [(range(12 + 3 * g, 15 + 3 * g), kappa[g]) for g in range(2)]
    for parameter, buffer in expected.items():
        for rows, factor in blocks:
            if factor < 1 and kind == "scale":
                buffer[list(rows)] *= factor
            elif factor < 1 and kind == "project":
                m, w = buffer[list(rows)], parameter.detach()[list(rows)]
                buffer[list(rows)] = m - (m * w).sum() / (w * w).sum() * w
    qk_clip = QKClip([layer.layout], tau=tau, momentum=kind)
    qk_clip.observe(maxima[None])
    qk_clip.apply(0, momentum_of=momentum.get)
    for parameter, buffer in momentum.items():
        torch.testing.assert_close(buffer, expected[parameter], rtol=1e-13, atol=1e-14)
    # Head 3 and the second key head are innocent, and so are the values.
    assert torch.equal(momentum[weight][9:12], expected[weight][9:12])
    assert torch.equal(momentum[weight][15:], expected[weight][15:])


def test_projected_momentum_no_longer_changes_the_norm_of_the_clipped_weights():
    torch.manual_seed(2)
    layer = oracle.columns(2, 2, 3)
    momentum = {weight: torch.randn_like(weight) for weight in layer.weights}
    qk_clip = QKClip([layer.layout], tau=20.0, momentum="project")
    qk_clip.observe(doubles(80, 10)[None])
    qk_clip.apply(0, momentum_of=momentum.get)
    for weight, buffer in momentum.items():
        assert abs((weight[:, :3] * buffer[:, :3]).sum().item()) < 1e-14
        assert abs((weight[:, 3:] * buffer[:, 3:]).sum().item()) > 1e-3


def test_weights_without_momentum_or_of_norm_zero_are_left_out_of_co_scaling():
    layout = flat_layout()
    q, k = layout.query[0].parameter, layout.key[0].parameter
    q.data.zero_()
    momentum = {q: torch.ones_like(q)}
    for kind in ("scale", "project"):
        qk_clip = QKClip([layout], tau=20.0, momentum=kind)
        qk_clip.observe(doubles(80, 10)[None])
        qk_clip.apply(0, momentum_of=momentum.get)
        assert momentum[q].isfinite().all()
    assert k.detach()[0, 0] == 0.25


def test_it_works_beside_any_optimizer_in_a_plain_loop():
    """AdamW drives the logits up; with the clip they are held near tau, without it they are not."""
    peaks = {}
    for clipped in (True, False):
        torch.manual_seed(0)
        layer, x = oracle.separate(4, 2, 6), torch.randn(2, 7, oracle.WIDTH, dtype=torch.float64)
        optimizer = torch.optim.AdamW(layer.weights, lr=0.005)
        qk_clip = QKClip([layer.layout], tau=5.0, windows=None if clipped else [])
        for step in range(150):
            optimizer.zero_grad()
            (-layer.logits(x).square().mean()).backward()
            qk_clip.observe(layer.max_logits(x))
            optimizer.step()
            qk_clip.apply(step)
        peaks[clipped] = float(layer.max_logits(x)[0].max())
    assert peaks[True] < 1.1 * 5.0
    assert peaks[False] > 2 * 5.0


@pytest.mark.cuda
def test_on_cuda_nothing_waits_for_the_device_and_the_result_is_the_cpu_result():
    host, device = flat_layout(4, 2), flat_layout(4, 2)
    qk_clip = QKClip([device], tau=20.0)
    for block in (*device.query, *device.key):
        block.parameter.data = block.parameter.data.cuda()
    maxima = doubles(80, 30, 40, 10)
    qk_clip.observe(maxima.cuda()[None])
    qk_clip.apply(0)
    qk_clip.observe(torch.ones(4, device="cuda")[None])
    torch.cuda.set_sync_debug_mode("error")
    try:
        qk_clip.apply(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    clip_once(host, maxima.tolist(), tau=20.0)
    for a, b in zip(factors(device), factors(host), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-14, atol=0)
