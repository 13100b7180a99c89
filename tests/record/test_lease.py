"""The lease of a run's folder: one holder at a time, on one machine, in containers and on many hosts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import lease as lease_module
from muonlab.record import owner as owner_module
from muonlab.record.lease import Lease, LeaseLost, Watch, beat_seconds, held
from muonlab.record.owner import Owner

HOLD = """
import sys, time
from pathlib import Path
from muonlab.record.lease import Lease
lease = Lease.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


ANOTHER_HOST = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setenv("MUONLAB_BEAT", "0.05")


def elsewhere(monkeypatch):
    """Owners are on another machine: nothing is known of their processes."""
    monkeypatch.setattr(Owner, "alive", property(lambda owner: None))


def holder(folder, *host):
    command = [*host, sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_is_refused_while_its_process_lives_and_taken_at_once_when_it_is_dead(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(EnvironmentFault, match=f"is being written by process {process.pid} on "):
            Lease.take(tmp_path)
        os.kill(process.pid, signal.SIGSTOP)  # it lives, however long it sleeps
        time.sleep(0.3)
        with pytest.raises(EnvironmentFault, match="is being written by"):
            Lease.take(tmp_path)
    finally:
        process.kill()
        process.communicate()
    lease = Lease.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lease-000002"]
    lease.release()
    assert not list(tmp_path.iterdir())


def can_unshare():
    """Whether this process may make hosts of its own."""
    return subprocess.run([*ANOTHER_HOST, "true"], capture_output=True).returncode == 0


def test_two_hosts_cannot_write_one_folder_and_a_dead_one_is_followed_in_three_heartbeats(
    tmp_path, monkeypatch
):
    """Host names of their own, and neither sees the other's processes, whose numbers may be equal."""
    if not can_unshare():
        pytest.skip("unshare --uts --pid is not permitted here")
    monkeypatch.setenv("MUONLAB_BEAT", "0.3")
    name = ["sh", "-c", 'hostname other; exec "$@"', "sh"]
    process = holder(tmp_path, *ANOTHER_HOST, *name)
    try:
        assert held(tmp_path).owner.host == "other"
        assert held(tmp_path).alive() is None
        with pytest.raises(EnvironmentFault, match=r"is being written by process \d+ on other"):
            Lease.take(tmp_path)
    finally:
        process.kill()  # and with it the first process of its namespace
        process.communicate()
    began = time.monotonic()
    lease = Lease.take(tmp_path)
    assert 0.3 < time.monotonic() - began < 30
    lease.release()


def test_a_lease_of_another_machine_is_refused_while_its_heart_beats(tmp_path, monkeypatch):
    first = Lease.take(tmp_path)
    elsewhere(monkeypatch)
    with pytest.raises(EnvironmentFault, match="is being written by"):
        Lease.take(tmp_path)
    first.check()
    first.release()
    Lease.take(tmp_path).release()


def test_a_silent_lease_of_another_machine_is_taken_and_its_holder_learns_of_it(tmp_path, monkeypatch):
    first = Lease.take(tmp_path)
    elsewhere(monkeypatch)
    asleep(first)
    began = time.monotonic()
    second = Lease.take(tmp_path)
    assert time.monotonic() - began >= 3 * 0.05
    second.check()
    with pytest.raises(LeaseLost, match="taken over"):
        first.check()
    first.release()  # takes nothing away from the second
    second.check()
    second.release()
    with pytest.raises(LeaseLost):
        first.check()


def test_a_holder_that_slept_and_woke_before_anybody_came_still_holds(tmp_path, monkeypatch):
    first = Lease.take(tmp_path)
    elsewhere(monkeypatch)
    asleep(first)
    time.sleep(0.3)
    before = held(tmp_path).beat
    first.check()
    assert held(tmp_path).beat != before


def test_silence_is_counted_by_the_observer_alone(tmp_path, monkeypatch):
    """The file's time may lie in the future or the past: only its change is a heartbeat."""
    first = Lease.take(tmp_path)
    asleep(first)
    elsewhere(monkeypatch)
    now, watch = [0.0], Watch()
    watch.now = lambda: now[0]
    for hour in (-1, 1, 0):
        os.utime(first.path, (1e9 + 3600 * hour,) * 2)
        assert held(tmp_path).alive(watch)
    now[0] = 3 * 0.05 - 1e-6
    assert held(tmp_path).alive(watch)
    now[0] = 3 * 0.05
    assert not held(tmp_path).alive(watch)


def test_of_many_that_come_at_once_one_takes_a_dead_lease(tmp_path, monkeypatch):
    dead = Owner.this().values() | {"pid_started": 1}
    for round_ in range(10):
        folder = tmp_path / str(round_)
        folder.mkdir()
        (folder / ".lease-000003").write_text(json.dumps({"token": "x", "every": 0.05, **dead}))
        taken, start = [], threading.Barrier(8)

        def take(folder=folder, taken=taken, start=start):
            start.wait()
            with suppress(EnvironmentFault):
                taken.append(Lease.take(folder))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [lease] = taken
        lease.check()
        assert [path.name for path in folder.iterdir()] == [".lease-000004"]
        lease.release()


def test_containers_with_equal_names_and_process_numbers_are_different_machines(tmp_path, monkeypatch):
    ours = Owner.this()
    monkeypatch.setattr(owner_module, "machine", lambda: "boot/pid:[2]")
    theirs = Owner(ours.host, ours.pid, ours.pid_started, "boot/pid:[1]")
    assert theirs.alive is None
    assert Owner(ours.host, ours.pid, ours.pid_started, None).alive is None
    assert Owner(ours.host, ours.pid, ours.pid_started, "boot/pid:[2]").alive is True


def test_a_lease_that_was_killed_while_it_was_made_is_silent(tmp_path):
    (tmp_path / ".lease-000001").write_text("")
    lease = Lease.take(tmp_path)
    assert lease.path.name == ".lease-000002"
    lease.release()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot write"):
        Lease.take(tmp_path / "missing")


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", ""])
def test_the_beat_is_a_positive_number(monkeypatch, given):
    monkeypatch.setenv("MUONLAB_BEAT", given)
    with pytest.raises(MuonlabError, match="positive number"):
        beat_seconds()


def asleep(lease):
    """Stop the thread of a lease, as if its process were stopped."""
    lease._over.set()
    lease._thread.join()
    assert lease_module.SILENCE == 3
