# shellcheck shell=bash
# Facts about the Docker engine and the host, and warnings about known problems.

# engine_facts: print "state<TAB>version<TAB>system<TAB>security<TAB>runtimes"; state is absent,
# denied, down or ok
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

# engine_address: print the address of the engine that docker commands use
engine_address() {
  if [ -n "${DOCKER_HOST:-}" ]; then
    printf '%s\n' "$DOCKER_HOST"
  else
    docker context inspect --format '{{.Endpoints.docker.Host}}' 2>/dev/null || true
  fi
}

# engine_is_remote: test for an engine on another host, whose GPUs the local nvidia-smi cannot see.
# A per-user socket (rootless, podman: unix:///run/user/...) is local.
engine_is_remote() { case "$(engine_address)" in tcp://* | ssh://* | http://* | https://*) return 0 ;; *) return 1 ;; esac; }

# engine_is_rootless FACTS, engine_is_desktop FACTS: test the type of engine
engine_is_rootless() { case "$1" in *name=rootless*) return 0 ;; *) return 1 ;; esac; }
engine_is_desktop() { case "$1" in *"Docker Desktop"*) return 0 ;; *) return 1 ;; esac; }

# toolkit_present FACTS: test for the NVIDIA Container Toolkit. The engine may find NVIDIA's hook on
# its PATH without listing a runtime; Docker Desktop includes the toolkit.
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

# compose_command ENGINE_VERSION: print "docker compose" or "docker-compose"; fail if neither works.
# Compose v1 fails with Docker Engine 25 and later (compose#11742). Engine 29 rejects its API.
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

# path_hash FOLDER: print six hexadecimal digits derived from the path
path_hash() { printf '%s' "$1" | cksum | awk '{printf "%06x\n", $1 % 16777216}'; }

# project_name FOLDER UID: print a name unique to the user and folder. Compose's default is the last
# part of the path, so two users' folders with the same name would share a project (compose#5104).
project_name() {
  local base
  base=$(basename "$1" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9\n' '_' | sed 's/^_*//; s/__*/_/g; s/_*$//')
  echo "${base:-train_llm}_u$2_$(path_hash "$1")"
}

# container_name FOLDER: print train_llm, or a unique name if another folder's container uses it
container_name() {
  local owner
  owner=$(docker inspect --type container --format '{{index .Config.Labels "com.docker.compose.project.working_dir"}}' train_llm 2>/dev/null) || owner=""
  if [ -z "$owner" ] && ! docker inspect --type container train_llm >/dev/null 2>&1; then owner=$1; fi
  if [ "$owner" = "$1" ]; then echo train_llm; else echo "train_llm_$(path_hash "$1")"; fi
}

# port_is_open PORT: succeed if a process on this machine listens on the port
port_is_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_port FIRST PROJECT: print the first port that is free or used by this project's TensorBoard
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

# host_user ROOTLESS: print "uid gid" for the container. A rootless engine maps root to the user.
host_user() {
  if [ "$1" = yes ]; then
    echo "0 0"
  elif [ "$(id -u)" = 0 ] && [ -n "${SUDO_UID:-}" ] && [ "$SUDO_UID" != 0 ]; then
    echo "$SUDO_UID ${SUDO_GID:-$SUDO_UID}"
  else
    echo "$(id -u) $(id -g)"
  fi
}

# host_warnings FOLDER: warn about a slow disk, low memory or low disk space, and print the fix
host_warnings() {
  local mib gb
  mib=$(memory_mib)
  gb=$(disk_gb "$1")
  if is_wsl; then
    case "$1" in
      /mnt/?/* | /mnt/?)
        warn "$1 is on a Windows disk, which is 10 to 50 times slower from WSL. Clone into your Linux home directory instead: cd ~ && git clone ..." \
          "$1 位于 Windows 磁盘，在 WSL 中访问要慢 10 到 50 倍。请改为克隆到 Linux 主目录：cd ~ && git clone ..."
        ;;
    esac
    if [ "$mib" -gt 0 ] && [ "$mib" -lt 11500 ]; then
      warn "WSL has $((mib / 1024)) GB of memory; at least 12 GB is recommended. Set [wsl2] memory=12GB in %UserProfile%\\.wslconfig, then run: wsl --shutdown" \
        "WSL 只有 $((mib / 1024)) GB 内存，建议至少 12 GB。在 %UserProfile%\\.wslconfig 中设置 [wsl2] memory=12GB，然后运行：wsl --shutdown"
    fi
  fi
  if [ -n "$gb" ] && [ "$gb" -lt 30 ]; then
    warn "only $gb GB of disk space is free here. The image takes 2 GB for a CPU or about 9 GB with CUDA; building it needs twice that. Free space: docker builder prune --filter until=24h" \
      "当前磁盘只剩 $gb GB 可用空间。CPU 镜像约 2 GB，CUDA 镜像约 9 GB，构建时需要两倍的空间。清理空间：docker builder prune --filter until=24h"
  fi
}
