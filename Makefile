# Everything from a machine with only Python (3.11 or newer) and make. `make` lists the targets.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --quiet --quiet --disable-pip-version-check install
LIBTPU := .cache/libtpu
PARITY := .cache/parity-venv
SITE   := .cache/site-venv
PACKAGES := .cache/packages-venv
APPWORLD      := .cache/appworld-venv
APPWORLD_ROOT := .cache/appworld-root
CODE   := hintsd_jax configs tests benchmarks docs examples

# Programs compiled once are kept: a second run starts faster.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: help install demo smoke test lint pages site test-tpu tpu-table libtpu bfcl appworld textworld textarena verifiers openenv desk-policy real-policy real-parity test-packages clean

help:
	@echo "make install      make .venv with the package in it; then: . .venv/bin/activate"
	@echo "make demo         train the embedded agent on the Desk environment and print the result"
	@echo "make smoke        the shortest whole run (under a minute)"
	@echo "make test         run the checks and the tests"
	@echo "make lint         run the checks alone: format, lint, types, directions of imports"
	@echo "make pages        write the generated pages of docs/ again"
	@echo "make site         build the documentation's site under site/"
	@echo "make bfcl         install the BFCL tasks and tools"
	@echo "make appworld     AppWorld's engine in an environment of its own, and an invented world under .cache/appworld-root"
	@echo "make textworld    install TextWorld"
	@echo "make textarena    install TextArena"
	@echo "make verifiers    install the package verifiers"
	@echo "make openenv      install OpenEnv"
	@echo "make test-packages  the tests of verifiers, OpenEnv and the trackers on the real packages, each in an environment of its own"
	@echo "make test-tpu     compile every program of a 4B policy for TPU topologies and check it (an hour or more; no TPU needed)"
	@echo "make tpu-table    the same as a table: docs/tpu.md (programs that were compiled before are not compiled again)"
	@echo "make desk-policy  bring up a policy for Desk from random weights, in runs/made-desk-policy (2.5 hours)"
	@echo "make real-policy  Qwen2.5-Coder-0.5B and SmolLM2-135M under .cache/real-policies (0.5 GB to download beside PyTorch)"
	@echo "make real-parity  compare both with transformers and PEFT: docs/real_models.md"
	@echo "make clean        remove the virtual environment and the caches"

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(PY) -m hintsd_jax train --config=desk --workdir=runs/desk

smoke: $(VENV)/.installed
	$(PY) -m hintsd_jax train --config=desk_smoke --workdir=runs/desk_smoke

# The real BFCL tasks and tools, for bfcl_smoke and the tests.
bfcl: $(VENV)/.installed-bfcl

# AppWorld's engine, and an invented world for appworld_smoke and the tests. The benchmark's own data: docs/appworld.md.
appworld: $(APPWORLD_ROOT)/data/version.txt

# TextWorld's generator and interpreter.
textworld: $(VENV)/.installed-textworld

# TextArena's games.
textarena: $(VENV)/.installed-textarena

# The package that runs tasksets of verifiers.
verifiers: $(VENV)/.installed-verifiers

# OpenEnv's client and server.
openenv: $(VENV)/.installed-openenv

test: lint $(VENV)/.installed-bfcl $(VENV)/.installed-textworld $(VENV)/.installed-textarena $(LIBTPU)/.installed
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 --durations-min=8

lint: $(VENV)/.installed-dev $(VENV)/.installed-bfcl
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check --quiet $(CODE)
	$(PY) -m pyright
	$(VENV)/bin/lint-imports --no-cache

pages: $(VENV)/.installed-dev
	$(PY) -m hintsd_jax.config.reference
	$(PY) docs/write_architecture.py

site: $(SITE)/.installed
	@$(SITE)/bin/python docs/write_site.py

test-tpu: $(VENV)/.installed-dev $(LIBTPU)/.installed
	$(PY) -m pytest -q -m tpu tests/test_planner_programs.py

tpu-table: $(VENV)/.installed $(LIBTPU)/.installed
	$(PY) -m benchmarks.tpu_programs

# The TPU compiler, which needs no TPU.
libtpu: $(LIBTPU)/.installed

desk-policy: $(VENV)/.installed
	$(PY) -m hintsd_jax.tools.desk_policy --config=configs/desk_warmup.py --out=runs/made-desk-policy

# Checkpoints of published models. `$(PARITY)/bin/python -m benchmarks.real_policy --help` tells of more.
real-policy: $(PARITY)/.installed
	@$(PARITY)/bin/python -m benchmarks.real_policy

real-parity: real-policy
	$(PARITY)/bin/python -m benchmarks.real_parity --write

# What the needs of these packages exclude from one environment, and from .venv.
test-packages: $(PACKAGES)/verifiers/.installed $(PACKAGES)/openenv/.installed $(PACKAGES)/trackers/.installed
	$(PACKAGES)/verifiers/bin/python -m pytest -q tests/test_envs_verifiers.py
	$(PACKAGES)/openenv/bin/python -m pytest -q tests/test_envs_openenv.py
	$(PACKAGES)/trackers/bin/python -m pytest -q tests/test_runs_trackers.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .hypothesis .ruff_cache build dist site *.egg-info

# Stamps: an environment is made once, and installed into again only when a requirements file is newer.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: '$(PYTHON) -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@

# The package itself is installed in place: its command is there, and the code that runs is the checkout's.
$(VENV)/.installed: requirements.txt pyproject.toml $(VENV)/.made
	@echo "installing requirements.txt (a few minutes the first time)"
	@$(PIP) -r requirements.txt --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-bench.txt $(VENV)/.installed
	@echo "installing requirements-dev.txt and requirements-bench.txt"
	@$(PIP) -r requirements-dev.txt -r requirements-bench.txt
	@touch $@

# bfcl-eval without what it depends on: the tasks and their tools need none of it but mpmath.
$(VENV)/.installed-bfcl: requirements-bfcl.txt $(VENV)/.installed
	@echo "installing requirements-bfcl.txt"
	@$(PIP) --no-deps -r requirements-bfcl.txt
	@touch $@

$(VENV)/.installed-textworld: requirements-textworld.txt $(VENV)/.installed
	@echo "installing requirements-textworld.txt"
	@$(PIP) -r requirements-textworld.txt
	@touch $@

$(VENV)/.installed-textarena: requirements-textarena.txt $(VENV)/.installed
	@echo "installing requirements-textarena.txt"
	@$(PIP) -r requirements-textarena.txt
	@touch $@

$(VENV)/.installed-verifiers: requirements-verifiers.txt $(VENV)/.installed
	@echo "installing requirements-verifiers.txt"
	@$(PIP) -r requirements-verifiers.txt
	@touch $@

$(VENV)/.installed-openenv: requirements-openenv.txt $(VENV)/.installed
	@echo "installing requirements-openenv.txt"
	@$(PIP) -r requirements-openenv.txt
	@touch $@

# The engine's own step unpacks the apps; what it unpacks beside the package stays under .cache too.
$(APPWORLD)/.installed: requirements-appworld.txt $(VENV)/.made
	@echo "making $(APPWORLD) with requirements-appworld.txt (a minute or two)"
	@$(PY) -m venv $(APPWORLD)
	@$(APPWORLD)/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r requirements-appworld.txt
	@APPWORLD_CACHE=$(CURDIR)/$(APPWORLD)/cache $(APPWORLD)/bin/appworld install > /dev/null
	@touch $@

$(APPWORLD_ROOT)/data/version.txt: benchmarks/appworld_root.py benchmarks/appworld_scenarios.py $(APPWORLD)/.installed
	@rm -rf $(APPWORLD_ROOT)
	@$(APPWORLD)/bin/python -m benchmarks.appworld_root --out=$(APPWORLD_ROOT)

# PyTorch and what reads GGUF, in an environment of their own: no run and no test of ours ever imports them.
$(PARITY)/.installed: requirements.txt requirements-parity.txt requirements-bfcl.txt $(VENV)/.made
	@echo "making $(PARITY) with requirements.txt, requirements-parity.txt and requirements-bfcl.txt"
	@$(PY) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip --quiet --disable-pip-version-check install -r requirements.txt -r requirements-parity.txt --editable .
	@$(PARITY)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps -r requirements-bfcl.txt
	@touch $@

$(PACKAGES)/verifiers/.installed: requirements-verifiers.txt
$(PACKAGES)/openenv/.installed: requirements-openenv.txt
$(PACKAGES)/trackers/.installed: requirements-wandb.txt requirements-trackio.txt requirements-mlflow.txt
$(PACKAGES)/%/.installed: requirements.txt requirements-dev.txt $(VENV)/.made
	@echo "making $(@D) with $(filter requirements%, $^)"
	@$(PY) -m venv $(@D)
	@$(@D)/bin/python -m pip --quiet --quiet --disable-pip-version-check install $(foreach file, $(filter requirements%, $^), -r $(file)) --editable .
	@touch $@

# The site is made of the files alone: its environment has nothing of the package's.
$(SITE)/.installed: requirements-docs.txt $(VENV)/.made
	@echo "making $(SITE) with requirements-docs.txt"
	@$(PY) -m venv $(SITE)
	@$(SITE)/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r requirements-docs.txt
	@touch $@

# Beside the environment, not in it: there, jax would look for a TPU at every start and warn that it finds none.
$(LIBTPU)/.installed: $(VENV)/.installed
	@rm -rf $(LIBTPU) && mkdir -p $(LIBTPU)
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		wanted=$$($(PY) -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))') && \
		echo "installing $$wanted under $(LIBTPU)" && $(PIP) --no-deps --target $(LIBTPU) "$$wanted"; \
	else echo "libtpu is for Linux x86_64 only: tests of TPU programs will be skipped"; fi
	@touch $@
