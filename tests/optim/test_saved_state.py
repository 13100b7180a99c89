"""States that do not fit an optimizer: each is refused in one sentence, and the optimizer stays what it was."""

import copy

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim import AdamW, Muon, MuonClip, QKClip


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon(shape=(8, 8), **settings):
    return Muon([("w", nn.Parameter(draw(*shape)))], **settings)


def adamw(shape=(8, 8)):
    return AdamW([("w", nn.Parameter(draw(*shape)))])


def normuon(shape=(8, 8)):
    return muon(shape, after=["normuon"])


def corrected(shape=(8, 8)):
    return muon(shape, momentum_kind="ema_corrected")


def mixed(shape=(8, 8)):
    gain = {"params": [("g", nn.Parameter(draw(*shape)))], "rule": "adamw"}
    return Muon([{"params": [("w", nn.Parameter(draw(8, 8)))]}, gain])


def clipped(shape=(8, 8)):
    q, k = (nn.Parameter(draw(*shape, seed=i)) for i in range(2))
    layout = AttentionLayout("layer", 2, 2, (HeadRows(q, 2),), (HeadRows(k, 2),))
    return MuonClip([("w", q), ("k", k)], [layout], tau=10.0)


BUILDERS = [muon, adamw, normuon, corrected, mixed, clipped]


def train(optimizer, steps=2):
    for step in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = draw(*param.shape, seed=100 + step)
        optimizer.observe(torch.tensor([5.0, 40.0])[None])
        optimizer.step()
    return optimizer


def everything(optimizer):
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((optimizer.state_dict(), weights))


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def refuses(optimizer, state, message):
    """The state is refused with this sentence, nothing of the optimizer changes, and it trains on as before."""
    before, given = everything(optimizer), copy.deepcopy(state)
    with pytest.raises(MuonlabError, match=message) as caught:
        optimizer.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert_equal(everything(optimizer), before)
    assert_equal(state, given)
    train(optimizer, 1)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("saved", [(16, 16), (4, 8), (4, 16), (64,), (8, 8, 1), (1, 8, 8), (1,), ()])
def test_buffers_of_another_shape_than_their_parameter_are_refused(build, saved):
    """Larger ones, smaller ones, and those with as many numbers; fused AdamW wrote past them or nonsense."""
    state = train(build()).state_dict()
    buffers = state["state"][max(state["state"])]
    entry = next(name for name in buffers if name in ("momentum_buffer", "exp_avg"))
    buffers[entry] = torch.zeros(saved)
    name = "w" if len(state["state"]) == 1 else "[gk]"
    shape = str(saved).replace("(", r"\(").replace(")", r"\)")
    refuses(
        train(build()),
        state,
        rf"{entry} of {name} was saved as a float32 tensor of shape {shape}; expected.*8",
    )


def entries(build):
    buffers = train(build()).state_dict()["state"][0]
    return [(build, name) for name in buffers]


@pytest.mark.parametrize(("build", "entry"), [case for build in BUILDERS for case in entries(build)])
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 5), torch.zeros(8, 8, dtype=torch.int64), torch.zeros(8, 8) * 1j, "text", None, [1.0]],
)
def test_no_entry_may_be_of_another_kind_or_shape(build, entry, wrong):
    state = train(build()).state_dict()
    state["state"][0][entry] = wrong
    refuses(train(build()), state, f"{entry} of w was saved as a ")


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_the_state_of_a_whole_optimizer_of_other_shapes_is_refused(build):
    state = train(build((16, 8))).state_dict()
    refuses(
        train(build()), state, r"was saved as a float32 tensor of shape \(16, 8\); expected .* shape \(8, 8\)"
    )


def test_a_saved_view_that_the_parameter_does_not_have_is_refused():
    state = train(muon((12, 8), row_blocks=3)).state_dict()
    for buffer in state["state"].values():
        buffer["momentum_buffer"] = torch.zeros(8, 8)
    refuses(train(muon()), state, "w of shape .* 8 rows cannot be cut into 3 equal blocks")


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_a_state_that_lacks_an_entry_is_refused(build):
    """Every entry at every level whose loss could not be made up for."""
    whole = train(build()).state_dict()
    for entry in ("state", "param_groups", "steps_done"):
        state = {name: value for name, value in whole.items() if name != entry}
        refuses(train(build()), state, f"the saved optimizer state has no {entry}; it is incomplete")
    for entry in whole["param_groups"][0]:
        if entry in ("param_names", "reasons"):
            continue
        state = copy.deepcopy(whole)
        del state["param_groups"][0][entry]
        refuses(train(build()), state, f"group_0.*({entry}|was saved under None)")
    for entry in set(whole["state"][0]) & {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}:
        state = copy.deepcopy(whole)
        state["state"][0]["momentum_product"] = 0.5  # an empty state would mean: not updated yet
        del state["state"][0][entry]
        refuses(train(build()), state, f"the saved state of w has no {entry}")


def test_a_clip_state_that_lacks_an_entry_or_has_other_sizes_is_refused():
    whole = train(clipped()).state_dict()
    for entry in ("heads", "history"):
        clip = {name: value for name, value in whole["clip"].items() if name != entry}
        refuses(train(clipped()), {**whole, "clip": clip}, f"the saved clip state has no {entry}")
    for entry in whole["clip"]["history"]:
        for wrong in (torch.zeros(3), torch.zeros(1), torch.zeros(2, 1), 1.0):
            state = copy.deepcopy(whole)
            state["clip"]["history"][entry] = wrong
            refuses(train(clipped()), state, rf"{entry} of the saved clip history is .*; expected .* \(2,\)")
        state = copy.deepcopy(whole)
        del state["clip"]["history"][entry]
        refuses(train(clipped()), state, f"the saved clip history has no {entry}")


def test_a_clip_by_itself_keeps_its_history_where_a_state_is_refused():
    _, layout = clipped(), clipped().clip.layouts
    clip = QKClip(layout, tau=10.0)
    clip.observe(torch.tensor([5.0, 40.0])[None])
    clip.apply(0)
    before, state = clip.state_dict(), QKClip(layout).state_dict()
    state["history"]["last_trigger"] = torch.zeros(3)  # the last of the tensors
    with pytest.raises(MuonlabError, match="last_trigger"):
        clip.load_state_dict(state)
    assert_equal(clip.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [], "the saved optimizer state is a list; expected a dict"),
        (lambda state: None, "the saved optimizer state is a NoneType"),
        (lambda state: torch.zeros(2), r"is a float32 tensor of shape \(2,\); expected a dict"),
        (lambda state: {}, "has no state and no param_groups and no steps_done"),
        (lambda state: {**state, "steps_done": -1}, "steps_done .* not -1"),
        (lambda state: {**state, "steps_done": "3"}, "steps_done .* not '3'"),
        (lambda state: {**state, "state": []}, "'state' of the saved state is a list; expected a dict"),
        (lambda state: {**state, "param_groups": {}}, "'param_groups' .* is a dict; expected a list"),
        (
            lambda state: {**state, "param_groups": [3]},
            "group_0' of the saved state is a int; expected a dict",
        ),
        (lambda state: {**state, "state": {0: [1]}}, "the saved state of w is a list; expected a dict"),
        (lambda state: {**state, "state": {7: state["state"][0]}}, r"no group holds: \[7\]"),
        (lambda state: {**state, "clip": 3}, "the saved clip state is a int"),
        (lambda state: in_group(state, params=[0, 0]), "does not hold the parameters that were saved"),
        (lambda state: in_group(state, params=None), "params of .* were saved as None"),
        (lambda state: in_group(state, momentum=2.0), "momentum of a muon group must be a number .* not 2.0"),
        (lambda state: in_group(state, ns_steps="many"), "ns_steps of a muon group must be a whole number"),
        (lambda state: in_buffers(state, max_exp_avg_sq=torch.zeros(8, 8)), "unknown entry 'max_exp_avg_sq'"),
    ],
)
def test_what_is_no_state_is_refused(change, message):
    optimizer = train(clipped())
    state = train(muon()).state_dict()
    if "clip" not in message:
        optimizer = train(muon())
    else:
        state = optimizer.state_dict()
    refuses(optimizer, change(state), message)


def in_group(state, **changes):
    return {**state, "param_groups": [{**state["param_groups"][0], **changes}]}


def in_buffers(state, **changes):
    return {**state, "state": {0: {**state["state"][0], **changes}}}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon])
def test_the_state_of_torchs_optimizers_is_refused(kind):
    param = nn.Parameter(draw(8, 8))
    param.grad = draw(8, 8)
    theirs = kind([param])
    theirs.step()
    refuses(
        train(adamw()),
        theirs.state_dict(),
        "no steps_done; it is incomplete, or not a state saved by muonlab",
    )


def test_a_parameter_that_had_no_gradient_yet_has_no_state_and_loads():
    optimizer = mixed()
    param = optimizer.param_groups[1]["params"][0]
    param.grad = draw(8, 8)
    optimizer.step()
    other = train(mixed())
    other.load_state_dict(optimizer.state_dict())
    assert_equal(other.state_dict(), optimizer.state_dict())


def test_hooks_run_before_the_check_and_after_the_restoration():
    """torch's contract: a hook may rename or mend a state, and another sees it restored."""
    saved, seen = train(muon()).state_dict(), []
    optimizer = muon()
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.bfloat16()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "steps_done": state["steps"]})
    optimizer.register_load_state_dict_post_hook(
        lambda self: seen.append(
            (self.steps_done, *(s["momentum_buffer"].dtype for s in self.state.values()))
        )
    )
    optimizer.load_state_dict(
        {"steps": saved["steps_done"], **{k: saved[k] for k in ("state", "param_groups")}}
    )
    assert seen == [(2, torch.float32)]
    with pytest.raises(KeyError):
        optimizer.load_state_dict(saved)  # the user's hook fails: ours are gone all the same
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
