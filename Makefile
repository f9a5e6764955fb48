# make install      .venv with pinned dependencies (idempotent); LOCK=requirements.lock: only files with the hashes in it
# make quickstart   the whole main job on two processes, from raw text to a report
# make lint         formatting, lint, types
# make test-fast    the tests that start no processes and take no long (three to four minutes on 2 cores)
# make test         lint, then all tests but those that need Slurm or inject faults; what fails is repeated alone
# make test-cluster the same for what needs Slurm
# make test-faults  kills, cuts, full disks: every row of the fault table of docs/OPERATIONS.md
# make test-parity  against the code of other projects; installs open-mythos and megatron-core (put Parcae and Huginn on PYTHONPATH)
# make test-exports exports under the newest transformers, 5.0 and 4.57, with PEFT, TRL, accelerate, lm_eval, in environments made in build/
# make test-vllm    exports served by vLLM for CPUs, in an environment made in build/
# make fuzz         2,000 random cases each of prep that is killed and of runs that are resumed; 50 kills of one run (long: a case of prep takes about 3 s)
# make bench        benchmarks; they print, nothing is asserted
# make gpu-check    one GPU in eight minutes: correctness of every CUDA path, speed, memory; installs nothing, uses PYTHON
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart lint test-fast test test-cluster test-faults test-parity test-exports test-vllm fuzz bench gpu-check
.DELETE_ON_ERROR:

install: $(STAMP)

# Name requirements.lock here to install nothing but the files whose hashes it has.
LOCK ?=

$(STAMP): pyproject.toml constraints.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) -V`. Use: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCK),)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
else
	$(BIN)/python -m pip install --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
endif
	touch $(STAMP)

quickstart: install
	$(BIN)/rdt quickstart

# One more than the two cores that the figures are of: many tests wait for processes.
TEST_PROCESSES ?= 3
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Processes that wait for each other may meet a limit on a busy machine: what fails beside other tests has to pass alone. The
# output has both runs.
OR_ALONE := || { test $$? -eq 1 && $(BIN)/python -m pytest --exitfirst --last-failed --last-failed-no-failures none

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-fast: install
	$(PYTEST) -m "not cluster and not distributed and not faults and not slow"

test: lint
	$(PYTEST) -m "not cluster and not faults" $(OR_ALONE) -m "not cluster and not faults"; }

# One after the other: what a fault costs is measured.
test-faults: install
	$(BIN)/python -m pytest --verbose -m faults tests/faults

# Two at a time, each with a cluster of its own: these tests wait more than they compute.
SLURM := command -v sbatch && command -v slurmctld && command -v slurmd && command -v munged
test-cluster: export PATH := $(PATH):/usr/sbin:/sbin
test-cluster: install
	@{ $(SLURM); } >/dev/null || \
		{ [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && apt-get update --quiet && \
		DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes slurm-wlm munge && { $(SLURM); } >/dev/null; } || \
		{ echo "Slurm and munge are needed. As root: apt-get install slurm-wlm munge"; exit 2; }
	$(BIN)/python -m pytest --verbose --numprocesses 2 --dist load -m cluster tests/cluster $(OR_ALONE) -m cluster tests/cluster; }

test-parity: install
	$(BIN)/python -m pip install --quiet --no-deps open-mythos==0.5.0 megatron-core==0.16.1
	$(BIN)/python -m pytest -rs tests/parity tests/data/shard_files/test_megatron_format.py

test-exports: install
	$(BIN)/python -m tests.exports.fresh_environments build/exports

test-vllm: install
	$(BIN)/python -m tests.vllm_plugin.fresh_environment build/vllm

fuzz: export RDT_FUZZ_CASES ?= 2000
fuzz: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/data/test_fuzz.py tests/data_prep/test_fuzz.py
	RDT_KILLS=50 $(BIN)/python -m pytest --verbose tests/faults/test_kills.py

bench: install
	for script in $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

gpu-check:
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_check.py --out gpu_check.json
