"""An experiment's file: what it may say, checked before anything runs, and the same question at another scale."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from muonlab.cli import project_folder
from muonlab.errors import MuonlabError, unknown_name

# Words that say before any run what is asked and how it is judged; all of them are required.
WORDS = ("question", "prediction", "source", "held_equal", "tuning", "primary")
SPEC_KEYS = {
    *WORDS,
    "minutes",
    "seeds",
    "common",
    "conditions",
    "claims",
    "harmless",
    "figures",
    "scales",
}
SCALE_KEYS = {"common", "conditions", "seeds", "minutes"}
CONDITION_KEYS = {"about", "arms", "common", "seeds", "vary", "levels", "tuned_on", "windows", "heads"}
ARM_KEYS = {"overrides", "vary", "levels"}


def load_experiment(name: str, scale: str = "cpu") -> dict[str, Any]:
    """experiments/<name>.yaml at a scale, checked; raises what `read_experiment` and `at_scale` raise."""
    return at_scale(read_experiment(name), scale)


def read_experiment(name: str) -> dict[str, Any]:
    """experiments/<name>.yaml as it stands, checked. Raises MuonlabError for an unknown name, with the near ones."""
    path = project_folder("experiments") / f"{name}.yaml"
    if not path.exists():
        raise unknown_name("experiment", name, [p.stem for p in path.parent.glob("*.yaml")])
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise MuonlabError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    check_spec(spec, path.name)
    return spec


def at_scale(spec: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """The same question at `scale`: its `seeds` and `minutes`, what its `conditions` say otherwise key by key, and as
    `scale_common` the overrides of every run.

    "cpu" is the file as it stands, unless it says more. Raises MuonlabError for a scale that the file lacks.
    """
    scales = {"cpu": {}, **spec.get("scales", {})}
    if scale not in scales:
        raise unknown_name("scale", scale, scales)
    chosen = scales[scale]
    changed = {key: chosen.get(key, spec[key]) for key in ("seeds", "minutes")}
    changed["conditions"] = {
        name: {**section, **chosen.get("conditions", {}).get(name, {})}
        for name, section in spec["conditions"].items()
    }
    kept = {key: value for key, value in spec.items() if key != "scales"}
    return kept | changed | {"scale": scale, "scale_common": list(chosen.get("common", ()))}


def check_spec(spec: Mapping[str, Any], where: str = "the experiment") -> None:
    """Raises MuonlabError, naming what is near, for an unknown or missing key and for a design that cannot be run."""
    _known(spec, SPEC_KEYS, f"key of {where}")
    for key in (*WORDS, "minutes", "seeds", "conditions"):
        if not spec.get(key):
            raise MuonlabError(f"{where} lacks '{key}', which must be said before anything runs")
    for scale, section in spec.get("scales", {}).items():
        _known(section, SCALE_KEYS, f"key of scale {scale} in {where}")
        for name, changed in section.get("conditions", {}).items():
            _known([name], spec["conditions"], f"condition of scale {scale} in {where}")
            _known(changed, CONDITION_KEYS, f"key of condition {name} at scale {scale} in {where}")
    for name, section in spec["conditions"].items():
        _known(section, CONDITION_KEYS, f"key of condition {name} in {where}")
        if not section.get("arms"):
            raise MuonlabError(f"condition '{name}' of {where} has no arms")
        for arm, details in section["arms"].items():
            if isinstance(details, Mapping):
                _known(details, ARM_KEYS, f"key of arm {name}/{arm} in {where}")
    for name, section in spec["conditions"].items():
        if "tuned_on" in section:
            _check_tuning(spec, name, section, where)
    _check_questions(spec, where)


def seeds_of(spec: Mapping[str, Any], condition: str) -> list[int]:
    """The seeds of a condition: its own, or else the experiment's."""
    return list(spec["conditions"][condition].get("seeds", spec["seeds"]))


def searches(spec: Mapping[str, Any]) -> set[str]:
    """The conditions that others are tuned on."""
    return {section["tuned_on"] for section in spec["conditions"].values() if "tuned_on" in section}


def claims_of(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims in the order in which they are answered: `claims`, then a claim for each pair of `harmless`."""
    pairs = []
    for pair in spec.get("harmless", ()):
        claim = f"The clip is harmless at a {pair['condition']} learning rate"
        told = {"claim": claim, "source": "K2 App. D", "harmless": pair["baseline"]}
        pairs.append(told | {key: value for key, value in pair.items() if key != "baseline"})
    return [*spec.get("claims", ()), *pairs]


def _check_questions(spec: Mapping[str, Any], where: str) -> None:
    from analysis.claims import check_claim

    for claim in claims_of(spec):
        try:
            check_claim(claim, spec["conditions"], searches(spec))
        except MuonlabError as error:
            raise MuonlabError(f"{where}: {error}") from error
    figures = {figure.get("name") for figure in spec.get("figures", ())}
    for claim in claims_of(spec):
        if "figure" in claim and claim["figure"] not in figures:
            raise unknown_name(f"figure of '{claim['claim']}' in {where}", claim["figure"], figures)
    for figure in spec.get("figures", ()):
        _known(
            figure.get("conditions", ()),
            spec["conditions"],
            f"condition of figure {figure.get('name')} in {where}",
        )


def _check_tuning(spec: Mapping[str, Any], name: str, section: Mapping[str, Any], where: str) -> None:
    search, others = section["tuned_on"], spec["conditions"]
    if search not in others:
        raise unknown_name(f"condition for {name} to be tuned on", search, others)
    if "tuned_on" in others[search]:
        raise MuonlabError(f"condition '{name}' of {where} is tuned on '{search}', which is itself tuned")
    for arm in section["arms"]:
        if arm not in others[search]["arms"]:
            raise unknown_name(f"arm of {search} to tune {name} on", arm, others[search]["arms"])
    shared = sorted(set(seeds_of(spec, name)) & set(seeds_of(spec, search)))
    if shared:
        raise MuonlabError(
            f"condition '{name}' of {where} is tuned on '{search}' with the same seed {shared[0]}: "
            "the seeds that chose a setting cannot judge it"
        )


def _known(section: Mapping[str, Any], known: Iterable[str], kind: str) -> None:
    for key in section:
        if key not in known:
            raise unknown_name(kind, key, known)
