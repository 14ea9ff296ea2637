# make demo   train a small GPT on FlashMHA beside its twin on PyTorch's attention (DEMO="--quick")
# make test   every check and test that this machine can run
# make test-clients   programs written for FlashAttention, from their own packages
# make lint | test-newest-triton | bench-report | wheel | clean

SHELL := bash
PYTHON ?= python3
VENV := .venv
NEWEST := .venv-newest
CLIENTS := .venv-clients
PY := $(VENV)/bin/python

export PYTHON
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)/packages/flash-attn-3/src

# $(call tool,module,command): run the command if the environment has the module, else say so.
tool = if $(PY) -c "import $(1)" 2>/dev/null; then echo "$(2)"; $(2); \
	else echo "left out: $(1) is not installed"; fi

# Shell lines that fill `options` for pytest after what the environment offers.
define pytest_options
options=(); \
if ! $(PY) -c "import pytest_timeout" 2>/dev/null; then \
	options+=(-W ignore::pytest.PytestConfigWarning); \
fi; \
for module in einops hypothesis; do \
	$(PY) -c "import $$module" 2>/dev/null && continue; \
	for file in $$(grep -rlE "^(from|import) $$module\b" tests --include='*.py'); do \
		echo "left out: $$file needs $$module"; options+=("--ignore=$$file"); \
	done; \
done
endef

# One thread a worker: the workers already fill the cores. A worker without tests takes over those
# that wait for another.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
define parallel_options
if $(PY) -c "import xdist" 2>/dev/null; then \
	options+=($(PARALLEL)); export OMP_NUM_THREADS=1; \
fi
endef

.PHONY: demo test lint test-newest-triton test-cpu test-gpu test-clients bench-report wheel clean

demo: $(VENV)/stamp
	$(PY) examples/demo_gpt.py $(DEMO)

# In this order, so that the closing line of the tests ends the output.
test: $(VENV)/stamp
	@$(MAKE) --no-print-directory lint
	@if [ -e $(VENV)/over-base-torch ]; then \
		echo "left out: the newest Triton, as this machine brings its own"; \
	else $(MAKE) --no-print-directory test-newest-triton; fi
	@$(MAKE) --no-print-directory test-cpu
	@if $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(MAKE) --no-print-directory test-gpu; fi

lint: $(VENV)/stamp
	@$(call tool,ruff,$(PY) -m ruff check .)
	@if [ -e .importlinter ] || grep -q "^\[tool.importlinter" pyproject.toml; then \
		$(call tool,importlinter,$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'); \
	fi
	@$(call tool,mypy,$(PY) -m mypy)

test-newest-triton: $(NEWEST)/stamp
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(PARALLEL) tests/compile \
		tests/unit/test_compiled.py tests/unit/test_driver_launches.py \
		tests/unit/test_launcher.py tests/unit/test_repeated.py \
		tests/unit/test_repeated_sm90.py

test-cpu: $(VENV)/stamp
	@$(pytest_options); $(parallel_options); \
	$(PY) -m pytest "$${options[@]}" -m "not gpu"

test-gpu: $(VENV)/stamp
	@$(pytest_options); \
	$(PY) -m pytest "$${options[@]}" -m gpu

test-clients: $(CLIENTS)/installed
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest tests/clients

bench-report: $(VENV)/stamp
	$(PY) benchmarks/report.py

wheel: $(VENV)/stamp
	$(PY) -m build --no-isolation
	$(PY) -m build --no-isolation --outdir dist packages/flash-attn-3

clean:
	rm -rf $(VENV) $(NEWEST) $(CLIENTS) build dist demo-out src/*.egg-info
	rm -rf packages/*/build packages/*/src/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/stamp $(NEWEST)/stamp: pyproject.toml scripts/setup_venv.sh
	scripts/setup_venv.sh $(@D)

# Laid over the first environment, which it shares PyTorch with and leaves as it is.
$(CLIENTS)/installed: $(VENV)/stamp tests/clients/requirements.txt
	PYTHON=$(abspath $(PY)) scripts/setup_venv.sh $(@D)
	$(CLIENTS)/bin/python -m pip install --quiet -r tests/clients/requirements.txt
	touch $@
