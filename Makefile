# make train          the demo: data, both stages, evaluation; typed again it resumes.   STORE=s3: the same through an S3 server
# make check          for every save: lint, types, and the tests that need no process, Ray or server
# make test           what a change must pass
# make test-hosts     the slow suites: several hosts.   make test-cluster: clusters, S3, Prometheus.   make test-chaos: things are killed
# make test-crash     killed before each of their writes: runs, sweeps, retraining.   make test-long: waits, notices, changes of size;
#                     memory; sweeps, retraining, benches
# make setup          only .venv.   make lint: only style and types.   make clean: without work/ and the caches
# make monitor        a Prometheus, and a Grafana where it is installed, beside the runs of this machine.   make dashboard: its panels
# PYTHON=python3.13   makes .venv, where there is none yet, with that Python and not with the first one that is there
# GPU=1               one rank on each of so many GPUs: make train GPU=1
# ARGS="..."          goes to the command: make train ARGS="optim.lr=1e-4", make test ARGS="-k order"

PYTHON := python3.11 python3.12 python3.13
PY     := .venv/bin/python
SETUP  := .venv/setup.stamp
TOOLS  := .venv/tools.stamp
BUCKET := reactdiff
STORE  := file
TWO    := -n 2
HOSTS  := tests/cluster/multihost
CHAOS  := tests/cluster/chaos
CRASH  := $(addprefix $(CHAOS)/,test_every_crash.py test_sweep_kill.py)
DRIVER := $(addprefix tests/cluster/driver/,test_machines_come_and_go.py test_told_to_end.py)
LONG   := $(DRIVER) tests/cluster/training tests/jobs tests/reactdiff
ARGS   :=
GPU    :=
SUDO   := $(if $(filter-out 0,$(shell id -u)),sudo -n)

train_file := $(PY) jobs/train.py
train_s3   := $(PY) infra/objectstore.py work/s3 --bucket $(BUCKET) -- \
              $(PY) jobs/train.py run.store=s3://$(BUCKET)/store data.url=s3://$(BUCKET)/shards
after_s3   := @echo 'The S3 server has ended; what names s3://$(BUCKET) needs it: $(PY) infra/objectstore.py work/s3 --bucket $(BUCKET) -- COMMAND'

.PHONY: monitor dashboard setup train check quick test lint test-hosts test-cluster test-chaos test-crash test-long clean

train: $(SETUP)
	$(or $(train_$(STORE)),$(error STORE=$(STORE): use file or s3)) $(if $(GPU),workers.gpu=true workers.count=$(GPU)) $(ARGS)
	$(after_$(STORE))

# Lint and types beside the tests: two cores have room for both.
check: $(SETUP)
	+$(MAKE) --no-print-directory -j2 -O lint quick

quick:
	$(PY) -m pytest $(TWO) -m 'not slow and not starts and not heavy' $(ARGS)

test: lint $(TOOLS)
	$(PY) -m pytest $(TWO) $(ARGS)

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m mypy

# The hosts are as many processes as the machine bears: one test after the other.
test-hosts: $(TOOLS)
	$(PY) -m pytest -n 1 -m slow $(HOSTS) $(ARGS)

test-cluster: $(TOOLS)
	@command -v chromium > /dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy --no-install-recommends chromium; }
	$(PY) -m pytest $(TWO) -m slow $(addprefix --ignore=,$(HOSTS) $(CHAOS) $(LONG)) $(ARGS)

test-chaos: $(TOOLS)
	$(PY) -m pytest $(TWO) -m slow $(CHAOS) $(addprefix --ignore=,$(CRASH)) $(ARGS)

test-crash: $(TOOLS)
	$(PY) -m pytest $(TWO) -m slow $(CRASH) $(ARGS)

test-long: $(TOOLS)
	$(PY) -m pytest $(TWO) -m slow $(LONG) $(ARGS)

monitor: $(TOOLS)
	$(PY) infra/monitor.py $(ARGS)

dashboard: $(SETUP)
	$(PY) infra/dashboard.py

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@$(PY) -c 'import pip' 2> /dev/null || { for python in $(PYTHON); do \
	    $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null || continue; \
	    echo "$$python -m venv .venv"; $$python -m venv .venv; exit; \
	  done; \
	  echo "no Python 3.11, 3.12 or 3.13 with venv under the names $(PYTHON); run: apt-get install python3-venv" \
	    "(Ubuntu 22.04: python3.11-venv), or name another: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -c 'import matplotlib.font_manager'  # lists the fonts now, with processes that no test may start
	touch $@

# Debian packages: the tests of metrics and alert rules run the real Prometheus, those of several hosts make them with the others'
# programs; both say so where one is missing. /usr/sbin is not on everybody's PATH.
DEBIAN := prometheus iproute2 util-linux procps nftables

$(TOOLS): $(SETUP)
	@PATH="$$PATH:/usr/sbin:/sbin"; (for program in promtool ip unshare pgrep nft; do command -v $$program > /dev/null || exit 1; done) \
	  || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy --no-install-recommends $(DEBIAN); } \
	  || echo "not all packages are installed; their tests will fail until you run: apt-get install $(DEBIAN)" >&2
	touch $@

clean:
	rm -rf work build .pytest_cache .ruff_cache .mypy_cache .hypothesis
