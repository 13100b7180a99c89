"""python -m muonlab.experiment NAME [scale=gpu] [overrides]: run or resume an experiment, judge its claims, draw
figures."""

import muonlab.begin  # noqa: F401

# isort: split
import shlex
from pathlib import Path

from muonlab.cli import compose_config, import_plugins, parse_overrides, plain
from muonlab.command import argument_parser, run_command, tell
from muonlab.errors import MuonlabError
from muonlab.record.files import check_folder
from muonlab.settings.address import storage_address
from muonlab.settings.check import Count, check
from muonlab.study.asking import Given
from muonlab.study.catalogue import experiment_names
from muonlab.study.reading import load_experiment, read_experiment
from muonlab.study.study import Study, overrides_for_runs


def main() -> int:
    """Exit code: 0 done, 2 a mistake in the command or failed runs, 130 interrupted."""
    parser = argument_parser("muonlab.experiment", __doc__.partition(": ")[2])
    parser.add_argument(
        "name", help="an experiment: the name of a file in experiments/ without .yaml; or `all`"
    )
    parser.add_argument(
        "overrides", nargs="*", help="scale=NAME and Hydra overrides for every run, e.g. trainer.device=cuda"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs at a time on this machine (default: its GPUs, or else its cores)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="NAME/ in it gets the results (default: results)",
    )
    parser.add_argument(
        "--studies",
        type=Path,
        default=Path("studies"),
        metavar="FOLDER",
        help="NAME/ in it keeps queue and logs (default: studies)",
    )
    arguments = parser.parse_intermixed_args()
    workers = None if arguments.workers is None else check(Count, arguments.workers, "--workers")
    if arguments.name != "all":
        run_experiment(
            make_study(arguments.name, arguments.overrides, arguments.studies, workers), arguments.results
        )
        return 0
    names = [name for name in experiment_names() if not _asks(name)]
    failed: list[str] = []
    print(
        f"saving {len(names)} studies; python -m muonlab.worker {arguments.studies} helps with them",
        flush=True,
    )
    for step in (
        begin_experiment,
        run_experiment,
    ):  # every study is saved before any runs, so that workers see them all
        for name in names:
            try:
                if name not in failed:
                    step(make_study(name, arguments.overrides, arguments.studies, workers), arguments.results)
            except MuonlabError as error:
                tell(f"{name}: {error}")
                failed.append(name)
    if failed:
        raise MuonlabError(f"{len(failed)} of {len(names)} experiments failed: {', '.join(failed)}")
    return 0


def _asks(experiment: str) -> bool:
    """Whether it asks for something, so that it is not run with all others; a file with a mistake, which its own turn
    reports, does not."""
    try:
        return bool(read_experiment(experiment).asks)
    except MuonlabError:
        return False


def make_study(experiment: str, overrides: list[str], studies: Path, workers: int | None) -> Study:
    """The study of one experiment, at the scale that the overrides name."""
    scale = "cpu"
    for override in overrides:
        if override.startswith("scale="):
            scale = override.removeprefix("scale=")
    import_plugins(overrides)  # claims may name their measures
    asks = read_experiment(experiment).asks
    given = _given(experiment, asks, overrides)
    texts = [experiment, *(value for value in given.values() if isinstance(value, str))]
    name = "-".join(texts if scale == "cpu" else [*texts, scale])
    command = shlex.join(["python", "-m", "muonlab.experiment", experiment, *overrides])
    design = load_experiment(experiment, scale, given)
    overrides = [override for override in overrides if override.partition("=")[0] not in asks]
    return Study(
        name=name,
        design=design,
        overrides=tuple(overrides_for_runs(overrides, own=["scale"])),
        folder=studies / name,
        command=command,
        storage=storage_address(None),
        workers=workers,
    )


def _given(experiment: str, asks: Given, overrides: list[str]) -> dict[str, str | float]:
    """What the overrides give of what an experiment asks for; a learning rate that they do not give is the default of
    the optimizer that they give.

    Raises MuonlabError for a name that is not given or is no text, and for an optimizer without a learning rate.
    """
    parsed = {each.key_or_group: each.value() for each in parse_overrides(overrides)}
    given: dict[str, str | float] = {}
    for key, example in asks.items():
        if key in parsed:
            number = isinstance(example, float)
            given[key] = check(float, parsed[key], key) if number else check(str, parsed[key], key)
        elif key != "lr":
            raise MuonlabError(f"the experiment {experiment} needs {key}=NAME, such as {key}={example}")
    if "lr" in asks and "lr" not in given:
        plugins = [override for override in overrides if override.startswith("plugins=")]
        settings = plain(compose_config("train", [*plugins, f"optimizer={given['optimizer']}"]))["optimizer"]
        rate = settings.get("lr") if isinstance(settings, dict) else None
        if not isinstance(rate, float):
            raise MuonlabError(
                f"{experiment} tunes the learning rate, and {given['optimizer']} has no setting lr"
            )
        given["lr"] = rate
    return given


def begin_experiment(study: Study, results: Path) -> None:
    """Check one experiment and save its study, which workers may then take up."""
    _check(study, results)

    from muonlab.study.run import begin_study

    begin_study(study)


def _check(study: Study, results: Path) -> None:
    for folder, flag in ((results, "--results"), (study.folder, "--studies")):
        check_folder(folder, flag)
    study.slots()  # a mistake is reported before anything heavy is imported


def run_experiment(study: Study, results: Path) -> None:
    """Train what is missing of one experiment, judge and draw it into results/NAME, and renew results/README.md."""
    design = study.design
    _check(study, results)
    print(f"{study.name}: about {design.minutes:g} minutes. {' '.join(design.question.split())}", flush=True)

    from analysis.evidence import write_evidence
    from muonlab.study.judging import answers_text, judge
    from muonlab.study.report import curves
    from muonlab.study.run import close_study, draw_figures, train_study, ui_command

    out = results / study.name
    trained, tuned, queue = train_study(study)
    judgement = judge(study, trained, tuned, out)
    text = answers_text(design, judgement, tuned)
    print(f"\n{text}")
    print(f"\nwritten: {out}, {write_evidence(results)}")
    for path in draw_figures(design, out):
        print(f"  {path}")
    if command := ui_command(study):
        print(f"\nbrowse the runs: make ui, or {command}")
    print(
        "next: make report, every figure and answer on one page; experiments/README.md lists the other questions"
    )
    answers = (out / "answers.md").read_text(encoding="utf-8")
    charts = curves(design, judgement.frames.runs, queue, [slot for slot, _ in trained])
    close_study(study, out, answers, charts, trained)


if __name__ == "__main__":
    run_command(main)
