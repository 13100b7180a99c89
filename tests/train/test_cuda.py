"""A run on a GPU against the same run on the CPU. Skipped where there is no GPU; `make gpu-check` runs these."""

import numpy as np
import pytest
import torch

from muonlab.optim import list_optimizers
from muonlab.record import load_run
from muonlab.train.run import train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# In fp32 both devices iterate in fp32; Muon's default on CUDA is bf16.
FP32 = {"muon": ["optimizer.ns_dtype=float32"], "muonclip": ["optimizer.ns_dtype=float32"]}


def losses(tiny, tmp_path, device, *overrides):
    config = tiny(f"paths.runs={tmp_path / device}", f"trainer.device={device}", *overrides)
    outcome = train(config)
    assert outcome.status == "finished"
    run = load_run(outcome.folder)
    return run.steps["train_loss"].to_numpy(), run.max_logits["value"].to_numpy()


@pytest.mark.parametrize("name", list_optimizers())
def test_a_gpu_run_in_fp32_follows_the_cpus(tiny, tmp_path, name):
    overrides = [f"optimizer={name}", *FP32.get(name, [])]
    on_cpu, on_gpu = (losses(tiny, tmp_path, device, *overrides) for device in ("cpu", "cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-true"])
def test_a_gpu_run_in_16_bits_stays_near(tiny, tmp_path, precision):
    reference, _ = losses(tiny, tmp_path, "cpu")
    found, _ = losses(tiny, tmp_path, "cuda", f"trainer.precision={precision}")
    np.testing.assert_allclose(found, reference, rtol=0.05, atol=0.05)
