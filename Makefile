# Every target sets up what it needs and skips what is already done; `make help` lists the targets.
#
# NAME=VALUE on the command line is passed on unchanged as a Hydra override, including spaces, quotes and brackets.
#     make sweep model=nanogpt_s search.trials=12 'optimizer.lr_scale={query: 0.1}'
# make takes anything else for a target or a flag, so deletions and flags go into ARGS, which the shell splits:
#     make sweep ARGS='~search.optimizers.adamw'

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# MAKEOVERRIDES lists the settings, last first, with a backslash before each space and backslash and with $ doubled.
# Two characters that nobody types replace spaces and backslashes until each setting is quoted for the shell.
nothing :=
blank := $(nothing) $(nothing)
reverse = $(if $(1),$(call reverse,$(wordlist 2,$(words $(1)),$(1))) $(firstword $(1)))
given := $(subst $$$$,$$,$(subst \$(blank),␣,$(subst \\,⧵,$(MAKEOVERRIDES))))
settings := $(call reverse,$(filter-out PYTHON=% VENV=% RUN=% ARGS=%,$(given)))
quote = '$(subst ⧵,\,$(subst ␣, ,$(subst ','\'',$(1))))'
# plugin=mine.py is plugins=[mine.py].
OVERRIDES = $(foreach setting,$(patsubst plugin=%,plugins=[%],$(settings)),$(call quote,$(setting))) $(ARGS)

# Waiting threads sleep: two runs whose threads spin are an order of magnitude slower.
export OMP_WAIT_POLICY := PASSIVE
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup data smoke sweep ablation compare evidence figures report ui dashboard test regression chaos lint clean bench-optim bench-step \
  gpu-check parity

# Settings are refused, not ignored, where a target takes none.
without := $(filter-out data smoke sweep ablation compare evidence,$(MAKECMDGOALS))
ifneq ($(and $(without),$(strip $(settings))),)
$(error make $(firstword $(without)) takes no settings such as $(subst ␣, ,$(firstword $(settings))))
endif

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Hydra overrides follow the target; those that are not NAME=VALUE go into ARGS:"
	@echo "  make sweep model=nanogpt_s search.trials=12 ARGS='~search.optimizers.adamw'"

$(VENV)/installed: requirements.lock pyproject.toml install.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "muonlab needs Python 3.11 to 3.13, not $$($(PYTHON) --version); try: make PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV) (once, half a minute with uv) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) install.py
	@touch $@

setup: $(VENV)/installed  ## a virtual environment in .venv with the locked versions

data: setup  ## fetch, verify and tokenize the default corpus
	@$(RUN) -m muonlab.data shakespeare $(OVERRIDES)

smoke: setup  ## everything once, at a tiny size (under 2 minutes)
	@$(RUN) -m muonlab.sweep study=smoke trainer=smoke search=smoke paths.runs=runs/smoke $(OVERRIDES)

sweep: setup  ## search AdamW, Muon and MuonClip at equal budget, compare them, draw figures
	@$(RUN) -m muonlab.sweep $(OVERRIDES)

ablation: setup  ## the loss-spike ablation: explosion, collapse, cure, and the switch, with answers
	@$(RUN) -m muonlab.experiment ablation $(OVERRIDES)

compare: setup  ## your optimizer beside AdamW, Muon and MuonClip: plugin=mine.py optimizer=mine
	@$(RUN) -m muonlab.experiment compare $(OVERRIDES)

evidence: setup  ## every experiment at cpu scale (hours; stop at any time and rerun to resume)
	@$(RUN) -m muonlab.experiment all $(OVERRIDES)

figures: setup  ## redraw every figure of results/ from its stored tables
	@$(RUN) -m analysis.redraw results

report: setup  ## results/report.html: every figure, every answer and the method on one page
	@$(RUN) -m analysis.report results

ui: setup  ## browse all runs in MLflow at http://127.0.0.1:5000, or the next free port
	@$(RUN) -m muonlab.ui $(ARGS)

dashboard: setup  ## browse the trials of a study in optuna-dashboard: ARGS=studies/NAME
	@$(RUN) -c 'import optuna_dashboard' 2>/dev/null || $(RUN) -m pip install --quiet 'optuna-dashboard>=0.20'
	@$(RUN) -m muonlab.ui $(or $(ARGS),$(error name the study: make dashboard ARGS=studies/NAME))

test: setup  ## the test suite
	@$(RUN) -m pytest -n 2 $(ARGS)

regression: setup  ## bitwise losses, committed answers and byte-identical figures (minutes)
	@$(RUN) -m pytest tests/regression $(ARGS)

chaos: setup  ## 500 faults injected into studies of 24 tiny runs, which must end as if there were none (an hour)
	@PYTHONPATH=tests $(RUN) -m chaos $(ARGS)

lint: setup  ## ruff and mypy
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

bench-step: setup  ## cost of recording, of exact max logits, of compiling and of the allocator
	@$(RUN) benchmarks/bench_step.py $(ARGS)

# Layered over .venv, so that only the packages compared with are installed.
.cache/parity/installed: benchmarks/parity-requirements.txt $(VENV)/installed
	@$(RUN) -m venv .cache/parity
	@$(RUN) -c "import glob, sysconfig; open(glob.glob('.cache/parity/lib/python*/site-packages')[0] + '/main.pth', 'w') \
	  .write(sysconfig.get_path('purelib') + '\n$(CURDIR)\n')"
	@.cache/parity/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/parity-requirements.txt
	@touch $@

parity: .cache/parity/installed  ## our Muon against the public packages, in their own environment
	@.cache/parity/bin/python benchmarks/parity.py

gpu-check: setup  ## the tests that need a CUDA device, against the CPU's results
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(RUN) -m pytest -m cuda; else echo "no GPU: nothing was checked"; fi

bench-optim: .cache/parity/installed  ## time of a Muon step against the public packages and the floor
	@.cache/parity/bin/python -W ignore::FutureWarning benchmarks/bench_optim.py $(ARGS)

clean:  ## remove the virtual environment and caches; runs, studies and results stay
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
