"""Defects of public orthogonalisation code, each named after the code that has it, none of them here."""

import pytest
import torch
import torch._dynamo.testing
from orthogonalisation_oracles import assert_relative, gaussian, oracle, spectral_error, with_spectrum

from muonlab.optim.newton_schulz import newton_schulz, orthogonalise
from muonlab.optim.schedules import list_schedules


@pytest.mark.parametrize("name", [name for name in list_schedules() if name != "svd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_emerging_optimizers_defect_nearly_rank_one_update_is_reversed(name, dtype):
    values = torch.cat([torch.ones(1), torch.full((63,), 2.5e-3)]).double()
    G = with_spectrum(values, 96).mT
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    gain = U[:, 0] @ newton_schulz(G, name, dtype=dtype) @ Vh[0]
    # cubic comes down to 0.5 at 1
    assert gain > 0.3


def test_torch_defect_bf16_gradient_normalised_in_place():
    for matrix in (gaussian(8, 6, dtype=torch.bfloat16), gaussian(6, 8, dtype=torch.bfloat16)):
        kept, version = matrix.clone(), matrix._version
        newton_schulz(matrix, dtype=torch.bfloat16)
        assert torch.equal(matrix, kept)
        assert matrix._version == version


@pytest.mark.parametrize("scale", [1e-12, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_defect_epsilon_shrinks_the_update_of_small_gradients(scale, dtype):
    G = gaussian(12, 8, dtype=torch.float32)
    result = newton_schulz(G * scale, dtype=dtype)
    assert torch.linalg.svdvals(result).min() > 0.5
    torch.testing.assert_close(result, newton_schulz(G, dtype=dtype), atol=0.03, rtol=0)


@pytest.mark.parametrize("work", [torch.float16, torch.bfloat16, torch.float32])
def test_deepspeed_defect_fp16_overflows_before_normalisation(work):
    G = (gaussian(64, 64, dtype=torch.float32).clamp(-1, 1) * 65_000).half()
    tiny = (gaussian(64, 64, dtype=torch.float32) * 2.0**-20).half()
    for matrix in (G, tiny):
        result = newton_schulz(matrix, dtype=work)
        assert result.dtype is torch.float16
        assert_relative(result, oracle(matrix, "jordan"), 0.1)


def test_heavyball_and_pytorch_optimizer_defect_expert_stacks_are_flattened():
    stack = gaussian(4, 6, 5)
    stack[2] *= 1e6
    result = newton_schulz(stack, "svd")
    for expert, alone in zip(result, stack, strict=True):
        torch.testing.assert_close(expert, newton_schulz(alone, "svd"), atol=1e-12, rtol=0)


def test_gram_newton_schulz_defect_instance_call_is_not_consulted():
    # a compiled orthogonalisation is really compiled, whole, and gives the same numbers
    matrices = [gaussian(6, 4, seed=i, dtype=torch.float32) for i in range(3)] + [gaussian(2, 4, 6)]
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(orthogonalise, backend=counter, fullgraph=True)
    for result, expected in zip(compiled(matrices), orthogonalise(matrices), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    assert counter.frame_count == 1
    assert counter.op_count > 20


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_bf16_is_as_exact_as_torch_optim_muon(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    G = gaussian(*shape, dtype=torch.float32)
    expected = oracle(G, "jordan")
    theirs = _zeropower_via_newtonschulz(G, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = newton_schulz(G, dtype=torch.bfloat16)
    assert spectral_error(ours, expected) < 1.5 * spectral_error(theirs, expected)
    assert_relative(ours, theirs.double(), 0.1)
