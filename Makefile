# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs under .venv/ (once) and needs no more than Python 3.10+ and make to begin with.
# Another interpreter: make demo PYTHON=/path/to/python3.12

.DEFAULT_GOAL := help
.PHONY: help demo serve test check unit slow test-xla e2e sim soak search fuzz race hostile tcp sweep failures alerts versions nightly bench benchvllm clean docs demo-env full-env fuzz-env xla-env docs-env lint format types imports api

BOOTSTRAP := $(if $(PYTHON),PYTHON=$(PYTHON) $(PYTHON),python3) tools/bootstrap.py
DEMO_ENV := $(if $(findstring mooncake,$(ARGS)),mooncake,demo)
DEMO := .venv/$(DEMO_ENV)/bin/python
FULL := .venv/full/bin/python
FUZZ := .venv/fuzz/bin/python
XLA := .venv/xla/bin/python
DOCS := .venv/docs/bin/python

PYTEST := $(FULL) -m pytest
# A process of tests for each core that we have, up to eight: much of their time they wait. One at a time: make unit ARGS="-n 0"
SIDE_BY_SIDE := -n $(shell echo $$(($$(nproc) < 8 ? $$(nproc) : 8))) --dist worksteal

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: demo-env ## Two processes move a request's KV cache over NIXL; every byte is checked; a table tells how fast
	@$(dir $(DEMO))kvxfer demo $(ARGS)

serve: full-env ## A vLLM prefill server, a vLLM decode server and a router, on a small model made on the spot; ctrl-C ends them (make serve ENGINE=transformers; ENGINE=vllm,transformers: prefill, decode)
	@$(FULL) -m tools.serve $(if $(ENGINE),--engine $(ENGINE)) $(ARGS)

test: check docs unit slow test-xla e2e ## All that proves the project: checks, tests of every part, and the tests through real vLLM

check: lint format types imports api ## Lint, format, types, direction of imports (make -k check: all complaints at once)

unit: full-env ## Tests of every part, on real NIXL, without vLLM servers: minutes, for each push (make unit ARGS="-k lease")
	$(PYTEST) --ignore=tests/e2e --ignore=tests/xla -m "not slow" $(SIDE_BY_SIDE) $(ARGS)

slow: full-env ## The unit tests that take longer: random pairs moved, soaks, races, hostile peers, every model type
	$(PYTEST) --ignore=tests/e2e --ignore=tests/xla -m slow $(SIDE_BY_SIDE) --durations 20 $(ARGS)

test-xla: xla-env ## Tests of caches on XLA devices: torch_xla and JAX, on the CPU (make test-xla ARGS="-k jax")
	@test ! -x $(XLA) || PJRT_DEVICE=CPU JAX_PLATFORMS=cpu $(XLA) -m pytest tests/xla tests/devices/test_cross_device.py $(SIDE_BY_SIDE) $(ARGS)

e2e: full-env ## Tests through real vLLM servers and the router
	$(PYTEST) tests/e2e --durations 20 $(ARGS)

sim: full-env ## Real endpoints in a simulated world for hours, looking for a seed that fails (make sim ARGS="--profile all --seeds 20000")
	$(dir $(FULL))kvxfer sim --seeds 2000 $(ARGS)

soak: full-env ## Engines in real processes for an hour, killed, frozen and restarted; every byte checked, nothing may grow (make soak ARGS="--minutes 10")
	$(dir $(FULL))kvxfer soak $(ARGS)

search: full-env ## Random pairs of caches for an hour or so, looking for one that fails (CI runs a fixed few thousand)
	HYPOTHESIS_PROFILE=search $(PYTEST) tests/core/planner/test_any_pair.py tests/core/runtime/test_any_pair_moved.py tests/core/planner/test_plan.py tests/core/buffers/test_host_copy.py --timeout=0 $(ARGS)

fuzz: fuzz-env ## Everything that reads what others wrote, five minutes for each reader, guided by coverage (make fuzz ARGS="--seconds 3600")
	$(FUZZ) -m tests.fuzz.long $(ARGS)

race: full-env ## Leases of 0.1 to 1 s, engines stopped at random, control messages lost; each element checked (make race ARGS="--seconds 1800 --route direct --seed 7")
	$(FULL) -m tests.race.race $(ARGS)

hostile: full-env ## What hostile members of the fleet cost a live endpoint and the honest reads beside it (make hostile ARGS="--only slots")
	$(FULL) -m tests.hostile.hostile $(ARGS)

tcp: full-env ## Engines killed, closed, stopped and cut off in mid-transfer over TCP, hundreds of times: an hour (make tcp ARGS="--how kill --trials 10")
	$(FULL) -m tests.process.tcp $(ARGS)

sweep: full-env ## Every model and option through real vLLM, beside its NixlConnector (make sweep ARGS="--only gemma3"; --write-docs: the table)
	$(FULL) -m tests.sweep.sweep $(ARGS)

failures: full-env ## What clients get when servers fail, with KvxferConnector on Mooncake and with vLLM's own MooncakeConnector (make failures ARGS="--write-docs")
	$(FULL) -m tests.failures.failures $(ARGS)

alerts: full-env ## A pair under load for ten minutes and a real Prometheus: no alert may fire (make alerts ARGS="--minutes 3 --draw docs/dashboard.png")
	$(FULL) -m tools.monitor $(ARGS)

versions: full-env ## The connector's tests with the other versions of vLLM, whose wheels are fetched (make versions ARGS="0.31.0 tests/vllm -n 0")
	$(FULL) -m tests.vllm.other_version $(ARGS)

nightly: full-env fuzz-env ## All of the long trials, four hours; ends with a table of what failed (make nightly ARGS="--share 0.1 --skip search")
	$(FULL) -m tests.nightly --fuzz-python $(FUZZ) $(ARGS)

bench: full-env ## Measure: reads beside raw NIXL in one run, binding, handshake, idle
	$(PYTEST) benchmarks --ignore=benchmarks/test_vllm.py --benchmark-enable --benchmark-only $(ARGS)

benchvllm: full-env ## Measure through real vLLM, beside its own NixlConnector in one run: minutes
	$(PYTEST) benchmarks/test_vllm.py --benchmark-enable --benchmark-only $(ARGS)

docs: docs-env ## The documentation as a site, in build/site/index.html; dead links, and pages outside its navigation, are errors
	@NO_MKDOCS_2_WARNING=1 $(DOCS) -m mkdocs build $(ARGS)
	@echo "build/site/index.html; with search: python3 -m http.server --directory build/site"

clean: ## Remove what was made here: environments, caches, builds
	rm -rf .venv .fuzz .nightly .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

demo-env:
	@$(BOOTSTRAP) $(DEMO_ENV)

full-env:
	@$(BOOTSTRAP) full

fuzz-env:
	@$(BOOTSTRAP) fuzz

xla-env:
	@$(BOOTSTRAP) xla

docs-env:
	@$(BOOTSTRAP) docs

# check-jsonschema has no wheels for Python 3.10. What kustomize makes of the patches is for tests/deploy/test_manifests.py.
MANIFESTS := $(addprefix deploy/kubernetes/,base/prefill.yaml base/decode.yaml base/network-policy.yaml vllm-router/namespace.yaml vllm-router/router.yaml)
lint: full-env
	$(FULL) -m ruff check .
	@! test -x $(dir $(FULL))check-jsonschema || $(dir $(FULL))check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@! test -x $(dir $(FULL))check-jsonschema || $(dir $(FULL))check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(FULL) -m kubernetes_validate --strict --quiet -k 1.37 $(MANIFESTS)

format: full-env
	$(FULL) -m ruff format --check .

types: full-env
	$(FULL) -m mypy

imports: full-env
	$(dir $(FULL))lint-imports

# --verifytypes asks the `python` of PATH where packages are; --pythonpath does not reach it (seen in 1.1.414).
api: full-env
	PATH="$(CURDIR)/$(dir $(FULL)):$$PATH" $(FULL) -m pyright --verifytypes kvxfer --ignoreexternal
