# shellcheck shell=bash
# The engine and the host: what kind it is, and what of it would stop a user later.

# engine_facts: "state<TAB>version<TAB>system<TAB>security<TAB>runtimes"; state is absent, denied,
# down or ok
engine_facts() {
  local out status=0
  if ! command -v docker >/dev/null; then
    printf 'absent\t\t\t\t\n'
    return
  fi
  out=$(mktemp)
  run_limited 20 "$out" docker info --format 'facts	{{.ServerVersion}}	{{.OperatingSystem}}	{{json .SecurityOptions}}	{{json .Runtimes}}' || status=$?
  if [ "$status" = 0 ] && grep -q '^facts	[^	]' "$out"; then
    grep '^facts' "$out" | tail -1 | sed 's/^facts/ok/'
  elif grep -qi 'permission denied' "$out"; then
    printf 'denied\t\t\t\t\n'
  else
    printf 'down\t\t\t\t\n'
  fi
  rm -f "$out"
}

# engine_address: where docker's commands go
engine_address() {
  if [ -n "${DOCKER_HOST:-}" ]; then
    printf '%s\n' "$DOCKER_HOST"
  else
    docker context inspect --format '{{.Endpoints.docker.Host}}' 2>/dev/null || true
  fi
}

# engine_is_remote: then nvidia-smi here says nothing of the cards there. A socket of the user's own
# (rootless, podman: unix:///run/user/...) is local.
engine_is_remote() { case "$(engine_address)" in tcp://* | ssh://* | http://* | https://*) return 0 ;; *) return 1 ;; esac; }

# engine_is_rootless FACTS, engine_is_desktop FACTS
engine_is_rootless() { case "$1" in *name=rootless*) return 0 ;; *) return 1 ;; esac; }
engine_is_desktop() { case "$1" in *"Docker Desktop"*) return 0 ;; *) return 1 ;; esac; }

# toolkit_present FACTS: the engine finds NVIDIA's hook on its PATH, so a runtime entry is no proof
# of the contrary; Docker Desktop brings its own.
toolkit_present() {
  engine_is_desktop "$1" && return 0
  case "$1" in *'"nvidia"'*) return 0 ;; esac
  local name file
  for name in nvidia-container-runtime-hook nvidia-container-toolkit nvidia-ctk nvidia-cdi-hook; do
    command -v "$name" >/dev/null && return 0
  done
  for file in "${HOST_ROOT:-}"/etc/cdi/*nvidia* "${HOST_ROOT:-}"/var/run/cdi/*nvidia*; do
    [ -e "$file" ] && return 0
  done
  return 1
}

# compose_command ENGINE_VERSION: "docker compose" or "docker-compose"; nothing when neither works.
# Version 1 speaks an API that engines from 25 on answer badly (compose#11742) and 29 not at all.
compose_command() {
  local major=${1%%.*}
  if docker compose version >/dev/null 2>&1; then
    echo "docker compose"
  elif command -v docker-compose >/dev/null; then
    case "$(docker-compose version --short 2>/dev/null)" in
      1.*) if [ "${major:-0}" -ge 25 ]; then return 1; fi ;;
    esac
    echo "docker-compose"
  else
    return 1
  fi
}

# path_hash FOLDER: six characters of a path
path_hash() { printf '%s' "$1" | cksum | awk '{printf "%06x\n", $1 % 16777216}'; }

# project_name FOLDER UID: private to user and folder, since Compose takes the last part of the
# path alone, and two people's folders of one name would be one project (compose#5104)
project_name() {
  local base
  base=$(basename "$1" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9\n' '_' | sed 's/^_*//; s/__*/_/g; s/_*$//')
  echo "${base:-train_llm}_u$2_$(path_hash "$1")"
}

# container_name FOLDER: train_llm, unless another folder's container has that name
container_name() {
  local owner
  owner=$(docker inspect --type container --format '{{index .Config.Labels "com.docker.compose.project.working_dir"}}' train_llm 2>/dev/null) || owner=""
  if [ -z "$owner" ] && ! docker inspect --type container train_llm >/dev/null 2>&1; then owner=$1; fi
  if [ "$owner" = "$1" ]; then echo train_llm; else echo "train_llm_$(path_hash "$1")"; fi
}

# port_is_open PORT: whether something listens on this machine
port_is_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_port FIRST PROJECT: the first port that nobody has, or that this project's TensorBoard has
free_port() {
  local port=$1
  while [ "$port" -lt $(($1 + 50)) ]; do
    if ! port_is_open "$port" || [ -n "$(docker ps -q --filter "label=com.docker.compose.project=$2" --filter "publish=$port" 2>/dev/null)" ]; then
      break
    fi
    port=$((port + 1))
  done
  echo "$port"
}

# host_user ROOTLESS: "uid gid" for the container. In a rootless engine, root inside is the user outside.
host_user() {
  if [ "$1" = yes ]; then
    echo "0 0"
  elif [ "$(id -u)" = 0 ] && [ -n "${SUDO_UID:-}" ] && [ "$SUDO_UID" != 0 ]; then
    echo "$SUDO_UID ${SUDO_GID:-$SUDO_UID}"
  else
    echo "$(id -u) $(id -g)"
  fi
}

# host_warnings FOLDER: what will be slow or short here, with the cure
host_warnings() {
  local mib gb
  mib=$(memory_mib)
  gb=$(disk_gb "$1")
  if is_wsl; then
    case "$1" in
      /mnt/?/* | /mnt/?)
        warn "$1 is a Windows disk, 10 to 50 times slower from WSL. Clone into the Linux home instead: cd ~ && git clone ..." \
          "$1 位于 Windows 磁盘，在 WSL 中慢 10 到 50 倍。请克隆到 Linux 主目录：cd ~ && git clone ..."
        ;;
    esac
    if [ "$mib" -gt 0 ] && [ "$mib" -lt 11500 ]; then
      warn "WSL has $((mib / 1024)) GB of memory; 12 GB or more are better. In %UserProfile%\\.wslconfig: [wsl2] memory=12GB, then: wsl --shutdown" \
        "WSL 只有 $((mib / 1024)) GB 内存，建议至少 12 GB。在 %UserProfile%\\.wslconfig 中写入 [wsl2] memory=12GB，然后运行 wsl --shutdown"
    fi
  fi
  if [ -n "$gb" ] && [ "$gb" -lt 30 ]; then
    warn "$gb GB of disk are free here; the image takes 2 GB on a CPU and about 9 GB with CUDA, a build twice that. To make room: docker builder prune --filter until=24h" \
      "此处只剩 $gb GB 磁盘空间；CPU 镜像约 2 GB，CUDA 镜像约 9 GB，构建时需要两倍。清理：docker builder prune --filter until=24h"
  fi
}
