"""Read an experiment's file, checked before anything runs: as YAML, as a design, and at another scale."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from muonlab.cli import project_folder
from muonlab.errors import MuonlabError, shown, unknown_name
from muonlab.settings.check import Text, build, check, vanishing_number
from muonlab.study.asking import Given, filled
from muonlab.study.design import Condition, Design, Figure, Scale, searches


# ---------------------------------------------------------------------- YAML
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


# ---------------------------------------------------------------------- designs
def load_experiment(name: str, scale: str = "cpu", given: Given | None = None) -> Design:
    """experiments/<name>.yaml at a scale, checked; raises what `read_experiment` and `at_scale` raise."""
    return at_scale(read_experiment(name, given), scale)


def read_experiment(name: str, given: Given | None = None) -> Design:
    """experiments/<name>.yaml, checked, with what is `given` of what it asks for and its examples for the rest.

    Raises MuonlabError for an unknown name, with the near ones.
    """
    paths = {path.stem: path for path in project_folder("experiments").glob("*.yaml")}
    if name not in paths:
        raise unknown_name("experiment", name, paths)
    return read_design(paths[name], given)


def read_design(path: Path, given: Given | None = None) -> Design:
    """The design in a file. Raises MuonlabError for a file that is not YAML or breaks the format."""
    try:
        return make_design(filled(read_yaml(path.read_text(encoding="utf-8")), given or {}), path.name)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MuonlabError(f"{path.name} is not YAML: {fault(error)}") from error


def make_design(values: object, where: str = "the experiment") -> Design:
    """A design from plain values.

    Raises MuonlabError, naming what is near, for an unknown or missing key and for a design that cannot be run.
    """
    if not isinstance(values, Mapping):
        raise MuonlabError(f"{where} must hold a mapping of settings")
    try:
        design = build(Design, _with_figures(values), "")
    except MuonlabError as error:
        raise MuonlabError(f"{where}: {error}") from error
    for scale, section in design.scales.items():
        for name, changed in section.conditions.items():
            _known([name], design.conditions, f"condition of scale {scale} in {where}")
            _known(
                changed,
                Condition.__dataclass_fields__,
                f"key of condition {name} at scale {scale} in {where}",
            )
    for name, condition in design.conditions.items():
        _check_times(name, condition, where)
        if condition.tuned_on is not None:
            _check_tuning(design, name, condition, where)
        if condition.search is not None:
            _check_search(design, name, condition, where)
        if not design.arms_of(name):
            raise MuonlabError(f"condition '{name}' of {where} has no arms")
    _check_looks(design, where)
    _check_questions(design, where)
    return design


def _with_figures(values: Mapping[str, object]) -> Mapping[str, object]:
    figures = values.get("figures")
    if not isinstance(figures, Sequence) or isinstance(figures, str):
        return values
    return {**values, "figures": [_figure(each) for each in figures]}


def _figure(values: object) -> Figure:
    if isinstance(values, Figure):
        return values
    if not isinstance(values, Mapping):
        raise MuonlabError(f"a figure must be a mapping of settings, not {shown(values)}")
    name = check(Text, values.get("name"), "a figure's name")
    lists = {
        key: check(Sequence[str], values[key], f"{key} of figure {name}")
        for key in ("conditions", "arms")
        if key in values
    }
    settings = {str(key): value for key, value in values.items() if key not in ("name", "kind", *lists)}
    return Figure(name, check(Text, values.get("kind"), f"kind of figure {name}"), **lists, settings=settings)


def at_scale(design: Design, scale: str) -> Design:
    """The same question at `scale`: with its `seeds`, `minutes` and `prediction`, the keys that its `conditions`
    change, its overrides for every run as `scale_common`, and what it is `about` as `scale_about`.

    "cpu" is the file as written, unless the file defines it. Raises MuonlabError for a scale that the file lacks.
    """
    scales = {"cpu": Scale(), **design.scales}
    if scale not in scales:
        raise unknown_name("scale", scale, scales)
    changes = scales[scale]
    conditions = {
        name: _with(section, name, changes.conditions.get(name, {}))
        for name, section in design.conditions.items()
    }
    scaled = replace(
        design,
        conditions=conditions,
        seeds=changes.seeds or design.seeds,
        minutes=changes.minutes or design.minutes,
        prediction=changes.prediction or design.prediction,
        scales={},
        scale=scale,
        scale_about=changes.about,
        scale_common=tuple(changes.common),
    )
    _check_looks(scaled, f"scale {scale}")
    return scaled


def _with(section: Condition, name: str, changed: Mapping[str, object]) -> Condition:
    """The condition with what a scale changes in it."""
    typed = build(Condition, changed, f"condition {name}")
    kept = {key: value for key, value in vars(section).items() if key not in changed}
    return Condition(**kept | {key: getattr(typed, key) for key in changed})


# ---------------------------------------------------------------------- checks
def _check_questions(design: Design, where: str) -> None:
    figures = [figure.name for figure in design.figures]
    try:
        claims = design.all_claims()
    except MuonlabError as error:
        raise MuonlabError(f"{where}: {error}") from error
    for claim in claims:
        if claim.figure and claim.figure not in figures:
            raise unknown_name(f"figure of '{claim.claim}' in {where}", claim.figure, figures)
    for figure in design.figures:
        _known(figure.conditions, design.conditions, f"condition of figure {figure.name} in {where}")


def _check_looks(design: Design, where: str) -> None:
    """Raise MuonlabError for a number of seeds that no planned look has: before the runs, not after."""
    looks = design.looks or ()
    for name in design.conditions if looks else ():
        count = len(design.seeds_of(name))
        if name not in design.tuning_conditions and count not in looks:
            planned = ", ".join(map(str, looks))
            raise MuonlabError(
                f"condition '{name}' of {where} has {count} seeds, which is none of its `looks`: {planned}"
            )


def _check_search(design: Design, name: str, section: Condition, where: str) -> None:
    if section.vary is not None or section.levels is not None:
        raise MuonlabError(f"condition '{name}' of {where} has both a search and levels; give one of them")
    search = searches(design, name)
    if search.adaptive and len(design.seeds_of(name)) > 1:
        raise MuonlabError(
            f"condition '{name}' of {where} has {len(design.seeds_of(name))} seeds, but the sampler {search.sampler}"
            " learns from one run per setting; give it one seed, or use quasi_random"
        )
    for arm in design.arms_of(name):
        if arm not in search.optimizers:
            raise unknown_name(f"searched optimizer of condition {name} in {where}", arm, search.optimizers)


def _check_times(name: str, section: Condition, where: str) -> None:
    if section.times is None:
        return
    if section.tuned_on is None or section.vary is not None or section.levels is not None:
        raise MuonlabError(
            f"condition '{name}' of {where} has `times`, which multiplies what it is `tuned_on`, and no levels"
        )
    if len(section.times) != 1:
        raise MuonlabError(
            f"`times` of condition '{name}' of {where} takes one key, not {len(section.times)}"
        )


def _check_tuning(design: Design, name: str, section: Condition, where: str) -> None:
    search = section.tuned_on
    assert search is not None
    if search not in design.conditions:
        raise unknown_name(f"condition for {name} to be tuned on", search, design.conditions)
    if design.conditions[search].tuned_on:
        raise MuonlabError(f"condition '{name}' of {where} is tuned on '{search}', which is itself tuned")
    for arm in section.arms:
        if arm not in design.arms_of(search):
            raise unknown_name(f"arm of {search} to tune {name} on", arm, design.arms_of(search))
    shared = sorted(set(design.seeds_of(name)) & set(design.seeds_of(search)))
    if shared:
        raise MuonlabError(
            f"condition '{name}' of {where} is tuned on '{search}' with the same seed {shared[0]}: "
            "the seeds that chose a setting cannot judge it"
        )


def _known(names: Iterable[object], known: Iterable[str], kind: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise unknown_name(kind, str(name), known)
