#!/bin/sh
# Steps of the image's build, each down an ordered list of addresses until one serves it to the end.
#   install.sh apt PACKAGE...    from $APT_MIRRORS, then the image's own sources
#   install.sh certificates      those of docker/certs, if any, beside those that the image has
#   install.sh torch VERSION LOCK   pip by the lock; torch from $TORCH_INDEX_URLS, then $PIP_INDEX_URLS, then pip's default
#   install.sh lock LOCK         every package by digest, from $PIP_INDEX_URLS, then pip's default
# Progress is printed, since a download of minutes that says nothing looks like one that hangs.
set -eu

step() { printf '\n== %s\n' "$*"; }

apt_sources() { ls /etc/apt/sources.list /etc/apt/sources.list.d/*.sources 2>/dev/null; }

install_apt() {
  rm -f /etc/apt/apt.conf.d/docker-clean # It would empty the cache that the build keeps.
  for file in $(apt_sources); do cp "$file" "$file.own"; done
  for mirror in ${APT_MIRRORS:-} own; do
    for file in $(apt_sources); do
      cp "$file.own" "$file"
      [ "$mirror" = own ] || sed -i -E "s#https?://(deb|security)\.debian\.org/debian(-security)?#${mirror%/}\2#g" "$file"
    done
    step "Debian packages from $mirror"
    if apt-get -o Acquire::Retries=2 -o Acquire::http::Timeout=30 update &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; then
      for file in $(apt_sources); do mv "$file.own" "$file"; done
      return 0
    fi
    step "$mirror did not serve it"
  done
  return 1
}

# Rewriting the bundle would lose what a base image has put into it by hand: only when there is cause.
install_certificates() {
  bundle=/etc/ssl/certs/ca-certificates.crt
  if [ ! -s "$bundle" ]; then install_apt ca-certificates; fi
  if ls /certs/*.crt >/dev/null 2>&1; then cp /certs/*.crt /usr/local/share/ca-certificates/ && update-ca-certificates; fi
}

# An index that does not answer would cost pip minutes of retries.
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

# pip_from INDEX ARGUMENTS: pip's own default for INDEX "default"
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
    step "$index did not serve it"
  done
  return 1
}

what=$1
shift
case "$what" in
  apt) install_apt "$@" ;;
  certificates) install_certificates ;;
  torch)
    # First a pip that resumes broken downloads: torch with CUDA is up to 3 GB.
    install_pip "${PIP_INDEX_URLS:-}" --require-hashes -r "$2"
    install_pip "${TORCH_INDEX_URLS:-} ${PIP_INDEX_URLS:-}" "torch==$1"
    ;;
  lock) install_pip "${PIP_INDEX_URLS:-}" --require-hashes -r "$1" ;;
  *) echo "unknown step $what" >&2 && exit 2 ;;
esac
