# shellcheck shell=bash disable=SC2154
# ./build.sh doctor: host, engine, cards, image, then docker/doctor.py in the container.

doctor_problems=0
doctor_report=""

# finding OK|NO NAME DETAIL
finding() {
  [ "$1" = OK ] || doctor_problems=$((doctor_problems + 1))
  printf '%s %s: %s\n' "$1" "$2" "$3"
  doctor_report="$doctor_report$1 $2: $(printf '%s' "$3" | anonymous)
"
}

# anonymous <TEXT: without names and paths of this machine
anonymous() {
  sed -e "s|$ROOT|REPOSITORY|g" -e "s|${HOME:-/nonexistent}|HOME|g" -e "s|$(id -un 2>/dev/null || echo nobody-here)|USER|g" \
    -e "s|$(hostname 2>/dev/null || echo no-host-name)|HOST|g" -e 's#/\(home\|Users\|mnt\|data\)/[^ :"]*#PATH#g'
}

run_doctor() {
  local line log kind rest name how
  look_at_engine
  finding OK host "$(uname -sm), $(($(memory_mib) / 1024)) GB of memory, $(disk_gb "$ROOT") GB of disk$(is_wsl && echo ', WSL')"
  case "$engine_state" in
    ok) finding OK engine "Docker $engine_version$([ "$rootless" = yes ] && echo ', rootless')" ;;
    *) finding NO engine "Docker is $engine_state: run ./build.sh, which says the cure" ;;
  esac
  if [ -n "$compose" ]; then finding OK compose "$compose $($compose version --short 2>/dev/null)"; else finding NO compose "none that works with this engine"; fi
  doctor_cards
  if [ ! -f "$ENV_FILE" ]; then
    finding NO .env "not there: run ./build.sh"
  else
    finding OK .env "profile $(managed_value "$ENV_FILE" GPU_PROFILE), torch $(managed_value "$ENV_FILE" TORCH_VERSION)"
  fi
  image=$(wanted TRAIN_LLM_IMAGE "$(managed_value "$ENV_FILE" TRAIN_LLM_IMAGE)")
  if [ "$engine_state" != ok ] || [ -z "$compose" ]; then
    finding NO container "not tried without an engine"
  elif ! docker image inspect "${image:-train_llm}" >/dev/null 2>&1; then
    finding NO container "there is no image yet: run ./build.sh"
  else
    log=$(mktemp)
    # In the container that is up, as trainings are; else in one of its own.
    how="run --rm --no-deps"
    if [ -n "$($compose ps -q train 2>/dev/null)" ] && $compose exec -T train true >/dev/null 2>&1; then how=exec; fi
    # shellcheck disable=SC2086
    if $compose $how -T train python docker/doctor.py >"$log" 2>&1; then
      finding OK container "starts and ends"
    elif grep -q '^NO ' "$log"; then
      finding OK container "starts"
    else
      finding NO container "$(tail -3 "$log" | tr '\n' ' ')"
      cure_of "$log"
    fi
    while IFS= read -r line; do
      kind=${line%% *} rest=${line#* }
      name=${rest%%: *}
      case "$kind" in OK | NO) finding "$kind" "$name" "${rest#*: }" ;; esac
    done <"$log"
    rm -f "$log"
  fi
  say "
to paste into a report (no names, no paths):" "
可粘贴到问题报告中（不含用户名和路径）："
  printf '%s\n%s%s\n' '```' "$doctor_report" '```'
  [ "$doctor_problems" = 0 ] || exit 6
}

doctor_cards() {
  local cards status=0
  if is_mac; then
    finding OK cards "none in containers on a Mac"
    return
  fi
  cards=$(detect_cards) || status=$?
  case "$status" in
    0) finding OK cards "$(printf '%s\n' "$cards" | awk -F'\t' '{printf "%s%s capability %s, %s MiB, driver %s", sep, $2, $4, $3, $5; sep = "; "}')" ;;
    1) finding OK cards "no nvidia-smi: CPU" ;;
    2) finding NO cards "nvidia-smi fails: $(printf '%s' "$cards" | head -1)" ;;
    3) finding NO cards "nvidia-smi hangs" ;;
    4) finding NO cards "the driver sees no card" ;;
  esac
  if [ "$status" = 0 ] && [ "$engine_state" = ok ]; then
    if toolkit_present "$engine"; then
      finding OK toolkit "the engine can pass cards on"
    else
      finding NO toolkit "NVIDIA Container Toolkit is missing: run ./build.sh, which says the cure"
    fi
  fi
}
