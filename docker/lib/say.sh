# shellcheck shell=bash
# Words for people: Chinese or English by TRAIN_LANG, else by the locale; errors show both.

# language: zh or en
language() {
  case "${TRAIN_LANG:-${LC_ALL:-${LC_MESSAGES:-${LANG:-en}}}}" in
    zh* | ZH* | cn | CN) echo zh ;;
    *) echo en ;;
  esac
}

# say ENGLISH CHINESE: one line on standard output
say() { if [ "$(language)" = zh ]; then printf '%s\n' "$2"; else printf '%s\n' "$1"; fi; }

# warn ENGLISH CHINESE: one line on standard error
warn() { printf '! %s\n' "$(say "$1" "$2")" >&2; }

# die CODE ENGLISH CHINESE: both languages on standard error, then exit CODE
die() {
  printf 'error: %s\n' "$2" >&2
  printf '错误：%s\n' "$3" >&2
  exit "$1"
}
