"""What a store has of a run, and one that is gone."""

from muonlab.record.store import connect


def refuse(*arguments, **settings):
    """What a store does that is gone."""
    raise ConnectionError("gone")


def points(store, run, key):
    history = connect(store).get_metric_history(run.run_id, key)
    return sorted((point.step, point.value) for point in history)
