# make train          the demo: data, both stages, evaluation; typed again it resumes.   STORE=s3: the same through an S3 server
# make test           what a change must pass
# make test-cluster   the slow suites: clusters, S3, many ranks.   make test-chaos: things are killed
# ARGS="..."          goes to the command: make train ARGS="optim.lr=1e-4", make test ARGS="-k order"

PYTHON := .venv/bin/python
SETUP  := .venv/setup.stamp
BUCKET := reactdiff
STORE  := file
ARGS   :=
SUDO   := $(if $(filter-out 0,$(shell id -u)),sudo -n)

train_file := $(PYTHON) jobs/train.py
train_s3   := $(PYTHON) infra/objectstore.py work/s3 --bucket $(BUCKET) -- \
              $(PYTHON) jobs/train.py run.store=s3://$(BUCKET)/store data.url=s3://$(BUCKET)/shards

.PHONY: setup train test lint test-cluster test-chaos clean

train: $(SETUP)
	$(or $(train_$(STORE)),$(error STORE=$(STORE): use file or s3)) $(ARGS)

test: lint
	$(PYTHON) -m pytest $(ARGS)

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test-cluster: $(SETUP)
	$(PYTHON) -m pytest -m slow --ignore=tests/cluster/chaos $(ARGS)

test-chaos: $(SETUP)
	$(PYTHON) -m pytest -m slow tests/cluster/chaos $(ARGS)

setup: $(SETUP)

# Prometheus is a Debian package: the tests of metrics and alert rules run the real one, and say so where it is missing.
$(SETUP): pyproject.toml constraints.txt
	python3.11 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@command -v promtool > /dev/null \
	  || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy --no-install-recommends prometheus; } \
	  || echo "prometheus is not installed; its tests will fail until you run: apt-get install prometheus" >&2
	touch $@

clean:
	rm -rf work build .pytest_cache .ruff_cache .mypy_cache .hypothesis
