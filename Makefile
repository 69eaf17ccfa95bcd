# `make demo` and `make test` work from a fresh clone with Python >= 3.11 and nothing else.
#
# TORCH_SPEC and TORCH_INDEX say where PyTorch comes from; see README, "PyTorch without CUDA".
#   TORCH_INDEX=auto   (default) on Linux without an NVIDIA driver: a local wheel folder known to pip
#                      if it has a build, else PyTorch's CPU index; elsewhere pip's own configuration
#   TORCH_INDEX=       pip's own configuration: a GPU machine, or a machine with a local wheel folder
#   TORCH_INDEX=URL    that index
#   TORCH_SPEC         what is asked for, e.g. TORCH_SPEC='torch==2.13.0' or a path to a wheel
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= auto
TORCH_SPEC ?= torch>=2.6
ARGS ?=
# Test processes, each with the tests of whole files: 4,152 tests took 20 minutes with one, half of
# it with two. A process takes up to 2 GB.
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test test-slow lint types contracts proto proto-check check error-pages bench dist clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) .ci/setup.py --venv $(VENV) --torch-index '$(TORCH_INDEX)' --torch-spec '$(TORCH_SPEC)'
	@touch $@

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/allograft demo $(ARGS)

# One thread: the models are tiny, and threads that wait for each other on a busy machine spin. On
# two cores with other work 150 tests of training took 49 s instead of more than 40 minutes.
PYTEST := OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest \
  --numprocesses $(TEST_PROCESSES)

# Files stay whole, since their tests share what they made.
test: $(STAMP)
	$(PYTEST) --dist loadfile -m "not slow and not gpu and not browser" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) --dist load -m "slow and not gpu and not browser" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

PROTO := protos/allograft/wire/v1/relay.proto

proto: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos --python_out=federation \
	  --grpc_python_out=federation --mypy_out=federation --mypy_grpc_out=federation $(PROTO)

# The committed generated code must be what the committed .proto says.
proto-check: proto
	git diff --exit-code -- federation/allograft/wire

error-pages: $(STAMP)
	$(BIN)/python .ci/error_pages.py

check: lint types contracts proto-check

bench: $(STAMP)
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

dist: $(STAMP)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build
