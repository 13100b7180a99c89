"""Frames and claims made by hand, and their answers."""

import math

import pandas as pd

from analysis.answers import answer_all
from analysis.claims import read_claim
from analysis.frames import Frames

CLAIM = {"claim": "c", "source": "s", "condition": "x", "arm": "a"}
NONE = pd.DataFrame()


def made_up(values, condition="x", level=math.nan, **columns):
    """One run an arm and seed: `values` = {arm: losses of seeds 1, 2, ...}."""
    rows = [
        {"arm": arm, "seed": seed, "loss": loss, "run": f"{condition}-{arm}-{level}-{seed}"}
        for arm, losses in values.items()
        for seed, loss in enumerate(losses, 1)
    ]
    shared = {"condition": condition, "level": level, "lr": 0.01, "status": "finished", "optimizer": "muon"}
    shared |= {"tau": math.nan, "clipped_share": 0.0, "initial_loss": 5.0, "warmup_steps": 0} | columns
    runs = pd.DataFrame(rows).assign(**shared)
    runs["max_logit"] = runs["loss"]
    steps = runs[["run", "condition", "arm", "seed", "loss"]].rename(columns={"loss": "probe_loss"})
    return Frames(runs, steps.assign(step=0, tokens=10.0), NONE, NONE)


def joined(*frames):
    return Frames(
        *(
            pd.concat(tables, ignore_index=True)
            for tables in zip(*(f.tables.values() for f in frames), strict=True)
        )
    )


def asked(frames, claims):
    """The claims as objects; any arm of the frames may be named."""
    conditions = frames.runs.groupby("condition")["arm"].agg(set).to_dict()
    return [read_claim(claim, conditions) for claim in claims]


def answers(claims, frames, outcomes=NONE, circumstances=None):
    return [vars(row) for row in answer_all(asked(frames, claims), frames, outcomes, circumstances)]


def answer(frames, outcomes=NONE, **claim):
    [row] = answers([CLAIM | claim], frames, outcomes)
    return row


def outcomes_of(name="exploded", condition="x", threshold=10.0, **holds):
    """Outcomes of one test: arm -> one value a seed 1, 2, ..., above the threshold where it holds; None: not judged."""
    rows = [
        {"arm": arm, "seed": seed, "value": value, "holds": None if value is None else value > threshold}
        for arm, values in holds.items()
        for seed, value in enumerate(values, 1)
    ]
    return pd.DataFrame(rows).assign(condition=condition, name=name, level=math.nan, threshold=threshold)


LOWER = made_up({"a": [2.00, 2.01, 2.02, 2.03], "b": [2.50, 2.52, 2.51, 2.53]})
