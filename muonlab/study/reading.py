"""YAML as people write it for experiments: 1e-3 is a number, and a repeated key is an error."""

import re
from typing import Any

import yaml

from muonlab.settings.check import vanishing_number


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3, which has no decimal point, as text, and keeps the last of two equal keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError for a repeated key."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is given twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> object:
    """The plain values in a text. Raises yaml.YAMLError for text that is not YAML or repeats a key."""
    return yaml.load(text, _Loader)


def fault(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong with a text, on one line, without YAML's excerpts of it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    if vanishing_number(node.value):
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"{node.value} is too small for a floating-point number and would become 0",
            node.start_mark,
        )
    return loader.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:float", _float)
