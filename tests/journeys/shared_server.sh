#!/usr/bin/env bash
# A server with eight GPUs and two users, ann and bob, whose folders have the same name. Four GPUs and
# port 6006 are in use. The GPUs are simulated by tests/docker/fakes/nvidia-smi.
# shellcheck source=tests/journeys/steps.sh
. "$(dirname "$0")/steps.sh"
ann=$JOURNEY/ann/train_llm bob=$JOURNEY/bob/train_llm
trap 'tidy_up "$ann"; tidy_up "$bob"; kill "$blocker" 2>/dev/null; rm -rf "$JOURNEY"' EXIT
mkdir "$JOURNEY/ann" "$JOURNEY/bob" "$JOURNEY/bin"
cp "$HERE/tests/docker/fakes/nvidia-smi" "$JOURNEY/bin/"
for card in 0 1 2 3 4 5 6 7; do
  printf '%s|NVIDIA A100-SXM4-80GB|81920|8.0|550.54.15|Disabled|%s|0|GPU-%s\n' "$card" "$((card < 4 ? 60000 : 4))" "$card"
done >"$JOURNEY/cards"
export PATH="$JOURNEY/bin:$PATH" FAKE_CARDS="$JOURNEY/cards"
python3 -m http.server 6006 --bind 127.0.0.1 >/dev/null 2>&1 &
blocker=$!
eventually 20 bash -c 'exec 3<>/dev/tcp/127.0.0.1/6006'

step "ann previews the settings"
fresh_clone "$ann"
cd "$ann"
expect "in use: 0,1,2,3" ./build.sh --dry-run
expect "CUDA_DEVICES=4,5$" ./build.sh --dry-run --devices free:2
expect "only 4 of the 5" ./build.sh --dry-run --devices free:5

step "ann has no GPUs until tomorrow, so she builds for the CPU and trains"
./build.sh cpu >/dev/null
grep -q "^TB_PORT=60[01][0-9]$" .env && ! grep -q "^TB_PORT=6006$" .env
docker compose up -d train
# shellcheck disable=SC2086
docker compose exec -T train $LONG save_every_steps=1000000 out_dir=runs/ann >/dev/null 2>&1 &
eventually 120 grep -q "^step 3 " runs/ann/train.log

step "bob does the same in a folder with the same name; ann's run continues"
fresh_clone "$bob"
cd "$bob"
./build.sh cpu --env-only >/dev/null
grep -q "^TRAIN_LLM_CONTAINER=train_llm_" .env
printf 'TRAIN_LLM_IMAGE=%s\n' "$(sed -n 's/^TRAIN_LLM_IMAGE=//p' "$ann/.env")" >>.env # The image is the same.
docker compose up -d train
before=$(tail -1 "$ann/runs/ann/train.log")
docker compose down
sleep 5
test "$before" != "$(tail -1 "$ann/runs/ann/train.log")"

step "the server shuts down: ann's run is saved"
cd "$ann"
docker compose stop
last=$(sed -n 's/^step \([0-9]*\) .*/\1/p' runs/ann/train.log | tail -1)
saved=$(basename "$(ls -d runs/ann/step_*)" | tr -dc 0-9 | sed 's/^0*//')
test "$saved" -ge "$last" && test "$saved" -le $((last + 2))

step "the next day: ann requests her GPUs by index"
export CUDA_DEVICES=4,5 SHM_SIZE=1gb
./build.sh --no-build >/dev/null
expect '"4,5"|4,5' docker compose config
if docker compose up -d train >"$JOURNEY/up.log" 2>&1; then
  expect '^NVIDIA_VISIBLE_DEVICES=4,5$' docker compose exec -T train bash -c "tr '\\0' '\\n' </proc/1/environ"
else
  # This Docker host has no toolkit. docs/troubleshooting.md has the fix for this message.
  grep -q "could not select device driver" "$JOURNEY/up.log"
fi
