#!/usr/bin/env bash
# The container's main process (started by Docker's init).
#   idle (default)   run TRAIN_COMMAND if it is set; copy every train.log to standard output; on
#                    SIGTERM, let every training run, no matter how it was started, save and exit
#   anything else    execute this command instead
#
# Docker signals only this process and shows only its output. Without this script, `stop` would kill
# a run started with `docker exec`, and `logs` would not show its output (moby#35703, moby#10166).
set -u
STOP_WAIT=${STOP_WAIT:-110} # Seconds; stop_grace_period in docker-compose.yml is ten seconds longer.
RUNS=${RUNS:-/workspace/runs}

[ "${1:-idle}" = idle ] || exec "$@"

note() { printf '[container] %s\n' "$*"; }

# ---- training runs -------------------------------------------------------------------------------

# programs: print the process ids of Python programs, torchrun and data workers. Skip shells,
# because they ignore SIGTERM, and compile workers, because they exit with their parent.
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
    note "stopping: asking $(wc -w <<<"$running") processes to save and exit"
    # Processes of another user (exec -u root) cannot be signaled from here.
    # shellcheck disable=SC2086
    kill -TERM $running 2>/dev/null
    while [ -n "$(programs)" ] && [ "$waited" -lt $((STOP_WAIT * 5)) ]; do
      waited=$((waited + 1))
      sleep 0.2
    done
    follow
    if [ -n "$(programs)" ]; then note "some processes did not exit within $STOP_WAIT s and will be killed"; else note "all processes exited"; fi
  fi
  exit 0
}

# ---- logs ----------------------------------------------------------------------------------------

declare -A stream=() partial=()
first_pass=1

# follow: print the lines added to any train.log since the last call. Hold back a line until it is
# complete. Skip lines written before the container started.
follow() {
  local file line name
  for file in "$RUNS"/train.log "$RUNS"/*/train.log "$RUNS"/*/*/train.log; do
    [ -f "$file" ] || continue
    if [ -n "${stream[$file]:-}" ] && ! [ "$file" -ef "/proc/self/fd/${stream[$file]}" ]; then
      descriptor=${stream[$file]} # The old run was moved aside; this file belongs to a new one.
      exec {descriptor}<&-
      unset "stream[$file]" "partial[$file]"
    fi
    if [ -z "${stream[$file]:-}" ]; then
      { exec {descriptor}<"$file"; } 2>/dev/null || continue
      stream[$file]=$descriptor
      if [ "$first_pass" = 1 ]; then cat <&"$descriptor" >/dev/null; fi
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
  first_pass=0
}

# ---- main ----------------------------------------------------------------------------------------

trap on_stop TERM INT
follow
for folder in "$RUNS" /workspace/.cache; do
  if [ -d "$folder" ] && ! [ -w "$folder" ]; then
    note "error: $folder belongs to user $(stat -c %u:%g "$folder"), but this container runs as user $(id -u):$(id -g) and cannot write to it"
    note "错误：$folder 属于用户 $(stat -c %u:%g "$folder")，而容器以用户 $(id -u):$(id -g) 运行，无法写入"
    note "  fix: run ./build.sh on the host, or add these lines to .env and run: docker compose build && docker compose up -d train"
    note "  HOST_UID=$(stat -c %u "$folder")"
    note "  HOST_GID=$(stat -c %g "$folder")"
  fi
done
for link in /workspace/dataset/* /workspace/runs; do
  if [ -L "$link" ] && ! [ -e "$link" ]; then
    note "warning: $link points to $(readlink "$link"), which is not mounted. Set the folder that contains it in .env, for example:"
    note "  DATASET_DIR=$(dirname "$(readlink "$link")")"
  fi
done
note "profile ${GPU_PROFILE:-cpu}, cards ${CUDA_DEVICES:-none}, /dev/shm $(df -h --output=size /dev/shm | tail -1 | tr -d ' '), user $(id -u):$(id -g)"
if [ -n "${TRAIN_COMMAND:-}" ]; then
  note "TRAIN_COMMAND: $TRAIN_COMMAND (output: runs/train_command.log)"
  (
    bash -c "$TRAIN_COMMAND" >>"$RUNS/train_command.log" 2>&1
    code=$?
    [ "$code" = 0 ] || tr '\r' '\n' <"$RUNS/train_command.log" | tail -n 15
    note "TRAIN_COMMAND exited with code $code"
  ) &
else
  note "ready: docker compose exec train python train.py"
fi
while true; do
  sleep 1 &
  wait $!
  follow
done
