"""The rule that chooses how an orthogonalisation is computed."""

import logging

import pytest
import torch

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim import backend
from muonlab.optim.backend import Backend, blocks, choose_backend, cost
from muonlab.optim.schedules import resolve_schedule

JORDAN = resolve_schedule("jordan").rows


def test_the_plain_form_is_one_block_per_step():
    assert blocks(JORDAN, "plain", torch.float32) == [(row,) for row in JORDAN]


@pytest.mark.parametrize(
    ("schedule", "dtype", "lengths"),
    [
        ("jordan", torch.float64, [5]),
        ("jordan", torch.float32, [5]),
        ("jordan", torch.float16, [2, 2, 1]),
        ("jordan", torch.bfloat16, [1, 1, 1, 1, 1]),
        ("polar_express_1.02", torch.float32, [5]),
        ("deepseek", torch.float32, [6, 4]),
    ],
)
def test_blocks_end_before_rounding_has_grown_too_far(schedule, dtype, lengths):
    rows = resolve_schedule(schedule).rows
    parts = blocks(rows, "gram", dtype)
    assert sum(parts, ()) == rows
    assert [len(block) for block in parts] == lengths


def test_cost_counts_the_products_of_both_forms():
    for n, m in ((3, 3), (4, 9)):
        assert cost(n, m, JORDAN, "plain", torch.float32) == resolve_schedule("jordan").flops(n, m)
        assert cost(n, m, JORDAN, "gram", torch.float32) == 4 * n * n * m + 34 * n**3


def test_the_gram_form_is_chosen_for_long_matrices():
    for device in ("cpu", "cuda"):
        assert choose_backend(64, 64, JORDAN, torch.float32, device).form == "plain"
        assert choose_backend(64, 256, JORDAN, torch.float32, device).form == "gram"


def test_stacks_shrink_with_the_matrix_and_hold_more_elsewhere_than_on_a_cpu():
    sizes = [choose_backend(n, n, JORDAN, torch.float32, "cpu").stack for n in (32, 64, 128, 4096)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    for n in (32, 512, 4096):
        there = choose_backend(n, n, JORDAN, torch.float32, "cuda")
        assert there.stack >= choose_backend(n, n, JORDAN, torch.float32, "cpu").stack
        assert there.strip == 0


def test_a_choice_is_logged_once(caplog):
    backend._remembered_rule.cache_clear()
    with caplog.at_level(logging.INFO, logger="muonlab.optim.backend"):
        for _ in range(3):
            choose_backend(48, 96, JORDAN, torch.float32, "cpu")
    assert len(caplog.messages) == 1
    assert "48 x 96 on cpu in torch.float32, 5 steps: Backend(form='gram'" in caplog.messages[0]


def test_a_backend_that_cannot_be_is_refused():
    with pytest.raises(
        MuonlabError, match=str(unknown_name("orthogonalisation form", "fast", ("plain", "gram")))
    ):
        Backend("fast")
    with pytest.raises(MuonlabError, match="negative"):
        Backend("gram", stack=-1)
