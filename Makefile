# make demo    everything once, in two minutes on two cores: tokenizer, store, training, evaluation, prompts
# make test    the whole test suite, by two processes
# make test-fast   what starts hardly any process: two minutes
# make test-agreement   evaluation against lm_eval, Trainer and transformers' page, in an environment of its own
# make bench   the benchmarks in small, beside their peers, in an environment of its own; some minutes
# make gpu     what wants a GPU, where there is one: tests, losses, resume, speed, memory; 12 minutes, then once more for the rest
# make test-long   what takes longer: offloading, large models, more of the engines
# make fuzz    a million changed files and command lines, or FUZZ_CASES=N of them, from which nothing may crash; hours
# make soak    faults at every point and signals at random moments, an hour; writes docs/explanation/reliability.md
# make audit   the pinned packages in the databases of known vulnerabilities, by pip-audit; fails where these are out of reach
# make check   ruff and mypy
# make picture the README's pictures, from a demo's run of their own (Debian: tmux chromium-headless-shell)
# make docs    the documentation as a website, in site/
# make pins    requirements.txt anew from setup.cfg

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: install bench gpu demo picture docs test test-fast test-agreement check pins test-long fuzz soak audit
.DELETE_ON_ERROR:

install: .venv/installed

.venv/installed: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "wikift needs Python 3.10 or newer with venv (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv/test-installed: .venv/installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

demo: install
	$(BIN)/wikift prepare --dataset demo --tokenizer train:2048 --out $(DEMO)/store
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 -m wikift train --config launch/demo.toml \
	  --data $(DEMO)/store --output-dir $(DEMO)/run
	$(BIN)/wikift consolidate $(DEMO)/run
	$(BIN)/wikift evaluate $(DEMO)/run/hf --data $(DEMO)/store --split test
	$(BIN)/wikift generate $(DEMO)/run/hf --prompts-file launch/demo_prompts.txt --max-new-tokens 48
	@echo
	$(BIN)/wikift report $(DEMO)/run
	@echo
	@echo "$(CURDIR)/$(DEMO)/run/report.html shows the run in a browser, $(DEMO)/run/hf is a Hugging Face model directory. Next:"
	@echo "  $(BIN)/wikift generate $(DEMO)/run/hf                    # prompts of your own"
	@echo "  $(BIN)/wikift plan                                # what fine-tuning gpt2 would do"
	@echo "  $(BIN)/torchrun --nproc_per_node=2 -m wikift train --dataset YOUR.txt --model distilgpt2"

picture: install
	$(BIN)/python docs/make_pictures.py

test: .venv/test-installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

FAST := tests/base tests/data/test_batches.py tests/data/test_store.py tests/kernels tests/model tests/settings \
  tests/test_api.py tests/test_architecture.py tests/test_readme.py tests/test_wheel.py

test-fast: .venv/test-installed
	$(BIN)/python -m pytest -q $(FAST)

AGREEMENT := .venv/agreement
$(AGREEMENT)/installed: .venv/test-installed tests/agreement/requirements.txt
	$(PYTHON) -m venv $(AGREEMENT)
	$(AGREEMENT)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
	  -r tests/requirements.txt -r tests/agreement/requirements.txt
	@touch $@

test-agreement: $(AGREEMENT)/installed
	$(AGREEMENT)/bin/python -m pytest -q -s tests/agreement

BENCH := .venv/bench
$(BENCH)/installed: .venv/installed tests/requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
	  -r tests/requirements.txt -r benchmarks/requirements.txt
	@touch $@

SMALL := --layers 2 --width 256 --heads 4 --results bench
bench: $(BENCH)/installed
	$(BENCH)/bin/python -m benchmarks.data --megabytes 100 --peer-megabytes 8 --rounds 2 --results bench
	$(BENCH)/bin/python -m benchmarks.train $(SMALL) --only '^Trainer$$|^plain loop$$|^wikift$$' --rounds 3
	$(BENCH)/bin/python -m benchmarks.checkpoint $(SMALL)
	$(BENCH)/bin/python -m benchmarks.startup $(SMALL) --rounds 2
	$(BENCH)/bin/python -m benchmarks.generate --new-tokens 32 --rounds 3 --results bench

gpu: $(BENCH)/installed
	$(BENCH)/bin/python -m benchmarks.gpu

test-long: .venv/test-installed
	$(BIN)/python -m pytest -q -m long

fuzz: .venv/test-installed
	FUZZ_CASES=$${FUZZ_CASES:-1000000} $(BIN)/python -m pytest -q tests/fuzz

soak: .venv/test-installed
	$(BIN)/python -m tests.faults.soak --seconds $${SOAK_SECONDS:-3600}

AUDIT := .venv/audit
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.txt || { echo \
	  "make audit: failed; if no vulnerability is listed above, the database is out of reach, and nothing is audited"; exit 1; }

check: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy wikift

DOCS := .venv/docs
$(DOCS)/installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=true $(DOCS)/bin/mkdocs build --strict --quiet

pins:
	{ echo "# uv pip compile --universal --python-version 3.10 --no-header --no-annotate --all-extras setup.cfg -o requirements.txt"; \
	  uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --all-extras setup.cfg; } > requirements.new
	{ echo "# uv pip compile --universal --python-version 3.10 --no-header --no-annotate -c requirements.txt tests/requirements.in -o tests/requirements.txt"; \
	  uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate -c requirements.new tests/requirements.in; } > tests/requirements.new
	mv requirements.new requirements.txt
	mv tests/requirements.new tests/requirements.txt
