"""Twelve short runs over every optimizer, model family and precision, each reduced to digests of its bits.

    python tests/regression/runs.py FOLDER

trains them into FOLDER through the command line of whichever muonlab is imported first, and prints a JSON object:
{run: {losses, max_logits, gammas, weights: digest, last_loss: nats}}. It uses nothing of muonlab but its commands and
`load_run`, so that it measures an older commit as well as this one.
"""

import hashlib
import json
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = (
    "data=synthetic data.train_tokens=20000 data.val_tokens=4000 trainer=smoke trainer.batch_size=4 "
    "trainer.probe_batch_size=4 trainer.max_steps=12 trainer.checkpoint_every=4 trainer.val_every=6 "
    "trainer.probe_every=3 trainer.progress=false trainer.device=cpu schedule.warmup=2 tracking=none "
    "model.context=16 seed=3"
)
DENSE = "model=nanogpt_xxs model.num_layers=2"
MIXTURE = "model=moe_xs model.num_layers=2 model.num_experts=4 model.d_model=32"
RUNS = {
    "adamw-fp32": f"{DENSE} optimizer=adamw",
    "adamwclip-fp32": f"{DENSE} optimizer=adamwclip optimizer.tau=0.3",
    "muon-fp32": f"{DENSE} optimizer=muon",
    "muonclip-fp32": f"{DENSE} optimizer=muonclip optimizer.tau=0.3 trainer.accumulate=2",
    "muonclip-exact-every": f"{DENSE} optimizer=muonclip optimizer.tau=0.5 trainer.exact_every=3 schedule=cosine",
    "muonclip-bf16": f"{DENSE} optimizer=muonclip optimizer.tau=0.3 trainer.precision=bf16",
    "muon-bf16-true": f"{DENSE} optimizer=muon trainer.precision=bf16-true schedule=wsd",
    "muonclip-fp64": f"{DENSE} optimizer=muonclip optimizer.tau=0.3 trainer.precision=fp64 "
    "optimizer.clip_momentum=scale",
    "muon-fused-gqa": f"{DENSE} model.num_kv_heads=1 model.fused_qkv=true optimizer=muon optimizer.after=[normuon] "
    "optimizer.beta2=0.95 optimizer.cautious=true trainer.grad_clip=0.5",
    "muon-heads": f"{DENSE} optimizer=muon optimizer.per_head=true optimizer.ns_schedule=deepseek "
    "optimizer.scale_rule=spectral optimizer.before=[equilibrate_rows] 'optimizer.lr_scale={query: 0.1}'",
    "muonclip-mla": f"{MIXTURE} optimizer=muonclip optimizer.tau=0.2 trainer.spectra_every=5",
    "adamw-mha-experts": f"{MIXTURE} model.attention=mha model.balance=loss optimizer=adamw trainer.grad_clip=1.0",
}  # fmt: skip

# What muonlab called these settings until the stages around the iteration became lists.
RENAMED = {
    "optimizer.after=[normuon] optimizer.beta2=": "optimizer.normuon_beta2=",
    "optimizer.before=[equilibrate_rows]": "optimizer.equilibrate_rows=true",
}


def digest(values) -> str:
    """Of the exact bytes of an array or tensor."""
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def measure(overrides: str, folder: Path) -> dict[str, str | float]:
    """Train one run below `folder` and reduce its record to digests. Raises RuntimeError for a run that fails."""
    import shlex

    import torch

    import muonlab
    from muonlab.record import load_run

    settings = Path(muonlab.__file__).parents[1] / "conf" / "optimizer" / "muon.yaml"
    for new, old in RENAMED.items() if "normuon_beta2" in settings.read_text("utf-8") else ():
        overrides = overrides.replace(new, old)
    sys.argv = ["muonlab.train", *shlex.split(f"{TINY} {overrides}")]
    sys.argv += [f"paths.runs={folder}/runs", f"paths.cache={folder}/cache"]
    try:
        with redirect_stdout(sys.stderr):
            runpy.run_module("muonlab.train", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"'{overrides}' ended with {end.code}") from end
    newest = max((folder / "runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime_ns).parent
    run, heads = load_run(newest), load_run(newest).max_logits
    saved = torch.load(max((newest / "checkpoints").iterdir()), weights_only=True)["state_dict"]
    weights = hashlib.sha256()
    for name in sorted(saved):
        weights.update(name.encode() + saved[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "losses": digest(run.steps[["train_loss", "probe_loss", "val_loss", "grad_norm"]].to_numpy()),
        "max_logits": digest(heads[["value", "value_abs", "entropy"]].to_numpy()),
        "gammas": digest(heads["gamma"].to_numpy()),
        "weights": weights.hexdigest()[:16],
        "last_loss": float(run.metrics["val_loss"]),
    }


def main(folder: Path) -> dict[str, dict[str, str | float]]:
    """Every run's digests."""
    return {name: measure(overrides, folder / name) for name, overrides in RUNS.items()}


if __name__ == "__main__":
    measured = main(Path(sys.argv[1]))
    print(json.dumps(measured, indent=1))
