# `make demo` and `make test` set up all they need in .venv. Extremely simple; keep it that way.
# VENV=/path uses an environment that exists already, and installs nothing into it: `make test VENV=/usr`.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python3
RUN := $(PY) -m
READY := $(if $(filter .venv,$(VENV)),.venv/op,existing)
WORKERS ?= logical
# other versions that are here, for the test that one binary serves them all
export GRADDROP_INTERPRETERS ?= $(wildcard $(CURDIR)/.venvs/*/bin/python3)

demo: $(READY)
	$(RUN) benchmarks.crosslingual.demo $(ARGS)

# a process per core; one thread each, or they would wait for each other
test: export OMP_NUM_THREADS ?= 1
test: $(READY)
	$(RUN) pytest -n $(WORKERS) --dist worksteal $(ARGS)

# what an ordinary run takes samples of, as a whole
test-all: export GRADDROP_ALL = 1
test-all: test

lint: .venv/tools
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) codespell_lib

bench: $(READY)
	$(RUN) benchmarks $(ARGS)

# all that a GPU has to say, in at most 25 minutes: docs/gpu-run.md
gpu: $(READY)
	$(RUN) benchmarks.gpu_run $(ARGS)

fuzz: export GRADDROP_FUZZ ?= 10000
fuzz: $(READY)
	$(RUN) pytest -k fuzz --timeout 0 $(ARGS)

# new sequences of operations on every backend, for an hour: make fuzz-hour FUZZ_SECONDS=600 FUZZ_SEED=7
fuzz-hour: export FUZZ_SECONDS ?= 3600
fuzz-hour: $(READY)
	$(RUN) pytest -x tests/test_sequences.py -k new_sequences $(ARGS)

# torch's own descriptions of its optimizers, run on ours; with TORCH_SOURCE=/path also test/test_optim.py of that tree
torch-tests: .venv/tools .venv/op
	$(RUN) tests.torch_optim $(ARGS)

# the suite under every set of versions in tests/matrix, one after the other; summaries in results/test-matrix
test-matrix: .venv/op
	$(MAKE) -k $(patsubst tests/matrix/%.txt,.venvs/%/tested,$(wildcard tests/matrix/*.txt))

# a source archive and a wheel whose tag says which systems it runs on
wheel: .venv/tools .venv/op
	rm -rf dist && $(RUN) build -q --no-isolation --outdir dist/built
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/built/*.whl
	$(VENV)/bin/abi3audit --strict dist/*.whl
	mv dist/built/*.tar.gz dist && rm -r dist/built && ls dist

# the native op with sanitizers, in a folder of its own; libasan must come before Python
sanitize: .venv/op
	mkdir -p build/sanitize && cp -a Makefile pyproject.toml setup.py graddrop_fused kernels tests build/sanitize
	cd build/sanitize && rm -f graddrop_fused/_cpu.* && GRADDROP_SANITIZE=address,undefined \
		../../$(PY) setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 ../../$(RUN) pytest tests/test_cpu*.py $(ARGS)

clean:
	rm -rf .venv .venvs build dist *.egg-info graddrop_fused/_cpu.* .pytest_cache .ruff_cache .mypy_cache
	rm -rf .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: demo test test-all lint bench gpu fuzz fuzz-hour torch-tests test-matrix wheel sanitize clean existing
.SECONDARY:

# Debian packages: $(call install,PACKAGES) as root or by sudo, else it fails and says what to run
install = { echo "installing $(1)"; if [ "$$(id -u)" = 0 ]; then S=; else S="sudo -n"; fi; \
	{ $$S apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$S apt-get install -qq $(1); } >/dev/null 2>&1 || \
	{ echo "could not install: please run  sudo apt-get install $(1)"; false; }; }
# pip first: pip 23 fails on editable installs with today's setuptools
.venv/requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call install,python3-venv)
	$(PYTHON) -m venv .venv
	$(RUN) pip install -q --upgrade pip
	$(RUN) pip install -q -r requirements-dev.txt
	touch $@

.venv/tools: .venv/requirements requirements-tools.txt
	$(RUN) pip install -q -r requirements-tools.txt
	touch $@

# without a compiler the package works on its PyTorch reference
.venv/op: .venv/requirements pyproject.toml setup.py graddrop_fused/build_op.py $(wildcard kernels/cpu/*)
	@command -v c++ >/dev/null || $(call install,g++) || echo "going on without a C++ compiler: no CPU op"
	PYTHONWARNINGS=ignore $(RUN) pip install -q --no-build-isolation -e .
	$(RUN) graddrop_fused
	touch $@

# an environment that is not ours: the op goes into the user's cache, and what runs is said
existing:
	$(RUN) graddrop_fused build || $(RUN) graddrop_fused

# requirements-dev.txt with some versions replaced; the op is the one binary that .venv/op built
.venvs/%/requirements: tests/matrix/%.txt requirements-dev.txt
	for python in $$(sed -n 's/^# interpreters: //p' $<); do $$python -m venv .venvs/$* 2>/dev/null && break; done
	.venvs/$*/bin/python3 -m pip install -q --upgrade pip
	grep -vE "^($$(sed -nE 's/^([a-z]+).*/\1/p' $< | paste -sd'|'))\b" requirements-dev.txt | cat - $< > $@.txt
	.venvs/$*/bin/python3 -m pip install -q -r $@.txt
	mv $@.txt $@
.venvs/%/tested: .venvs/%/requirements .venv/op
	mkdir -p results/test-matrix
	$(MAKE) test VENV=.venvs/$* > results/test-matrix/$*.txt 2>&1; status=$$?; \
		echo "$*: $$(tail -n1 results/test-matrix/$*.txt)"; exit $$status
