# Everything runs in a virtual environment that these targets make themselves; Python 3.11+ and make are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export LBP_RAY_ROOT ?= $(CURDIR)/demo
export RAY_USAGE_STATS_ENABLED = 0
export PYTHONUNBUFFERED = 1
BENCH_OUT ?= $(CURDIR)/demo/bench
HEAD_FOLDER ?=

.PHONY: help install demo demo-roi test test-slow lint bench head clean-demo

help:
	@echo "make install    only the installation into $(VENV), which the others do first"
	@echo "make demo       synthetic DICOM -> store -> trials -> report, under $(LBP_RAY_ROOT)"
	@echo "make demo-roi   the region finder on a synthetic cohort of its own (about 15 minutes), under demo-roi/"
	@echo "make test       the tests (under 10 minutes on 2 cores)"
	@echo "make test-slow  the slow ones: kill -9 at many moments, 20 other cohorts, SLURM, three hosts, browser (about an hour; some need root)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      benchmarks, as ratios, with a table and a plot under $(BENCH_OUT) (about 40 minutes; BENCH_OPTIONS=--quick for a smoke test)"
	@echo "make head       a local Ray head for 'ray job submit' (Ctrl-C ends it)"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is required, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[codecs,dev]'
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m lbp_ray.phantom --config configs/phantom_demo.yaml
	$(BIN)/python -m preprocess $(LBP_RAY_ROOT)/phantom/dicom --out $(LBP_RAY_ROOT)/store.zarr \
	  --templates $(LBP_RAY_ROOT)/phantom/templates.csv --key-file $(LBP_RAY_ROOT)/phantom/pseudonym.key
	$(BIN)/python -m preprocess link $(LBP_RAY_ROOT)/store.zarr --out $(LBP_RAY_ROOT)/linked \
	  --csv $(LBP_RAY_ROOT)/phantom/questionnaire.csv --csv $(LBP_RAY_ROOT)/phantom/gradings.csv \
	  --csv $(LBP_RAY_ROOT)/phantom/truth.csv \
	  --cvat $(LBP_RAY_ROOT)/phantom/annotations.xml
	$(BIN)/python -m lbp_ray.tune --config configs/demo.yaml

demo-roi: export LBP_RAY_ROOT = $(CURDIR)/demo-roi
demo-roi: $(VENV)/.installed
	$(BIN)/python -m lbp_ray.phantom --config configs/phantom_roi.yaml
	$(BIN)/python -m preprocess $(LBP_RAY_ROOT)/phantom/dicom --out $(LBP_RAY_ROOT)/store.zarr \
	  --templates $(LBP_RAY_ROOT)/phantom/templates.csv --key-file $(LBP_RAY_ROOT)/phantom/pseudonym.key
	$(BIN)/python -m preprocess link $(LBP_RAY_ROOT)/store.zarr --out $(LBP_RAY_ROOT)/linked \
	  --csv $(LBP_RAY_ROOT)/phantom/questionnaire.csv --cvat $(LBP_RAY_ROOT)/phantom/annotations.xml
	$(BIN)/python -m lbp_ray.seal --config configs/demo.yaml
	$(BIN)/python -m lbp_ray.segment --config configs/roi_demo.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --instafail -m 'not slow and not slurm and not multihost and not browser and not gpu'

test-slow: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tracking]'
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --instafail --durations=30 -m 'slow or slurm or multihost or browser or gpu'

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks --out $(BENCH_OUT) $(BENCH_OPTIONS)

# Jobs find this python and a token that only its owner can read; port 0 avoids the fixed port of Ray's agents, which any other Ray
# on the machine may hold. Ray lets everybody write to its folder: unless HEAD_FOLDER names one, it lies below one of mode 0700 that
# a loop removes once the process that becomes Ray has ended.
head: $(VENV)/.installed
	@umask 077; $(BIN)/ray get-auth-token --generate >/dev/null; chmod -f 600 ~/.ray/auth_token || true
	@echo "dashboard: http://127.0.0.1:8265, with the token in ~/.ray/auth_token; from elsewhere first: ssh -L 8265:127.0.0.1:8265 $$(hostname)"
	$(if $(HEAD_FOLDER),,own=$$(mktemp -d /tmp/ray-XXXX) || exit 1; \
	  (trap '' HUP INT TERM; while kill -0 $$$$; do sleep 0.5; done; rm -rf "$$own") </dev/null >/dev/null 2>&1 &) \
	PATH=$(abspath $(BIN)):$$PATH RAY_AUTH_MODE=token exec ray start --head --block --disable-usage-stats \
	  --dashboard-host=127.0.0.1 --dashboard-agent-listen-port=0 --temp-dir=$(or $(HEAD_FOLDER),$$own/ray) $(HEAD_OPTIONS)

clean-demo:
	rm -rf $(CURDIR)/demo $(CURDIR)/demo-roi
