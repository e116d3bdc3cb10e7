# shellcheck shell=bash
# Helpers for the user journeys. Each step runs a command that a user types and checks its output.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
JOURNEY=$(mktemp -d /var/tmp/train_llm_journey.XXXXXX)
chmod 755 "$JOURNEY"

# step TEXT: print what the user does next
step() { printf '\n[%s %4d s] %s\n' "$(basename "$0" .sh)" "$SECONDS" "$*"; }

# expect PATTERN COMMAND...: check that a command's output matches; ignore its exit code
expect() {
  local pattern=$1 out
  shift
  out=$("$@" 2>&1) || true
  if ! grep -Eq -- "$pattern" <<<"$out"; then
    printf 'expected %s from: %s\n%s\n' "$pattern" "$*" "$out" >&2
    return 1
  fi
}

# eventually SECONDS COMMAND...: repeat a command until it succeeds
eventually() {
  local limit=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    if [ "$SECONDS" -ge "$limit" ]; then
      printf 'did not succeed in time: %s\n' "$*" >&2
      return 1
    fi
    sleep 1
  done
}

# fresh_clone FOLDER: clone the working tree as a user would, and add some data
fresh_clone() {
  git clone -q "$HERE" "$1"
  (cd "$HERE" && git ls-files -mo --exclude-standard) | while IFS= read -r name; do
    if [ -f "$HERE/$name" ] && ! [ -L "$HERE/$name" ]; then
      mkdir -p "$1/$(dirname "$name")"
      cp "$HERE/$name" "$1/$name"
    fi
  done
  for number in $(seq 300); do
    printf '{"text": "%s and %s make %s. A line of text that is long enough to train on, number %s."}\n' \
      "$number" "$number" "$((number * 2))" "$number"
  done >"$1/dataset/text.jsonl"
}

# tidy_up FOLDER: remove only what the journey created
tidy_up() {
  (cd "$1" && docker compose down -v && docker image rm "$(docker compose config --images | sort -u | head -1)") >/dev/null 2>&1 || true
}

# Train with small steps and one thread, because others may be using this machine.
TINY="env OMP_NUM_THREADS=1 python train.py configs/tiny_pretrain.yaml max_steps=20 log_every_steps=1 eval_every_steps=0
  data.files=dataset/text.jsonl tokens_per_step=4096 sequence_length=128 precision=fp32 model.hidden_size=64 model.num_hidden_layers=1"
LONG=${TINY/max_steps=20/max_steps=1000000}
export TINY LONG
