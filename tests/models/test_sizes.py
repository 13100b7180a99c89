"""Sizes that do not fit each other are one sentence, before any of the model is made."""

import pytest

from muonlab.errors import MuonlabError
from muonlab.models import build_model
from muonlab.settings.check import build
from muonlab.settings.model import MODEL_SETTINGS, with_vocabulary


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide the width model.d_model=64"),
        ({"num_heads": 4, "num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"num_kv_heads": 0}, "model.num_kv_heads must be a whole number of at least 1 .* or null, not 0"),
        (
            {"num_heads": 64},
            "model.rotary_fraction=1 of head_dim=1 rotates 1 entries; .* even number from 0 to 1",
        ),
        ({"rotary_fraction": 0.3}, "model.rotary_fraction=0.3 of head_dim=32 rotates 9.6 entries"),
        (
            {"rotary_fraction": 1.5},
            "model.rotary_fraction must be a number of at least 0 and at most 1, not 1.5",
        ),
        (
            {"forced_max_logit": -1.0},
            "model.forced_max_logit must be a finite number of at least 0, not -1.0",
        ),
        ({"attention_soft_cap": -1.0}, "model.attention_soft_cap must be a finite number of at least 0"),
        ({"activation": "relu"}, "unknown model.activation 'relu'; did you mean 'relu2'"),
        ({"num_layers": 0}, "model.num_layers must be a whole number of at least 1 .*, not 0"),
        ({"num_layers": 2.0}, "model.num_layers must be a whole number .*, not 2.0"),
        (
            {"d_model": 10**12},
            "model.d_model must be a whole number .* at most 1,000,000,000, not 1000000000000",
        ),
        (
            {"mlp_ratio": 1e-3},
            "model.mlp_ratio=0.001 of model.d_model=64 leaves the MLP without hidden units",
        ),
        ({"num_head": 2}, "unknown model setting 'num_head'; did you mean 'num_heads'"),
        ({"d_model": 10**8}, "this nanogpt has .* GB of weights alone"),
    ],
)
def test_a_wrong_nanogpt_is_one_sentence(values, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        build_model("nanogpt", **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "mlp"}, "unknown model.attention 'mlp'; did you mean 'mla'"),
        (
            {"attention": "mha", "num_heads": 3},
            "model.num_heads=3 does not divide the width model.d_model=64",
        ),
        ({"qk_norm": True}, "model.qk_norm is for model.attention=mha"),
        ({"qk_rope_head_dim": 3}, "model.qk_rope_head_dim must be even, since pairs are rotated, not 3"),
        ({"qk_rope_head_dim": 0}, "model.qk_rope_head_dim must be a whole number of at least 2 .*, not 0"),
        ({"kv_lora_rank": 0}, "model.kv_lora_rank must be a whole number of at least 1 .*, not 0"),
        ({"q_lora_rank": -1}, "model.q_lora_rank must be a whole number of at least 0 .*, not -1"),
        ({"num_dense_layers": 4}, "model.num_dense_layers must be from 0 to num_layers - 1 = 3, not 4"),
        ({"experts_per_token": 17}, "model.experts_per_token must be from 1 to num_experts=16, not 17"),
        ({"expert_hidden": 0}, "model.expert_hidden must be a whole number of at least 1 .*, not 0"),
        ({"sparsity": 0.5}, "model.sparsity must be a number of at least 1 .* or null, not 0.5"),
        (
            {"sparsity": 1.3},
            "model.sparsity=1.3 of model.experts_per_token=2 must give a whole number of experts",
        ),
        ({"balance": "bais"}, "unknown model.balance 'bais'; did you mean 'bias'"),
        ({"balance_speed": -1.0}, "model.balance_speed must be a finite number of at least 0"),
        ({"balance_loss": -1.0}, "model.balance_loss must be a finite number of at least 0"),
        ({"num_experts": 10**9}, "this moe has .* GB of weights alone"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(values, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        build_model("moe", **values)
    assert "\n" not in str(caught.value)


def section(name, **values):
    return build(MODEL_SETTINGS[name], values, "model")


@pytest.mark.parametrize(("k", "sparsity", "experts"), [(2, None, 16), (2, 48, 96), (8, 1.5, 12)])
def test_sparsity_is_experts_over_active_ones(k, sparsity, experts):
    assert section("moe", num_experts=16, experts_per_token=k, sparsity=sparsity).routed_experts == experts


def test_a_vocabulary_is_the_models_own_or_is_given():
    with pytest.raises(MuonlabError, match=r"model.vocab_size is not known yet"):
        section("nanogpt").vocabulary  # noqa: B018
    assert with_vocabulary(section("nanogpt"), 61).vocabulary == 61
    assert with_vocabulary(section("nanogpt", vocab_size=7), 61).vocabulary == 7
    assert build_model("nanogpt", vocab_size=None).head.out_features == 256
