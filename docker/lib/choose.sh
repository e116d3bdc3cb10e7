# shellcheck shell=bash
# Choose settings for the cards from configs/hardware.tsv. These are pure functions on text.

# PyPI's torch 2.10.0 is built with CUDA 12.8 (sm_70 to sm_120), 2.13.0 with CUDA 13.0 (sm_75 on).
# CUDA 12.x needs driver 525, CUDA 13.x needs 580 (NVIDIA, "CUDA minor version compatibility").
TORCH_CUDA12=2.10.0
TORCH_CUDA13=2.13.0
TORCH_CPU=2.13.0
CUDA12_DRIVER=525
CUDA13_DRIVER=580

# choose_row TABLE CAPABILITY MIB: print the table row for a card. Unknown memory ("-") counts as 0.
choose_row() {
  awk -F'\t' -v capability="$2" -v mib="$3" '
    function number(v, part) { split(v, part, "."); return part[1] * 100 + part[2] }
    /^#/ { next }
    !seen { seen = 1; next }
    $2 == "-" { next }
    number($2) <= number(capability) && number(capability) <= number($3) && $4 + 0 <= mib + 0 { print; exit }' "$1"
}

# profile_row TABLE PROFILE MIB: print the row for a profile requested by name. If MIB is "-", this
# is its typical row. If the memory is too small for every row, this is its last row.
profile_row() {
  awk -F'\t' -v profile="$2" -v mib="$3" '
    /^#/ { next }
    !seen { seen = 1; for (i = 1; i <= NF; i++) if ($i == "typical") typical = i; next }
    $1 != profile { next }
    { last = $0 }
    found == "" && (mib == "-" ? $typical == "yes" : $4 + 0 <= mib + 0) { found = $0 }
    END { if (found == "") found = last; if (found != "") print found }' "$1"
}

# row_field TABLE ROW COLUMN: print one value of a row, selected by column name
row_field() {
  awk -F'\t' -v row="$2" -v column="$3" '
    /^#/ { next }
    { for (i = 1; i <= NF; i++) if ($i == column) { split(row, f, "\t"); print f[i] } exit }' "$1"
}

# profiles TABLE: print the profile names that a user may request
profiles() { awk -F'\t' '/^#/ {next} !seen {seen = 1; next} $1 != "mps" && !had[$1]++ {print $1}' "$1" | tr '\n' ' '; }

# weakest <CARDS: print "capability MiB", the minimum of each; MiB is "-" if any card's is unknown
weakest() {
  awk -F'\t' '
    function number(v, part) { split(v, part, "."); return part[1] * 100 + part[2] }
    NR == 1 || number($4) < number(capability) { capability = $4 }
    $3 == "-" { unknown = 1 }
    NR == 1 || $3 + 0 < mib + 0 { mib = $3 }
    END { if (NR) print capability, unknown ? "-" : mib }'
}

# busy_cards <CARDS: print the indices of cards in use. A desktop environment may use up to 2 GB.
busy_cards() {
  awk -F'\t' '($7 != "-" && $7 > 2000 && $7 * 10 > $3) || ($8 != "-" && $8 + 0 >= 50 && $7 != "-" && $7 > 500) {print $1}'
}

# without_kernels TABLE <CARDS: print the indices of cards for which PyPI's torch has no kernels
# (Pascal and older). is_available() is True, but the first kernel fails with "no kernel image".
without_kernels() {
  local line capability row
  while IFS= read -r line; do
    capability=$(printf '%s' "$line" | cut -f4)
    [ "$capability" = - ] && continue
    row=$(choose_row "$1" "$capability" 999999)
    if [ -z "$row" ] || [ "$(row_field "$1" "$row" min_driver)" = - ]; then printf '%s\n' "$line" | cut -f1; fi
  done
}

# select_cards LIST <CARDS: keep the cards whose index or UUID is in a comma-separated list
select_cards() { awk -F'\t' -v list="$1" 'BEGIN {n = split(list, a, ","); for (i = 1; i <= n; i++) listed[a[i]] = 1} ($1 in listed) || ($9 in listed)'; }

# drop_cards LIST <CARDS: remove the cards whose index is in the list
drop_cards() { awk -F'\t' -v list="$1" 'BEGIN {n = split(list, a, ","); for (i = 1; i <= n; i++) listed[a[i]] = 1} !($1 in listed)'; }

# joined <LINES: join lines with commas
joined() { tr '\n' ',' | sed 's/,$//'; }

# torch_version TABLE DRIVER CAPABILITY...: print the newest torch that both the driver and the cards
# support. If there is none, print the minimum driver version and return 1.
torch_version() {
  local table=$1 major=${2%%.*} capability row minimum version=$TORCH_CUDA13
  shift 2
  case "$major" in '' | *[!0-9]*) major=0 ;; esac
  for capability in "$@"; do
    row=$(choose_row "$table" "$capability" 999999)
    minimum=$(row_field "$table" "$row" min_driver)
    [ -n "$minimum" ] && [ "$minimum" != - ] || minimum=$CUDA12_DRIVER
    if [ "$major" -lt "$minimum" ]; then
      echo "$minimum"
      return 1
    fi
    [ "$(row_field "$table" "$row" cuda13)" = yes ] || version=$TORCH_CUDA12
  done
  [ "$major" -ge "$CUDA13_DRIVER" ] || version=$TORCH_CUDA12
  echo "$version"
}

# valid_devices TEXT: accept all, or a comma-separated list of indices and GPU- or MIG- UUIDs
valid_devices() { printf '%s' "$1" | grep -Eq '^(all|([0-9]+|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+)(,([0-9]+|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+))*)$'; }

# valid_size TEXT: accept a memory size that both versions of Compose understand
valid_size() { printf '%s' "$1" | grep -Eq '^[1-9][0-9]* *[kKmMgG]([iI]?[bB])?$'; }

# size_mib SIZE: convert a memory size to MiB
size_mib() {
  local number=${1%%[!0-9]*}
  case "$1" in
    *[gG]*) echo $((number * 1024)) ;;
    *[mM]*) echo "$number" ;;
    *) echo $((number / 1024)) ;;
  esac
}

# capped_size SIZE MEMORY_MIB: limit the size of /dev/shm to half of the RAM, because it uses RAM
capped_size() {
  if [ "$2" -gt 0 ] && [ "$(size_mib "$1")" -gt $(($2 / 2)) ]; then echo "$(($2 / 2))mb"; else echo "$1"; fi
}
