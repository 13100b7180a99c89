"""The softer clips: gamma to a power, and gamma by a running average of the max logits."""

import math
from types import SimpleNamespace

import pytest
import torch
from attention_oracle import NAME, clip_once, doubles, factors, flat_layout, separate
from hypothesis import given
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.optim import build_optimizer
from muonlab.optim.qk_clip import QKClip, head_gammas


def clipped_by(maxima, **settings):
    """(steps, heads): the gammas of a clip of tau 20 that sees these maxima, one step after the other."""
    qk_clip = QKClip([flat_layout()], tau=20.0, **settings)
    gammas = []
    for step, each in enumerate(maxima):
        qk_clip.observe(torch.as_tensor(each, dtype=torch.float64)[None])
        gammas.append(qk_clip.apply(step)[0])
    return torch.stack(gammas)


@given(st.floats(1e-3, 1), st.floats(-1e3, 1e6), st.floats(0.1, 1e3))
def test_a_power_of_gamma_is_its_equation(power, size, tau):
    """gamma = min(1, tau / S)^p, exactly 1 for S <= tau."""
    expected = (tau / size) ** power if size > tau else 1.0
    assert head_gammas(doubles(size), tau, power).item() == pytest.approx(expected, rel=1e-13)
    assert size > tau or head_gammas(doubles(size), tau, power).item() == 1.0


def test_a_half_power_leaves_the_root_of_the_excess():
    layout = flat_layout()
    gamma = clip_once(layout, [80, 10], tau=20.0, power=0.5)
    assert gamma[0].tolist() == [0.5, 1]
    torch.testing.assert_close(factors(layout)[0], doubles(math.sqrt(0.5), 1), rtol=1e-15, atol=0)


def test_repeated_soft_clips_bring_the_logits_of_real_attention_down_to_tau():
    """Without updates S_t = tau (S_0 / tau)^((1 - p)^t): each clip leaves the excess to the power 1 - p."""
    torch.manual_seed(0)
    layer, x = separate(4, 2, 6, rotary_dim=4, bias=True), torch.randn(2, 7, 12, dtype=torch.float64)
    start = layer.max_logits(x)
    qk_clip = QKClip([layer.layout], tau=1.0, power=0.25)
    for step in range(6):
        qk_clip.observe(layer.max_logits(x))
        qk_clip.apply(step)
    assert (start > 1).any()
    expected = torch.where(start > 1, start ** (0.75**6), start)
    torch.testing.assert_close(layer.max_logits(x), expected, rtol=1e-12, atol=0)


@given(
    st.lists(st.tuples(st.floats(-50, 500), st.floats(-50, 500)), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
)
def test_the_average_clips_by_the_average_of_the_maxima(maxima, weight):
    """A_0 = S_0, A_t = w A_(t-1) + (1 - w) S_t, gamma = min(1, tau / A_t), one number at a time."""
    averages, expected = [None, None], []
    for step in maxima:
        averages = [
            s if a is None else weight * a + (1 - weight) * s for a, s in zip(averages, step, strict=True)
        ]
        expected.append([min(1.0, 20 / a) if a > 20 else 1.0 for a in averages])
    actual = clipped_by(maxima, average=weight)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"power": 1.0, "average": 0.0}])
def test_the_defaults_are_k2s_clip_to_the_bit(settings):
    maxima = [(30.1, 5.0), (77.7, 20.0), (19.0, 1e6)]
    plain = torch.tensor([[20 / max(20.0, s) for s in step] for step in maxima], dtype=torch.float64)
    assert torch.equal(clipped_by(maxima, **settings), plain)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_diverged_maximum_clips_nothing_and_leaves_the_average_alone(lost):
    steps = clipped_by([(40, 40), (lost, 40), (40, 40)], average=0.5)
    assert steps.tolist() == [[0.5, 0.5], [1, 0.5], [0.5, 0.5]]
    assert clipped_by([(lost, 40), (40, 40)], average=0.5).tolist() == [[1, 0.5], [0.5, 0.5]]


def test_the_average_goes_on_outside_the_windows_and_over_steps_without_maxima():
    qk_clip = QKClip([flat_layout()], tau=20.0, average=0.5, windows=[[2, 3]])
    qk_clip.observe(doubles(40, 10)[None])
    qk_clip.apply(0)
    qk_clip.apply(1)
    qk_clip.observe(doubles(120, 10)[None])
    assert qk_clip.apply(2)[0].tolist() == [0.25, 1]  # 20 / (0.5 * 40 + 0.5 * 120)
    assert qk_clip.trace()[NAME]["max_logit"].tolist() == [120, 10]


def test_by_layer_the_largest_average_decides():
    assert clipped_by([(40, 10), (10, 100)], average=0.5, per="layer").tolist() == [
        [0.5, 0.5],
        [20 / 55, 20 / 55],
    ]


def test_a_resumed_average_goes_on_to_the_last_bit(tmp_path):
    maxima = [60 * torch.rand(2, dtype=torch.float64) for _ in range(12)]

    def run(qk_clip, steps):
        return [qk_clip.observe(maxima[step][None]) or qk_clip.apply(step) for step in steps]

    through, first, second = (QKClip([flat_layout()], tau=20.0, power=0.7, average=0.9) for _ in range(3))
    expected = run(through, range(12))
    run(first, range(7))
    torch.save(first.state_dict(), tmp_path / "clip.pt")
    second.load_state_dict(torch.load(tmp_path / "clip.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(run(second, range(7, 12)), expected[7:], strict=True))


def test_a_state_without_an_average_begins_one_and_a_wrong_one_is_refused():
    plain, averaged = QKClip([flat_layout()], tau=20.0), QKClip([flat_layout()], tau=20.0, average=0.5)
    for each in (plain, averaged):
        each.observe(doubles(100, 100)[None])
        each.apply(0)
    plain.load_state_dict(averaged.state_dict())
    averaged.load_state_dict(plain.state_dict())
    averaged.observe(doubles(40, 10)[None])
    assert averaged.apply(1)[0].tolist() == [0.5, 1]
    before = averaged.state_dict()
    with pytest.raises(MuonlabError, match="average of the saved clip state is a list; expected a tensor"):
        averaged.load_state_dict(averaged.state_dict() | {"average": [1.0, 2.0]})
    assert torch.equal(averaged.state_dict()["average"], before["average"])


def test_the_average_follows_weights_made_more_precise():
    layout = flat_layout(dtype=torch.float32)
    qk_clip = QKClip([layout], tau=20.0, average=0.5)
    qk_clip.observe(doubles(40, 10)[None])
    qk_clip.apply(0)
    for block in (*layout.query, *layout.key):
        block.parameter.data = block.parameter.data.double()
    qk_clip.observe(doubles(120, 10)[None])
    gamma = qk_clip.apply(1)
    assert gamma.dtype is torch.float64
    assert gamma[0].tolist() == [0.25, 1]


@pytest.mark.parametrize(("average", "exact"), [(0.0, False), (0.5, True)])
def test_training_measures_every_maximum_that_an_average_needs(average, exact):
    """Between exact measurements the bounds of heads below tau would enter the average."""
    from muonlab.models import build_model
    from muonlab.train.module import LanguageModel

    model = build_model("nanogpt", vocab_size=7, context=256, d_model=8, num_heads=2, num_layers=1)
    optimizer = build_optimizer("muonclip", model, tau=100.0, clip_average=average)
    config = SimpleNamespace(trainer=SimpleNamespace(exact_every=1000))
    module = SimpleNamespace(model=model, optimizer=optimizer, config=config)
    model(torch.zeros(1, 256, dtype=torch.long))
    LanguageModel._measure_logits(module, 1)
    assert (module.exact is None) == exact


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_power": 0.0}, "optimizer.clip_power must be a number above 0 and at most 1"),
        ({"clip_power": 2.0}, "clip_power"),
        ({"clip_average": 1.0}, "clip_average"),
        ({"clip_avrage": 0.5}, "did you mean 'clip_average'"),
    ],
)
@pytest.mark.parametrize("name", ["muonclip", "adamwclip"])
def test_a_mistake_is_one_sentence(name, settings, message):
    from muonlab.models import build_model

    with pytest.raises(MuonlabError, match=message) as caught:
        build_optimizer(name, build_model("nanogpt", vocab_size=7), **settings)
    assert "\n" not in str(caught.value)
