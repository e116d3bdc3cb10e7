# shellcheck shell=bash disable=SC2154
# ./build.sh doctor: check the host, Docker and GPUs, then run docker/doctor.py in the container.

doctor_problems=0
doctor_report=""

# finding OK|NO NAME DETAIL: print a result and add it to the report
finding() {
  [ "$1" = OK ] || doctor_problems=$((doctor_problems + 1))
  printf '%s %s: %s\n' "$1" "$2" "$3"
  doctor_report="$doctor_report$1 $2: $(printf '%s' "$3" | anonymize)
"
}

# anonymize <TEXT: remove the secrets, names and paths of this machine
anonymize() {
  without_secrets | sed -e "s|$ROOT|REPOSITORY|g" -e "s|${HOME:-/nonexistent}[^ :\"']*|HOME|g" \
    -e "s#/\(home\|Users\|mnt\|data\|media\|Volumes\|root\)/[^ :\"']*#PATH#g" \
    -e "s|$(id -un 2>/dev/null || echo nobody-here)|USER|g" -e "s|$(hostname 2>/dev/null || echo no-host-name)|HOST|g"
}

# without_secrets <TEXT: mask passwords in addresses, values given to names such as HF_TOKEN, and
# the values that such names have in the environment and in .env
without_secrets() {
  KNOWN="$(user_lines "$ENV_FILE" && env)" awk '
    function secret(name) { return toupper(name) ~ /TOKEN|KEY|PASSW|SECRET|CREDENTIAL|SWANLAB_/ }
    function masked(text, value,    at, out) {
      while ((at = index(text, value)) > 0) { out = out substr(text, 1, at - 1) "MASKED"; text = substr(text, at + length(value)) }
      return out text
    }
    BEGIN {
      for (i = split(ENVIRON["KNOWN"], lines, "\n"); i > 0; i--) {
        name = value = lines[i]; sub(/=.*/, "", name); sub(/^[^=]*=/, "", value)
        gsub(/^["\047]|["\047 ]+$/, "", value)
        if (secret(name) && length(value) > 5) values[value]
      }
    }
    {
      gsub(/:\/\/[^ "\047]*@/, "://MASKED@")
      gsub(/hf_[A-Za-z0-9]+/, "MASKED")
      gsub(/[Bb]earer +[^ "\047]+/, "Bearer MASKED")
      for (value in values) $0 = masked($0, value)
      out = ""
      while (match($0, /[A-Za-z0-9_-]+["\047]?[=:] *["\047]?[^ ,"\047]+/)) {
        pair = substr($0, RSTART, RLENGTH); name = pair; sub(/["\047]?[=:].*/, "", name)
        out = out substr($0, 1, RSTART - 1) (secret(name) ? name "=MASKED" : pair)
        $0 = substr($0, RSTART + RLENGTH)
      }
      print out $0
    }'
}

run_doctor() {
  local line log status rest name subcommand
  inspect_engine
  finding OK host "$(uname -sm), $(($(memory_mib) / 1024)) GB of memory, $(disk_gb "$ROOT") GB of free disk space$(is_wsl && echo ', WSL')"
  case "$engine_state" in
    ok) finding OK engine "Docker $engine_version$([ "$rootless" = yes ] && echo ', rootless')" ;;
    *) finding NO engine "Docker state: $engine_state. Run ./build.sh to see the fix" ;;
  esac
  if [ -n "$compose" ]; then finding OK compose "$compose $($compose version --short 2>/dev/null)"; else finding NO compose "no installed version works with this engine. Run ./build.sh to see the fix"; fi
  doctor_cards
  if [ ! -f "$ENV_FILE" ]; then
    finding NO .env "file not found. Run ./build.sh"
  else
    finding OK .env "profile $(managed_value "$ENV_FILE" GPU_PROFILE), torch $(managed_value "$ENV_FILE" TORCH_VERSION)"
  fi
  image=$(user_setting TRAIN_LLM_IMAGE "$(managed_value "$ENV_FILE" TRAIN_LLM_IMAGE)")
  if [ "$engine_state" != ok ] || [ -z "$compose" ]; then
    finding NO container "skipped: needs a working engine and Compose"
  elif ! docker image inspect "${image:-train_llm}" >/dev/null 2>&1; then
    finding NO container "the image is not built yet. Run ./build.sh"
  else
    log=$(mktemp)
    # Use the running container, as training does; if there is none, start a temporary one.
    subcommand="run --rm --no-deps"
    if [ -n "$($compose ps -q train 2>/dev/null)" ] && $compose exec -T train true >/dev/null 2>&1; then subcommand=exec; fi
    # shellcheck disable=SC2086
    if $compose $subcommand -T train python docker/doctor.py >"$log" 2>&1; then
      finding OK container "starts, and all checks in it pass"
    elif grep -q '^NO ' "$log"; then
      finding OK container "starts"
    else
      finding NO container "$(tail -3 "$log" | tr '\n' ' ')"
      print_fixes "$log"
    fi
    while IFS= read -r line; do
      status=${line%% *} rest=${line#* }
      name=${rest%%: *}
      case "$status" in OK | NO) finding "$status" "$name" "${rest#*: }" ;; esac
    done <"$log"
    rm -f "$log"
  fi
  say "
paste this into your report (it contains no names or paths):" "
报告问题时，请粘贴以下内容（不含用户名和路径）："
  printf '%s\n%s%s\n' '```' "$doctor_report" '```'
  [ "$doctor_problems" = 0 ] || exit 6
}

doctor_cards() {
  local cards status=0
  if is_mac; then
    finding OK cards "containers on a Mac cannot use the GPU; using the CPU"
    return
  fi
  cards=$(detect_cards) || status=$?
  case "$status" in
    0) finding OK cards "$(printf '%s\n' "$cards" | awk -F'\t' '{printf "%s%s capability %s, %s MiB, driver %s", sep, $2, $4, $3, $5; sep = "; "}')" ;;
    1) finding OK cards "nvidia-smi not found; using the CPU" ;;
    2) finding NO cards "nvidia-smi failed: $(printf '%s' "$cards" | head -1)" ;;
    3) finding NO cards "nvidia-smi does not respond" ;;
    4) finding NO cards "the driver found no GPU" ;;
  esac
  if [ "$status" = 0 ] && [ "$engine_state" = ok ]; then
    if toolkit_present "$engine"; then
      finding OK toolkit "containers can use the GPUs"
    else
      finding NO toolkit "the NVIDIA Container Toolkit is missing. Run ./build.sh to see the fix"
    fi
  fi
}
