"""The spikes of a whole run: every definition applied to its columns."""

import numpy as np
import pandas as pd
import pyarrow as pa

from muonlab.record.spikes import DEFINITIONS, SCORED, events_of, measure, score_of

SERIES = tuple(sorted({column for columns in SCORED.values() for column in columns}))
"""The columns of a `steps` trace that are scored."""


def score_run(steps: pa.Table) -> tuple[pd.DataFrame, dict[str, float]]:
    """Spike events and spike scores of a `steps` trace, which needs only the columns SERIES.

    The events are those of `detect_spikes` with the column `series`, sorted by step; the scores are
    percentages by "<definition>/<column>", and by "olmo2_upward/<column>" without the drops. Steps at
    which a column was not measured are not part of its series.
    """
    events, scores = [], {}
    for definition, columns in SCORED.items():
        for column in columns:
            series = _series(steps, column)
            measured = measure(series, definition)
            events.append(events_of(series, measured, definition).assign(series=column))
            scores[f"{definition}/{column}"] = score_of(measured)
            if definition == "olmo2":
                scores[f"olmo2_upward/{column}"] = score_of(measured, upward_only=True)
    spikes = pd.concat(events, ignore_index=True)
    return spikes.sort_values("step", kind="stable", ignore_index=True), scores


def describe_spikes(steps: pa.Table) -> dict[str, object]:
    """The result of `score_run` and the definitions' settings as JSON, with infinities and NaN as text."""
    events, scores = score_run(steps)
    return {
        "definitions": {
            name: {"columns": columns, "settings": DEFINITIONS.settings(name)}
            for name, columns in SCORED.items()
        },
        "scores": {name: _number(score) for name, score in scores.items()},
        "events": [{key: _number(value) for key, value in row.items()} for row in events.to_dict("records")],
    }


def _series(steps: pa.Table, column: str) -> pd.Series:
    measured = steps.filter(steps[column].is_valid())
    return pd.Series(measured[column].to_numpy(), index=measured["step"].to_numpy(), dtype=np.float64)


def _number(value: object) -> object:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
