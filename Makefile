# `make quickstart` runs the whole pipeline; `make test` runs all checks. Both set up .venv from the complete lock
# first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
# Number of test files that run in parallel: much of their time is the start of processes, on one core each.
JOBS ?= 2
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Hundreds of processes import the package. Each would compile it where an environment forbids to write bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test test-fast test-chaos test-cluster coverage lint types layers style docs setup lock clean

quickstart: setup
	$(BIN)/lorapar run jobs/configs/quickstart.yaml

# `test` runs a sample of the tests that kill processes at random times, the same each time; SEED=N draws another.
SEED ?= 1
PYTEST = LORAPAR_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup lint
	$(PYTEST)

# After every save: no Ray, no engine, no test that waits or compiles for seconds.
test-fast: setup
	$(PYTEST) tests/unit -m "not slow"

# Every kill test, ROUNDS times, each time at other random times.
ROUNDS ?= 3
test-chaos: SEED =
test-chaos: setup
	$(PYTEST) -m chaos --chaos all --chaos-rounds $(ROUNDS)

# The pipeline on several machines made of Linux namespaces, some of which are killed: as root, some minutes. And other
# tests that take minutes, as a whole grid of several Systems and 500 syncs of a policy.
test-cluster: setup
	$(BIN)/python -m pytest -m "hosts or long" tests/hosts tests/e2e/test_ablate.py tests/e2e/test_autoscaler.py \
	  tests/e2e/test_elastic.py tests/e2e/test_grpo_together.py tests/e2e/test_many_syncs.py \
	  tests/e2e/test_policy_proof.py tests/e2e/test_tutorial.py

# Lines of the package that the tests run, in Ray's and vLLM's processes too; TESTS=tests for all of them.
TESTS ?= tests/unit
coverage: setup
	rm -f .coverage .coverage.*
	LORAPAR_CHAOS_SEED=$(SEED) $(BIN)/python -m coverage run -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# On two cores, the longest first; each says what it has to say when it ends.
lint: setup
	$(MAKE) --no-print-directory --jobs=2 --output-sync types docs layers style

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports --no-logo --no-cache

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# site/index.html; every warning is an error, nothing is fetched.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

setup: $(VENV)/.complete

# The CPU build of torch comes from pip's configured index if that has it, else from PyTorch's own index.
$(VENV)/.complete: $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps "$$(grep '^torch==' $(LOCK))" \
	  || $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) "$$(grep '^torch==' $(LOCK))"
	$(BIN)/pip install --quiet --no-deps -r $(LOCK)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Needs uv on the path; `make lock FIND_LINKS=DIR` if the CPU build of torch is in a directory.
COMPILE = uv pip compile --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header \
  --no-emit-index-url --no-emit-find-links --upgrade
lock:
	$(COMPILE) requirements/cpu.in --override requirements/cpu-overrides.txt -o requirements/cpu.txt \
	  $(if $(FIND_LINKS),--find-links $(FIND_LINKS),--extra-index-url $(TORCH_INDEX))
	$(COMPILE) requirements/gpu.in --override requirements/gpu-overrides.txt -o requirements/gpu.txt

clean:
	rm -rf $(VENV) runs site
