"""python benchmarks/profile_step.py [model ...]: what the time of a training step is made of, in percent.

The bare step of MuonClip on one thread with exact max logits, as in bench_step.py, under torch's profiler. The time of
an operation counts once, for the innermost part that it is in:

    optimizer     Newton-Schulz, AdamW, clip; of which its matrix products
    norms, rotation, activation    forward and backward
    products      matrix products of the model, forward and backward
    softmax       of the attention, or its fused kernel, forward and backward
    loss          cross-entropy and its softmax
    copies        of the model: concatenated weights, contiguous halves, gradients
    other         every other operation of the model: sums of the residual stream, embedding, autograd's own
    Python        what no operation accounts for: the interpreter, the batch, the profiler's own cost
"""

import argparse
import os
import tempfile
import time
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench_step import BareLoop, config
from torch.profiler import ProfilerActivity, profile

from muonlab.runtime import settle

MODELS = ["nanogpt_xxs", "nanogpt_xs", "nanogpt_s", "nanogpt_m"]
# A part by words in the names of the operations around; the first that fits counts.
AROUND = {
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad"),
    "norms": ("_RMSNorm",),
    "rotation": ("_Rotate",),
    "activation": ("_Relu2", "gelu", "silu"),
}
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
OWN = {
    "products": PRODUCTS,
    "softmax": ("aten::_softmax", "aten::_scaled_dot_product_flash_attention"),
    "loss": ("aten::_log_softmax", "aten::nll_loss"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::_foreach_copy_"),
}
SHOWN = (*OWN, *AROUND, "products of the optimizer", "other", "Python")


def part_of(event) -> str:
    """The part that an operation's own time belongs to."""
    around, each = "", event
    while each is not None:
        around += each.name + " "
        each = each.cpu_parent
    for part, words in AROUND.items():
        if any(word in around for word in words):
            product = part == "optimizer" and event.name in PRODUCTS
            return "products of the optimizer" if product else part
    return next((part for part, names in OWN.items() if event.name.startswith(names)), "other")


def shares(name: str, steps: int) -> tuple[Counter[str], float]:
    """Seconds of each part of a step, and the milliseconds of a step without the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        small = ["trainer.batch_size=2", "trainer.probe_batch_size=4"] if name == "nanogpt_m" else []
        loop = BareLoop(config(name, folder, *small))
    loop.steps(3)
    alone = loop.steps(steps)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loop.steps(steps)
        wall = time.perf_counter() - started
    parts: Counter[str] = Counter()
    for event in profiler.events():
        parts[part_of(event)] += event.self_cpu_time_total / 1e6
    parts["Python"] = wall - parts.total()
    return parts, 1e3 * alone


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2].splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    settle(1)
    columns = [shares(name, options.steps) for name in options.models]
    print(f"{'percent of a step':<28}" + "".join(f"{name:>14}" for name in options.models))
    for part in SHOWN:
        print(f"{part:<28}" + "".join(f"{100 * parts[part] / parts.total():>14.1f}" for parts, _ in columns))
    print(f"{'ms a step, not profiled':<28}" + "".join(f"{ms:>14.1f}" for _, ms in columns))


if __name__ == "__main__":
    main()
