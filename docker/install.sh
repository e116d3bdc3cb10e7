#!/bin/sh
# The steps of the image build. Each step tries a list of addresses in order until one succeeds.
#   install.sh apt PACKAGE...    install packages from $APT_MIRRORS, then from the default sources
#   install.sh certificates      add any CA certificates in docker/certs to the image's trust store
#   install.sh torch VERSION LOCK   install pip from LOCK, then torch, first from $TORCH_INDEX_URLS
#   install.sh lock LOCK         install LOCK with hash checking
# pip tries $PIP_INDEX_URLS, then its default index. Progress is printed, so that nothing seems to hang.
set -eu

step() { printf '\n== %s\n' "$*"; }

apt_sources() { ls /etc/apt/sources.list /etc/apt/sources.list.d/*.sources 2>/dev/null; }

install_apt() {
  rm -f /etc/apt/apt.conf.d/docker-clean # It would empty the apt cache that builds share.
  for file in $(apt_sources); do cp "$file" "$file.orig"; done
  for mirror in ${APT_MIRRORS:-} default; do
    for file in $(apt_sources); do
      cp "$file.orig" "$file"
      [ "$mirror" = default ] || sed -i -E "s#https?://(deb|security)\.debian\.org/debian(-security)?#${mirror%/}\2#g" "$file"
    done
    step "Debian packages from $mirror"
    if apt-get -o Acquire::Retries=2 -o Acquire::http::Timeout=30 update &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; then
      for file in $(apt_sources); do mv "$file.orig" "$file"; done
      return 0
    fi
    step "$mirror failed"
  done
  return 1
}

# Rewriting the bundle would lose certificates that the base image added, so do it only if needed.
install_certificates() {
  bundle=/etc/ssl/certs/ca-certificates.crt
  if [ ! -s "$bundle" ]; then install_apt ca-certificates; fi
  if ls /certs/*.crt >/dev/null 2>&1; then cp /certs/*.crt /usr/local/share/ca-certificates/ && update-ca-certificates; fi
}

# answers INDEX: fail if the index does not respond, because pip would spend minutes on retries
answers() {
  python3 - "$1" <<'PYTHON'
import sys, urllib.request
url = sys.argv[1].rstrip("/") + "/typing-extensions/"
try:
    urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "pip"}), timeout=8)
except OSError as error:
    sys.exit(f"{url}: {error}")
PYTHON
}

# pip_from INDEX ARGUMENTS: run pip install with an index; "default" means pip's own
pip_from() {
  index=$1
  shift
  set -- python3 -m pip install --timeout 60 --retries 3 --progress-bar on "$@"
  if python3 -m pip install --help | grep -q resume-retries; then set -- "$@" --resume-retries 20; fi
  if [ "$index" != default ]; then set -- "$@" --index-url "$index"; fi
  "$@"
}

install_pip() {
  indices=$1
  shift
  for index in $indices default; do
    step "$* from $index"
    if [ "$index" != default ] && ! answers "$index"; then continue; fi
    if pip_from "$index" "$@"; then return 0; fi
    step "$index failed"
  done
  return 1
}

action=$1
shift
case "$action" in
  apt) install_apt "$@" ;;
  certificates) install_certificates ;;
  torch)
    # First install a pip that resumes interrupted downloads: torch with CUDA is up to 3 GB.
    install_pip "${PIP_INDEX_URLS:-}" --require-hashes -r "$2"
    install_pip "${TORCH_INDEX_URLS:-} ${PIP_INDEX_URLS:-}" "torch==$1"
    ;;
  lock) install_pip "${PIP_INDEX_URLS:-}" --require-hashes -r "$1" ;;
  *) echo "unknown step $action" >&2 && exit 2 ;;
esac
