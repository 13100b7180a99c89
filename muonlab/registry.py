"""A boring table of names: configs name our own builders, never import paths of arbitrary code."""

import inspect
from collections.abc import Callable
from typing import Any

from muonlab.errors import MuonlabError, unknown_name


class Registry:
    """Maps names to builders and refuses settings that the builder does not have.

    `kind` is what the entries are called in errors ("optimizer").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._builders: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: `@registry.register("muon")`. Raises MuonlabError if the name is taken."""

        def add(builder: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._builders:
                raise MuonlabError(f"{self.kind} '{name}' is already registered")
            self._builders[name] = builder
            return builder

        return add

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._builders)

    def build(self, name: str, *args: Any, **settings: Any) -> Any:
        """Call the builder; an unknown name or setting raises MuonlabError with the near ones."""
        if name not in self._builders:
            raise unknown_name(self.kind, name, self._builders)
        builder = self._builders[name]
        known = self.settings(name)
        for setting in settings:
            if setting not in known:
                raise unknown_name(f"setting of {self.kind} {name}", setting, known)
        return builder(*args, **settings)

    def settings(self, name: str) -> dict[str, Any]:
        """The keyword settings of one entry with their defaults."""
        if name not in self._builders:
            raise unknown_name(self.kind, name, self._builders)
        parameters = inspect.signature(self._builders[name]).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty or p.kind is p.KEYWORD_ONLY}
