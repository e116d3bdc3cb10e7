# shellcheck shell=bash
# Hardware detection. Host paths start with $HOST_ROOT (empty except in tests).
# A card is one line of tab-separated fields: index, name, MiB, capability, driver, MIG mode, MiB in
# use, utilization in %, UUID. "-" marks a value that nvidia-smi does not report.

# run_limited SECONDS FILE COMMAND...: write a command's output to FILE; return 124 on a timeout.
# `wait` would block on a process stuck in the kernel, so poll it and abandon it after the timeout.
run_limited() {
  local ticks=$(($1 * 10)) file=$2 pid
  shift 2
  "$@" >"$file" 2>&1 </dev/null &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if [ "$ticks" -le 0 ]; then
      kill -9 "$pid" 2>/dev/null
      disown "$pid" 2>/dev/null
      return 124
    fi
    ticks=$((ticks - 1))
    sleep 0.1
  done
  wait "$pid"
}

# smi_path: print the path of nvidia-smi. WSL keeps it off sudo's PATH (docker/for-win#10524).
smi_path() {
  command -v nvidia-smi && return 0
  local wsl="${HOST_ROOT:-}/usr/lib/wsl/lib/nvidia-smi"
  [ -x "$wsl" ] && printf '%s\n' "$wsl"
}

# parse_cards FIELDS <CSV: convert nvidia-smi's "csv,noheader,nounits" output to one card per line.
# GB10 reports its memory as [N/A], because it is unified (unsloth#10283).
parse_cards() {
  awk -F', *' -v fields="$1" '
    BEGIN { OFS = "\t"; n = split(fields, name, ",") }
    { sub(/\r$/, "") }
    NF >= 3 && $1 ~ /^[0-9]+$/ {
      split("", value)
      for (i = 1; i <= n; i++) value[name[i]] = ($i == "" || $i ~ /N\/A|Not Supported|Unknown|Insufficient/) ? "-" : $i
      m = value["memory.total"]; u = value["memory.used"]
      print value["index"], value["name"], m ~ /^[0-9]+$/ ? m : "-", known(value["compute_cap"]), known(value["driver_version"]),
        known(value["mig.mode.current"]), u ~ /^[0-9]+$/ ? u : "-", known(value["utilization.gpu"]), known(value["uuid"])
    }
    function known(v) { return v == "" ? "-" : v }'
}

# detect_cards: print the cards and return 0. Return 1 if nvidia-smi is missing, 2 if it fails (and
# print its output), 3 if it hangs, 4 if it finds no card.
detect_cards() {
  local smi out status fields
  smi=$(smi_path) || return 1
  out=$(mktemp)
  # Drivers before 510 reject the entire query because of compute_cap (candle#733, TensorRT-LLM#735).
  for fields in index,name,memory.total,compute_cap,driver_version,mig.mode.current,memory.used,utilization.gpu,uuid \
    index,name,memory.total,driver_version,memory.used,utilization.gpu,uuid; do
    status=0
    run_limited "${SMI_LIMIT:-10}" "$out" "$smi" "--query-gpu=$fields" --format=csv,noheader,nounits || status=$?
    grep -q 'not a valid field' "$out" || break
  done
  if [ "$status" = 124 ]; then
    rm -f "$out"
    return 3
  fi
  # If there is no card, the exit code depends on the driver version.
  if grep -qi 'no devices were found' "$out"; then
    rm -f "$out"
    return 4
  fi
  if [ "$status" != 0 ]; then
    head -3 "$out"
    rm -f "$out"
    return 2
  fi
  parse_cards "$fields" <"$out" | sort -n
  [ -n "$(parse_cards "$fields" <"$out")" ] || status=4
  rm -f "$out"
  return "$status"
}

# parse_slices CARDS <"nvidia-smi -L": print each MIG slice as a card whose index is its UUID.
# In MIG mode, memory.total is the full card's memory. A slice's is in its name ("3g.40gb").
parse_slices() {
  awk -v cards="$1" '
    BEGIN { OFS = "\t"; n = split(cards, line, "\n"); for (i = 1; i <= n; i++) { split(line[i], f, "\t"); card[f[1]] = line[i] } }
    /^GPU [0-9]+:/ { gsub(":", "", $2); parent = $2 }
    /MIG .*UUID: MIG-/ {
      gb = $0; sub(/gb.*/, "", gb); sub(/.*\./, "", gb)
      id = $0; sub(/.*UUID: /, "", id); sub(/\).*/, "", id)
      slice = $0; sub(/^ */, "", slice); sub(/ +Device.*/, "", slice)
      split(card[parent], f, "\t")
      print id, f[2] " " slice, gb * 1000, f[4], f[5], "-", 0, 0, id
    }'
}

# detect_slices CARDS: print the slices of the cards in MIG mode, if any
detect_slices() {
  local out
  case "$1" in *"	Enabled	"*) ;; *) return 0 ;; esac
  out=$(mktemp)
  run_limited "${SMI_LIMIT:-10}" "$out" "$(smi_path)" -L && parse_slices "$1" <"$out"
  rm -f "$out"
}

# is_wsl, is_mac, has_amd: test for WSL, for a Mac, for an AMD GPU
is_wsl() { grep -qi microsoft "${HOST_ROOT:-}/proc/version" 2>/dev/null; }
is_mac() { [ "${HOST_SYSTEM:-$(uname -s)}" = Darwin ]; }
has_amd() { [ -e "${HOST_ROOT:-}/dev/kfd" ]; }

# memory_mib: print the RAM of this machine in MiB, or 0 if unknown
memory_mib() {
  local kib bytes
  kib=$(awk '/^MemTotal/ {print $2}' "${HOST_ROOT:-}/proc/meminfo" 2>/dev/null)
  if [ -n "$kib" ]; then
    echo $((kib / 1024))
  elif bytes=$(sysctl -n hw.memsize 2>/dev/null); then
    echo $((bytes / 1048576))
  else
    echo 0
  fi
}

# disk_gb FOLDER: print the free space in GB
disk_gb() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 {printf "%d\n", $4 / 1000000}'; }
