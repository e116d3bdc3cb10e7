#!/usr/bin/env bash
# A laptop without a card, whose owner does not read: `docker compose up` right after the clone.
# shellcheck source=tests/journeys/steps.sh
. "$(dirname "$0")/steps.sh"
home=$JOURNEY/train_llm_from_scratch
trap 'tidy_up "$home"; rm -rf "$JOURNEY"' EXIT
unset HOST_UID HOST_GID
export TRAIN_LLM_CONTAINER=train_llm_journey TRAIN_LLM_IMAGE=train_llm:journey TB_PORT=6106

step "clones, and has the container up without build.sh"
fresh_clone "$home"
chown -R 4711:4711 "$home" # Somebody whose number is not the image's 1000.
cd "$home"
docker compose up -d train
expect "HOST_UID=4711" docker compose logs train

step "puts the lines into .env, as the log says"
printf 'HOST_UID=4711\nHOST_GID=4711\n' >.env
docker compose build -q train
docker compose up -d train
expect "ready: docker compose exec" docker compose logs train
expect "^4711$" docker compose exec -T train id -u

step "trains, and has a model that is theirs"
# shellcheck disable=SC2086
docker compose exec -T train $TINY out_dir=runs/first
test "$(stat -c %u runs/first/final/model.safetensors)" = 4711
expect "\[first\] step 20 " docker compose logs train

step "looks at TensorBoard"
eventually 90 python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:6106/')"

step "shuts the lid: down takes the container away, and the run stays"
docker compose down
test -f runs/first/final/model.safetensors
test -z "$(docker ps -aq --filter name=train_llm_journey)"
