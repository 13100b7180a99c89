"""How each line of the pages is carried out, for test_readme.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """To its end: `extra` is appended, `needs` lies in the folder before, `makes` after, `says` is printed.

    extra: overrides, where DATA is a tiny corpus, SIZE a tiny model for a few steps, SEARCH both with a tiny search.
    """

    extra: str = ""
    needs: tuple[str, ...] = ()
    makes: str = ""
    says: str = ""
    name: str = ""  # what stands for NAME


@dataclass(frozen=True)
class Compose:
    """Not run, for the reason `why`: its settings are composed and checked as they are."""

    why: str


@dataclass(frozen=True)
class Look:
    """Not run, for the reason `why`: its program, module and files exist."""

    why: str


SUITE = Look("this very suite")
SETUP = Look("installs for minutes what runs this test; test_project.py and every fresh clone prove it")
CHAOS = "an hour; tests/chaos/test_chaos.py is its short form"
WHOLE = "hours; tests/study/test_design.py composes every run of every experiment"
RANKS = "needs four devices; tests/train/test_ranks.py trains on two"
RECORD = "runs/*/config.yaml"

TABLE: dict[str, Run | Compose | Look] = {
    # make
    "make setup": SETUP,
    "make help": Run(says="make sweep"),
    "make data": Compose("needs a network"),
    "make smoke": Run("SEARCH", makes="studies/smoke/comparison.csv"),
    "make sweep": Run("SEARCH", makes="studies/*/comparison.csv", says="validation loss"),
    "make sweep model=nanogpt_xs trainer.max_steps=600 search.trials=12": Compose("an hour"),
    "make sweep search.optimizers.muonclip.space.lr='tag(log, interval(1e-3, 1e-1))' study=narrow": Compose("minutes"),
    "make sweep ARGS='~search.optimizers.adamw'": Compose("minutes"),
    "make ablation": Run("DATA SIZE", makes="results/ablation/explosion.png", says="harmless"),
    "make evidence": Look(WHOLE),
    "make figures": Run(needs=("results",), makes="results/heads/heads.png"),
    "make report": Run(needs=("results",), makes="results/report.html"),
    "make ui": Look("serves until it is stopped"),
    "make test": SUITE,
    'make test ARGS="tests/optim -k newton"': SUITE,
    'make test ARGS="-m hypothesis --hypothesis-profile=free"': SUITE,
    "make lint": Look("a minute of mypy; every push runs it"),
    "make regression": SUITE,
    "make chaos": Look(CHAOS),
    'make chaos ARGS="--seed 7 --rounds 2"': Look(CHAOS),
    "make gpu-check": Look("needs a GPU"),
    # one run
    "source .venv/bin/activate": SETUP,
    "python -m muonlab.train optimizer=muonclip optimizer.tau=30 model=nanogpt_xs seed=1": Run(
        "DATA SIZE", makes=RECORD, says="run: runs/muonclip"
    ),
    "python -m muonlab.train trainer.devices=4": Compose(RANKS),
    "python -m muonlab.train trainer.devices=4 trainer.strategy=fsdp2": Compose(RANKS),
    "python -m muonlab.train --help": Run(says=", muon, "),
    "python -m muonlab.train --cfg job optimizer=muon": Run(says="name: muon"),
    "python -m muonlab.train +experiment=switch": Run("DATA SIZE", makes=RECORD),
    "python -m muonlab.train -m optimizer=adamw,muon,muonclip optimizer.lr=0.01,0.03 seed=1,2": Run(
        "DATA SIZE trainer.max_steps=2", makes="runs/muonclip-lr3e-2-s2-*/config.yaml"
    ),
    "python -m muonlab.record runs": Run(needs=("runs",), says="olmo2"),
    # an optimizer of one's own
    "python -m muonlab.optim.check mine.py:mine": Run(needs=("mine.py",), says="the loss falls"),
    "python -m muonlab.train plugins=[mine.py] optimizer=mine optimizer.lr=0.003": Run(
        "DATA SIZE", needs=("mine.py",), makes="runs/mine-lr3e-3-s1-*/plugins/mine.py"
    ),
    "python -m muonlab.sweep plugins=[mine.py] '+search.optimizers.mine={published: {lr: 1e-3, weight_decay: 0.1},"
    " space:"
    ' {lr: "tag(log, interval(1e-4, 1e-2))", weight_decay: "tag(log, interval(1e-3, 1.0))"}}\'': Compose("minutes"),
    "make compare plugin=mine.py optimizer=mine": Compose("10 minutes"),
    # models
    "python -m muonlab.train model=nanogpt_s model.num_kv_heads=1 model.rotary_fraction=0.5": Run(
        "DATA SIZE model.d_model=48", makes=RECORD
    ),
    "python -m muonlab.train model.fused_qkv=true optimizer=muon optimizer.split_qkv=false": Run(
        "DATA SIZE", makes=RECORD
    ),
    "python -m muonlab.train model=moe_xs optimizer=muonclip": Run("DATA SIZE", makes=RECORD),
    "python -m muonlab.train model=moe_xs model.sparsity=16": Run("DATA SIZE", makes=RECORD),
    "python -m muonlab.models k2_shape": Run(says="1.03 T"),
    # data
    "python -m muonlab.train data=english": Compose("needs a network"),
    "python -m muonlab.train data=text data.path=corpus.txt": Run("SIZE", needs=("corpus.txt",), makes=RECORD),
    "python -m muonlab.data pack corpus.tokens text path=corpus.txt tokenizer=bpe": Run(
        needs=("corpus.txt",), makes="corpus.tokens"
    ),
    "python -m muonlab.train data=tokens data.path=corpus.tokens": Compose("needs the file of the line before"),
    "python -m muonlab.train data=shakespeare data.tokenizer=bpe data.bpe_vocab_size=1024": Compose(
        "needs a network"
    ),
    "python -m muonlab.train data=synthetic": Run(
        "data.train_tokens=20000 data.val_tokens=4000 SIZE", makes=RECORD
    ),
    "python -m muonlab.train data=huggingface data.dataset=tinystories": Compose("needs a network"),
    # studies
    "python -m muonlab.sweep": Compose("make sweep runs it"),
    "python -m muonlab.worker studies/NAME": Run(needs=("study",), name="narrow", says="no open slot is left"),
    "python -m muonlab.worker studies/narrow": Look("the same with another name"),
    "python -m muonlab.worker studies/remedies": Look("the same with another name"),
    "python -m muonlab.study.status studies/narrow": Run(needs=("study",), name="narrow", says="runs done"),
    "python -m muonlab.worker studies": Look("the same with every study of a folder"),
    "python -m muonlab.study.repair studies/NAME": Run(
        needs=("study",), name="narrow", says="nothing to repair"
    ),
    "pip install 'muonlab[postgres]'": Look("needs a network"),
    "python -m muonlab.experiment ablation scale=long": Compose("make ablation runs its other scale"),
    "python -m muonlab.experiment remedies": Compose("140 runs"),
    "python -m muonlab.experiment remedies scale=gpu": Compose("needs a GPU"),
    "python -m muonlab.experiment rivals scale=xs": Compose("50 minutes"),
    "python -m muonlab.experiment NAME": Compose("make ablation runs one"),
    "python -m muonlab.experiment NAME scale=gpu": Look("needs a GPU"),
    # contributing
    "python -m muonlab.study.rejudge results": Run(needs=("results",), says="README.md"),
    "python -m muonlab.study.catalogue": Look("writes experiments/README.md; test_design.py compares the two"),
    "pre-commit install": Look("writes into .git"),
    "pipx install pre-commit": Look("needs a network"),
    "pytest tests/regression": SUITE,
    "MUONLAB_BASE=HEAD~3 pytest tests/regression/test_bits.py": SUITE,
}  # fmt: skip
