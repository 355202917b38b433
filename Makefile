# Two commands do everything: `make demo` and `make test`. Each creates the environment first.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
RESULTS ?= results
# A worker per core, at most eight; tests that measure time come afterwards, alone.
BESIDE := -n auto --maxprocesses 8 --dist worksteal
# Marked tests spend a third of their time waiting for clocks and processes of their own: one worker more.
WAITING := -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 9 --dist worksteal
PLAIN := not gpu and not llm and not assets and not slow and not browser
MARKED := (assets or slow) and not gpu and not llm and not mesh and not browser
export PYTHONUNBUFFERED = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: mesh demo test marked check env lint types imports bench gpu site browser interop llm crosscheck clean

demo: env  ## run the main job on the embedded default: text -> SAEs -> explanations -> scores -> leaderboard and pages
	$(PY) -m evals.run_all --preset quick --root $(RESULTS)

test: env  ## unit, numeric and contract tests; no network, no key, no GPU
	$(PY) -m pytest $(BESIDE) -m "$(PLAIN) and not alone"
	$(PY) -m pytest -m "$(PLAIN) and alone"

marked: env  ## the tests that take longer or need the assets, as CI runs them (minutes)
	$(PY) -m pytest $(WAITING) --timeout=900 --durations=20 -m "$(MARKED) and not alone"
	$(PY) -m pytest --timeout=900 --durations=8 -m "$(MARKED) and alone"

check: env lint types imports test  ## everything that CI demands, but the marked tests

lint: env
	$(PY) -m ruff check .

types: env
	$(PY) -m mypy

imports: env
	$(VENV)/bin/lint-imports

bench: env  ## kernels against their references
	$(PY) kernels/bench.py

gpu: env  ## on a machine with an NVIDIA GPU: the tests that need one, launch settings for it, the bench, docs/kernels.md
	$(PY) -m pytest -m gpu
	$(PY) kernels/bench.py --tune
	$(PY) kernels/bench.py
	$(PY) kernels/bench_summary.py --write

mesh: env  ## training on every mesh of 2 and 4 processes, with every architecture (CI takes a part of them)
	$(PY) -m pytest tests/sae/test_distributed.py tests/sae/test_distributed_meshes.py

site: env  ## rebuild leaderboard and pages from the rows
	$(PY) -m evals.leaderboard --root $(RESULTS)

browser: env  ## the pages in a real Chromium (Debian: apt-get install chromium); skipped where there is none
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	$(PY) -m pytest -m browser tests/browser

interop: env  ## goldens anew by the six libraries that write these files, each in its own environment
	PYTHON=$(PYTHON) tests/interop/rebuild.sh $(PY)

llm: env  ## real servers in their own environments: llama.cpp's, with VLLM=1 also vLLM on the processor; after make demo
	PYTHON=$(PYTHON) VLLM=$(VLLM) RESULTS=$(RESULTS) scripts/llm_servers.sh $(PY)

crosscheck: env  ## our numbers against SAEBench, SAELens and sae-probes: goldens anew by the peers, in their environment
	PYTHON=$(PYTHON) tests/crosscheck/rebuild.sh $(PY)

env: $(STAMP)

# torch comes first and alone: on machines with a local CPU build this keeps gigabytes of CUDA out.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saescope needs Python 3.11 or newer, this is %s; try make PYTHON=python3.11" % sys.version.split()[0])'
	@if [ "$${CONDA_PREFIX:-}" ] && [ ! -d $(VENV) ]; then echo "creating $(VENV) beside the active conda environment"; fi
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@rm -f $(VENV)/.installed-* && touch $(STAMP)

clean:
	rm -rf $(VENV)
