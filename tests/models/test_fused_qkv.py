"""Query, key and value in one weight: the same model, the same steps where they are cut apart, others where not."""

import pytest
import torch

from muonlab.models import build_model
from muonlab.optim import build_optimizer

SETTINGS = dict(vocab_size=61, context=16, d_model=32, num_layers=2, num_heads=4)
VARIANTS = [{}, {"num_kv_heads": 2}, {"bias": True}, {"qk_init_scale": 3.0}]


def pair(**variant):
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        models.append(build_model("nanogpt", **SETTINGS, **variant, fused_qkv=fused).double())
    return models


def as_separate(state):
    """The state of a fused model under the names of the separate one."""
    cut = {}
    for name, value in state.items():
        if ".qkv." in name:
            keys = (value.shape[0] - 32) // 2
            for part, rows in zip(("query", "key", "value"), value.split((32, keys, keys)), strict=True):
                cut[name.replace("qkv", part)] = rows
        else:
            cut[name] = value
    return cut


def steps(model, number=3, **settings):
    optimizer = build_optimizer("muonclip", model, lr=0.05, tau=0.5, ns_dtype="float64", **settings)
    for seed in range(number):
        x = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(seed))
        model(x[:, :-1], x[:, 1:]).loss.backward()
        optimizer.clip.observe(model.max_logits())
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_gives_both_the_same_first_weights_to_the_bit(variant):
    separate, fused = pair(**variant)
    for name, value in as_separate(fused.state_dict()).items():
        assert torch.equal(value, separate.state_dict()[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [{}, {"per_head": True}])
def test_cut_apart_and_clipped_it_is_the_separate_model(variant, settings):
    separate, fused = pair(**variant)
    expected = steps(separate, **settings)
    actual = as_separate(steps(fused, **settings))
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_as_one_matrix_its_update_is_orthogonal_as_a_whole():
    _, fused = pair()
    before = fused.blocks[0].attention.qkv.weight.detach().clone()
    model = fused
    optimizer = build_optimizer(
        "muon", model, lr=1.0, scale_rule="none", weight_decay=0.0, split_qkv=False, ns_schedule="svd"
    )
    x = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    model(x[:, :-1], x[:, 1:]).loss.backward()
    optimizer.step()
    update = model.blocks[0].attention.qkv.weight.detach() - before
    torch.testing.assert_close(update.mT @ update, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-6)
