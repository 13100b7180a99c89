"""Who updates what: declared roles, foreign models, overrides, ties, and everything that must be refused."""

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.layout import ParameterRole
from muonlab.optim import build_optimizer, format_routing
from muonlab.optim.routing import Route, collapse_layers, parameter_groups


class Declared(nn.Module):
    """One parameter of every declared kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.query, self.key = nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        self.value, self.output = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.qkv = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(8, 4, bias=False)
        self.up = nn.Linear(8, 12, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 4, 8))
        self.router = nn.Linear(8, 3, bias=False)
        self.gate = nn.Linear(8, 1, bias=False)
        self.sink = nn.Parameter(torch.zeros(4))
        self.filter = nn.Conv1d(8, 8, 3, bias=False)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 7, bias=False)

    def parameter_roles(self):
        return {
            "embedding.weight": ParameterRole("embedding"),
            "query.weight": ParameterRole("query", 4),
            "key.weight": ParameterRole("key", 2),
            "key.bias": ParameterRole("bias"),
            "value.weight": ParameterRole("value", 2),
            "output.weight": ParameterRole("output", 2),
            "qkv.weight": ParameterRole("qkv", 8, (8, 4, 4)),
            "down.weight": ParameterRole("latent"),
            "up.weight": ParameterRole("mlp"),
            "experts": ParameterRole("expert"),
            "router.weight": ParameterRole("router"),
            "gate.weight": ParameterRole("gate"),
            "sink": ParameterRole("sink"),
            "filter.weight": ParameterRole("conv"),
            "norm.weight": ParameterRole("norm"),
            "head.weight": ParameterRole("head"),
        }


def table(model, **settings):
    return {route.name: route for route in build_optimizer("muon", model, **settings).routing}


def rules(model, **settings):
    return {name: route.rule for name, route in table(model, **settings).items()}


MUON = {
    "query.weight",
    "key.weight",
    "value.weight",
    "output.weight",
    "qkv.weight",
    "down.weight",
    "up.weight",
}
MUON |= {"experts"}


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw():
    routes = rules(Declared())
    assert set(routes) == {name for name, _ in Declared().named_parameters()}
    assert {name for name, rule in routes.items() if rule == "muon"} == MUON


def test_a_group_is_a_role():
    assert {route.group for route in table(Declared()).values()} == {
        role.role for role in Declared().parameter_roles().values()
    }


def test_every_role_of_the_layout_has_a_rule():
    from muonlab.layout import ROLES
    from muonlab.optim.routing import MUON_ROLES

    assert {role.role for role in Declared().parameter_roles().values()} == set(ROLES)
    assert set(MUON_ROLES) - {"linear"} < set(ROLES)


@pytest.mark.parametrize(
    ("routes", "changed"),
    [
        ({"head": "muon"}, {"head.weight": "muon"}),
        ({"router": "muon", "gate": "muon"}, {"router.weight": "muon", "gate.weight": "muon"}),
        ({"query": "adamw", "key": "adamw"}, {"query.weight": "adamw", "key.weight": "adamw"}),
        ({"experts": "adamw"}, {"experts": "adamw"}),
        ({"*.weight": "adamw", "norm": "adamw"}, dict.fromkeys(MUON - {"experts"}, "adamw")),
    ],
)
def test_routes_override_the_default_by_role_or_by_name(routes, changed):
    assert rules(Declared(), routes=routes) == {**rules(Declared()), **changed}


def test_a_name_pattern_goes_before_a_role():
    assert rules(Declared(), routes={"query.*": "muon", "query": "adamw"})["query.weight"] == "muon"


def test_a_filter_sent_to_muon_is_flattened_and_said_so():
    route = table(Declared(), routes={"conv": "muon"})["filter.weight"]
    assert (route.rule, route.view) == ("muon", "8 x 24")


def test_heads_are_cut_from_rows_and_of_the_output_from_columns():
    views = {name: route.view for name, route in table(Declared(), per_head=True).items()}
    assert views["query.weight"] == "4 of 2 x 8"
    assert views["key.weight"] == "2 of 2 x 8"
    assert views["value.weight"] == "2 of 2 x 8"
    assert views["output.weight"] == "2 of 8 x 2"
    assert views["qkv.weight"] == "8 of 2 x 8"
    assert views["up.weight"] == "12 x 8"
    assert views["experts"] == "3 of 4 x 8"


def test_a_fused_weight_is_cut_into_its_three_parts_or_left_whole():
    assert table(Declared())["qkv.weight"].view == "8 x 8 + 4 x 8 + 4 x 8"
    assert table(Declared(), split_qkv=False)["qkv.weight"].view == "16 x 8"
    with pytest.raises(MuonlabError, match="per_head cuts a fused QKV weight"):
        table(Declared(), split_qkv=False, per_head=True)
    with pytest.raises(
        MuonlabError, match=r"fused_qkv=true\); this one keeps query, key and value in separate weights"
    ):
        table(nn.Linear(4, 4), split_qkv=False)


def test_learning_rates_are_scaled_by_role():
    optimizer = build_optimizer("muon", Declared(), lr=0.1, adamw_lr=0.01, lr_scale={"query": 0.1, "head": 2})
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["query"] == pytest.approx(0.01)
    assert rates["head"] == 0.02
    assert (rates["key"], rates["norm"]) == (0.1, 0.01)


def test_gains_and_biases_never_decay():
    for name, settings in (("adamw", {"weight_decay": 0.1}), ("muon", {"adamw_weight_decay": 0.1})):
        for group in build_optimizer(name, Declared(), **settings).param_groups:
            expected = 0.0 if group["name"] in ("norm", "bias", "sink") or group["rule"] == "muon" else 0.1
            assert group["weight_decay"] == expected


def test_the_table_prints_one_line_per_parameter():
    routes = [
        Route("w", (3, 4), "mlp", "muon", "3 x 4", "declared mlp"),
        Route("scale", (), "vector", "adamw", "-", "has no matrix"),
    ]
    assert format_routing(routes).splitlines() == [
        "parameter  shape   group   rule   matrices  reason",
        "w          3 x 4   mlp     muon   3 x 4     declared mlp",
        "scale      scalar  vector  adamw  -         has no matrix",
    ]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(7, 8)
        self.hidden = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 7, bias=False)
        self.decoder.weight = self.wte.weight


def test_tied_weights_are_one_row_and_an_embedding_wherever_they_are_declared():
    routes = table(Tied())
    assert set(routes) == {"wte.weight", "hidden.weight", "hidden.bias"}
    assert routes["wte.weight"].rule == "adamw"
    assert "tied to decoder.weight" in routes["wte.weight"].reason


def test_tied_weights_found_first_under_the_other_name_are_an_embedding_too():
    model = nn.Module()
    model.decoder, model.wte = nn.Linear(8, 7, bias=False), nn.Embedding(7, 8)
    model.wte.weight = model.decoder.weight
    assert rules(model) == {"decoder.weight": "adamw"}


def test_tied_weights_cannot_have_two_rules():
    with pytest.raises(
        MuonlabError, match=r"'decoder.weight' is tied to 'wte.weight' but routed to another rule"
    ):
        rules(Tied(), routes={"decoder.*": "muon"})
    assert rules(Tied(), routes={"embedding": "muon"})["wte.weight"] == "muon"


def test_a_torch_transformer_layer_is_routed_by_types():
    routes = table(nn.TransformerEncoderLayer(8, 2, 16))
    assert {name: route.group for name, route in routes.items()} == {
        "self_attn.in_proj_weight": "qkv",
        "self_attn.in_proj_bias": "bias",
        "self_attn.out_proj.weight": "output",
        "self_attn.out_proj.bias": "bias",
        "linear1.weight": "linear",
        "linear1.bias": "bias",
        "linear2.weight": "linear",
        "linear2.bias": "bias",
        **{f"norm{i}.{leaf}": "norm" for i in (1, 2) for leaf in ("weight", "bias")},
    }
    assert routes["self_attn.in_proj_weight"].view == "3 of 8 x 8"
    per_head = table(nn.TransformerEncoderLayer(8, 2, 16), per_head=True)
    assert per_head["self_attn.in_proj_weight"].view == "6 of 4 x 8"


def named(**modules):
    """A model with these modules under these (dotted) names."""
    model = nn.Module()
    for name, module in modules.items():
        parent = model
        *path, leaf = name.split("__")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, module)
    return model


def linear():
    return nn.Linear(4, 4, bias=False)


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def test_a_llama_like_model_is_routed_by_names():
    model = named(
        model__embed_tokens=nn.Embedding(5, 4),
        model__self_attn__q_proj=linear(),
        model__self_attn__k_proj=linear(),
        model__self_attn__v_proj=linear(),
        model__self_attn__o_proj=linear(),
        model__mlp__gate_proj=linear(),
        model__mlp__gate=linear(),
        model__mlp__down_proj=linear(),
        model__input_layernorm=OwnRMSNorm(),
        model__patch=nn.Conv2d(3, 4, 2),
        lm_head=linear(),
    )
    groups = {name.removesuffix(".weight"): route.group for name, route in table(model).items()}
    assert groups == {
        "model.embed_tokens": "embedding",
        "model.self_attn.q_proj": "query",
        "model.self_attn.k_proj": "key",
        "model.self_attn.v_proj": "value",
        "model.self_attn.o_proj": "output",
        "model.mlp.gate_proj": "linear",
        "model.mlp.gate": "gate",
        "model.mlp.down_proj": "linear",
        "model.input_layernorm": "norm",
        "model.patch": "conv",
        "model.patch.bias": "bias",
        "lm_head": "head",
    }
    muon = {name for name, rule in rules(model).items() if rule == "muon"}
    assert muon == {f"model.self_attn.{p}_proj.weight" for p in "qkvo"} | {
        "model.mlp.gate_proj.weight",
        "model.mlp.down_proj.weight",
    }


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 5))


def test_a_matrix_of_unknown_role_is_an_error_until_a_route_names_it():
    with pytest.raises(MuonlabError, match=r"parameter 'experts' \(parameter of Stack\) has no role"):
        build_optimizer("muon", Stack())
    route = table(Stack(), routes={"experts": "muon"})["experts"]
    assert (route.group, route.rule, route.view) == ("routed", "muon", "3 of 4 x 5")
    assert build_optimizer("adamw", Stack()).routing[0].rule == "adamw"


def test_a_parameter_left_out_of_the_declaration_is_an_error():
    model = Declared()
    model.extra = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(MuonlabError, match=r"'extra' has no role in Declared.parameter_roles\(\)"):
        parameter_groups(model, "muon")


def test_a_declared_name_that_is_no_parameter_is_an_error():
    model = Declared()
    roles = model.parameter_roles()
    roles["hed.weight"] = roles["head.weight"]
    model.parameter_roles = lambda: roles
    with pytest.raises(MuonlabError, match=r"did you mean 'head\.weight'"):
        parameter_groups(model, "muon")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routes": {"hed": "muon"}}, "unknown role or parameter in routes 'hed'; did you mean 'head'"),
        ({"routes": {"head": "moun"}}, "unknown rule in routes 'moun'; did you mean 'muon'"),
        (
            {"routes": {"head.*": "muon", "*.weight": "adamw"}},
            "send parameter 'head.weight' to different rules",
        ),
        ({"lr_scale": {"qeury": 0.1}}, "unknown role in lr_scale 'qeury'; did you mean 'query'"),
        ({"routes": {"norm": "muon"}}, r"norm.weight of shape \(8,\), which is not a matrix"),
    ],
)
def test_wrong_overrides_are_refused_in_one_sentence(settings, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        build_optimizer("muon", Declared(), **settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_rule_is_refused_by_the_groups_themselves():
    with pytest.raises(MuonlabError, match="unknown rule in routes 'moun'; did you mean 'muon'"):
        parameter_groups(Declared(), "muon", routes={"head": "moun"})


def test_a_depthwise_filter_is_refused_by_muon():
    model = named(conv=nn.Conv1d(8, 8, 3, groups=8))
    assert rules(model)["conv.weight"] == "adamw"
    with pytest.raises(MuonlabError, match=r"'conv\.weight' is a depthwise filter"):
        rules(model, routes={"conv": "muon"})


def test_frozen_parameters_are_routed_and_never_move():
    model = Declared()
    model.query.weight.requires_grad_(False)
    before = model.query.weight.clone()
    optimizer = build_optimizer("muon", model, weight_decay=0.5)
    model.up(torch.ones(8)).sum().backward()
    optimizer.step()
    assert "query.weight" in {route.name for route in optimizer.routing}
    assert torch.equal(model.query.weight, before)


def test_layers_that_are_treated_alike_share_a_row():
    same = [Route(f"blocks.{i}.up.weight", (8, 4), "mlp", "muon", "8 x 4", "role") for i in range(3)]
    other = Route("blocks.3.up.weight", (8, 4), "mlp", "adamw", "-", "routes")
    assert collapse_layers([*same, other]) == [
        Route("blocks.*.up.weight (3)", (8, 4), "mlp", "muon", "8 x 4", "role"),
        Route("blocks.*.up.weight", (8, 4), "mlp", "adamw", "-", "routes"),
    ]
