"""Nothing is lost between split and join, and each block is updated as a parameter of its own would be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.optim import Muon
from muonlab.optim.matrix_view import MatrixView

COUNTS = st.integers(1, 4)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(COUNTS, COUNTS, COUNTS, COUNTS, st.booleans())
def test_join_is_the_inverse_of_split(experts, heads, rows, cols, of_columns):
    if of_columns:
        view, tensor = MatrixView(col_blocks=heads), draw(experts, rows, heads * cols)
    else:
        view, tensor = MatrixView(row_blocks=heads), draw(experts, heads * rows, cols)
    blocks = view.split(tensor)
    assert {block.shape[-2:] for block in blocks} == {(rows, cols)}
    assert [tuple(block.shape) for block in blocks] == view.block_shapes(tensor.shape)
    assert torch.equal(view.join(blocks, tensor.shape), tensor)


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=4), COUNTS)
def test_join_is_the_inverse_of_split_with_unequal_blocks(sizes, cols):
    view, tensor = MatrixView(row_blocks=tuple(sizes)), draw(sum(sizes), cols)
    blocks = view.split(tensor)
    assert [block.shape[0] for block in blocks] == sizes
    assert torch.equal(view.join(blocks, tensor.shape), tensor)


def stepped(weight, grad, **settings):
    param = torch.nn.Parameter(weight.clone())
    optimizer = Muon([param], lr=0.1, scale_rule="original", **settings)
    for _ in range(2):
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def test_heads_in_rows_are_updated_like_separate_parameters():
    weight, grad = draw(12, 5), draw(12, 5, seed=1)
    heads = [stepped(w, g) for w, g in zip(weight.chunk(3), grad.chunk(3), strict=True)]
    torch.testing.assert_close(stepped(weight, grad, row_blocks=3), torch.cat(heads), rtol=0, atol=1e-13)


def test_heads_in_columns_are_updated_like_separate_parameters():
    weight, grad = draw(5, 12), draw(5, 12, seed=1)
    heads = [stepped(w, g) for w, g in zip(weight.chunk(3, 1), grad.chunk(3, 1), strict=True)]
    torch.testing.assert_close(stepped(weight, grad, col_blocks=3), torch.cat(heads, 1), rtol=0, atol=1e-13)


def test_a_fused_qkv_with_fewer_key_heads_is_updated_like_its_three_parts():
    sizes = (8, 2, 2)
    weight, grad = draw(12, 4), draw(12, 4, seed=1)
    parts = [stepped(w, g) for w, g in zip(weight.split(sizes), grad.split(sizes), strict=True)]
    torch.testing.assert_close(stepped(weight, grad, row_blocks=sizes), torch.cat(parts), rtol=0, atol=1e-13)


def test_an_expert_stack_is_updated_expert_by_expert():
    weight, grad = draw(3, 4, 6), draw(3, 4, 6, seed=1)
    experts = torch.stack([stepped(w, g) for w, g in zip(weight, grad, strict=True)])
    torch.testing.assert_close(stepped(weight, grad), experts, rtol=0, atol=1e-13)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_flattened_filter_is_updated_as_a_matrix(memory_format):
    weight, grad = draw(6, 2, 3, 3), draw(6, 2, 3, 3, seed=1)
    matrix = stepped(weight.flatten(1), grad.flatten(1)).view(6, 2, 3, 3)
    layout = {"memory_format": memory_format}
    filters = stepped(weight.contiguous(**layout), grad.contiguous(**layout), flatten=True)
    torch.testing.assert_close(filters, matrix, rtol=0, atol=1e-13)


def test_a_transposed_parameter_is_updated_in_place():
    weight, grad = draw(5, 7), draw(5, 7, seed=1)
    param = torch.nn.Parameter(weight.clone().t().contiguous().t())
    assert not param.is_contiguous()
    param.grad = grad
    Muon([param], lr=0.1).step()
    other = torch.nn.Parameter(weight.clone())
    other.grad = grad
    Muon([other], lr=0.1).step()
    torch.testing.assert_close(param, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((6,), {}, "which is not a matrix; use a group with rule='adamw'"),
        ((0, 4), {}, "which is not a matrix"),
        ((6, 2, 3, 3), {}, "which is a filter and not a matrix; set flatten=True"),
        ((6, 4), {"row_blocks": 4}, "6 rows cannot be cut into 4 equal blocks"),
        ((6, 4), {"col_blocks": 3}, "4 columns cannot be cut into 3 equal blocks"),
        ((6, 4), {"row_blocks": [4, 1]}, "add up to 5, not to 6 rows"),
        (
            (6, 4),
            {"row_blocks": 0},
            "row_blocks of a muon group must be a whole number of at least 1 or a list.* not 0",
        ),
        ((6, 4), {"row_blocks": 2, "col_blocks": 2}, "not both"),
    ],
)
def test_what_has_no_such_view_is_refused_in_one_sentence(shape, settings, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        Muon([("blocks.0.weight", torch.nn.Parameter(torch.zeros(shape)))], **settings)
    assert "\n" not in str(caught.value)


def test_views_are_described_in_words():
    assert MatrixView().describe(torch.Size((6, 4))) == "6 x 4"
    assert MatrixView().describe(torch.Size((3, 6, 4))) == "3 of 6 x 4"
    assert MatrixView(row_blocks=2).describe(torch.Size((6, 4))) == "2 of 3 x 4"
    assert MatrixView(col_blocks=2).describe(torch.Size((5, 6, 4))) == "10 of 6 x 2"
    assert MatrixView(row_blocks=(4, 2)).describe(torch.Size((6, 4))) == "4 x 4 + 2 x 4"
    assert MatrixView(flatten=True).describe(torch.Size((6, 4, 3, 3))) == "6 x 36"
