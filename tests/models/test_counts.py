"""Counts by formula against counted ones, over drawn settings and for models of which everybody knows the size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from muonlab.errors import MuonlabError
from muonlab.models import build_model, model_counts, register_model
from muonlab.models.__main__ import main, short
from muonlab.models.counts import total
from muonlab.models.registry import MODELS
from muonlab.settings.check import build

common = dict(
    vocab_size=st.sampled_from([7, 61]),
    context=st.sampled_from([4, 8]),
    d_model=st.sampled_from([8, 16]),
    num_heads=st.sampled_from([1, 2]),
    tied_head=st.booleans(),
    attention_gate=st.sampled_from(["none", "head", "element"]),
    attention_sink=st.sampled_from(["none", "learnt"]),
)
DRAWN = {
    "nanogpt": st.fixed_dictionaries(
        common
        | dict(
            num_layers=st.integers(1, 3),
            num_kv_heads=st.sampled_from([None, 1]),
            mlp_ratio=st.sampled_from([1.0, 2.5]),
            activation=st.sampled_from(["gelu", "swiglu"]),
            bias=st.booleans(),
            qk_norm=st.booleans(),
        )
    ),
    "moe": st.fixed_dictionaries(
        common
        | dict(
            num_layers=st.integers(2, 4),
            num_dense_layers=st.integers(0, 1),
            q_lora_rank=st.sampled_from([0, 5]),
            kv_lora_rank=st.integers(1, 6),
            qk_nope_head_dim=st.integers(1, 6),
            qk_rope_head_dim=st.sampled_from([2, 4]),
            v_head_dim=st.integers(1, 6),
            dense_hidden=st.integers(1, 20),
            num_experts=st.integers(3, 6),
            experts_per_token=st.integers(1, 3),
            sparsity=st.sampled_from([None, 2]),
            expert_hidden=st.sampled_from([4, 8]),
            num_shared_experts=st.integers(0, 2),
        )
    ),
}


def counted(name, **values):
    return model_counts(build(MODELS.section(name), values, "model"))


def active(model):
    """Parameters that one token uses: k of the E experts of a stack, one row of an embedding that is not the head."""
    experts_of = [
        (layer.router, set(layer.experts.parameters())) for layer in model.modules() if is_routed(layer)
    ]
    count = 0
    for parameter in model.parameters():
        share = [r.experts_per_token / r.num_experts for r, stacks in experts_of if parameter in stacks]
        count += round(parameter.numel() * (share[0] if share else 1))
    tied = model.head.weight is model.embedding.weight
    return count - (0 if tied else model.embedding.weight.numel() - model.embedding.embedding_dim)


def is_routed(layer):
    return hasattr(layer, "router") and hasattr(layer, "experts")


def grouped_flops(a, b, *others, **named):
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize("name", DRAWN)
def test_formulas_give_what_is_counted(name):
    @settings(max_examples=20)
    @given(DRAWN[name])
    def check(drawn):
        model = build_model(name, **drawn)
        counts = counted(name, **drawn)
        whole = total(counts.values())
        assert whole.parameters == sum(p.numel() for p in model.parameters())
        assert whole.active == active(model)
        x = torch.randint(drawn["vocab_size"], (2, drawn["context"]))
        mapping = {torch.ops.muonlab.grouped_mm: grouped_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(x, x).loss.backward()
        assert counter.get_total_flops() == pytest.approx(whole.flops * x.numel(), rel=1e-6)
        assert model.flops_per_token(drawn["context"]) == whole.flops

    check()


DEEPSEEK_V3 = dict(  # arXiv 2412.19437, section 4.2: 671 B, of which 37 B are active
    vocab_size=129280, context=4096, d_model=7168, num_layers=61, num_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_dense_layers=3, dense_hidden=18432,
    num_experts=256, experts_per_token=8, expert_hidden=2048,
)  # fmt: skip


def test_published_models_have_their_published_sizes():
    deepseek = total(counted("moe", **DEEPSEEK_V3).values())
    assert deepseek.parameters == pytest.approx(671.0e9, rel=1e-4)
    assert deepseek.active == pytest.approx(37e9, rel=0.02)
    gpt2 = dict(vocab_size=50257, context=1024, d_model=768, num_layers=12, num_heads=12, activation="gelu")
    counts = counted("nanogpt", tied_head=True, bias=True, **gpt2)
    # Of 124,439,808: no table of positions, and RMSNorm has no biases.
    assert total(counts.values()).parameters == 124_439_808 - 1024 * 768 - 25 * 768


def test_kimi_k2_is_counted_without_being_allocated(capsys):
    main(["k2_shape"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert set(lines) >= {"embedding", "attention", "dense", "shared", "routed", "router", "head", "total"}
    assert "1.03 T" in lines["total"]
    assert "31.7 B" in lines["total"]


def test_settings_change_the_count(capsys):
    main(["moe_xs", "sparsity=32"])
    assert "2.36 M" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["k2_shap"], "did you mean 'k2_shape'"),
        (["moe_xs", "sparsty=3"], "did you mean 'sparsity'"),
        (["moe_xs", "sparsity"], "written name=value"),
        (["moe_xs", "sparsity=1.3"], "whole number of experts"),
        (["nanogpt_s", "num_heads=0"], "model.num_heads must be a whole number of at least 1"),
        (["nanogpt_s", "d_model=-4"], "model.d_model must be a whole number of at least 1"),
        (["nanogpt_s", "num_heads=1,2"], "written name=value, not 'num_heads=1,2'"),
        (["nanogpt_s", "name=gpt"], "unknown model 'gpt'"),
        ([], "arguments are required: name"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_a_registered_model_needs_no_formula_to_be_built(monkeypatch):
    assert MODELS.names()  # those of the package are registered before the copy is made
    monkeypatch.setattr(MODELS, "_builders", dict(MODELS._builders))
    monkeypatch.setattr(MODELS, "_sections", dict(MODELS._sections))

    @register_model("mine")
    def mine(*, width: int = 2):
        return torch.nn.Linear(width, width)

    assert build_model("mine", width=3).in_features == 3
    with pytest.raises(MuonlabError, match="model 'mine' has no formula"):
        counted("mine")


@pytest.mark.parametrize(
    ("number", "text"), [(1.0264e12, "1.03 T"), (999_999, "1 M"), (225_024, "225 K"), (64, "64"), (0.0, "0")]
)
def test_numbers_have_three_digits_and_a_unit(number, text):
    assert short(number) == text
