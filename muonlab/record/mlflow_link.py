"""The link from a run folder to its MLflow run, kept in mlflow.json and written first, so that no run is made twice."""

import os
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.files import read_json, set_aside, temporary_path, write_json
from muonlab.settings.check import Text, check

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FILE = "mlflow.json"
TAG, FOLDER_TAG = "muonlab.record", "muonlab.folder"


@dataclass(frozen=True)
class Link:
    """The content of mlflow.json.

    record: a unique name of the folder, which the tag TAG of its MLflow run repeats, so that a run made just before a
        kill is found again.
    begun_ms: when the first MLflow run was made, in ms since 1970; the times of all points count from it, even after
        the store was lost and filled again.
    run_id: MLflow's; None before there is one.
    complete: whether MLflow has everything that the folder holds, including how the run ended.
    """

    record: str
    begun_ms: int
    run_id: str | None = None
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Link | None":
        """The link of a folder; None where it has none. Raises MuonlabError for a damaged file."""
        values = read_json(folder / FILE)
        if values is None:
            return None
        try:
            held = check(dict[str, object], values, FILE)
            return cls(
                check(Text, held.get("record", uuid.uuid4().hex), "record"),
                check(int, held.get("begun_ms", _now_ms()), "begun_ms"),
                check(Text | None, held.get("run_id"), "run_id"),
                check(bool, held.get("complete", False), "complete"),
            )
        except MuonlabError as error:
            raise MuonlabError(f"{folder / FILE} is damaged: {error}") from error

    @classmethod
    def of(cls, folder: Path) -> "Link":
        """The link of a folder, created if missing: processes that call it at the same time get the same one. A damaged
        file is renamed to mlflow.json.torn."""
        try:
            held = cls.read(folder)
        except EnvironmentFault:
            raise
        except MuonlabError:
            set_aside(folder / FILE)
            held = None
        return held or cls._begin(folder)

    @classmethod
    def _begin(cls, folder: Path) -> "Link":
        link, mine = cls(uuid.uuid4().hex, _now_ms()), temporary_path(folder / FILE)
        write_json(mine, asdict(link))
        try:
            os.link(mine, folder / FILE)
        except FileExistsError:
            return cls.of(folder)
        finally:
            mine.unlink()
        return link

    def keep(self, folder: Path, run_id: str | None = None, complete: bool = False) -> "Link":
        """The link with these values, written to disk if any differ; run_id None keeps the present one."""
        changed = replace(self, complete=complete, run_id=run_id or self.run_id)
        if changed != self:
            write_json(folder / FILE, asdict(changed))
        return changed

    def tags(self, folder: Path) -> dict[str, str]:
        """The tags by which the MLflow run is found again."""
        return {TAG: self.record, FOLDER_TAG: folder.name}

    def find(self, client: "MlflowClient", experiment_id: str, folder: Path) -> "Run | None":
        """The MLflow run made for this record. If the link was damaged, its name is lost, and the newest run made for a
        folder of this name is taken."""
        runs = client.search_runs([experiment_id], f"tags.`{TAG}` = '{self.record}'", max_results=1)
        if not runs and (folder / f"{FILE}.torn").exists():
            query = f"tags.`{FOLDER_TAG}` = '{folder.name}'"
            runs = client.search_runs([experiment_id], query, max_results=1, order_by=["start_time DESC"])
        return runs[0] if runs else None


def _now_ms() -> int:
    return int(1000 * time.time())
