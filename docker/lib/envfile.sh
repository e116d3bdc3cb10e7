# shellcheck shell=bash
# .env: a block managed by build.sh, then the user's lines, which override the block.

BLOCK_BEGIN='# >>> written by build.sh; do not edit this block; add your own lines below it'
BLOCK_END='# <<< end of the block of build.sh'

# user_lines FILE: print the lines outside the block, without carriage returns
user_lines() {
  [ -f "$1" ] || return 0
  tr -d '\r' <"$1" | awk -v b="${BLOCK_BEGIN%%;*}" -v e="$BLOCK_END" 'index($0, b) == 1 {inside = 1; next} inside {if ($0 == e) inside = 0; next} {print}'
}

# user_value FILE KEY: print a key's unquoted value from the user's lines, or nothing if unset
user_value() { user_lines "$1" | unquoted "$2"; }

# managed_value FILE KEY: print the value of a key in the block
managed_value() {
  [ -f "$1" ] || return 0
  tr -d '\r' <"$1" | awk -v b="${BLOCK_BEGIN%%;*}" -v e="$BLOCK_END" '$0 == e {exit} inside {print} index($0, b) == 1 {inside = 1}' | unquoted "$2"
}

# unquoted KEY <LINES: print the last value of a key, with quotes and any trailing comment stripped
unquoted() {
  sed -n "s/^[[:space:]]*\\(export  *\\)\\{0,1\\}$1=//p" | tail -1 |
    sed -e 's/[[:space:]][[:space:]]*#.*$//' -e 's/[[:space:]]*$//' -e 's/^"\(.*\)"$/\1/' -e "s/^'\\(.*\\)'\$/\\1/"
}

# env_text FILE BLOCK: print the new content of the file
env_text() {
  printf '%s\n%s\n%s\n' "$BLOCK_BEGIN" "$2" "$BLOCK_END"
  user_lines "$1"
}

# write_env FILE BLOCK: replace the block atomically and keep the old file as FILE.bak. If nothing
# changes, write nothing. The file keeps its mode, for it may hold secrets.
write_env() {
  local file=$1 new
  new=$(mktemp "$file.XXXXXX") || return 1
  if [ -f "$file" ]; then cp -p "$file" "$new"; else chmod 644 "$new"; fi || return 1
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
  mv "$new" "$file"
}
