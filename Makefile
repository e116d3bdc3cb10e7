# `make` alone lists the targets.
PYTHON ?= python3
NAME ?= 小智
AUTHOR ?=
BIN = .venv/bin
TORCH_CPU = https://download.pytorch.org/whl/cpu

# Words to avoid. Use baseline, rebuild, fix, resume, report, predict or next to instead.
ODD_WORDS = yardsticks?|anew|mend(s|ed|ing)?|cures?|(go|goes|going|went) on with|told|foretold|beside

# make env MIRROR=cn: pip and torch from the first mirrors of docker/mirrors.conf that answer. The
# environment keeps the index of pip.
ifeq ($(origin MIRROR),command line)
first_mirror = $(shell . docker/lib/mirrors.sh; reachable docker/mirrors.conf $(1) $(MIRROR) | head -1)
export PIP_INDEX_URL := $(call first_mirror,pip)
TORCH_CPU := $(call first_mirror,torch-cpu)
$(if $(PIP_INDEX_URL),,$(error MIRROR=$(MIRROR): no package index for this region in docker/mirrors.conf responds. Check the network and the name (cn), or omit MIRROR))
endif

.PHONY: help env demo test test-all peers docker-test bench bench-long faults faults-sample gpu-check lint lock tensorboard

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile
	@echo "Variables: NAME=小智 AUTHOR='Li Lei' QUICK=1 (demo), PYTHON=python3.12, MIRROR=cn"

env: .venv/ready ## Create the environment .venv. To activate it: . .venv/bin/activate

demo: .venv/ready ## Train a small chat model in three stages, on a CPU or a GPU.
	$(BIN)/python -m tools.demo --name "$(NAME)" $(if $(AUTHOR),--author "$(AUTHOR)") $(if $(QUICK),--quick)

test: .venv/ready-dev ## Run the quick tests.
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not cuda"

test-all: .venv/ready-dev ## Run the quick and the slow tests.
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not cuda"

peers: .venv-peers/ready dataset/sample/SOURCES.json ## Test that TRL, datasets and lm_eval agree with us.
	.venv-peers/bin/python -m pytest -q tests/bench/test_trl.py tests/bench/test_lm_eval.py

# If CI is set, a Docker engine is required.
docker-test: .venv/ready-dev ## Test the containers on a Docker engine (half an hour).
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -s --durations=8 tests/docker
	@if docker info >/dev/null 2>&1; then \
	  for journey in laptop shared_server student_wsl; do bash tests/journeys/$$journey.sh || exit 1; done; \
	else test -z "$$CI"; fi

gpu-check: .venv/ready-dev ## Test training on this machine's GPU, and measure it; writes docs/gpu.md.
	$(BIN)/python -m tools.gpu_check

# Fail points are loaded into the process, which must have one thread before it forks.
search_faults = @folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
  cc -O1 -shared -fPIC -o $$folder/fault.so tests/faults/fault.c -ldl && \
  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 FAULTS_FOLDER=$$folder \
  LD_PRELOAD=$$folder/fault.so $(BIN)/python -m tests.faults.search

faults: .venv/ready-dev ## Search for faults that a run does not survive (an hour); writes docs/reliability.md.
	$(search_faults) $(FAULTS)

faults-sample: .venv/ready-dev ## Try random faults for a minute.
	$(search_faults) --seconds 60

bench: .venv/ready-dev .venv-peers/ready dataset/sample/SOURCES.json ## Run the short benchmarks (an hour).
	$(BIN)/python -m bench.training --pairs 1
	$(BIN)/python -m bench.costs --repeats 1
	$(BIN)/python -m bench.time_to_loss
	$(BIN)/python -m bench.report

# After an interruption, run it again: finished ablations and peer runs are kept.
bench-long: .venv/ready-dev .venv-peers/ready dataset/sample/SOURCES.json ## Run all benchmarks (many hours).
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench.costs
	$(BIN)/python -m bench.ablations
	$(BIN)/python -m bench.time_to_loss --resume --minutes 20 --config configs/pretrain_6m.yaml \
	  --set tokens_per_step=4096 optim.muon_lr=0.01 optim.embedding_lr=16e-3 optim.momentum=0.9 \
	  eval_every_steps=15
	$(BIN)/python -m bench.report

lint: .venv/ready-dev ## Check style, types, spelling and the word list.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	git ls-files '*.py' '*.md' '*.sh' '*.yaml' '*.yml' '*.tsv' Makefile Dockerfile | \
	  xargs $(BIN)/codespell --ignore-words-list modle
	@git grep -nwiE '$(ODD_WORDS)' -- '*.py' '*.md' '*.sh' '*.yaml' '*.yml' '*.tsv' '*.conf' Dockerfile ':!CHANGELOG.md'; \
	  test $$? = 1 || { echo "Use baseline, rebuild, fix, resume, report, predict or next to instead."; exit 1; }

tensorboard: .venv/ready ## Show all runs on http://localhost:6006
	$(BIN)/tensorboard --logdir runs --port 6006

# The files contain no index URLs.
lock: .venv/ready-dev ## Pin the image's packages for every supported Python version.
	grep -hv -e '^torch' -e '^#' requirements.txt docker/requirements.in | \
	  $(BIN)/uv pip compile --quiet --native-tls --universal --python-version 3.10 --generate-hashes \
	    --no-header --no-annotate --output-file docker/requirements.lock.new -
	{ echo '# Exact versions and hashes of the packages in the image, except torch. Written by `make lock`.'; \
	  cat docker/requirements.lock.new; } > docker/requirements.lock
	{ echo '# Only pip, which the torch layer installs first. Written by `make lock`.'; \
	  awk '/^pip==/ {on = 1; print; next} on && /^ / {print; next} {on = 0}' docker/requirements.lock; } > docker/pip.lock
	rm docker/requirements.lock.new

dataset/sample/SOURCES.json: | .venv/ready
	$(BIN)/python -m tools.prepare_data

# Install torch. Without an NVIDIA driver the CPU wheel is enough: from PyTorch's own index if it
# responds within three seconds, else from pip's default index.
define torch_into
@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && \
  ! test -e /proc/driver/nvidia && \
  $(1)/python -c 'import urllib.request as u; u.urlopen("$(TORCH_CPU)/torch/", timeout=3)' 2>/dev/null; \
then echo "torch for the CPU: about 200 MB"; \
  $(1)/pip install --index-url "$(TORCH_CPU)" "$$(grep '^torch' requirements.txt)"; \
else echo "torch from pip's default index: about 200 MB on a Mac, up to 3,000 MB on Linux"; fi
endef

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is too old: Python 3.10 or newer is required. Run: make env PYTHON=python3.12"; exit 1; }
	@# A venv created without ensurepip has python but no pip. Running venv again adds pip.
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(if $(filter command%,$(origin MIRROR)),$(BIN)/pip config --site set global.index-url $(PIP_INDEX_URL))
	$(call torch_into,$(BIN))
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-data.txt
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

# A second environment, because the peers need other versions of the same packages.
.venv-peers/ready: bench/requirements-peers.txt requirements.txt
	test -x .venv-peers/bin/pip || $(PYTHON) -m venv .venv-peers
	$(call torch_into,.venv-peers/bin)
	.venv-peers/bin/pip install -r bench/requirements-peers.txt
	touch $@
