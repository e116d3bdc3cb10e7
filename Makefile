# demo: real text to a model that chats.  test, lint: what every change must pass.
# test-all: the slower ones too. Tests of a card run alone, as several at once would not fit it: gpu-check.
PYTHON ?= python3
NAME ?= 小智
AUTHOR ?= 我
BIN = .venv/bin

.PHONY: demo env test test-all docker-test bench bench-long gpu-check lint lock tensorboard

env: .venv/ready

demo: .venv/ready
	$(BIN)/python -m tools.demo --name "$(NAME)" --author "$(AUTHOR)"

test: .venv/ready-dev
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not cuda"

test-all: .venv/ready-dev
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not cuda"

# On a Docker engine, where there is one (with CI=true there must be): half an hour.
docker-test: .venv/ready-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -s --durations=8 tests/docker
	@if docker info >/dev/null 2>&1; then \
	  for journey in laptop shared_server student_wsl; do bash tests/journeys/$$journey.sh || exit 1; done; \
	else test -z "$$CI"; fi

# The exact packages of the image, for every Python that is supported; no address is written down.
lock: .venv/ready-dev
	grep -hv -e '^torch' -e '^#' requirements.txt docker/requirements.in | \
	  $(BIN)/uv pip compile --quiet --native-tls --universal --python-version 3.10 --generate-hashes \
	    --no-header --no-annotate --output-file docker/requirements.lock.new -
	{ echo '# Exact versions and digests of the image'"'"'s packages but torch. Written by `make lock`.'; \
	  cat docker/requirements.lock.new; } > docker/requirements.lock
	{ echo '# pip alone, which the layer of torch needs before the rest. Written by `make lock`.'; \
	  awk '/^pip==/ {on = 1; print; next} on && /^ / {print; next} {on = 0}' docker/requirements.lock; } > docker/pip.lock
	rm docker/requirements.lock.new

# The figures of docs/benchmarks.md beside the peers, each pair once: within an hour on two cores.
bench: .venv/ready-dev .venv-peers/ready dataset/sample/SOURCES.json
	$(BIN)/python -m bench.training --pairs 1
	$(BIN)/python -m bench.costs --repeats 1
	$(BIN)/python -m bench.time_to_loss
	$(BIN)/python -m bench.report

# The ones that take hours, and three pairs of the others. Started again, the ablations and the
# peer's runs go on where they were.
bench-long: .venv/ready-dev .venv-peers/ready dataset/sample/SOURCES.json
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench.costs
	$(BIN)/python -m bench.ablations
	$(BIN)/python -m bench.time_to_loss --resume --minutes 20 --config configs/pretrain_6m.yaml \
	  --set tokens_per_step=4096 optim.muon_lr=0.01 optim.embedding_lr=16e-3 optim.momentum=0.9 \
	  eval_every_steps=15
	$(BIN)/python -m bench.report

# Is training right on this machine's card, and how fast? The tests in tests/cuda/; it writes docs/gpu.md.
gpu-check: .venv/ready-dev
	$(BIN)/python -m tools.gpu_check

dataset/sample/SOURCES.json: | .venv/ready
	$(BIN)/python -m tools.prepare_data

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	git ls-files '*.py' '*.md' '*.sh' '*.yaml' '*.yml' '*.tsv' Makefile Dockerfile | \
	  xargs $(BIN)/codespell --ignore-words-list modle

tensorboard: .venv/ready
	$(BIN)/tensorboard --logdir runs --port 6006

# Torch into an environment. Without an NVIDIA driver its CPU wheel is enough: from PyTorch's own
# index where that answers within three seconds, else from pip's default index.
define torch_into
@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && \
  ! test -e /proc/driver/nvidia && \
  $(1)/python -c 'import urllib.request as u; u.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=3)' 2>/dev/null; \
then echo "torch for the CPU: about 200 MB"; \
  $(1)/pip install --index-url https://download.pytorch.org/whl/cpu "$$(grep '^torch' requirements.txt)"; \
else echo "torch from pip's default index: about 200 MB on a Mac, up to 3,000 MB on Linux"; fi
endef

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.11 ..."; exit 1; }
	@# A venv made without ensurepip has a python but no pip: running venv again adds it.
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(call torch_into,$(BIN))
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-data.txt
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

# Apart from ours, since they want other versions of the same packages.
.venv-peers/ready: bench/requirements-peers.txt requirements.txt
	test -x .venv-peers/bin/pip || $(PYTHON) -m venv .venv-peers
	$(call torch_into,.venv-peers/bin)
	.venv-peers/bin/pip install -r bench/requirements-peers.txt
	touch $@
