"""Heartbeats of a study's workers in the storage that they share: silence is judged without comparing clocks.

Every worker counts its heartbeats in an attribute of the Optuna study `<name>/workers`. A worker that waits for another
measures silence in heartbeats of its own that the storage accepted. So nobody is taken for dead while the storage
cannot be written, and a process that was suspended for an hour does not count that hour.
"""

import threading
import uuid
from contextlib import suppress
from typing import Any

import optuna
from optuna.storages import BaseStorage

from muonlab.record.lease import Watch, beat_seconds


class Heartbeat:
    """This worker's heartbeat, while entered as a context, and what it has seen of the others'.

    `token` names the worker; `every`: seconds between two beats.
    """

    def __init__(self, storage: BaseStorage | str, name: str):
        self.token, self.every = uuid.uuid4().hex, beat_seconds()
        self._storage, self._name = storage, f"{name}/workers"
        self._study: optuna.Study | None = None
        self._beats = 0
        self._watch = Watch(now=lambda: float(self._beats))
        self._signs: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Heartbeat":
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name=f"heartbeat of {self._name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(self.every)  # does not wait for a storage that hangs

    def beat(self) -> None:
        """Record one heartbeat and read the others'. Raises whatever the storage raises."""
        if self._study is None:
            self._study = optuna.create_study(
                study_name=self._name, storage=self._storage, load_if_exists=True
            )
        self._study.set_user_attr(self.token, {"beat": self._beats + 1, "every": self.every})
        signs = self._study.user_attrs
        with self._lock:
            self._beats += 1
            self._signs = signs
            for token in signs:
                self._look(token)

    def alive(self, token: str) -> bool:
        """False once the worker of this token gave no sign during three beats of ours (or of its own, if they are
        longer)."""
        with self._lock:
            return self._look(token)

    def _look(self, token: str) -> bool:
        sign = self._signs.get(token, {})
        return self._watch.alive(token, sign.get("beat"), max(1.0, sign.get("every", 0.0) / self.every))

    def _go_on(self) -> None:
        while True:
            with suppress(
                Exception
            ):  # whatever the storage raises: this beat does not count, and the next may
                self.beat()
            if self._over.wait(self.every):
                return
