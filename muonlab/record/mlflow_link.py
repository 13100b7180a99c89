"""Which MLflow run shows a folder, in its mlflow.json: written before there is such a run, so none is made twice."""

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
    """record: a name of the folder's own, which the tag TAG of its MLflow run repeats: by it a run is found that was
    made just before a kill. begun_ms: when the first run was made, in ms since 1970; the clock of all its points, also
    where the store is lost and filled again. run_id: MLflow's; None before there is one. complete: whether MLflow was
    given everything that the folder holds, its end included.
    """

    record: str
    begun_ms: int
    run_id: str | None = None
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Link | None":
        """That of a folder; None where it has none. Raises MuonlabError for a file that is damaged."""
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
        """That of a folder, begun where it has none: several processes that ask at once get the same. A damaged file is
        moved to mlflow.json.torn."""
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
        """The link with these changes, written where there are any; run_id None: as it was."""
        changed = replace(self, complete=complete, run_id=run_id or self.run_id)
        if changed != self:
            write_json(folder / FILE, asdict(changed))
        return changed

    def tags(self, folder: Path) -> dict[str, str]:
        """By which its run is found again."""
        return {TAG: self.record, FOLDER_TAG: folder.name}

    def find(self, client: "MlflowClient", experiment_id: str, folder: Path) -> "Run | None":
        """The run that was made for it. Where the link was damaged, its name is lost: then the newest run that was made
        for a folder of this name."""
        found = client.search_runs([experiment_id], f"tags.`{TAG}` = '{self.record}'", max_results=1)
        if not found and (folder / f"{FILE}.torn").exists():
            query = f"tags.`{FOLDER_TAG}` = '{folder.name}'"
            found = client.search_runs([experiment_id], query, max_results=1, order_by=["start_time DESC"])
        return found[0] if found else None


def _now_ms() -> int:
    return int(1000 * time.time())
