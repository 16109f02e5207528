# make demo, make test: everything they need goes into .venv, from nothing but Python and make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
GPU_PYTHON ?= python3
BUDGET ?= 480
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/.ready
	$(RUN) -m tritonparam demo rnn

test: $(VENV)/.ready
	$(RUN) -m pytest --quiet --numprocesses auto --dist worksteal

lint: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# Times the machine at hand and writes benchmarks/results/<device>/.
bench: $(VENV)/.ready
	$(RUN) -m pytest benchmarks --quiet

# On a machine with a GPU, in the Python that has its torch: the tests that use it, marked by
# tests/conftest.py, in 2/5 of BUDGET seconds; compute-sanitizer, where there is one, while what the
# benchmarks run is compiled, in 1/6; then the benchmarks in what is left, most valuable first. What
# takes its process along is followed by the rest in another. Result files, and what the tests print,
# go to $OUT where it is set, else results to benchmarks/results/<device>/.
gpu:
	@$(GPU_PYTHON) -m tests.on_gpu
	@start=$$(date +%s); status=0; export TRITONPARAM_BENCH_OUT="$(OUT)"; \
	if ! $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .; then \
		echo "make gpu: not installed; a link takes the place of that"; \
		trap 'rm -f tritonparam/kernels' EXIT; \
		ln -sfn ../kernels tritonparam/kernels || exit $$?; \
	fi; \
	$(GPU_PYTHON) -m tests.on_gpu $$(($(BUDGET) * 2 / 5)) || status=$$?; \
	$(GPU_PYTHON) -m tests.sanitize & sanitizer=$$!; \
	$(GPU_PYTHON) -m benchmarks.warm $$(($(BUDGET) / 6)); \
	wait $$sanitizer || status=$$?; \
	export TRITONPARAM_BENCH_DEVICE=cuda TRITONPARAM_TEST_UNTIL=$$((start + $(BUDGET))); \
	export TRITONPARAM_TEST_LONGEST=300; \
	$(GPU_PYTHON) -m tests.resumed benchmarks/test_speed.py --quiet || status=$$?; \
	exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[demo,test,bench]"
	touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@
