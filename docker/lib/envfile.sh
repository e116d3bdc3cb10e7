# shellcheck shell=bash
# .env: a managed block, then the user's own lines, which are later and hence stronger.

BLOCK_BEGIN='# >>> written by build.sh; change nothing here, put your own lines below the end of the block'
BLOCK_END='# <<< end of the block of build.sh'

# own_lines FILE: what the user wrote, without the block and without carriage returns
own_lines() {
  [ -f "$1" ] || return 0
  tr -d '\r' <"$1" | awk -v b="${BLOCK_BEGIN%%;*}" -v e="$BLOCK_END" 'index($0, b) == 1 {inside = 1; next} inside {if ($0 == e) inside = 0; next} {print}'
}

# own_value FILE KEY: what the user's own lines say of a key, unquoted; nothing when they are silent
own_value() { own_lines "$1" | unquoted "$2"; }

# managed_value FILE KEY: what the block says
managed_value() {
  [ -f "$1" ] || return 0
  tr -d '\r' <"$1" | awk -v b="${BLOCK_BEGIN%%;*}" -v e="$BLOCK_END" '$0 == e {exit} inside {print} index($0, b) == 1 {inside = 1}' | unquoted "$2"
}

# unquoted KEY <LINES: the last value of a key, without quotes and note
unquoted() {
  sed -n "s/^[[:space:]]*\\(export  *\\)\\{0,1\\}$1=//p" | tail -1 |
    sed -e 's/[[:space:]][[:space:]]*#.*$//' -e 's/[[:space:]]*$//' -e 's/^"\(.*\)"$/\1/' -e "s/^'\\(.*\\)'\$/\\1/"
}

# env_text FILE BLOCK: the new content
env_text() {
  printf '%s\n%s\n%s\n' "$BLOCK_BEGIN" "$2" "$BLOCK_END"
  own_lines "$1"
}

# write_env FILE BLOCK: replace the block. Nothing is written when nothing changes; else the old
# file stays as FILE.bak, and the new one appears whole.
write_env() {
  local file=$1 new
  new=$(mktemp "$file.XXXXXX") || return 1
  if ! env_text "$file" "$2" >"$new"; then
    rm -f "$new"
    return 1
  fi
  if [ -f "$file" ]; then
    if cmp -s "$file" "$new"; then
      rm -f "$new"
      return 0
    fi
    cp -p "$file" "$file.bak" || return 1
  fi
  chmod 644 "$new" && mv "$new" "$file"
}
