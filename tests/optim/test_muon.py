"""Muon and MuonClip as a user holds them: the update equation, parameter lists and groups, and refusals."""

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim import AdamW, Muon, MuonClip, newton_schulz
from muonlab.optim.muon_rule import SCALE_RULES

SIZES = st.integers(1, 10)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(*shapes, dtype=torch.float64):
    params = [nn.Parameter(draw(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    for i, param in enumerate(params):
        param.grad = draw(*param.shape, seed=50 + i, dtype=dtype)
    return params


@hypothesis.settings(deadline=None)
@given(SIZES, SIZES, st.sampled_from(sorted(SCALE_RULES)), st.floats(0, 0.5), st.floats(0, 0.5))
def test_one_step_is_the_equation(rows, cols, rule, lr, weight_decay):
    """W <- (1 - lr wd) W - lr scale U f(S) V^T, by singular values and to the last digits."""
    (param,) = parameters((rows, cols))
    weight = param.detach().clone()
    Muon([param], lr=lr, scale_rule=rule, weight_decay=weight_decay, momentum=0.0).step()
    U, S, Vh = torch.linalg.svd(param.grad / param.grad.norm(), full_matrices=False)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    scale = {
        "original": max(1, rows / cols) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, cols) ** 0.5,
        "unit_update_rms": max(rows, cols) ** 0.5,
        "spectral": (rows / cols) ** 0.5,
        "none": 1.0,
    }[rule]
    expected = (1 - lr * weight_decay) * weight - lr * scale * (U * S) @ Vh
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-12)


@hypothesis.settings(deadline=None)
@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=8))
def test_matrices_updated_together_are_updated_as_if_alone(shapes):
    together, alone = parameters(*shapes), parameters(*shapes)
    Muon(together, lr=0.1, weight_decay=0.1).step()
    for param in alone:
        Muon([param], lr=0.1, weight_decay=0.1).step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-13)


def test_groups_carry_their_own_rule_and_settings():
    matrix, slow, gain = parameters((4, 6), (4, 6), (6,))
    copies = [nn.Parameter(p.detach().clone()) for p in (matrix, slow, gain)]
    for copy, param in zip(copies, (matrix, slow, gain), strict=True):
        copy.grad = param.grad.clone()
    optimizer = Muon(
        [
            {"params": [matrix]},
            {"params": [slow], "lr": 0.001, "scale_rule": "none"},
            {"params": [gain], "rule": "adamw", "weight_decay": 0.1},
        ],
        lr=0.1,
        adamw_lr=0.01,
    )
    optimizer.step()
    Muon([copies[0]], lr=0.1).step()
    Muon([copies[1]], lr=0.001, scale_rule="none").step()
    torch.optim.AdamW([copies[2]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step()
    for copy, param in zip(copies, (matrix, slow, gain), strict=True):
        assert torch.equal(copy, param)


def test_adamw_is_torchs_adamw_to_the_bit():
    ours, theirs = (
        parameters((4, 6), (6,), dtype=torch.float32),
        parameters((4, 6), (6,), dtype=torch.float32),
    )
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = AdamW(ours, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for step in range(4):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for param in params:
                param.grad = draw(*param.shape, seed=step, dtype=torch.float32)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_parameters_may_come_with_names():
    (param,) = parameters((4, 6))
    optimizer = Muon([("layers.0.weight", param)])
    assert [route.name for route in optimizer.routing] == ["layers.0.weight"]


def test_lr_scale_multiplies_the_learning_rate_of_a_group():
    a, b = parameters((4, 6), (4, 6))
    optimizer = Muon([{"params": [a]}, {"params": [b], "lr_scale": 0.1}], lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def test_a_learning_rate_tensor_is_read_at_every_step():
    """As a captured graph needs it: changing the tensor in place changes the next step."""
    fixed, read = parameters((4, 6)), parameters((4, 6))
    lr = torch.tensor(0.1, dtype=torch.float64)
    by_number = Muon(fixed, lr=0.1, weight_decay=0.2)
    by_tensor = Muon(read, lr=lr, weight_decay=0.2)
    for value in (0.1, 0.03):
        by_number.param_groups[0]["lr"] = value
        lr.fill_(value)
        by_number.step()
        by_tensor.step()
    torch.testing.assert_close(read[0], fixed[0], rtol=0, atol=1e-14)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    (param,) = parameters((4, 6))
    optimizer = Muon([param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    expected = param.detach().square().sum()
    assert torch.equal(optimizer.step(closure), expected)
    assert param.detach().square().sum() < expected


def test_more_steps_come_closer_to_the_polar_factor():
    errors = []
    for steps in (1, 3, 6):
        (param,) = parameters((6, 9))
        weight = param.detach().clone()
        settings = {"momentum": 0.0, "ns_schedule": "polar_express", "ns_steps": steps, "scale_rule": "none"}
        Muon([param], lr=1.0, **settings).step()
        errors.append((weight - param.detach() - newton_schulz(param.grad, "svd")).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def test_a_schedule_object_and_its_name_are_one_setting():
    from muonlab.optim.schedules import SCHEDULES

    results = []
    rows = SCHEDULES["polar_express_1.02"].rows
    for schedule in ("polar_express_1.02", SCHEDULES["polar_express_1.02"]):
        (param,) = parameters((6, 9))
        optimizer = Muon([param], ns_schedule=schedule)
        assert optimizer.param_groups[0]["ns_schedule"] == "polar_express_1.02"
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
    (param,) = parameters((6, 9))
    assert Muon([param], ns_schedule=[list(row) for row in rows]).param_groups[0]["ns_schedule"] == rows


def test_the_margin_of_a_schedule_of_ones_own_survives():
    """A margin m is folded into the first row: p(x/m) has a/m, b/m^3, c/m^5."""
    from dataclasses import replace

    from muonlab.optim.schedules import SCHEDULES

    own = replace(SCHEDULES["jordan"], name="own", margin=1.3)
    (param,) = parameters((6, 9))
    weight = param.detach().clone()
    Muon([param], lr=1.0, ns_schedule=own, scale_rule="none", momentum=0.0).step()
    expected = newton_schulz(param.grad, own)
    torch.testing.assert_close(weight - param.detach(), expected, rtol=0, atol=1e-12)


def test_muonclip_around_somebody_elses_attention():
    """Query and key of one layer as two plain Linears; the clip brings the next forward's logits to tau."""
    query, key = (nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(2))
    x = draw(5, 8)

    def logits():
        q, k = (f(x).view(5, 2, 4).transpose(0, 1) for f in (query, key))
        return q @ k.mT / 2

    layout = AttentionLayout("attn", 2, 2, (HeadRows(query.weight, 4),), (HeadRows(key.weight, 4),))
    optimizer = MuonClip([query.weight, key.weight], [layout], tau=0.01, lr=0.0)
    logits().sum().backward()
    optimizer.observe(logits().detach().amax((1, 2))[None])
    optimizer.step()
    assert (optimizer.gammas()[0] < 1).all()
    torch.testing.assert_close(logits().amax((1, 2)), torch.full((2,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "lr of a muon group must be a finite number of at least 0, not -1"),
        ({"lr": float("nan")}, "lr of a muon group must be"),
        ({"lr": "fast"}, "not 'fast'"),
        ({"momentum": 1.0}, "momentum of a muon group must be a number of at least 0 and below 1, not 1.0"),
        ({"weight_decay": -0.1}, "weight_decay of a muon group"),
        ({"nesterov": "perhaps"}, "nesterov of a muon group must be true or false, not 'perhaps'"),
        ({"momentum_kind": "emma"}, "unknown momentum_kind of a muon group 'emma'; did you mean 'ema'"),
        ({"scale_rule": "match_rms"}, "did you mean 'match_rms_adamw'"),
        ({"weight_decay_kind": "coupled"}, "did you mean 'decoupled'"),
        ({"ns_schedule": "jordn"}, "did you mean 'jordan'"),
        ({"ns_steps": 0}, "ns_steps of a muon group must be a whole number of at least 1 or null, not 0"),
        ({"ns_dtype": "float8"}, "unknown ns_dtype of a muon group 'float8'"),
        ({"ns_backend": "gramm"}, "did you mean 'gram'"),
        ({"beta2": 1.0}, "beta2 of a muon group must be a number of at least 0 and below 1"),
        ({"row_blocks": [2, 2], "weight_decay_kind": "shape_scaled"}, "blocks of one shape"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        Muon([nn.Parameter(torch.zeros(4, 4))], **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rule": "sgd"}, "unknown rule of a parameter group 'sgd'"),
        ({"momentun": 0.9}, "unknown setting of a muon group 'momentun'; did you mean 'momentum'"),
        ({"rule": "adamw", "momentum": 0.9}, "unknown setting of an adamw group 'momentum'"),
        (
            {"rule": "adamw", "betas": 0.9},
            "betas of an adamw group must be a list of 2 entries, each a number of at least 0 and below 1, not 0.9",
        ),
        ({"rule": "adamw", "betas": (0.9, 1.0)}, r"below 1, not \(0.9, 1.0\)"),
        ({"lr_scale": -1.0}, "lr_scale must be"),
    ],
)
def test_wrong_groups_are_refused_in_one_sentence(group, message):
    with pytest.raises(MuonlabError, match=message):
        Muon([{"params": [nn.Parameter(torch.zeros(4, 4))], **group}])


def test_a_parameter_given_twice_is_refused():
    param = nn.Parameter(torch.zeros(4, 4))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(MuonlabError, match="update it twice"):
        Muon([param, param])


def test_a_refused_group_is_not_left_behind():
    optimizer = Muon([nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(
        MuonlabError, match=r"cannot update group_1\[0\] of shape \(4,\), which is not a matrix"
    ):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_what_is_not_real_is_refused_by_name(dtype):
    param = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=dtype.is_complex)
    with pytest.raises(MuonlabError, match=rf"layers\.0\.weight is {dtype}"):
        Muon([("layers.0.weight", param)])


def test_a_sparse_gradient_is_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW([("wte.weight", embedding.weight)])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(MuonlabError, match=r"the gradient of wte\.weight is sparse"):
        optimizer.step()


def test_a_parameter_sharded_by_columns_is_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        param = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Shard(1)]))
        with pytest.raises(MuonlabError, match=r"layers\.0\.weight is spread over ranks as"):
            Muon([("layers.0.weight", param)])
    finally:
        dist.destroy_process_group()


def test_a_gradient_of_another_dtype_is_converted():
    low, high = parameters((4, 6), dtype=torch.float32), parameters((4, 6), dtype=torch.float32)
    low[0].grad = None
    low[0].grad_dtype = torch.bfloat16
    low[0].grad = high[0].grad.bfloat16()
    high[0].grad = low[0].grad.float()
    for params in (low, high):
        Muon(params).step()
    assert torch.equal(low[0], high[0])
