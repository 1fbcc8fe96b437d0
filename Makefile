# make train        train, evaluate and export the tiny model; sets up .venv first if it is missing
# make test         run the tests and list the twenty longest
# make test-all     run the slow tests as well: whole matrices, thirty kills, a million texts, readers
# make test-toolchains  compile every launch of every kernel with each Triton that we promise
# make test-libraries   test what depends on libraries with their oldest and newest versions
# make test-kernels test the kernels in an environment that has the wheel of mlembed-kernels alone
# make test-readers open exports with the oldest sentence-transformers that they are for
# make mutate       break the product on purpose, list what no test notices: SEED=1 N=20, ten minutes
# make attack       spoil runs, models, data and disks on purpose, list what is not refused or bit-equal:
#                   SEED=1 N=40, five minutes; ONLY=kills
# make golden       same numbers as an earlier commit, bit for bit: BASE=COMMIT, 90 seconds
# make check        lint, format and types
#
# In an existing environment, installing nothing: make train PYTHON=python3 VENV=
# Further arguments of the run:                   make train ARGS="--name second --steps 600"

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# For small machines. Waiting threads spin briefly: a step of the tiny recipe takes 0.19 s, and 0.25 s
# without spinning; long spins (torch's default) stall it once anything else runs, 1.3 s against 0.4 s.
# Every batch has a different number of tokens, so a cache of matrix kernels by shape only grows, and
# memory that a step frees is allocated again by the next.
export GOMP_SPINCOUNT ?= 1000
export ONEDNN_PRIMITIVE_CACHE_CAPACITY ?= 64
export MALLOC_MMAP_THRESHOLD_ ?= 1000000000
export MALLOC_TRIM_THRESHOLD_ ?= 1000000000

ifeq ($(strip $(VENV)),)
# Nothing is installed: a link gives kernels/ the name under which it would be installed.
RUN   := $(PYTHON)
READY := .path/mlembed_kernels
export PYTHONPATH := $(CURDIR)/.path:$(CURDIR):$(PYTHONPATH)
else
RUN   := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# A file stays on one worker, so that its fixtures are built once. (loadgroup of xdist 3.8 groups
# nothing under pytest 9.2, whose test names differ.) The last files by name are short.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := $(RUN) -m pytest $(SPREAD) --durations 20

.PHONY: train test test-all test-kernels test-readers test-libraries test-oldest test-newest
.PHONY: test-toolchains test-toolchains-quick mutate attack golden check setup clean

train: setup
	$(RUN) train.py tiny $(ARGS)

test: setup
	$(PYTEST) --minutes 15 $(ARGS)

test-all: setup .venv-readers/.ready
	MLEMBED_READERS=.venv-readers/bin/python $(PYTEST) -m "slow or not slow" --minutes 60 $(ARGS)

test-kernels: setup
	$(RUN) -m pytest tests/test_wheel.py -k kernels_alone -m "slow or not slow" $(ARGS)

test-readers: setup .venv-readers/.ready
	MLEMBED_READERS=.venv-readers/bin/python $(RUN) -m pytest tests/publishing/test_export_readers.py $(ARGS)

# Tests that depend on libraries: command lines, files, tokenizers, models, scores, figures.
LIBRARIES := $(addprefix tests/,cli config data evaluation inference modeling publishing runtime/test_cache.py \
	runtime/test_log.py training/test_train.py training/objective/test_teacher.py)

test-libraries: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest $(SPREAD) $(LIBRARIES) $(ARGS)

mutate: setup
	$(RUN) -m tests.mutation $(if $(SEED),--seed $(SEED)) $(if $(N),--n $(N)) \
		$(if $(NAMED),--named) $(if $(ONLY),--only $(ONLY)) $(ARGS)

attack: setup
	$(RUN) -m tests.attack $(if $(SEED),--seed $(SEED)) $(if $(N),--n $(N)) \
		$(if $(ONLY),--only "$(ONLY)") $(ARGS)

# The oldest Triton that pyproject.toml admits, that of constraints.txt, and the newest. Compiled
# kernels stay in .cache/triton, so that a run that was stopped continues.
TRITONS := 3.6.0 3.7.1 3.9.0

test-toolchains: setup $(TRITONS:%=.toolchains/triton-%/.ready)
	$(call hopper,$(TRITONS))

# One launch of each kernel with the oldest and the newest Triton.
test-toolchains-quick: ARGS += --quick
test-toolchains-quick: setup $(patsubst %,.toolchains/triton-%/.ready,3.6.0 3.9.0)
	$(call hopper,3.6.0 3.9.0)

hopper = @failed=; for version in $(1); do \
		PYTHONPATH=$(CURDIR)/.toolchains/triton-$$version:$$PYTHONPATH \
			$(RUN) -W ignore tests/hopper.py $(ARGS) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "violations with triton$$failed"; exit 1; }

golden: setup
	$(RUN) tests/golden.py $(if $(BASE),--base $(BASE)) $(ARGS)

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

setup: $(READY)

# Installed again when its requirements change; complete once the mark exists.
$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlembed needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-readers/.ready: Makefile
	test -x .venv-readers/bin/python || $(PYTHON) -m venv .venv-readers
	.venv-readers/bin/python -m pip install --quiet --disable-pip-version-check \
		sentence-transformers==5.0.0 'transformers==4.57.*' torch==2.13.0
	touch $@

# torch stays at the version of constraints.txt in both: a newer one from PyPI is 3 GB with CUDA.
.venv-%/.ready: pyproject.toml constraints.txt tests/floors.py
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -E '^(torch|triton)==' constraints.txt > $(@D)/constraints.txt
	test $* = newest || $(PYTHON) tests/floors.py >> $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		--upgrade-strategy eager -c $(@D)/constraints.txt -e '.[dev]'
	touch $@

# Outside of the environment, without torch, which pins one Triton.
.toolchains/triton-%/.ready:
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target .toolchains/triton-$* triton==$*
	touch $@

.path/mlembed_kernels:
	mkdir -p .path
	ln -s ../kernels $@

clean:
	rm -rf .path .venv-readers .venv-oldest .venv-newest .toolchains .cache $(VENV) *.egg-info \
		.pytest_cache .ruff_cache .mypy_cache
