"""Designs that are composed in milliseconds and trained in seconds."""

from muonlab.study.reading import at_scale, make_design

WORDS = dict.fromkeys(("question", "prediction", "source", "held_equal", "tuning", "primary"), "said")
QUICK = [
    "model=nanogpt_xxs",
    "data=synthetic",
    "data.train_tokens=20000",
    "data.val_tokens=4000",
    "model.d_model=16",
    "model.num_layers=1",
    "model.context=16",
    "trainer.batch_size=4",
    "trainer.probe_batch_size=4",
    "trainer.max_steps=40",
    "trainer.probe_every=5",
    "trainer.val_every=0",
    "schedule.warmup=2",
    "tracking=none",
]
SPACE = {"lr": "tag(log, interval(1e-3, 1.0))", "weight_decay": "interval(0.0, 1.0)"}
PUBLISHED = {"lr": 0.02, "weight_decay": 0.1}


def search(sampler="quasi_random", trials=4, **optimizers):
    """A search section over Muon alone, or over what is given."""
    return {
        "trials": trials,
        "sampler": sampler,
        "seed": 0,
        "replicate_seeds": [1, 2],
        "optimizers": optimizers or {"muon": {"published": PUBLISHED, "space": SPACE}},
    }


def design(conditions, **others):
    """A checked design with these conditions at cpu scale."""
    values = WORDS | {"minutes": 1, "seeds": [1, 2], "conditions": conditions} | others
    return at_scale(make_design(values), "cpu")
