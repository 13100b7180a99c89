"""What QK-Clip refuses, each in one sentence."""

import math

import pytest
import torch
from attention_oracle import NAME, doubles, flat_layout
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim.qk_clip import QKClip


def test_weights_on_two_devices_are_refused():
    q, k = (nn.Parameter(torch.ones(2, 2, device=device)) for device in ("meta", "cpu"))
    qk_clip = QKClip([AttentionLayout(NAME, 1, 1, (HeadRows(q, 2),), (HeadRows(k, 2),))])
    with pytest.raises(MuonlabError, match="lie on meta and cpu"):
        qk_clip.observe(torch.ones(1)[None])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": 0.0}, "tau is 0.0; the clip threshold must be finite and above 0"),
        ({"tau": -1.0}, "tau is -1.0"),
        ({"tau": math.nan}, "tau is nan"),
        ({"tau": math.inf}, "tau is inf; the clip threshold must be finite"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"maximum": "abs"}, "'abs'; did you mean 'absolute'"),
        ({"per": "heads"}, "'heads'; did you mean 'head'"),
        ({"momentum": "scaled"}, "'scaled'; did you mean 'scale'"),
        ({"power": 0.0}, r"power is 0.0; the exponent of the clip's factor must lie in \(0, 1\]"),
        ({"power": 1.5}, "power is 1.5"),
        ({"power": math.nan}, "power is nan"),
        ({"average": 1.0}, "average is 1.0; the weight of the past"),
        ({"average": -0.1}, "average is -0.1"),
        ({"windows": [[3, 3]]}, r"window \[3, 3\]: expected \[first step, last step\)"),
        ({"windows": [[-1, 3]]}, "window"),
        ({"windows": [[1, 2, 3]]}, "window"),
        ({"windows": [7]}, "window 7"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(wrong: dict, message: str):
    with pytest.raises(MuonlabError, match=message) as caught:
        QKClip([flat_layout()], **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("maxima", "message"),
    [
        (torch.ones(2), r"a float32 tensor of shape \(2,\); QK-Clip needs a tensor of shape"),
        (torch.ones(1, 3), r"of shape \(1, 3\); .* \(layers, heads\) = \(1, 2\), a row for each of layer_00"),
        (torch.ones(2, 2), r"of shape \(2, 2\)"),
        ({NAME: torch.ones(2)}, "are a dict; QK-Clip needs a tensor"),
        ([[1.0, 2.0]], "are a list; QK-Clip needs a tensor"),
    ],
)
def test_maxima_that_do_not_fit_the_layouts_are_refused(maxima: object, message: str):
    with pytest.raises(MuonlabError, match=message):
        QKClip([flat_layout()]).observe(maxima)


def test_a_step_without_maxima_is_refused_because_it_would_pass_for_one_without_need():
    qk_clip = QKClip([flat_layout()])
    with pytest.raises(MuonlabError, match="no max logits for step 4; call observe"):
        qk_clip.apply(4)
    qk_clip.observe(doubles(1, 1)[None])
    qk_clip.apply(4)
    with pytest.raises(MuonlabError, match="no max logits for step 5"):
        qk_clip.apply(5)


def test_co_scaling_without_buffers_and_verifying_before_a_step_are_refused():
    qk_clip = QKClip([flat_layout()], momentum="scale")
    with pytest.raises(MuonlabError, match="nothing to verify"):
        qk_clip.verify(lambda: doubles(1, 1)[None])
    qk_clip.observe(doubles(1, 1)[None])
    with pytest.raises(MuonlabError, match="momentum='scale' needs the optimizer's buffers"):
        qk_clip.apply(0)


def test_layouts_that_would_scale_a_row_twice_are_refused():
    one, other = flat_layout(name="layer_00"), flat_layout(name="layer_01")
    weight = one.query[0].parameter
    tied = AttentionLayout("layer_01", 2, 2, one.query, other.key)
    with pytest.raises(MuonlabError, match=r"layer_01: row 0 of a weight \(4, 3\) is declared twice"):
        QKClip([one, tied])
    with pytest.raises(MuonlabError, match="along dim 0 and 1"):
        QKClip([AttentionLayout(NAME, 1, 1, (HeadRows(weight, 2),), (HeadRows(weight, 1, offset=2, dim=1),))])
    with pytest.raises(MuonlabError, match="the same name"):
        QKClip([flat_layout(), flat_layout()])


def test_layouts_that_cannot_be_are_refused():
    weight = nn.Parameter(torch.ones(4, 3))
    rows = (HeadRows(weight, 2),)
    for build, message in (
        (lambda: HeadRows(weight, 0), "rows must be at least 1"),
        (lambda: HeadRows(weight, 2, offset=-1), "offset at least 0"),
        (lambda: HeadRows(weight, 2, stride=1), "stride 0 or at least the rows"),
        (lambda: HeadRows(weight, 2, dim=2), "which has 2 dimensions"),
        (lambda: AttentionLayout(NAME, 3, 1, rows, rows), "head 2 ends at row 6 of a weight with 4"),
        (lambda: AttentionLayout(NAME, 3, 2, rows, rows), "cannot share 2 key heads evenly"),
        (lambda: AttentionLayout(NAME, 2, 2, rows, ()), "must be declared together"),
        (lambda: AttentionLayout(NAME, 2, 2, (), ()), "no query rows are declared"),
        (lambda: QKClip([]), "at least one AttentionLayout"),
    ):
        with pytest.raises(MuonlabError, match=message):
            build()


def test_a_state_of_other_layers_or_another_shape_is_refused():
    state = QKClip([flat_layout()]).state_dict()
    with pytest.raises(
        MuonlabError, match=r"has heads \{'layer_00': 2\}; the layouts declare \{'other': 2\}"
    ):
        QKClip([flat_layout(name="other")]).load_state_dict(state)
    with pytest.raises(MuonlabError, match="the saved clip history has no gamma"):
        QKClip([flat_layout()]).load_state_dict(
            {**state, "history": {k: v for k, v in state["history"].items() if k != "gamma"}}
        )
