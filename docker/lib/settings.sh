# shellcheck shell=bash disable=SC2034,SC2154
# The choice itself: from what was found to the lines of .env. Results are the script's variables.

# wanted KEY DEFAULT: a setting by hand, in the environment or in .env's own lines, else DEFAULT
wanted() {
  local value
  eval "value=\${$1:-}"
  [ -n "$value" ] || value=$(own_value "$ENV_FILE" "$1")
  printf '%s\n' "${value:-$2}"
}

# look_at_engine: engine_state, engine_version, compose, rootless, remote
look_at_engine() {
  engine=$(engine_facts)
  engine_state=$(printf '%s' "$engine" | cut -f1)
  engine_version=$(printf '%s' "$engine" | cut -f2)
  compose=$(compose_command "$engine_version") || compose=""
  rootless=no remote=no
  if engine_is_rootless "$engine"; then rootless=yes; fi
  if engine_is_remote; then remote=yes; fi
}

# look_at_cards: all_cards and used_cards, one a line; cards_state says what became of the search
look_at_cards() {
  local status=0 slices left_out unusable busy wanted_devices taken
  all_cards="" used_cards="" busy="" cards_state=found reason_en="" reason_zh="" cuda_devices=""
  if [ "$remote" = yes ]; then
    cards_state=remote
  elif is_mac; then
    cards_state=mac
  else
    all_cards=$(detect_cards) || status=$?
    case "$status" in
      1) cards_state=absent ;;
      2) cards_state=failing smi_words=$all_cards all_cards="" ;;
      3) cards_state=hanging ;;
      4) cards_state=none all_cards="" ;;
    esac
  fi
  [ "$cards_state" = found ] || return 0

  slices=$(detect_slices "$all_cards")
  if printf '%s' "$all_cards" | cut -f6 | grep -q Enabled; then
    if [ -z "$slices" ]; then
      die 4 "a card is in MIG mode and has no slice. Make one: sudo nvidia-smi mig -cgi 0 -C (or switch MIG off: sudo nvidia-smi -mig 0)" \
        "显卡处于 MIG 模式但没有实例。请创建：sudo nvidia-smi mig -cgi 0 -C（或关闭 MIG：sudo nvidia-smi -mig 0）"
    fi
    # CUDA shows a program one slice at most, so the default is the first.
    all_cards=$(printf '%s\n%s\n' "$slices" "$all_cards" | awk -F'\t' '$6 != "Enabled" && NF')
  fi
  unusable=$(printf '%s\n' "$all_cards" | without_kernels "$TABLE" | joined)
  busy_list=$(printf '%s\n' "$all_cards" | busy_cards | joined)
  wanted_devices=$devices
  [ -n "$wanted_devices" ] || wanted_devices=$(wanted CUDA_DEVICES "")
  if [ -n "$wanted_devices" ] && ! valid_devices "${wanted_devices#free:}"; then
    die 2 "CUDA_DEVICES=$wanted_devices: give all, numbers like 0,1, or UUIDs" "CUDA_DEVICES=$wanted_devices：请用 all、0,1 这样的编号或 UUID"
  fi
  case "$wanted_devices" in
    "") used_cards=$(printf '%s\n' "$all_cards" | drop_cards "$unusable,$busy_list") ;;
    free:*)
      used_cards=$(printf '%s\n' "$all_cards" | drop_cards "$unusable,$busy_list" | head -n "${wanted_devices#free:}")
      taken=$(printf '%s' "$used_cards" | grep -c . || true)
      [ "$taken" -ge "${wanted_devices#free:}" ] ||
        die 4 "only $taken of the ${wanted_devices#free:} cards asked for are idle; in use: ${busy_list:-none}" "空闲显卡只有 $taken 张，不足 ${wanted_devices#free:} 张；被占用：${busy_list:-无}"
      ;;
    all) used_cards=$all_cards ;;
    *)
      used_cards=$(printf '%s\n' "$all_cards" | select_cards "$wanted_devices")
      [ "$(printf '%s\n' "$used_cards" | grep -c .)" = "$(printf '%s\n' "$wanted_devices" | tr ',' '\n' | grep -c .)" ] ||
        die 2 "CUDA_DEVICES=$wanted_devices: this machine has $(printf '%s\n' "$all_cards" | cut -f1 | joined)" "CUDA_DEVICES=$wanted_devices：本机只有 $(printf '%s\n' "$all_cards" | cut -f1 | joined)"
      ;;
  esac
  if [ -z "$wanted_devices" ] && [ -z "$used_cards" ]; then
    used_cards=$(printf '%s\n' "$all_cards" | drop_cards "$unusable")
    if [ -n "$used_cards" ]; then
      warn "every card is in use by somebody; taking them all the same. Wait, or choose: --devices 0" "所有显卡都被占用，仍将使用它们。可以等待，或自行选择：--devices 0"
    fi
  elif [ -z "$wanted_devices" ] && [ -n "$busy_list" ]; then
    warn "left out, since others use them: card $busy_list (--devices all takes them too)" "以下显卡正被他人使用，已跳过：$busy_list（--devices all 可强制使用）"
  fi
  if [ -n "$unusable" ]; then
    warn "card $unusable: compute capability below 7.0 has no kernels in PyPI's torch. The least are RTX 20, GTX 16, T4, V100; such a card needs a torch of its own (the CUDA 12.6 wheels of pytorch.org), outside Docker" \
      "显卡 $unusable：计算能力低于 7.0，PyPI 的 torch 不含其内核。最低要求 RTX 20、GTX 16、T4、V100；此类显卡需在 Docker 之外自行安装 torch（pytorch.org 的 CUDA 12.6 版本）"
  fi
  if [ -z "$used_cards" ] || printf '%s\n' "$used_cards" | without_kernels "$TABLE" | grep -q .; then
    [ "$profile" = cpu ] || die 4 "no torch of PyPI runs the card(s) ${unusable}: at least compute capability 7.0 is needed. On the CPU: ./build.sh cpu" \
      "没有可用于显卡 ${unusable} 的 torch：至少需要计算能力 7.0。使用 CPU：./build.sh cpu"
  fi
  if printf '%s' "$used_cards" | cut -f1 | grep -q '^MIG-'; then used_cards=$(printf '%s\n' "$used_cards" | head -1); fi
  cuda_devices=$(printf '%s\n' "$used_cards" | cut -f1 | joined)
  # "all" outlives a card that is added; a list that was asked for stays as it is.
  case "$wanted_devices:$cuda_devices" in
    *MIG-*) ;;
    :* | all:*) [ "$used_cards" != "$all_cards" ] || cuda_devices=all ;;
  esac
}

# without_card: why there is none, said once
without_card() {
  case "$cards_state" in
    absent)
      if has_amd; then
        warn "AMD cards are not covered; training runs on the CPU" "不支持 AMD 显卡，将使用 CPU 训练"
      elif is_wsl; then
        warn "WSL shows no NVIDIA card. With one: install NVIDIA's driver in Windows (none in WSL), then: wsl --shutdown" "WSL 中没有 NVIDIA 显卡。若有显卡，请在 Windows 中安装驱动（不要在 WSL 中安装），再运行 wsl --shutdown"
      fi
      ;;
    mac) warn "containers on a Mac see no Metal device, so training runs on the CPU. Without Docker it can use Metal: python train.py device=mps" "Mac 的容器无法使用 Metal，将使用 CPU 训练。不用 Docker 时可使用 Metal：python train.py device=mps" ;;
    failing)
      warn "nvidia-smi fails: $(printf '%s' "$smi_words" | head -1)" "nvidia-smi 出错：$(printf '%s' "$smi_words" | head -1)"
      warn "after a driver upgrade reboot once, or: sudo rmmod nvidia_uvm nvidia && sudo modprobe nvidia" "升级驱动后请重启一次，或执行：sudo rmmod nvidia_uvm nvidia && sudo modprobe nvidia"
      ;;
    hanging) warn "nvidia-smi does not answer within ${SMI_LIMIT:-10} s: a card is stuck. See: sudo dmesg | grep -i xid; usually a reboot is needed" "nvidia-smi 在 ${SMI_LIMIT:-10} 秒内没有响应：显卡可能已挂起。查看：sudo dmesg | grep -i xid；通常需要重启" ;;
    none) warn "the driver is there and sees no card (lspci | grep -i nvidia; in a virtual machine the card must be passed through)" "驱动存在但没有检测到显卡（lspci | grep -i nvidia；虚拟机需要显卡直通）" ;;
  esac
}

# choose_settings: everything that the block of .env and the table show
choose_settings() {
  local weakest_card row_capability row_mib user least status=0
  on_card=no row="" driver="-" note_en="" forced=no
  if [ -n "$used_cards" ]; then
    weakest_card=$(printf '%s\n' "$used_cards" | weakest)
    row_capability=${weakest_card% *} row_mib=${weakest_card#* }
    driver=$(printf '%s\n' "$used_cards" | head -1 | cut -f5)
  fi
  if [ "$profile" = auto ]; then
    case "$cards_state" in
      remote) die 4 "Docker's commands go to another host ($(engine_address)), whose cards cannot be seen from here. Name its profile: ./build.sh rtx40 (or cpu); the repository must lie there under the same path" \
        "Docker 命令发往另一台主机（$(engine_address)），无法检测其显卡。请指定配置：./build.sh rtx40（或 cpu）；代码目录需在该主机的相同路径下" ;;
      failing | hanging)
        without_card
        die 4 "the card cannot be used as it is. On the CPU: ./build.sh cpu" "显卡目前无法使用。使用 CPU：./build.sh cpu"
        ;;
      found) on_card=yes ;;
      *) without_card ;;
    esac
    if [ "$on_card" = yes ] && [ "$engine_state" = ok ] && ! toolkit_present "$engine"; then
      warn "the engine has no NVIDIA Container Toolkit, so containers see no card, and training will run on the CPU. The cure, then ./build.sh again:
    sudo apt-get install -y nvidia-container-toolkit
    sudo nvidia-ctk runtime configure --runtime=docker
    sudo systemctl restart docker" "Docker 缺少 NVIDIA Container Toolkit，容器无法使用显卡，将使用 CPU 训练。请执行以下命令后重新运行 ./build.sh：
    sudo apt-get install -y nvidia-container-toolkit
    sudo nvidia-ctk runtime configure --runtime=docker
    sudo systemctl restart docker"
      on_card=no
    fi
    if [ "$on_card" = yes ]; then
      if [ "$row_capability" = - ] && [ "${driver%%.*}" -ge "$CUDA12_DRIVER" ] 2>/dev/null; then
        die 4 "nvidia-smi does not tell the compute capability. Name the profile: ./build.sh rtx30 (developer.nvidia.com/cuda-gpus)" "nvidia-smi 没有给出计算能力。请指定配置：./build.sh rtx30（见 developer.nvidia.com/cuda-gpus）"
      fi
      [ "$row_capability" = - ] || row=$(choose_row "$TABLE" "$row_capability" "$row_mib")
    else
      row=$(profile_row "$TABLE" cpu -)
    fi
  elif [ "$profile" = cpu ]; then
    row=$(profile_row "$TABLE" cpu -)
  else
    on_card=yes
    row=$(profile_row "$TABLE" "$profile" "${row_mib:--}")
    warn_of_contradiction
  fi
  choose_torch
  [ "$on_card" = yes ] || cuda_devices=""
  [ "$on_card" != yes ] || cuda_devices=${cuda_devices:-${devices:-all}}
  profile_chosen=$(row_field "$TABLE" "$row" profile)
  precision=$(row_field "$TABLE" "$row" precision)
  micro_batch=$(row_field "$TABLE" "$row" micro_batch_size)
  compile=$(row_field "$TABLE" "$row" compile)
  peak=$(row_field "$TABLE" "$row" peak_gb)
  nccl=$(row_field "$TABLE" "$row" nccl)
  shm=$(wanted SHM_SIZE "")
  if [ -n "$shm" ]; then
    valid_size "$shm" || die 2 "SHM_SIZE=$shm: give a size like 8gb or 512mb" "SHM_SIZE=$shm：请用 8gb 或 512mb 这样的大小"
  else
    shm=$(capped_size "$(row_field "$TABLE" "$row" shm)" "$(memory_mib)")
  fi
  user=$(host_user "$rootless")
  host_uid=${user% *} host_gid=${user#* }
  if [ "$host_uid" = 0 ] && [ "$rootless" = no ]; then
    warn "you are root, so the container will be root too, and files in runs/ will belong to root" "当前用户是 root，容器也将以 root 运行，runs/ 中的文件属于 root"
  fi
  project=$(wanted COMPOSE_PROJECT_NAME "$(project_name "$ROOT" "$host_uid")")
  container=$(wanted TRAIN_LLM_CONTAINER "$(container_name "$ROOT")")
  image=$(wanted TRAIN_LLM_IMAGE "train_llm:u${host_uid}_$(path_hash "$ROOT")")
  tb_port=$(wanted TB_PORT "$(free_port 6006 "$project")")
  runs_dir=$(wanted RUNS_DIR "$ROOT/runs")
  cache_dir=$(wanted CACHE_DIR "$ROOT/.cache")
  choose_mirrors
}

# choose_torch: torch and torch_mb, by driver and capability together
choose_torch() {
  local capabilities least
  torch=$TORCH_CPU torch_mb=300
  [ "$on_card" = yes ] || return 0
  torch=$TORCH_CUDA13 torch_mb=3000
  if [ -n "$used_cards" ]; then
    capabilities=$(printf '%s\n' "$used_cards" | cut -f4 | sort -u | tr '\n' ' ')
    # shellcheck disable=SC2086
    if ! torch=$(torch_version "$TABLE" "$driver" $capabilities); then
      least=$torch
      die 4 "the NVIDIA driver $driver is too old: torch needs $least or newer for this card. Install it from nvidia.com/drivers (on WSL: in Windows), or train on the CPU: ./build.sh cpu" \
        "NVIDIA 驱动 $driver 过旧：该显卡的 torch 需要 $least 或更新版本。请从 nvidia.com/drivers 安装（WSL 请在 Windows 中安装），或使用 CPU：./build.sh cpu"
    fi
  elif [ "$(row_field "$TABLE" "$row" cuda13)" = no ]; then
    torch=$TORCH_CUDA12
  fi
}

# warn_of_contradiction: a profile by name that is not what the card asks for
warn_of_contradiction() {
  local own
  [ -n "$used_cards" ] || return 0
  own=$(choose_row "$TABLE" "$row_capability" "$row_mib")
  if [ -n "$own" ] && [ "$own" != "$row" ]; then
    forced=yes
    warn "$profile was asked for, but the card (capability $row_capability, $row_mib MiB) is $(row_field "$TABLE" "$own" profile): micro batch $(row_field "$TABLE" "$row" micro_batch_size) instead of $(row_field "$TABLE" "$own" micro_batch_size), precision $(row_field "$TABLE" "$row" precision) instead of $(row_field "$TABLE" "$own" precision). It may run out of memory, or fail" \
      "指定了 $profile，但显卡（计算能力 $row_capability，$row_mib MiB）属于 $(row_field "$TABLE" "$own" profile)：micro batch $(row_field "$TABLE" "$row" micro_batch_size) 而非 $(row_field "$TABLE" "$own" micro_batch_size)，精度 $(row_field "$TABLE" "$row" precision) 而非 $(row_field "$TABLE" "$own" precision)。可能显存不足或运行失败"
  fi
}

# choose_mirrors: base_image, pip_indices, torch_indices, apt_mirrors
choose_mirrors() {
  local hub
  region=$(choose_region "$mirror" "$MIRRORS")
  base_image=$(wanted BASE_IMAGE "")
  pip_indices=$(wanted PIP_INDEX_URLS "")
  apt_mirrors=$(wanted APT_MIRRORS "")
  torch_indices=""
  if [ "$region" = cn ]; then
    [ -n "$pip_indices" ] || pip_indices=$(alive "$MIRRORS" pip cn | tr '\n' ' ' | sed 's/ $//')
    [ -n "$apt_mirrors" ] || apt_mirrors=$(alive "$MIRRORS" apt cn | tr '\n' ' ' | sed 's/ $//')
    if [ -z "$base_image" ] && ! docker image inspect python:3.11-slim-bookworm >/dev/null 2>&1; then
      hub=$(alive "$MIRRORS" hub cn | head -1)
      if [ -n "$hub" ]; then base_image=$hub/library/python:3.11-slim-bookworm; fi
    fi
    if [ -z "$pip_indices" ] && [ "$mirror" = cn ]; then
      warn "no mirror of docker/mirrors.conf answers; the build will try the official addresses" "docker/mirrors.conf 中的镜像站均无响应，将尝试官方地址"
    fi
  fi
  base_image=${base_image:-python:3.11-slim-bookworm}
  if [ "$on_card" != yes ]; then torch_indices=$(mirrors "$MIRRORS" torch-cpu "$region" | tr '\n' ' ' | sed 's/ $//'); fi
  torch_indices=$(wanted TORCH_INDEX_URLS "$torch_indices")
}

# env_block: what build.sh manages in .env
env_block() {
  local files=docker-compose.yml pair
  if [ "$on_card" = yes ]; then
    files=$files:docker-compose.gpu.yml
    # WSL shows a container every card, whatever was asked for (nvidia-container-toolkit#21).
    if is_wsl && [ "$cuda_devices" != all ]; then files=$files:docker/compose.wsl.yml; fi
  fi
  cat <<EOF
COMPOSE_FILE=$files
COMPOSE_PATH_SEPARATOR=:
COMPOSE_PROJECT_NAME=$project
# Of docker-compose 1: on a slow disk a container of this size takes more than its 60 s.
COMPOSE_HTTP_TIMEOUT=600
TRAIN_LLM_CONTAINER=$container
TRAIN_LLM_IMAGE=$image
GPU_PROFILE=$profile_chosen
SHM_SIZE=$shm
HOST_UID=$host_uid
HOST_GID=$host_gid
TB_PORT=$tb_port
TORCH_VERSION=$torch
BASE_IMAGE=$base_image
PIP_INDEX_URLS=$pip_indices
TORCH_INDEX_URLS=$torch_indices
APT_MIRRORS=$apt_mirrors
EOF
  [ -z "$cuda_devices" ] || echo "CUDA_DEVICES=$cuda_devices"
  if [ "$on_card" = yes ] && [ "$nccl" != - ]; then
    for pair in $nccl; do echo "$pair"; done
  fi
  # Inside, auto reads the same table; only a profile that the card would not get is told.
  if [ "$forced" = yes ] || { [ "$on_card" = yes ] && [ -z "$used_cards" ]; }; then
    printf 'TRAIN_LLM_MICRO_BATCH_SIZE=%s\nTRAIN_LLM_PRECISION=%s\nTRAIN_LLM_COMPILE=%s\n' "$micro_batch" "$precision" "$compile"
  fi
}

# write_generated: the overlay under the one name that .devcontainer/devcontainer.json knows
write_generated() {
  mkdir -p docker/generated
  if [ "$on_card" = yes ]; then
    cp docker-compose.gpu.yml docker/generated/compose.hardware.yml
  else
    printf '# No card: nothing to add.\nservices:\n  train:\n    init: true\n' >docker/generated/compose.hardware.yml
  fi
}

# explain: the choice in one table
explain() {
  local what=CPU
  if [ "$on_card" = yes ]; then
    what=$(printf '%s\n' "$used_cards" | awk -F'\t' 'NF {n[$2 " (" $4 ", " $3 " MiB)"]++} END {for (c in n) {printf "%s%d x %s", sep, n[c], c; sep = "; "}}')
    what=${what:-"?"}
  fi
  line "cards" "显卡" "$what${cuda_devices:+, CUDA_DEVICES=$cuda_devices}"
  line "driver" "驱动" "$driver"
  line "profile" "配置" "$profile_chosen"
  line "micro batch" "微批大小" "$micro_batch x 512"
  if [ "$profile_chosen" = cpu ]; then precision=$(say "fp32 or bf16, whichever the first run finds faster" "fp32 或 bf16，首次运行时测量"); fi
  line "precision" "精度" "$precision, compile $compile"
  line "predicted peak" "预计显存峰值" "$peak GB"
  line "/dev/shm" "共享内存" "$shm"
  line "torch" "torch" "$torch"
  line "packages from" "软件包来源" "$region${pip_indices:+: $pip_indices}"
  line "base image" "基础镜像" "$base_image"
  line "to download" "需下载" "$(say "about $torch_mb MB, and 400 MB of Debian and Python packages, if not there" "约 $torch_mb MB，另有约 400 MB 系统与 Python 包（已有则跳过）")"
  line "container" "容器" "$container, $image"
  line "TensorBoard" "TensorBoard" "http://localhost:$tb_port"
}
line() { printf '  %-16s %s\n' "$(say "$1" "$2")" "$3"; }

# warn_of_running: `up` with another environment makes the container anew, and ends what runs in it
warn_of_running() {
  [ "$engine_state" = ok ] || return 0
  if docker top "$container" -eo args 2>/dev/null | grep -Eq '(^|[ /])(train|sft_train|dpo_train)\.py'; then
    warn "a training runs in $container. It goes on; the next '$compose up -d train' with changed settings stops it (it saves first), and the same command goes on with it" \
      "$container 中有训练正在进行，不受影响；若设置已改变，下次 '$compose up -d train' 会停止它（先保存），之后用同一命令继续"
  fi
}

# proxy_arguments, unset_loopback_proxies: a proxy on 127.0.0.1 would be the build container itself
unset_loopback_proxies() {
  local name value
  for name in HTTP_PROXY HTTPS_PROXY http_proxy https_proxy ALL_PROXY all_proxy; do
    eval "value=\${$name:-}"
    if [ -n "$value" ] && proxy_is_loopback "$value"; then
      warn "$name=$value is not passed into the build: there it would be the build itself. A proxy that listens on the network's address works: export $name=http://HOST_ADDRESS:PORT" \
        "$name=$value 不会传入构建：在构建容器中它指向容器自身。请让代理监听局域网地址：export $name=http://主机地址:端口"
      unset "$name"
    fi
  done
}
proxy_arguments() {
  local name value
  for name in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy; do
    eval "value=\${$name:-}"
    if [ -n "$value" ] && ! proxy_is_loopback "$value"; then printf -- '--build-arg %s ' "$name"; fi
  done
}
