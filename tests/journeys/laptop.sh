#!/usr/bin/env bash
# A laptop without a GPU, whose owner skips the docs and runs `docker compose up` after cloning.
# shellcheck source=tests/journeys/steps.sh
. "$(dirname "$0")/steps.sh"
home=$JOURNEY/train_llm_from_scratch
trap 'tidy_up "$home"; rm -rf "$JOURNEY"' EXIT
unset HOST_UID HOST_GID
export TRAIN_LLM_CONTAINER=train_llm_journey TRAIN_LLM_IMAGE=train_llm:journey TB_PORT=6106

step "clone, and start the container without build.sh"
fresh_clone "$home"
chown -R 4711:4711 "$home" # A user id other than the image's default, 1000.
cd "$home"
docker compose up -d train
expect "HOST_UID=4711" docker compose logs train

step "add the lines from the log to .env"
printf 'HOST_UID=4711\nHOST_GID=4711\n' >.env
docker compose build -q train
docker compose up -d train
expect "ready: docker compose exec" docker compose logs train
expect "^4711$" docker compose exec -T train id -u

step "train: the model files belong to the user"
# shellcheck disable=SC2086
docker compose exec -T train $TINY out_dir=runs/first
test "$(stat -c %u runs/first/final/model.safetensors)" = 4711
expect "\[first\] step 20 " docker compose logs train

step "open TensorBoard"
eventually 90 python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:6106/')"

step "close the laptop: down removes the container but keeps the run"
docker compose down
test -f runs/first/final/model.safetensors
test -z "$(docker ps -aq --filter name=train_llm_journey)"
