"""A table of names: configs name registered builders; code is imported only where `plugins` names it."""

import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from muonlab.errors import MuonlabError, unknown_name
from muonlab.settings.check import Keywords, Named, build, defaults, settings_class

Built = TypeVar("Built")
Builder = TypeVar("Builder", bound=Callable[..., Any])

REGISTRIES: "list[Registry[Any]]" = []  # every one that this process has made


class Registry(Generic[Built]):
    """Maps names to builders, and builds from checked settings.

    A builder first takes what the caller supplies, such as the model, and then either one argument `settings`,
    annotated with its dataclass, or annotated keyword settings. `kind` is what errors call the entries ("optimizer").
    `package`: a package whose modules register entries; they are imported at the first look-up.
    """

    def __init__(self, kind: str, package: str = ""):
        self.kind, self._package = kind, package
        self._builders: dict[str, Callable[..., Built]] = {}
        self._sections: dict[str, type] = {}
        REGISTRIES.append(self)

    def register(self, name: str) -> Callable[[Builder], Builder]:
        """Decorator: `@registry.register("muon")`. Raises MuonlabError if the name is taken or a setting cannot be
        checked."""

        def add(builder: Builder) -> Builder:
            inside = str(builder.__module__).startswith(f"{self._package}.")
            if not inside:  # else the package is being imported at this moment
                self._import_entries()
            if name in self._builders:
                raise MuonlabError(f"{self.kind} '{name}' is already registered")
            self._sections[name] = settings_class(builder, name)
            self._builders[name] = builder
            return builder

        return add

    def _import_entries(self) -> None:
        package, self._package = self._package, ""
        if package:
            for module in pkgutil.iter_modules(import_module(package).__path__):
                if module.name != "__main__":
                    import_module(f"{package}.{module.name}")

    @property
    def added(self) -> list[str]:
        """The names that were registered by now from outside of the package."""
        return [
            name for name, builder in self._builders.items() if not builder.__module__.startswith("muonlab.")
        ]

    def names(self) -> list[str]:
        """The registered names, sorted."""
        self._import_entries()
        return sorted(self._builders)

    def section(self, name: str) -> type:
        """The dataclass of one entry's settings. Raises MuonlabError, with the near names, for an unknown one."""
        self._import_entries()
        if name not in self._builders:
            raise unknown_name(self.kind, name, self._builders)
        return self._sections[name]

    def settings(self, name: str) -> dict[str, object]:
        """The settings of one entry with their defaults."""
        return {key: value for key, value in defaults(self.section(name)).items() if key != "name"}

    def build(self, name: str, values: Mapping[str, object], *context: object) -> Built:
        """Check plain values and build; `context`: the builder's arguments before its settings."""
        return self.make(build(self.section(name), values, self.kind), *context)

    def make(self, settings: Named, *context: object) -> Built:
        """Build from a checked section, whose `name` selects the builder."""
        self._import_entries()
        builder = self._builders[settings.name]
        if isinstance(settings, Keywords):
            return builder(*context, **settings.arguments())
        return builder(*context, settings)
