"""Plug-ins: a file of one's own, or an installed package, that registers optimizers, models, schedules or measures.

A plug-in is known by the digest of its source, wherever it lies: that digest is part of a run's identity, and the run's
folder keeps the source. Once it is imported, its entries are found by name like the package's own.
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

from muonlab.errors import MuonlabError, unknown_name
from muonlab.registry import REGISTRIES

GROUP = "muonlab.plugins"  # of entry points: NAME = "package.module"
FOLDER = "plugins"  # in a run's folder, holds the sources


@dataclass(frozen=True)
class Plugin:
    """A plug-in as it is on this machine.

    place: the absolute path of its file, or the name of its entry point. files: its source, {name: bytes}; of
    a package every .py file. paths: where those lie. entries: (kind, name) of what it registers, once imported.
    """

    place: str
    files: Mapping[str, bytes] = field(repr=False)
    paths: frozenset[Path] = field(repr=False)
    entries: frozenset[tuple[str, str]] = frozenset()

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256: of the bytes of a single file, whatever its name, or of all names and bytes."""
        if len(self.files) == 1:
            [source] = self.files.values()
        else:
            source = b"".join(
                name.encode() + b"\0" + text + b"\0" for name, text in sorted(self.files.items())
            )
        return hashlib.sha256(source).hexdigest()[:16]


_imported: dict[str, Plugin] = {}  # by digest


def find_plugin(place: str) -> Plugin:
    """The plug-in at `place`, the path of a .py file or the name of an entry point of GROUP; not yet imported.

    Raises MuonlabError for a file that does not exist or cannot be read and for an entry point that is not installed.
    """
    if _is_file(place):
        path = Path(place).absolute()
        try:
            return Plugin(str(path), {path.name: path.read_bytes()}, frozenset({path}))
        except FileNotFoundError as error:
            raise MuonlabError(
                f"plug-in {place} does not exist; each run that used it keeps a copy as {FOLDER}/{path.name} in its"
                " folder, which goes on with the same runs if it is given in its place"
            ) from error
        except OSError as error:
            raise MuonlabError(f"plug-in {place} cannot be read: {error.strerror}") from error
    module = _entry_point(place).module
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise MuonlabError(f"plug-in {place} is installed as the module {module}, which does not exist")
    top = Path(spec.origin)
    paths = sorted(top.parent.rglob("*.py")) if spec.submodule_search_locations else [top]
    return Plugin(
        place, {str(path.relative_to(top.parent)): path.read_bytes() for path in paths}, frozenset(paths)
    )


def load_plugin(place: str, digest: str = "") -> Plugin:
    """Import the plug-in at `place`, once in a process, so that what it registers is known.

    `digest` is that of the source that a run was asked for with; "" takes the source as it is. Raises what
    `find_plugin` raises; and MuonlabError for another source than `digest` says, and for an exception within the
    plug-in, with its file and line.
    """
    plugin = find_plugin(place)
    if digest and plugin.digest != digest:
        raise MuonlabError(
            f"plug-in {place} has changed since its runs were asked for; rerun the command to train other runs with it"
        )
    if plugin.digest not in _imported:
        if any(plugin.paths & other.paths for other in _imported.values()):
            raise MuonlabError(
                f"plug-in {place} has changed since this process imported it; start the command again"
            )
        before = _registered()
        _import(plugin)
        _imported[plugin.digest] = replace(plugin, entries=frozenset(_registered() - before))
    return replace(plugin, entries=_imported[plugin.digest].entries)


def owner_of(kind: str, name: str) -> Plugin | None:
    """The imported plug-in that registered an entry; None for the package's own and for unknown ones."""
    return next((plugin for plugin in _imported.values() if (kind, name) in plugin.entries), None)


def plugin_entries() -> set[tuple[str, str]]:
    """(kind, name) of everything that imported plug-ins registered."""
    return {entry for plugin in _imported.values() for entry in plugin.entries}


def plugin_sources(plugins: Mapping[str, str] | None) -> dict[str, bytes]:
    """The source of imported plug-ins, given as {place: digest}, by the names under which a run's folder keeps it."""
    sources: dict[str, bytes] = {}
    for place, digest in (plugins or {}).items():
        folder = FOLDER if _is_file(place) else f"{FOLDER}/{place}"
        sources |= {f"{folder}/{name}": text for name, text in _imported[digest].files.items()}
    return sources


def plugin_fault(error: BaseException) -> MuonlabError | None:
    """The sentence for an exception that passed through an imported plug-in: its file, line and text. None for any
    other, and for a MuonlabError, which is a sentence already."""
    paths = [path for plugin in _imported.values() for path in plugin.paths]
    return None if isinstance(error, MuonlabError) else _fault(error, paths)


def _fault(error: BaseException, paths: Iterable[Path]) -> MuonlabError | None:
    """The sentence for an exception that passed through one of these files, by the last place in them; else None."""
    names = set(map(str, paths))
    places = [(frame.filename, frame.lineno) for frame in extract_tb(error.__traceback__)]
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename in names:
        places, text = [(error.filename, error.lineno)], error.msg
    place = next((place for place in reversed(places) if place[0] in names), None)
    if place is None:
        return None
    kind = "" if isinstance(error, MuonlabError) else f"{type(error).__name__}: "
    fault = MuonlabError(f"{place[0]}, line {place[1]}: {kind}{' '.join(text.split())}".removesuffix(": "))
    fault.__cause__ = error
    return fault


def _import(plugin: Plugin) -> None:
    try:
        if _is_file(plugin.place):
            _execute(plugin)
        else:
            importlib.import_module(_entry_point(plugin.place).module)
    except (Exception, SystemExit) as error:
        fault = _fault(error, plugin.paths)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        raise fault or MuonlabError(f"plug-in {plugin.place} cannot be imported: {text}") from error


def _execute(plugin: Plugin) -> None:
    """Import a file under a name of its own, so that its classes can be pickled and it hides no package.

    What is executed are the very bytes of the digest; the import system might take an older compiled copy.
    """
    [source] = plugin.files.values()
    module = ModuleType(f"muonlab_plugin_{plugin.digest}")
    module.__file__ = plugin.place
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, plugin.place, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _entry_point(name: str) -> EntryPoint:
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise MuonlabError(
            f"{unknown_name('installed plug-in', name, points)}; a plug-in of one file is given by its path, which ends"
            " in .py"
        )
    return points[name]


def _registered() -> set[tuple[str, str]]:
    """(kind, name) of every entry that is not the package's own, by now."""
    return {(registry.kind, name) for registry in REGISTRIES for name in registry.added}
