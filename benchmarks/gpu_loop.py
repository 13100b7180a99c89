"""Where a stage of gpu_stages.py runs, and the bare training loop that it measures."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from plain_gpt import PlainGPT
from torch import Tensor

from muonlab.cli import compose_config, plain
from muonlab.train.config import RunConfig, read_config

SEQUENCES = 32  # of a micro-batch


class Place:
    """Where a stage runs, and whether it is a dry run: tiny and on the CPU."""

    def __init__(self, name: str, folder: Path, tokens: str, dry: bool):
        self.name, self.folder, self.tokens, self.dry = name, folder, tokens, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.failures = 0  # measurements that are an error

    def report(self, **values: object) -> None:
        """Append one measurement, and print it."""
        self.failures += "error" in values
        line = json.dumps(values)
        print(line, flush=True)
        with (self.folder / f"{self.name}.jsonl").open("a") as file:
            file.write(line + "\n")

    def config(self, *overrides: str, mixture: bool = False) -> RunConfig:
        """A run of nanogpt_124m, or of the mixture moe_m, in bf16 with GPT-2's vocabulary and 1024 tokens a sequence.

        In a dry run the model is a tiny one of the same kind.
        """
        paths = [
            f"paths.runs={self.folder / 'runs'}",
            f"paths.cache={self.folder / 'cache'}",
            "tracking=none",
        ]
        model = "moe_m" if mixture else "nanogpt_124m"
        size = [f"model={model}", "data=tokens", f"data.path={self.tokens}", "trainer=gpu"]
        size += [f"trainer.batch_size={SEQUENCES}", "model.vocab_size=50304"]
        if self.dry:
            model = "moe_xs" if mixture else "nanogpt_xxs"
            size = [f"model={model}", "data=synthetic", "trainer=smoke", "trainer.batch_size=2"]
            size += ["trainer.device=cpu", "trainer.probe_batch_size=2"]
        usual = [
            "trainer.val_every=0",
            "trainer.checkpoint_every=0",
            "trainer.progress=false",
            "schedule.warmup=0",
        ]
        return read_config(plain(compose_config("train", [*size, *usual, *paths, *overrides])))


class Loop:
    """A model, its optimizer and batches with nothing around them.

    maxima: how a clip gets its max logits: "exact" at every step, "kernel" what the kernels report or bound, "none".
    """

    def __init__(
        self,
        place: Place,
        config: RunConfig,
        *,
        compiled: bool,
        maxima: str = "none",
        written_out: bool = False,
    ):
        from muonlab.data import make_data
        from muonlab.train.module import LanguageModel

        self.place, self.maxima = place, maxima
        torch.manual_seed(config.seed)
        self.data = make_data(config.data, config.paths.cache)
        eager = read_config(
            {**config.as_dict(), "trainer": {**config.as_dict()["trainer"], "compile": False}}
        )
        self.module = LanguageModel(eager, self.data).to(place.device)
        self.model, self.optimizer = self.module.model, self.module.optimizer
        self.forward: Callable[[Tensor, Tensor], Tensor] = lambda tokens, targets: (
            self.model(tokens, targets).loss
        )
        if written_out:
            plain = PlainGPT(config.model).to(place.device)
            self.forward = plain
            self.optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=not place.dry)
        if compiled and not place.dry:  # Inductor's minute would show nothing on the CPU
            (self.forward if isinstance(self.forward, PlainGPT) else self.model).compile()
        self.shape = config.trainer.batch_size, config.model.context
        self.index = 0

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.shape[0] * self.shape[1]

    @property
    def flops(self) -> float:
        """Of one step, forward and backward."""
        return self.tokens * self.model.flops_per_token(self.shape[1])

    def step(self) -> None:
        """One update."""
        batch = self.data.batch(1, self.index, *self.shape)
        self.index += 1
        tokens, targets = (self.module.sent(part) for part in batch)
        with torch.autocast(self.place.device.type, torch.bfloat16):
            loss = self.forward(tokens, targets)
        loss.backward()
        if self.maxima == "exact":
            self.optimizer.observe(self.model.logit_extremes().highest)
        elif self.maxima == "kernel":
            self.optimizer.observe(self.model.bounded_logits()[0].highest)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, warm_up: int, steps: int) -> float:
        """Seconds a step, after `warm_up` steps, which compile."""
        for _ in range(warm_up):
            self.step()
        wait(self.place.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait(self.place.device)
        return (time.perf_counter() - started) / steps


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
