#!/usr/bin/env bash
# The container's first process (below Docker's init).
#   idle (default)   wait; run TRAIN_COMMAND if there is one; print what trainings write to their
#                    train.log; on SIGTERM let every training save and end, however it was begun
#   anything else    is run in its place
#
# Docker signals only this process, and shows only its output: a training begun by `docker exec`
# would be killed without a word at `stop`, and be invisible in `logs` (moby#35703, moby#10166).
set -u
STOP_WAIT=${STOP_WAIT:-110} # Seconds; compose's stop_grace_period is ten more.
RUNS=${RUNS:-/workspace/runs}

[ "${1:-idle}" = idle ] || exec "$@"

note() { printf '[container] %s\n' "$*"; }

# ---- trainings -----------------------------------------------------------------------------------

# programs: process ids of Python programs, torchrun and data workers. Shells ignore SIGTERM, so
# waiting for those would take the whole grace; helpers of torch.compile end with their parent.
programs() {
  local folder comm state rest
  for folder in /proc/[0-9]*; do
    { read -r comm <"$folder/comm"; } 2>/dev/null || continue
    case "$comm" in python* | torchrun | pt_*) ;; *) continue ;; esac
    { read -r rest <"$folder/stat"; } 2>/dev/null || continue
    state=${rest##*) }
    [ "${state%% *}" = Z ] && continue
    case "$(tr '\0' ' ' 2>/dev/null <"$folder/cmdline")" in
      *compile_worker* | *multiprocessing*) continue ;;
    esac
    printf '%s\n' "${folder#/proc/}"
  done
}

on_stop() {
  trap '' TERM INT
  local running waited=0
  running=$(programs)
  if [ -n "$running" ]; then
    note "stopping: asking $(wc -w <<<"$running") programs to save and end"
    # Those of another user (exec -u root) cannot be reached from here.
    # shellcheck disable=SC2086
    kill -TERM $running 2>/dev/null
    while [ -n "$(programs)" ] && [ "$waited" -lt $((STOP_WAIT * 5)) ]; do
      waited=$((waited + 1))
      sleep 0.2
    done
    follow
    if [ -n "$(programs)" ]; then note "some did not end within $STOP_WAIT s, and will be killed"; else note "all ended"; fi
  fi
  exit 0
}

# ---- logs ----------------------------------------------------------------------------------------

declare -A stream=() partial=()
first_look=1

# follow: print the lines that have come to any train.log since the last look. A line without its
# end waits for it. What was there before the container started is not repeated.
follow() {
  local file line name
  for file in "$RUNS"/train.log "$RUNS"/*/train.log "$RUNS"/*/*/train.log; do
    [ -f "$file" ] || continue
    if [ -n "${stream[$file]:-}" ] && ! [ "$file" -ef "/proc/self/fd/${stream[$file]}" ]; then
      descriptor=${stream[$file]} # The run was moved aside, and this is a new one's.
      exec {descriptor}<&-
      unset "stream[$file]" "partial[$file]"
    fi
    if [ -z "${stream[$file]:-}" ]; then
      { exec {descriptor}<"$file"; } 2>/dev/null || continue
      stream[$file]=$descriptor
      if [ "$first_look" = 1 ]; then cat <&"$descriptor" >/dev/null; fi
    fi
    name=${file#"$RUNS"/}
    while IFS= read -r -u "${stream[$file]}" line; do
      line=${partial[$file]:-}$line
      partial[$file]=
      line=${line%$'\r'}
      printf '[%s] %s\n' "${name%/train.log}" "${line##*$'\r'}"
    done
    partial[$file]=${partial[$file]:-}$line
  done
  first_look=0
}

# ---- life ----------------------------------------------------------------------------------------

trap on_stop TERM INT
follow
for folder in "$RUNS" /workspace/.cache; do
  if [ -d "$folder" ] && ! [ -w "$folder" ]; then
    note "error: $folder belongs to user $(stat -c %u:%g "$folder"), and this container is user $(id -u):$(id -g): it cannot write there"
    note "错误：$folder 属于用户 $(stat -c %u:%g "$folder")，而容器以用户 $(id -u):$(id -g) 运行，无法写入"
    note "  cure: ./build.sh on the host, or put these lines into .env and run: docker compose build && docker compose up -d train"
    note "  HOST_UID=$(stat -c %u "$folder")"
    note "  HOST_GID=$(stat -c %g "$folder")"
  fi
done
for link in /workspace/dataset/* /workspace/runs; do
  if [ -L "$link" ] && ! [ -e "$link" ]; then
    note "warning: $link points to $(readlink "$link"), which is outside the mounts. Put its folder into .env, for example:"
    note "  DATASET_DIR=$(dirname "$(readlink "$link")")"
  fi
done
note "profile ${GPU_PROFILE:-cpu}, cards ${CUDA_DEVICES:-none}, /dev/shm $(df -h --output=size /dev/shm | tail -1 | tr -d ' '), user $(id -u):$(id -g)"
if [ -n "${TRAIN_COMMAND:-}" ]; then
  note "TRAIN_COMMAND: $TRAIN_COMMAND (its output: runs/train_command.log)"
  (
    bash -c "$TRAIN_COMMAND" >>"$RUNS/train_command.log" 2>&1
    code=$?
    [ "$code" = 0 ] || tr '\r' '\n' <"$RUNS/train_command.log" | tail -n 15
    note "TRAIN_COMMAND ended with code $code"
  ) &
else
  note "ready: docker compose exec train python train.py"
fi
while true; do
  sleep 1 &
  wait $!
  follow
done
