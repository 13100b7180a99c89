import json
import math

import pytest

from muonlab.errors import MuonlabError
from muonlab.record import RunRecord, load_run
from muonlab.record.__main__ import SHOWN, main


@pytest.fixture
def runs(tmp_path, config):
    """Two runs, one with a spike of the loss at step 80."""
    for name, spike in (("calm", 0.0), ("spiked", 40.0)):
        record = RunRecord.create(tmp_path / name, config, [], {})
        for step in range(100):
            record.append(step, {"train_loss": 2.0 + step % 2 + spike * (step == 80), "grad_norm": math.nan})
        record.finish("finished")
    return tmp_path


def test_it_prints_status_scores_and_events_of_every_run(runs, capsys):
    main([str(runs)])
    lines = capsys.readouterr().out.splitlines()
    calm, spiked = (next(line for line in lines if line.split()[:1] == [name]) for name in ("calm", "spiked"))
    assert calm.split()[:5] == ["calm", "finished", "100", "0", "0"]
    assert spiked.split()[:5] == ["spiked", "finished", "100", "2", "2"]  # one of the 50 scored steps
    assert "spiked: 2 events" in lines
    assert [line.split()[:3] for line in lines[-2:]] == [["80", "42", "olmo2"], ["80", "42", "six_sigma"]]


def test_a_run_is_named_by_its_own_folder_too(runs, capsys):
    main([str(runs / "calm"), str(runs / "calm")])
    assert capsys.readouterr().out.count("calm") == 2


def test_many_events_are_counted_not_listed(tmp_path, config, capsys):
    record = RunRecord.create(tmp_path / "rough", config, [], {})
    for step in range(400):
        record.append(step, {"grad_norm": 1.0 + step % 2 + 10.0 * (step % 10 == 9)})
    record.finish("finished")
    count = len(load_run(tmp_path / "rough").events)
    assert count > SHOWN
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == f"... and {count - SHOWN} more"


def test_no_run_is_a_mistake(tmp_path):
    with pytest.raises(MuonlabError, match="no run in"):
        main([str(tmp_path)])


def test_the_record_holds_the_events_and_the_definitions_that_found_them(runs):
    kept = json.loads((runs / "spiked" / "events.json").read_text())
    events = load_run(runs / "spiked").events
    assert [event["step"] for event in kept["events"]] == events["step"].tolist()
    assert kept["definitions"]["six_sigma"]["settings"] == {"window": 128, "sigmas": 6.0}
    assert kept["scores"]["olmo2/train_loss"] == 2.0
    assert kept["scores"]["zclip/grad_norm"] == "nan"
