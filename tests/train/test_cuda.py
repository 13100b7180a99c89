"""A run on a GPU against the same run on the CPU. Skipped where there is no GPU; `make gpu-check` runs these."""

import numpy as np
import pytest
import torch

from muonlab.models import build_model
from muonlab.optim import build_optimizer, list_optimizers
from muonlab.record import load_run
from muonlab.train.run import train

pytestmark = pytest.mark.cuda
FP32 = ["optimizer.ns_dtype=float32"]  # both devices iterate in it; the default on CUDA is bf16
IN_BF16 = ("scion", "soap_muon")  # whose iteration has no other on CUDA
# Of a head's max logit after a step in bf16, in a basis that low rank leaves open, and with roots of small eigenvalues.
LOGITS_APART = {"scion": 0.2, "soap": 0.2, "soap_muon": 0.2, "pmuon": 0.02}


def losses(tiny, tmp_path, device, *overrides):
    config = tiny(f"paths.runs={tmp_path / device}", f"trainer.device={device}", *overrides)
    outcome = train(config)
    assert outcome.status == "finished"
    run = load_run(outcome.folder)
    return run.steps["train_loss"].to_numpy(), run.max_logits["value"].to_numpy()


@pytest.mark.parametrize("name", list_optimizers())
def test_a_gpu_run_in_fp32_follows_the_cpus(tiny, tmp_path, name):
    overrides = [f"optimizer={name}"]
    overrides += FP32 if hasattr(tiny(*overrides).optimizer, "ns_dtype") else []
    loss_apart = 5e-2 if name in IN_BF16 else 2e-3
    apart = loss_apart, LOGITS_APART.get(name, 2e-3)
    on_cpu, on_gpu = (losses(tiny, tmp_path, device, *overrides) for device in ("cpu", "cuda"))
    for cpu, gpu, tolerance in zip(on_cpu, on_gpu, apart, strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-true"])
def test_a_gpu_run_in_16_bits_stays_near(tiny, tmp_path, precision):
    reference, _ = losses(tiny, tmp_path, "cpu")
    computed, _ = losses(tiny, tmp_path, "cuda", f"trainer.precision={precision}")
    np.testing.assert_allclose(computed, reference, rtol=0.05, atol=0.05)


MIXTURE = ["model=moe_xs", "model.num_layers=3", "model.num_experts=8", "model.expert_hidden=16"]


def test_a_mixture_of_experts_on_a_gpu_follows_the_cpus(tiny, tmp_path):
    """Its bf16 run takes the grouped products, its fp32 run the padded; a token near a tie may change experts."""
    overrides = [*MIXTURE, *FP32]
    reference, _ = losses(tiny, tmp_path / "fp32", "cpu", *overrides)
    exact, _ = losses(tiny, tmp_path / "fp32", "cuda", *overrides)
    np.testing.assert_allclose(exact, reference, rtol=1e-2, atol=1e-2)
    short, _ = losses(tiny, tmp_path / "bf16", "cuda", *overrides, "trainer.precision=bf16")
    np.testing.assert_allclose(short, reference, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("model", [[], MIXTURE])
def test_a_compiled_run_follows_the_eager_one(tiny, tmp_path, model):
    precision = "trainer.precision=bf16"
    eager, _ = losses(tiny, tmp_path / "eager", "cuda", *model, precision)
    compiled, _ = losses(tiny, tmp_path / "compiled", "cuda", *model, precision, "trainer.compile=true")
    np.testing.assert_allclose(compiled, eager, rtol=0.02, atol=0.02)


def test_no_step_waits_for_the_device():
    """Forward, backward and update in bf16 with every max logit exact: no value is looked at by the host."""
    model = build_model("nanogpt", vocab_size=64, context=32, d_model=32, num_layers=2).cuda()
    optimizer = build_optimizer("muonclip", model, lr=0.01)
    tokens = torch.randint(64, (2, 32), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, tokens).loss
        loss.backward()
        optimizer.observe(model.max_logits())
        optimizer.step()

    step()  # allocates the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
