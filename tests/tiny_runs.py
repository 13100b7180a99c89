"""The overrides that make a run take a second, on text that needs no network."""

TINY = [
    "data=synthetic",
    "data.train_tokens=20000",
    "data.val_tokens=4000",
    "model.context=16",
    "model.d_model=16",
    "model.num_layers=2",
    "trainer=smoke",
    "trainer.batch_size=4",
    "trainer.probe_batch_size=4",
    "trainer.max_steps=12",
    "trainer.checkpoint_every=4",
    "trainer.val_every=6",
    "trainer.probe_every=3",
    "trainer.progress=false",
    "schedule.warmup=2",
    "tracking=none",
]
