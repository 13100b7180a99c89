"""A file of one's own, or an installed package, registers what every command then takes by name."""

import re

import pytest
import yaml

import muonlab.plugins as plugins
from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError
from muonlab.help import help_page
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.record import load_run
from muonlab.train.check import check_run
from muonlab.train.config import read_config
from muonlab.train.run import run_folder, train

pytestmark = pytest.mark.usefixtures("own_registries")

OPTIMIZER = """
from muonlab.optim import AdamW, register_optimizer
from muonlab.optim.routing import parameter_groups
from muonlab.settings.check import NonNegative

@register_optimizer("mine")
def mine(model, *, lr: NonNegative = 0.002, betas: tuple[float, float] = (0.9, 0.99)):
    return AdamW(parameter_groups(model, "adamw"), lr=lr, betas=betas)
"""


@pytest.fixture
def mine(tmp_path):
    """write(text) -> the path of mine.py."""

    def write(text=OPTIMIZER, name="mine.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def forget(monkeypatch):
    """As in another process."""
    monkeypatch.setattr(plugins, "_imported", {})
    for table in (OPTIMIZERS._builders, OPTIMIZERS._sections):
        table.pop("mine", None)


def message(call, *arguments):
    with pytest.raises(MuonlabError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- what a plug-in adds
def test_its_optimizer_trains_and_its_source_is_part_of_the_record(mine, tiny):
    path = mine()
    config = tiny(f"plugins=[{path}]", "optimizer=mine", "optimizer.lr=0.004")
    outcome = train(config)
    assert outcome.status == "finished"
    assert outcome.folder.name.startswith("mine-lr4e-3-s1-")
    assert (outcome.folder / "plugins" / "mine.py").read_text() == OPTIMIZER
    recorded = yaml.safe_load((outcome.folder / "config.yaml").read_text())
    assert recorded["plugins"] == {str(path): plugins.find_plugin(str(path)).digest}
    assert recorded["optimizer"] == {"name": "mine", "lr": 0.004, "betas": [0.9, 0.99]}
    assert read_config(recorded) == config.__class__(**vars(config) | {"corpus": recorded["corpus"]})


def test_a_source_and_no_place_identifies_a_run(mine, tiny, tmp_path, monkeypatch):
    path = mine()
    config = tiny(f"plugins=[{path}]", "optimizer=mine")
    elsewhere = mine(name="copy/mine.py")
    assert tiny(f"plugins=[{elsewhere}]", "optimizer=mine").identity == config.identity
    forget(monkeypatch)
    path.write_text(OPTIMIZER + "# another\n")
    assert tiny(f"plugins=[{path}]", "optimizer=mine").identity != config.identity
    # It counts also where only the package's own optimizers are used; none changes nothing.
    assert tiny(f"plugins=[{path}]").identity != tiny().identity == tiny("plugins=[]").identity


def test_models_schedules_rules_and_columns_are_registered_too(mine, tiny):
    path = mine(
        """
from muonlab.models import NanoGPT
from muonlab.models.registry import register_model
from muonlab.settings.model import NanoGPTSettings
from muonlab.train.providers import Columns, provider
from muonlab.train.schedule import SCHEDULES
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True, kw_only=True)
class Settings(NanoGPTSettings):
    name: Literal["my_gpt"] = "my_gpt"

@register_model("my_gpt")
class MyGPT(NanoGPT):
    def __init__(self, settings: Settings):
        super().__init__(settings)

@SCHEDULES.register("halved")
def halved(max_steps, *, at: float = 0.5, warmup: int = 0):
    return lambda step: 1.0 if step < at * max_steps else 0.5

@provider("third of the loss")
def third(step):
    return Columns({"third": step.losses[0] / 3})
"""
    )
    outcome = train(tiny(f"plugins=[{path}]", "model=my_gpt", "schedule=halved", "schedule.at=0.25"))
    steps = load_run(outcome.folder).steps
    assert steps["lr"].tolist() == [steps["lr"][0]] * 3 + [steps["lr"][0] / 2] * 9
    assert steps["third"].tolist() == pytest.approx((steps["train_loss"] / 3).tolist())


def test_help_and_checks_come_from_the_signature(mine):
    overrides = [f"plugins=[{mine()}]", "optimizer=mine"]
    page = help_page("train", overrides)
    assert re.search(r"optimizer: adamuon, .*, mine, muon", page)
    assert re.search(r"lr: 0.002 +# a finite number of at least 0", page)
    wrong = [*overrides, "optimizer.lr=-1"]
    said = message(lambda: read_config(plain(compose_config("train", wrong))))
    assert said == "optimizer.lr must be a finite number of at least 0, not -1"
    assert "did you mean 'optimizer.lr'" in message(compose_config, "train", [*overrides, "optimizer.rl=1"])
    assert "did you mean 'mine'" in message(compose_config, "train", [overrides[0], "optimizer=mien"])


def test_a_file_beside_it_is_its_option(mine, tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 0.03  # of every entry\n")
    overrides = [f"plugins=[{mine()}]", "optimizer=mine"]
    config = read_config(plain(compose_config("train", overrides)))
    assert (config.optimizer.lr, config.optimizer.betas) == (0.03, (0.9, 0.99))
    assert re.search(r"lr: 0.03 +# of every entry", help_page("train", overrides))
    (tmp_path / "mine.yaml").write_text("lr: [")
    assert "mine.yaml cannot be read" in message(compose_config, "train", overrides)


def test_an_installed_package_is_given_by_its_name(tmp_path, tiny, monkeypatch):
    package = tmp_path / "site" / "their_optimizers"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("from their_optimizers.deep import theirs\n")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "theirs.py").write_text(OPTIMIZER)
    info = tmp_path / "site" / "their_optimizers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-optimizers\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[muonlab.plugins]\ntheirs = their_optimizers\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    outcome = train(tiny("plugins=[theirs]", "optimizer=mine"))
    assert outcome.status == "finished"
    assert (outcome.folder / "plugins" / "theirs" / "deep" / "theirs.py").read_text() == OPTIMIZER
    assert "unknown installed plug-in 'thiers'; did you mean 'theirs'" in message(tiny, "plugins=[thiers]")


# ---------------------------------------------------------------------- what goes wrong is one sentence
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os\n\nx = 1 / 0\n", "mine.py, line 3: ZeroDivisionError: division by zero"),
        ("x = (\n", "mine.py, line 1: SyntaxError: '(' was never closed"),
        ("\nimport sys; sys.exit(3)", "mine.py, line 2: SystemExit: 3"),
        (
            "import no_such_package\n",
            "mine.py, line 1: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        (OPTIMIZER.replace("mine", "muon"), "mine.py, line 6: optimizer 'muon' is already registered"),
        (
            OPTIMIZER.replace("NonNegative =", "Nonsense ="),
            "mine.py, line 7: NameError: name 'Nonsense' is not",
        ),
    ],
)
def test_an_exception_within_it_names_its_file_and_line(mine, tiny, text, said):
    assert said in message(tiny, f"plugins=[{mine(text)}]")


def test_so_does_one_while_it_is_built(mine, tiny, tmp_path):
    config = tiny(f"plugins=[{mine(OPTIMIZER.replace('    return', '    1 / 0; return'))}]", "optimizer=mine")
    said = message(train, config)
    assert said.endswith("mine.py, line 8: ZeroDivisionError: division by zero")
    assert message(check_run, config) == said
    assert not list((tmp_path / "runs").glob("*/config.yaml"))


def test_and_one_within_a_step(mine, tiny):
    text = f"""{OPTIMIZER.replace("return AdamW(", "return Later(")}
class Later(AdamW):
    def step(self, closure=None):
        if self.steps_done == 2:
            raise ValueError("no")
        return super().step(closure)
"""
    config = tiny(f"plugins=[{mine(text)}]", "optimizer=mine")
    said = message(train, config)
    assert said.endswith("mine.py, line 13: ValueError: no")
    run = load_run(run_folder(config))
    assert (run.status, run.cause) == ("failed", said)


def test_a_removed_file_is_one_sentence_and_its_copy_goes_on(mine, tiny, monkeypatch):
    path = mine()
    first = train(tiny(f"plugins=[{path}]", "optimizer=mine"))
    path.unlink()
    forget(monkeypatch)
    said = message(tiny, f"plugins=[{path}]", "optimizer=mine")
    assert said.startswith(
        f"plug-in {path} does not exist; each run that used it keeps a copy as plugins/mine.py"
    )
    again = train(tiny(f"plugins=[{first.folder / 'plugins' / 'mine.py'}]", "optimizer=mine"))
    assert (again.folder, again.trained) == (first.folder, False)


def test_a_file_that_changes_under_waiting_runs_does_not_change_them(mine, tiny, monkeypatch):
    path = mine()
    values = tiny(f"plugins=[{path}]", "optimizer=mine").as_dict()
    path.write_text(OPTIMIZER.replace("0.99", "0.5"))
    assert "has changed since this process imported it" in message(tiny, f"plugins=[{path}]")
    forget(monkeypatch)
    assert "has changed since its runs were asked for" in message(read_config, values)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "plugins=mine.py",
            "plugins must be a list of files or installed names, such as plugins=[mine.py], not mine.py",
        ),
        ("plugins=[1]", "plugins must be a list of files"),
        ("plugins=[no/such.py]", "plug-in no/such.py does not exist"),
        ("plugins=[mine]", "unknown installed plug-in 'mine'"),
        ("plugins=[/]", "plug-in / cannot be read"),
    ],
)
def test_what_is_no_plugin_is_refused(tiny, override, said):
    assert said in message(tiny, override)


def test_an_entry_needs_its_plugin_and_two_files_need_two_names(mine, tiny):
    path = mine()
    tiny(f"plugins=[{path}]", "optimizer=mine")
    assert f"optimizer 'mine' is that of the plug-in {path}, which `plugins` does not name" in message(
        tiny, "optimizer=mine"
    )
    other = mine("x = 1\n", "other/mine.py")
    assert "two plug-ins are called mine.py" in message(tiny, f"plugins=[{path},{other}]")
    taken = mine(
        OPTIMIZER.replace("register_optimizer", "register_model")
        .replace("muonlab.optim import AdamW,", "muonlab.models.registry import")
        .replace('"mine"', '"nanogpt_s"'),
        "taken.py",
    )
    assert "registers the model 'nanogpt_s', a name of conf/model" in message(tiny, f"plugins=[{taken}]")
