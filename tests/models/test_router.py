"""The router against its equations, and its balance: by bias, which has no gradient, or by Switch's loss."""

import pytest
import torch

from muonlab.models.experts import group_by_expert
from muonlab.models.router import Router, normalised_scores

TOKENS, WIDTH, EXPERTS, K = 40, 6, 8, 3


def router(balance="bias", seed=0, **settings):
    torch.manual_seed(seed)
    return Router(WIDTH, EXPERTS, K, balance=balance, **settings).double()


def inputs(seed=1, tokens=TOKENS):
    return torch.randn(
        tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True
    )


def test_gates_are_the_normalised_scores_of_the_highest_scaled():
    made, x = router(scaling=2.5), inputs()
    choices, gates, logits = made(x)
    scores = 1 / (1 + (-(x @ made.weight.T)).exp())
    torch.testing.assert_close(logits.sigmoid(), scores)
    for t in range(TOKENS):
        best = sorted(range(EXPERTS), key=lambda e: -scores[t, e].item())[:K]
        assert sorted(choices[t].tolist()) == sorted(best)
        expected = 2.5 * scores[t, choices[t]] / scores[t, best].sum()
        torch.testing.assert_close(gates[t], expected, rtol=1e-12, atol=0)


def test_gates_stay_finite_when_every_score_is_zero():
    made = router().float()
    x = torch.ones(3, WIDTH)
    with torch.no_grad():
        made.weight.fill_(-1e4)
    assert torch.equal(made(x)[1], torch.zeros(3, K))


def test_the_bias_changes_the_choice_and_neither_gates_nor_gradients():
    """Of tokens whose choice the bias leaves alone, gates and gradients are the same, but for the order of sums."""
    made, x = router(), inputs()
    choices, gates, _ = made(x)
    with torch.no_grad():
        made.balance_bias[2] = 0.1
    biased_choices, biased_gates, _ = made(x)
    same = (choices.sort(-1).values == biased_choices.sort(-1).values).all(-1)
    assert 0 < same.sum() < TOKENS
    assert (biased_choices == 2).sum() > (choices == 2).sum()

    def by_expert(choices, gates):
        return gates.new_zeros(TOKENS, EXPERTS).scatter(1, choices, gates)[same]

    pairs = (choices, gates), (biased_choices, biased_gates)
    torch.testing.assert_close(by_expert(*pairs[0]), by_expert(*pairs[1]), rtol=1e-14, atol=0)
    direction = torch.randn(int(same.sum()), EXPERTS, dtype=torch.float64)
    gradients = [torch.autograd.grad(by_expert(*pair), (x, made.weight), direction) for pair in pairs]
    for plain, biased in zip(*gradients, strict=True):
        torch.testing.assert_close(biased, plain, rtol=1e-13, atol=1e-15)


def test_without_bias_balance_the_buffer_is_not_read():
    made, x = router("none"), inputs()
    choices = made(x)[0]
    with torch.no_grad():
        made.balance_bias.copy_(torch.arange(EXPERTS))
    assert torch.equal(made(x)[0], choices)
    made.end_step(torch.arange(EXPERTS))
    assert torch.equal(made.balance_bias, torch.arange(EXPERTS).float())


def test_a_step_moves_each_bias_by_the_speed_against_its_load():
    made = router(balance_speed=0.25)
    made.end_step(torch.tensor([9, 0, 4, 4, 5, 3, 4, 3]))  # mean 4
    assert made.balance_bias.tolist() == [-0.25, 0.25, 0, 0, -0.25, 0.25, 0, 0.25]


def test_bias_updates_balance_a_skewed_router():
    """Every token prefers the same experts, and yet after the updates all are used alike."""
    made = router(balance_speed=0.01)
    with torch.no_grad():
        made.weight[:, 0] = torch.linspace(-2, 2, EXPERTS)
    violations = []
    for step in range(300):
        x = inputs(seed=step, tokens=256).detach()
        x[:, 0] = 1.0
        loads = group_by_expert(made(x)[0], EXPERTS).loads
        violations.append((loads.max() / loads.float().mean() - 1).item())
        made.end_step(loads)
    assert violations[0] > 1.2
    assert sum(violations[-20:]) / 20 < 0.2


def test_the_balance_loss_is_switchs():
    made, x = router("loss", balance_loss=0.5), inputs()
    choices, _, logits = made(x)
    loads = group_by_expert(choices, EXPERTS).loads
    scores = (x @ made.weight.T).sigmoid()
    f = [(choices == e).sum().item() / (TOKENS * K) for e in range(EXPERTS)]
    p = [(scores[:, e] / scores.sum(-1)).mean() for e in range(EXPERTS)]
    expected = 0.5 * EXPERTS * sum(a * b for a, b in zip(f, p, strict=True))
    loss = made.auxiliary_loss(logits, loads)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    even = made.auxiliary_loss(torch.zeros_like(logits), torch.full((EXPERTS,), 15))
    assert even.item() == pytest.approx(0.5)  # its value at balance


def test_descending_the_balance_loss_balances():
    made, x = router("loss", balance_loss=1.0), inputs(tokens=256).detach()
    x[:, 0] = 1.0
    with torch.no_grad():
        made.weight[:, 0] = torch.linspace(-2, 2, EXPERTS)
    spread = []
    for _ in range(200):
        choices, _, logits = made(x)
        loads = group_by_expert(choices, EXPERTS).loads
        spread.append((loads.max() / loads.float().mean() - 1).item())
        (gradient,) = torch.autograd.grad(made.auxiliary_loss(logits, loads), made.weight)
        with torch.no_grad():
            made.weight -= 5.0 * gradient
    assert spread[-1] < 0.5 * spread[0]


def test_the_bias_is_saved_and_stays_fp32_when_the_model_is_cast():
    made = router(balance_speed=1e-3)
    made.end_step(torch.arange(EXPERTS))
    assert set(made.state_dict()) == {"weight", "balance_bias"}
    bias = made.balance_bias.clone()
    made.bfloat16()
    assert made.weight.dtype is torch.bfloat16
    assert torch.equal(made.balance_bias, bias)
    assert made.loads.dtype is torch.int64


def test_scores_are_computed_in_fp32_under_autocast():
    made, x = router().float(), inputs().detach().float()
    expected = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        choices, gates, logits = made(x)
    assert torch.equal(logits, expected[2])
    assert torch.equal(gates, expected[1])
    assert torch.equal(choices, expected[0])


def test_normalised_scores_are_a_distribution():
    p = normalised_scores(torch.randn(5, EXPERTS, dtype=torch.float64))
    torch.testing.assert_close(p.sum(-1), torch.ones(5, dtype=torch.float64))
