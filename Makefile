# `make demo` and `make test` do all set-up on a fresh Debian or Ubuntu with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# faiss-cpu and faiss-gpu share a folder: one of the two, chosen by whether there is a GPU
FAISS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BENCHMARKS := contrastive_loss siglip_loss order tar_reading decode swav_views pipeline clip_step swav_step objective_overhead trainer checkpoint parity resharding memory exact_search

.PHONY: install demo test test-cluster test-cluster-all lint bench learning control faults ci-deps clean
install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "polyview needs Python >= 3.11: make PYTHON=python3.12 install"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python has no venv module here: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(FAISS),test]'
	@touch $@

demo: install
	$(BIN)/polyview demo

test: install lint
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# every benchmark beside its peer; figures are kept under benchmarks/results/
bench: install
	@for b in $(BENCHMARKS); do \
	  echo "== $$b"; OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$b --json benchmarks/results/$$b.json || exit 1; done

# do the objectives learn? three seeds of each: CIFAR-10 beside lightly and SupCon (about an hour of CPU), photographs
# with captions, PyramidCLIP beside CLIP (about forty minutes); finished runs are kept and not done again
learning: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.learning --json benchmarks/results/learning.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pyramid_clip --json benchmarks/results/pyramid_clip.json

# the demo's control, shown in its report: CLIP alone, three seeds, on captions of other scenes (about 15 minutes)
control: install
	$(BIN)/python -m benchmarks.shuffled_captions

# two hundred runs with a fault each, seeded: finished ones are kept under runs/faults and not done again (hours)
faults: install
	$(BIN)/python -m benchmarks.faults --runs 200 --seed 0 --json benchmarks/results/faults.json

# on a real Slurm of three nodes that is started here (root, and the packages of ci-deps); all: an hour more
test-cluster: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "cluster and not long" tests/cluster

test-cluster-all: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m cluster tests/cluster

# Debian packages that only tests need: a browser to open the report in, a Slurm to submit to
ci-deps:
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
	  slurm-wlm slurmdbd munge mariadb-server iproute2 procps

clean:
	rm -rf .venv demo build *.egg-info
