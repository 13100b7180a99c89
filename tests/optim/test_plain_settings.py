"""NumPy's numbers, lists and dicts as settings: checkpoints hold plain values, and no list breaks a step."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim import AdamW, Muon, MuonClip
from muonlab.optim.rules import plain_value
from muonlab.optim.schedule_design import Schedule


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer, steps=2):
    for step in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = draw(*param.shape, seed=100 + step)
        optimizer.observe(torch.tensor([5.0, 40.0])[None])
        optimizer.step()
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


def loaded(optimizer):
    """The state through a file that may hold tensors and plain values alone."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def muon(**settings):
    return Muon([nn.Parameter(draw(8, 8))], **settings)


def adamw(**settings):
    return AdamW([nn.Parameter(draw(8, 8))], **settings)


def muon_clip(**settings):
    q, k = (nn.Parameter(draw(4, 4, seed=i)) for i in range(2))
    layout = AttentionLayout("layer", 2, 2, (HeadRows(q, 2),), (HeadRows(k, 2),))
    return MuonClip([q, k], [layout], **settings)


ROWS = [[3.4445, -4.775, 2.0315], [2.0, -1.5, 0.5]]
# (builder, setting as Python gives it, as NumPy or a list gives it)
CASES = [
    (muon, "lr", 0.5, np.float64(0.5)),
    (muon, "lr", 0.5, np.float32(0.5)),
    (muon, "lr", 0.5, np.float16(0.5)),
    (muon, "lr", 0.5, np.array(0.5)),
    (muon, "lr", 1, np.int64(1)),
    (muon, "momentum", 0.5, np.float64(0.5)),
    (muon, "momentum_kind", "heavy_ball", np.str_("heavy_ball")),
    (muon, "nesterov", False, np.bool_(False)),
    (muon, "ns_steps", 3, np.int32(3)),
    (muon, "ns_schedule", ROWS, np.array(ROWS)),
    (muon, "ns_schedule", ROWS, [np.array(row) for row in ROWS]),
    (muon, "ns_schedule", ROWS[0], np.array(ROWS[0])),
    (
        muon,
        "ns_schedule",
        Schedule("s", tuple(map(tuple, ROWS)), ""),
        Schedule("s", tuple(np.array(ROWS)), ""),
    ),
    (muon, "ns_dtype", "float64", np.str_("float64")),
    (muon, "weight_decay", 0.25, np.float32(0.25)),
    (muon, "cautious", True, np.bool_(True)),
    (muon, "row_blocks", 2, np.int64(2)),
    (muon, "row_blocks", (3, 5), np.array([3, 5])),
    (muon, "row_blocks", (3, 5), [np.int64(3), 5]),
    (muon, "col_blocks", 2, np.uint8(2)),
    (muon, "after", ("normuon",), ["normuon"]),
    (adamw, "lr", 0.5, np.float64(0.5)),
    (adamw, "betas", (0.5, 0.75), [0.5, 0.75]),
    (adamw, "betas", (0.5, 0.75), np.array([0.5, 0.75])),
    (adamw, "betas", (0.5, 0.75), (np.float32(0.5), np.float64(0.75))),
    (adamw, "eps", 1e-8, np.float64(1e-8)),
    (adamw, "weight_decay", 0.25, np.float64(0.25)),
    (muon_clip, "tau", 10.0, np.float64(10.0)),
    (muon_clip, "alpha", 0.25, np.float32(0.25)),
    (muon_clip, "windows", [[0, 1]], np.array([[0, 1]])),
]


@pytest.mark.parametrize(("build", "setting", "python", "other"), CASES)
def test_a_setting_may_be_numpys_or_a_list_and_is_saved_as_pythons(build, setting, python, other):
    ours, theirs = build(**{setting: python}), build(**{setting: other})
    for a, b in zip(train(ours), train(theirs), strict=True):
        assert torch.equal(a, b)
    state = loaded(theirs)
    assert state["param_groups"] == ours.state_dict()["param_groups"]
    assert_plain(state["param_groups"])
    assert_plain(theirs.defaults)


@pytest.mark.parametrize(
    ("build", "setting", "python", "other"), [case for case in CASES if case[0] is not muon_clip]
)
def test_the_same_holds_for_a_setting_of_a_group(build, setting, python, other):
    face = {muon: Muon, adamw: AdamW}[build]
    optimizer = face([{"params": [nn.Parameter(draw(8, 8))], setting: other}])
    assert torch.equal(train(optimizer)[0], train(build(**{setting: python}))[0])
    assert_plain(loaded(optimizer)["param_groups"])


def assert_plain(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            assert_plain(each)
    else:
        assert value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize("kind", ["ema", "heavy_ball", "ema_corrected"])
def test_what_a_scheduler_writes_may_be_numpys(kind):
    """A factor from NumPy makes the rate a NumPy number; a momentum schedule written by hand as well."""
    optimizer = muon(momentum_kind=kind)
    scheduler = LambdaLR(optimizer, lambda step: np.float64(1 / (step + 1)))
    for _ in range(2):
        optimizer.param_groups[0]["momentum"] = np.float64(0.9)
        train(optimizer, 1)
        scheduler.step()
    state = loaded(optimizer)
    assert_plain(state["param_groups"])
    muon(momentum_kind=kind).load_state_dict(state)


def test_lr_scale_may_be_numpys():
    optimizer = Muon([{"params": [nn.Parameter(draw(8, 8))], "lr_scale": np.float64(0.5)}])
    assert_plain(loaded(optimizer)["param_groups"])


@pytest.mark.parametrize("note", [[1, [2]], {"a": 1}, {1, 2}, np.arange(3), {"a": [np.float64(1)]}])
def test_a_note_in_a_group_does_not_break_the_step(note):
    """torch's optimizers let a group hold anything."""
    noted, plain = muon(), muon()
    noted.param_groups[0]["note"] = note
    assert torch.equal(train(noted)[0], train(plain)[0])


@pytest.mark.parametrize("unhashable", [[0.5, 0.75], np.array([0.5, 0.75])])
def test_a_list_written_into_a_setting_later_does_not_break_the_step(unhashable):
    written, given = adamw(), adamw(betas=(0.5, 0.75))
    written.param_groups[0]["betas"] = unhashable
    assert torch.equal(train(written)[0], train(given)[0])


@pytest.mark.parametrize("setting", list(Muon([nn.Parameter(draw(2, 2))]).defaults))
@pytest.mark.parametrize("wrong", [{}, {"a": 1}, {1}, [[]], [{}], object()])
def test_what_is_no_setting_is_refused_in_one_sentence(setting, wrong):
    """When the group is added, and where it is written later, before anything is updated."""
    with pytest.raises(MuonlabError) as caught:
        muon(**{setting: wrong})
    assert "\n" not in str(caught.value)
    optimizer = muon()
    with pytest.raises(MuonlabError) as caught:
        optimizer.add_param_group({"params": [nn.Parameter(draw(8, 8))], setting: wrong})
    assert len(optimizer.param_groups) == 1
    if setting not in ("row_blocks", "col_blocks", "flatten") and type(wrong) is not object:
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        optimizer.param_groups[0][setting] = wrong
        with pytest.raises(MuonlabError):
            train(optimizer)
        assert all(
            torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True)
        )


@pytest.mark.parametrize("value", [[1], {"a": 1}, {1}, 3, "text"])
def test_an_unknown_setting_is_refused_whatever_its_value(value):
    with pytest.raises(MuonlabError, match="unknown setting of a muon group 'note'"):
        Muon([{"params": [nn.Parameter(draw(8, 8))], "note": value}])


def test_the_name_of_a_group_is_text():
    with pytest.raises(MuonlabError, match=r"the name of a parameter group must be text, not \['a'\]"):
        Muon([{"params": [nn.Parameter(draw(8, 8))], "name": ["a"]}])


@pytest.mark.parametrize("number", [0.1, 1e300, -0.0, 5e-324, float("inf")])
def test_plain_numbers_keep_their_bits(number):
    assert repr(plain_value(np.float64(number))) == repr(number)
    assert plain_value(np.float32(0.1)) == float(np.float32(0.1))
    assert plain_value(np.int64(2**62 + 1)) == 2**62 + 1


def test_a_tensor_stays_the_very_tensor():
    """A learning rate that a captured graph reads from the device."""
    rate = torch.tensor(0.1)
    assert plain_value(rate) is rate
    assert muon(lr=rate).param_groups[0]["lr"] is rate
