# shellcheck shell=bash
# Package sources: docker/mirrors.conf, one "type region address" per line, in order of preference.

# mirrors FILE TYPE REGION: print the addresses in order
mirrors() { awk -v type="$2" -v region="$3" '!/^#/ && $1 == type && $2 == region {print $3}' "$1"; }

# answers URL: succeed if the address responds without an error within four seconds
answers() {
  if command -v curl >/dev/null; then
    curl -fsL -o /dev/null --connect-timeout 3 --max-time 4 "$1" 2>/dev/null
  elif command -v wget >/dev/null; then
    wget -q -O /dev/null --timeout=4 --tries=1 "$1" 2>/dev/null
  else
    return 0 # There is no tool to probe with. pip and apt try the list in order anyway.
  fi
}

# probe_page TYPE ADDRESS: print the URL of a small page that a working mirror serves
probe_page() {
  case "$1" in
    pip | torch-cpu) echo "${2%/}/typing-extensions/" ;;
    apt) echo "${2%/}/dists/bookworm/InRelease" ;;
    hub) echo "https://${2%/}/v2/library/python/tags/list" ;;
  esac
}

# reachable FILE TYPE REGION: print the addresses that respond, in order
reachable() {
  local address page
  mirrors "$1" "$2" "$3" | while IFS= read -r address; do
    page=$(probe_page "$2" "$address")
    # A registry that responds 401 (no token) is reachable.
    if answers "$page" || { [ "$2" = hub ] && [ "$(curl -s -o /dev/null -w '%{http_code}' --max-time 4 "https://${address%/}/v2/" 2>/dev/null)" = 401 ]; }; then
      printf '%s\n' "$address"
    fi
  done
}

# choose_region MODE FILE: print world or cn. Mode auto first probes PyTorch's index, which a CPU
# build needs anyway. It probes the mirrors only if that index does not respond.
choose_region() {
  case "$1" in
    cn) echo cn ;;
    off) echo world ;;
    *)
      if [ -z "$(reachable "$2" torch-cpu world)" ] && [ -n "$(reachable "$2" pip cn | head -1)" ]; then echo cn; else echo world; fi
      ;;
  esac
}

# proxy_is_loopback URL: test for a proxy at 127.0.0.1, which is the build container itself during a
# build (docker/for-win#14706, #14828)
proxy_is_loopback() { printf '%s' "$1" | grep -Eq '^([a-z0-9]+://)?([^@/]*@)?(localhost|127\.[0-9.]+|\[?::1\]?)([:/]|$)'; }
