"""python -m muonlab.sweep: search, repeat the best settings on fresh seeds, compare; rerun to resume or report."""

import muonlab.begin  # noqa: F401

# isort: split
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from muonlab.cli import Config, hydra_command, parse_overrides
from muonlab.command import run_command
from muonlab.errors import MuonlabError, shown
from muonlab.record.files import check_folder
from muonlab.record.identity import run_identity
from muonlab.settings.address import storage_address
from muonlab.settings.check import Name, PathText, build, check
from muonlab.settings.search import SearchSettings
from muonlab.study.design import Condition, Design
from muonlab.study.reading import read_experiment
from muonlab.study.slots import check_spaces
from muonlab.study.study import Study, overrides_for_runs

REPORT = "report.txt"
OWN = ("search", "study", "paths.studies")  # config keys that are the sweep's, not its runs'


def main() -> int:
    """Exit code: 0 done, 2 a mistake in the command or failed runs, 130 interrupted."""
    sys.argv[1:] = with_quoted_ranges(sys.argv[1:])
    design = read_experiment("sweep")
    return hydra_command(
        "sweep", lambda config, overrides: sweep(make_study(design, config, overrides)), design.common
    )


def with_quoted_ranges(arguments: list[str]) -> list[str]:
    """The arguments with the ranges of search spaces as text, so that interval(1e-3, 1e-1) needs no inner quotes.

    Hydra would read such a range as a sweep over several values; for this command it is one value.
    """
    return [_with_quoted_range(argument) for argument in arguments]


def _with_quoted_range(argument: str) -> str:
    try:
        override = parse_overrides([argument])[0]
    except MuonlabError:  # a flag, or a mistake that composing reports
        return argument
    searched = override.key_or_group.startswith("search.optimizers.") and ".space." in override.key_or_group
    if not searched or not override.is_sweep_override():
        return argument
    text = override.get_value_string().replace("'", r"\'")
    return f"{override.get_key_element()}='{text}'"


def make_study(design: Design, config: Config, overrides: list[str]) -> Study:
    """The study of experiments/sweep.yaml with the search section of a composed conf/sweep.yaml.

    Raises MuonlabError for an unknown optimizer or setting, spaces of different sizes, a seed that is used twice, and
    any setting that a run would refuse.
    """
    values, paths = _mapping(config, "search"), _mapping(config, "paths")
    search = build(SearchSettings, values, "search")
    name = check(Name | None, config.get("study"), "study")
    studies = check(PathText, paths.get("studies"), "paths.studies")
    check_folder(Path(studies), "paths.studies")
    conditions = {
        key: _of_search(section, values, search)
        for key, section in design.conditions.items()
        if _searched(section, search)
    }
    figures = [figure for figure in design.figures if set(figure.conditions) <= set(conditions)]
    study = Study(
        name=name or "",
        design=replace(design, conditions=conditions, figures=figures, seeds=search.replicate_seeds),
        overrides=tuple(overrides_for_runs(overrides, OWN)),
        folder=Path(studies) / (name or ""),
        command=shlex.join(["python", "-m", "muonlab.sweep", *overrides]),
        storage=storage_address(search.storage),
        workers=search.workers,
    )
    check_spaces(study.design, study.settings, study.overrides)
    slots = study.slots()
    taus = {tau for slot in slots if (tau := getattr(slot.config.optimizer, "tau", None)) is not None}
    if len(taus) == 1:
        study = replace(study, design=_with_tau(study.design, taus.pop()))
    if name is None:
        name = f"{slots[0].config.model.name}-{run_identity(study.definition())[:6]}"
        study = replace(study, name=name, folder=Path(studies) / name)
    return study


def sweep(study: Study) -> int:
    """Run what is left of a study and report; a finished study only prints its report. Returns the exit code."""
    from muonlab.study.judging import judge
    from muonlab.study.report import comparison_text, curves, fairness, finished_report, story
    from muonlab.study.run import close_study, draw_figures, train_study, ui_command

    if text := finished_report(study):
        print(f"study {study.name} is complete; raise search.trials to add trials to it\n{text}", end="")
        return 0
    print(f"study {study.name} in {study.folder}\n{fairness(study.design, study.base())}", flush=True)
    trained, tuned, queue = train_study(study)
    judgement = judge(study, trained, tuned, study.folder)
    text = comparison_text(study.design, queue, [slot for slot, _ in trained], judgement, tuned, study.folder)
    written = [study.folder / "trials.csv", study.folder / "comparison.csv"]
    written += draw_figures(study.design, study.folder)
    sentences = story(study.design, judgement.frames.runs)
    text += "\n\n" + sentences
    text += "\nwritten:\n" + "\n".join(f"  {path}" for path in written) + "\n"
    if command := ui_command(study):
        text += f"\nbrowse the runs: make ui, or {command}\n"
    text += "next: make ablation, the same with five seeds, and the clip switched off and on within a run\n"
    (study.folder / REPORT).write_text(text, encoding="utf-8")
    print(text, end="")
    table = (study.folder / "comparison.md").read_text(encoding="utf-8")
    charts = curves(study.design, judgement.frames.runs, queue, [slot for slot, _ in trained])
    close_study(study, study.folder, f"{table}\n{sentences}", charts, trained)
    return 0


def _searched(section: Condition, search: SearchSettings) -> bool:
    """Whether every optimizer searches what the condition multiplies."""
    keys = [key.removeprefix("optimizer.") for key in section.times or ()]
    return all(key in each.space for key in keys for each in search.optimizers.values())


def _of_search(section: Condition, values: Mapping[str, object], search: SearchSettings) -> Condition:
    """The search itself with its settings; conditions beyond the best setting take the first two fresh seeds."""
    if section.search is not None:
        return replace(section, search=values, seeds=(search.seed,))
    return replace(section, seeds=search.replicate_seeds[:2]) if section.times else section


def _with_tau(design: Design, tau: float) -> Design:
    """Draw the clip threshold in the figures of max logits, where all clipped arms share it."""
    threshold: dict[str, dict[str, object]] = {
        "spike_vs_stable": {"tau": tau},
        "levels": {"references": {"end_max_logit": {f"tau = {tau:g}": tau}}},
    }
    figures = [
        replace(figure, settings={**figure.settings, **threshold.get(figure.kind, {})})
        for figure in design.figures
    ]
    return replace(design, figures=figures)


def _mapping(config: Config, key: str) -> Mapping[str, object]:
    if not isinstance(values := config.get(key), Mapping):
        raise MuonlabError(f"{key} must be a mapping of settings, not {shown(values)}")
    return values


if __name__ == "__main__":
    run_command(main)
