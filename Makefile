# `make demo` and `make test` set up all they need in .venv. Extremely simple; keep it that way.

PYTHON ?= python3
PY := .venv/bin/python
RUN := $(PY) -m

demo: .venv/op
	$(RUN) benchmarks.crosslingual.demo $(ARGS)

test: .venv/op
	$(RUN) pytest $(ARGS)

lint: .venv/requirements
	$(RUN) ruff check
	$(RUN) ruff format --check

bench: .venv/op
	$(RUN) benchmarks $(ARGS)

fuzz: export GRADDROP_FUZZ ?= 10000
fuzz: .venv/op
	$(RUN) pytest -k fuzz --timeout 0 $(ARGS)

# the native op with sanitizers, in a folder of its own; libasan must come before Python
sanitize: .venv/op
	mkdir -p build/sanitize && cp -a Makefile pyproject.toml setup.py graddrop_fused kernels tests build/sanitize
	cd build/sanitize && rm -f graddrop_fused/_cpu.* && GRADDROP_SANITIZE=address,undefined \
		../../$(PY) setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 ../../$(RUN) pytest tests/test_cpu*.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info graddrop_fused/_cpu.* .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: demo test lint bench fuzz sanitize clean

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

# without a compiler the package works on its PyTorch reference
.venv/op: .venv/requirements pyproject.toml setup.py $(wildcard kernels/cpu/*)
	@command -v c++ >/dev/null || $(call install,g++) || echo "going on without a C++ compiler: no CPU op"
	PYTHONWARNINGS=ignore $(RUN) pip install -q --no-build-isolation -e .
	$(RUN) graddrop_fused
	touch $@
