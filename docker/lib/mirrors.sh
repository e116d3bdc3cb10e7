# shellcheck shell=bash
# Where packages come from: docker/mirrors.conf, "kind region address" a line, in order.

# mirrors FILE KIND REGION
mirrors() { awk -v kind="$2" -v region="$3" '!/^#/ && $1 == kind && $2 == region {print $3}' "$1"; }

# answers URL: whether an address gives anything but an error within four seconds
answers() {
  if command -v curl >/dev/null; then
    curl -fsL -o /dev/null --connect-timeout 3 --max-time 4 "$1" 2>/dev/null
  elif command -v wget >/dev/null; then
    wget -q -O /dev/null --timeout=4 --tries=1 "$1" 2>/dev/null
  else
    return 0 # Nothing to ask with: pip and apt go down the list themselves.
  fi
}

# probe_page KIND ADDRESS: a small page that a living mirror serves
probe_page() {
  case "$1" in
    pip | torch-cpu) echo "${2%/}/typing-extensions/" ;;
    apt) echo "${2%/}/dists/bookworm/InRelease" ;;
    hub) echo "https://${2%/}/v2/library/python/tags/list" ;;
  esac
}

# alive FILE KIND REGION: the list's addresses that answer, in order
alive() {
  local address page
  mirrors "$1" "$2" "$3" | while IFS= read -r address; do
    page=$(probe_page "$2" "$address")
    # A registry answers 401 to whom has no token: it lives.
    if answers "$page" || { [ "$2" = hub ] && [ "$(curl -s -o /dev/null -w '%{http_code}' --max-time 4 "https://${address%/}/v2/" 2>/dev/null)" = 401 ]; }; then
      printf '%s\n' "$address"
    fi
  done
}

# choose_region MODE FILE: world or cn. auto asks PyTorch's own index, which a build without a card
# needs in any case, and, where that is silent, the mirrors.
choose_region() {
  case "$1" in
    cn) echo cn ;;
    off) echo world ;;
    *)
      if [ -z "$(alive "$2" torch-cpu world)" ] && [ -n "$(alive "$2" pip cn | head -1)" ]; then echo cn; else echo world; fi
      ;;
  esac
}

# proxy_is_loopback URL: a proxy on 127.0.0.1 is, inside a build, the build container itself
# (docker/for-win#14706, #14828)
proxy_is_loopback() { printf '%s' "$1" | grep -Eq '^([a-z0-9]+://)?([^@/]*@)?(localhost|127\.[0-9.]+|\[?::1\]?)([:/]|$)'; }
