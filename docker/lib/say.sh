# shellcheck shell=bash
# Messages in English or Chinese, as set by TRAIN_LANG or the locale. Errors are in both languages.

# language: print zh or en
language() {
  case "${TRAIN_LANG:-${LC_ALL:-${LC_MESSAGES:-${LANG:-en}}}}" in
    zh* | ZH* | cn | CN) echo zh ;;
    *) echo en ;;
  esac
}

# say ENGLISH CHINESE: print a message to standard output
say() { if [ "$(language)" = zh ]; then printf '%s\n' "$2"; else printf '%s\n' "$1"; fi; }

# warn ENGLISH CHINESE: print a warning to standard error
warn() { printf '! %s\n' "$(say "$1" "$2")" >&2; }

# die CODE ENGLISH CHINESE: print an error in both languages to standard error, then exit with CODE
die() {
  printf 'error: %s\n' "$2" >&2
  printf '错误：%s\n' "$3" >&2
  exit "$1"
}
