# shellcheck shell=bash disable=SC2034,SC2154
# Choose the settings in .env from the detected hardware. The results are global variables.

# user_setting KEY DEFAULT: print the value from the environment or the user's lines, or DEFAULT
user_setting() {
  local value
  eval "value=\${$1:-}"
  [ -n "$value" ] || value=$(user_value "$ENV_FILE" "$1")
  printf '%s\n' "${value:-$2}"
}

# inspect_engine: set engine_state, engine_version, compose, rootless, remote
inspect_engine() {
  engine=$(engine_facts)
  engine_state=$(printf '%s' "$engine" | cut -f1)
  engine_version=$(printf '%s' "$engine" | cut -f2)
  compose=$(compose_command "$engine_version") || compose=""
  rootless=no remote=no
  if engine_is_rootless "$engine"; then rootless=yes; fi
  if engine_is_remote; then remote=yes; fi
}

# inspect_cards: set all_cards and used_cards (one card per line) and cards_state
inspect_cards() {
  local status=0 slices unusable requested count
  all_cards="" used_cards="" cards_state=found cuda_devices=""
  if [ "$remote" = yes ]; then
    cards_state=remote
  elif is_mac; then
    cards_state=mac
  else
    all_cards=$(detect_cards) || status=$?
    case "$status" in
      1) cards_state=absent ;;
      2) cards_state=failing smi_output=$all_cards all_cards="" ;;
      3) cards_state=hanging ;;
      4) cards_state=none all_cards="" ;;
    esac
  fi
  [ "$cards_state" = found ] || return 0

  slices=$(detect_slices "$all_cards")
  if printf '%s' "$all_cards" | cut -f6 | grep -q Enabled; then
    if [ -z "$slices" ]; then
      die 4 "a card is in MIG mode but has no MIG instances. Create one: sudo nvidia-smi mig -cgi 0 -C (or disable MIG: sudo nvidia-smi -mig 0)" \
        "显卡处于 MIG 模式，但没有 MIG 实例。请创建：sudo nvidia-smi mig -cgi 0 -C（或关闭 MIG：sudo nvidia-smi -mig 0）"
    fi
    # A process can use only one MIG slice, so the default is the first one.
    all_cards=$(printf '%s\n%s\n' "$slices" "$all_cards" | awk -F'\t' '$6 != "Enabled" && NF')
  fi
  unusable=$(printf '%s\n' "$all_cards" | without_kernels "$TABLE" | joined)
  busy_list=$(printf '%s\n' "$all_cards" | busy_cards | joined)
  requested=$devices
  [ -n "$requested" ] || requested=$(user_setting CUDA_DEVICES "")
  if [ -n "$requested" ] && ! valid_devices "${requested#free:}"; then
    die 2 "CUDA_DEVICES=$requested: use all, indices such as 0,1, or UUIDs" "CUDA_DEVICES=$requested：请用 all、UUID，或形如 0,1 的编号"
  fi
  case "$requested" in
    "") used_cards=$(printf '%s\n' "$all_cards" | drop_cards "$unusable,$busy_list") ;;
    free:*)
      used_cards=$(printf '%s\n' "$all_cards" | drop_cards "$unusable,$busy_list" | head -n "${requested#free:}")
      count=$(printf '%s' "$used_cards" | grep -c . || true)
      [ "$count" -ge "${requested#free:}" ] ||
        die 4 "only $count of the ${requested#free:} requested cards are idle; in use: ${busy_list:-none}. Request fewer, or wait" "空闲显卡只有 $count 张，不足 ${requested#free:} 张；被占用的显卡：${busy_list:-无}。请减少数量，或等待显卡空闲"
      ;;
    all) used_cards=$all_cards ;;
    *)
      used_cards=$(printf '%s\n' "$all_cards" | select_cards "$requested")
      [ "$(printf '%s\n' "$used_cards" | grep -c .)" = "$(printf '%s\n' "$requested" | tr ',' '\n' | grep -c .)" ] ||
        die 2 "CUDA_DEVICES=$requested: this machine has $(printf '%s\n' "$all_cards" | cut -f1 | joined). Use indices from this list" "CUDA_DEVICES=$requested：本机的显卡编号为 $(printf '%s\n' "$all_cards" | cut -f1 | joined)，请从中选择"
      ;;
  esac
  if [ -z "$requested" ] && [ -z "$used_cards" ]; then
    used_cards=$(printf '%s\n' "$all_cards" | drop_cards "$unusable")
    if [ -n "$used_cards" ]; then
      warn "all cards are in use; using them anyway. To avoid this, wait, or choose a card: --devices 0" "所有显卡都被占用，仍会使用这些显卡。可以等待显卡空闲，或自行指定：--devices 0"
    fi
  elif [ -z "$requested" ] && [ -n "$busy_list" ]; then
    warn "skipped the cards that are in use: $busy_list (--devices all includes them)" "以下显卡正在被他人使用，已跳过：$busy_list（要强制使用，请加 --devices all）"
  fi
  if [ -n "$unusable" ]; then
    warn "card $unusable: PyPI's torch has no kernels for compute capability below 7.0. The oldest supported cards are RTX 20, GTX 16, T4 and V100. Older cards need the CUDA 12.6 wheels from pytorch.org, installed outside Docker" \
      "显卡 $unusable 的计算能力低于 7.0，PyPI 上的 torch 不支持。支持的最旧型号为 RTX 20、GTX 16、T4、V100；更旧的显卡需要在 Docker 之外自行安装 torch（pytorch.org 提供的 CUDA 12.6 版本）"
  fi
  if [ -z "$used_cards" ] || printf '%s\n' "$used_cards" | without_kernels "$TABLE" | grep -q .; then
    [ "$profile" = cpu ] || die 4 "PyPI's torch does not support card(s) ${unusable}: compute capability 7.0 or higher is required. Use the CPU: ./build.sh cpu" \
      "PyPI 上的 torch 不支持显卡 ${unusable}：计算能力至少要达到 7.0。请改用 CPU：./build.sh cpu"
  fi
  if printf '%s' "$used_cards" | cut -f1 | grep -q '^MIG-'; then used_cards=$(printf '%s\n' "$used_cards" | head -1); fi
  cuda_devices=$(printf '%s\n' "$used_cards" | cut -f1 | joined)
  # "all" stays correct when a card is added. A list that the user requested is kept.
  case "$requested:$cuda_devices" in
    *MIG-*) ;;
    :* | all:*) [ "$used_cards" != "$all_cards" ] || cuda_devices=all ;;
  esac
}

# explain_missing_card: print why no card can be used
explain_missing_card() {
  case "$cards_state" in
    absent)
      if has_amd; then
        warn "AMD cards are not supported; training will run on the CPU" "不支持 AMD 显卡，将使用 CPU 训练"
      elif is_wsl; then
        warn "no NVIDIA card was found in WSL. If this computer has one, install NVIDIA's driver in Windows (not in WSL), then run: wsl --shutdown" "WSL 中没有检测到 NVIDIA 显卡。如果这台电脑装有 NVIDIA 显卡，请在 Windows 中安装驱动（不要在 WSL 中安装），再运行：wsl --shutdown"
      fi
      ;;
    mac) warn "containers on a Mac cannot use Metal, so training will run on the CPU. To use Metal, train without Docker: python train.py device=mps" "Mac 上的容器无法使用 Metal，将使用 CPU 训练。要使用 Metal，请不用 Docker，直接训练：python train.py device=mps" ;;
    failing)
      warn "nvidia-smi failed: $(printf '%s' "$smi_output" | head -1)" "nvidia-smi 出错：$(printf '%s' "$smi_output" | head -1)"
      warn "if the driver was upgraded, reboot once or run: sudo rmmod nvidia_uvm nvidia && sudo modprobe nvidia" "如果刚升级过驱动，请重启一次，或执行：sudo rmmod nvidia_uvm nvidia && sudo modprobe nvidia"
      ;;
    hanging) warn "nvidia-smi did not respond within ${SMI_LIMIT:-10} s: a card is probably stuck. Check: sudo dmesg | grep -i xid. A reboot is usually needed" "nvidia-smi 在 ${SMI_LIMIT:-10} 秒内没有响应：显卡可能已卡死。请检查：sudo dmesg | grep -i xid。通常需要重启" ;;
    none) warn "the driver is installed but finds no card. Check: lspci | grep -i nvidia (a virtual machine needs GPU passthrough)" "驱动已安装，但没有检测到显卡。请检查：lspci | grep -i nvidia（虚拟机需要配置显卡直通）" ;;
  esac
}

# choose_settings: set every value in .env and in the printed table
choose_settings() {
  local weakest_card row_capability row_mib user
  on_card=no row="" driver="-" forced=no
  if [ -n "$used_cards" ]; then
    weakest_card=$(printf '%s\n' "$used_cards" | weakest)
    row_capability=${weakest_card% *} row_mib=${weakest_card#* }
    driver=$(printf '%s\n' "$used_cards" | head -1 | cut -f5)
  fi
  if [ "$profile" = auto ]; then
    case "$cards_state" in
      remote) die 4 "Docker runs on another host ($(engine_address)), whose GPUs cannot be detected from here. Specify the profile: ./build.sh rtx40 (or cpu). The repository must be at the same path on that host" \
        "Docker 运行在另一台主机上（$(engine_address)），从本机无法检测那台主机的显卡。请指定显卡配置：./build.sh rtx40（或 cpu）。代码目录在那台主机上的路径必须与本机相同" ;;
      failing | hanging)
        explain_missing_card
        die 4 "the card cannot be used in its current state. Use the CPU: ./build.sh cpu" "显卡目前无法使用。请改用 CPU：./build.sh cpu"
        ;;
      found) on_card=yes ;;
      *) explain_missing_card ;;
    esac
    if [ "$on_card" = yes ] && [ "$engine_state" = ok ] && ! toolkit_present "$engine"; then
      warn "the NVIDIA Container Toolkit is missing, so containers cannot use the card and training will run on the CPU. To fix it, run these commands, then ./build.sh again:
    sudo apt-get install -y nvidia-container-toolkit
    sudo nvidia-ctk runtime configure --runtime=docker
    sudo systemctl restart docker" "未安装 NVIDIA Container Toolkit，容器无法使用显卡，将使用 CPU 训练。请执行以下命令后重新运行 ./build.sh：
    sudo apt-get install -y nvidia-container-toolkit
    sudo nvidia-ctk runtime configure --runtime=docker
    sudo systemctl restart docker"
      on_card=no
    fi
    if [ "$on_card" = yes ]; then
      if [ "$row_capability" = - ] && [ "${driver%%.*}" -ge "$CUDA12_DRIVER" ] 2>/dev/null; then
        die 4 "nvidia-smi does not report the compute capability. Specify the profile: ./build.sh rtx30 (developer.nvidia.com/cuda-gpus)" "nvidia-smi 没有报告计算能力。请指定显卡配置：./build.sh rtx30（参见 developer.nvidia.com/cuda-gpus）"
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
    warn_of_mismatch
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
  shm=$(user_setting SHM_SIZE "")
  if [ -n "$shm" ]; then
    valid_size "$shm" || die 2 "SHM_SIZE=$shm: use a size such as 8gb or 512mb" "SHM_SIZE=$shm：请写成 8gb 或 512mb 这样的形式"
  else
    shm=$(capped_size "$(row_field "$TABLE" "$row" shm)" "$(memory_mib)")
  fi
  user=$(host_user "$rootless")
  host_uid=${user% *} host_gid=${user#* }
  if [ "$host_uid" = 0 ] && [ "$rootless" = no ]; then
    warn "you are root, so the container will also run as root and files in runs/ will belong to root" "当前用户是 root，容器也将以 root 身份运行，runs/ 中的文件将归 root 所有"
  fi
  project=$(user_setting COMPOSE_PROJECT_NAME "$(project_name "$ROOT" "$host_uid")")
  container=$(user_setting TRAIN_LLM_CONTAINER "$(container_name "$ROOT")")
  image=$(user_setting TRAIN_LLM_IMAGE "train_llm:u${host_uid}_$(path_hash "$ROOT")")
  tb_port=$(user_setting TB_PORT "$(free_port 6006 "$project")")
  runs_dir=$(user_setting RUNS_DIR "$ROOT/runs")
  cache_dir=$(user_setting CACHE_DIR "$ROOT/.cache")
  choose_mirrors
}

# choose_torch: set torch and torch_mb from the driver and the cards' compute capabilities
choose_torch() {
  local capabilities minimum
  torch=$TORCH_CPU torch_mb=300
  [ "$on_card" = yes ] || return 0
  torch=$TORCH_CUDA13 torch_mb=3000
  if [ -n "$used_cards" ]; then
    capabilities=$(printf '%s\n' "$used_cards" | cut -f4 | sort -u | tr '\n' ' ')
    # shellcheck disable=SC2086
    if ! torch=$(torch_version "$TABLE" "$driver" $capabilities); then
      minimum=$torch
      die 4 "the NVIDIA driver $driver is too old: torch needs $minimum or newer for this card. Install a newer driver from nvidia.com/drivers (for WSL, in Windows), or use the CPU: ./build.sh cpu" \
        "NVIDIA 驱动 $driver 过旧：torch 要支持这张显卡，驱动版本须为 $minimum 及以上。请从 nvidia.com/drivers 下载安装（WSL 用户请在 Windows 中安装），或改用 CPU：./build.sh cpu"
    fi
  elif [ "$(row_field "$TABLE" "$row" cuda13)" = no ]; then
    torch=$TORCH_CUDA12
  fi
}

# warn_of_mismatch: warn if the requested profile does not match the card
warn_of_mismatch() {
  local detected
  [ -n "$used_cards" ] || return 0
  detected=$(choose_row "$TABLE" "$row_capability" "$row_mib")
  if [ -n "$detected" ] && [ "$detected" != "$row" ]; then
    forced=yes
    warn "$profile was requested, but the card (capability $row_capability, $row_mib MiB) matches $(row_field "$TABLE" "$detected" profile): micro batch $(row_field "$TABLE" "$row" micro_batch_size) instead of $(row_field "$TABLE" "$detected" micro_batch_size), precision $(row_field "$TABLE" "$row" precision) instead of $(row_field "$TABLE" "$detected" precision). Training may run out of memory or fail" \
      "指定的显卡配置是 $profile，但检测到的显卡（计算能力 $row_capability，$row_mib MiB）对应 $(row_field "$TABLE" "$detected" profile)。按指定的配置，micro batch 为 $(row_field "$TABLE" "$row" micro_batch_size)（而非 $(row_field "$TABLE" "$detected" micro_batch_size)），精度为 $(row_field "$TABLE" "$row" precision)（而非 $(row_field "$TABLE" "$detected" precision)）。训练可能会因显存不足等原因失败"
  fi
}

# choose_mirrors: set base_image, pip_indices, torch_indices, apt_mirrors
choose_mirrors() {
  local hub
  region=$(choose_region "$mirror" "$MIRRORS")
  base_image=$(user_setting BASE_IMAGE "")
  pip_indices=$(user_setting PIP_INDEX_URLS "")
  apt_mirrors=$(user_setting APT_MIRRORS "")
  torch_indices=""
  if [ "$region" = cn ]; then
    [ -n "$pip_indices" ] || pip_indices=$(reachable "$MIRRORS" pip cn | tr '\n' ' ' | sed 's/ $//')
    [ -n "$apt_mirrors" ] || apt_mirrors=$(reachable "$MIRRORS" apt cn | tr '\n' ' ' | sed 's/ $//')
    if [ -z "$base_image" ] && ! docker image inspect python:3.11-slim-bookworm >/dev/null 2>&1; then
      hub=$(reachable "$MIRRORS" hub cn | head -1)
      if [ -n "$hub" ]; then base_image=$hub/library/python:3.11-slim-bookworm; fi
    fi
    if [ -z "$pip_indices" ] && [ "$mirror" = cn ]; then
      warn "no mirror in docker/mirrors.conf is reachable; the build will try the official servers" "docker/mirrors.conf 中的镜像站都无法访问，构建时将尝试官方地址"
    fi
  fi
  base_image=${base_image:-python:3.11-slim-bookworm}
  if [ "$on_card" != yes ]; then torch_indices=$(mirrors "$MIRRORS" torch-cpu "$region" | tr '\n' ' ' | sed 's/ $//'); fi
  torch_indices=$(user_setting TORCH_INDEX_URLS "$torch_indices")
}

# env_block: print the lines that build.sh manages in .env
env_block() {
  local files=docker-compose.yml pair
  if [ "$on_card" = yes ]; then
    files=$files:docker-compose.gpu.yml
    # Under WSL, a container sees every card, not only those it requests (nvidia-container-toolkit#21).
    if is_wsl && [ "$cuda_devices" != all ]; then files=$files:docker/compose.wsl.yml; fi
  fi
  cat <<EOF
COMPOSE_FILE=$files
COMPOSE_PATH_SEPARATOR=:
COMPOSE_PROJECT_NAME=$project
# docker-compose 1 waits 60 s by default; creating this container on a slow disk can take longer.
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
  # In the container, auto reads the same table, so pass only values that differ from its choice.
  if [ "$forced" = yes ] || { [ "$on_card" = yes ] && [ -z "$used_cards" ]; }; then
    printf 'TRAIN_LLM_MICRO_BATCH_SIZE=%s\nTRAIN_LLM_PRECISION=%s\nTRAIN_LLM_COMPILE=%s\n' "$micro_batch" "$precision" "$compile"
  fi
}

# write_generated: write the overlay under the fixed name that .devcontainer/devcontainer.json uses
write_generated() {
  mkdir -p docker/generated
  if [ "$on_card" = yes ]; then
    cp docker-compose.gpu.yml docker/generated/compose.hardware.yml
  else
    printf '# There is no card, so nothing is added.\nservices:\n  train:\n    init: true\n' >docker/generated/compose.hardware.yml
  fi
}

# explain: print the chosen settings as a table
explain() {
  local cards=CPU
  if [ "$on_card" = yes ]; then
    cards=$(printf '%s\n' "$used_cards" | awk -F'\t' 'NF {n[$2 " (" $4 ", " $3 " MiB)"]++} END {for (c in n) {printf "%s%d x %s", sep, n[c], c; sep = "; "}}')
    cards=${cards:-"?"}
  fi
  line "cards" "显卡" "$cards${cuda_devices:+, CUDA_DEVICES=$cuda_devices}"
  line "driver" "驱动" "$driver"
  line "profile" "显卡配置" "$profile_chosen"
  line "micro batch" "micro batch" "$micro_batch x 512"
  if [ "$profile_chosen" = cpu ]; then precision=$(say "fp32 or bf16, whichever is faster (measured on the first run)" "fp32 或 bf16，首次运行时实测，取较快者"); fi
  line "precision" "精度" "$precision, compile $compile"
  line "predicted peak" "预计显存峰值" "$peak GB"
  line "/dev/shm" "共享内存" "$shm"
  line "torch" "torch" "$torch"
  line "packages from" "软件源" "$region${pip_indices:+: $pip_indices}"
  line "base image" "基础镜像" "$base_image"
  line "to download" "需下载" "$(say "about $torch_mb MB, plus about 400 MB of Debian and Python packages, unless already cached" "约 $torch_mb MB，另有约 400 MB 的 Debian 和 Python 软件包（已缓存的不再下载）")"
  line "container" "容器" "$container, $image"
  line "TensorBoard" "TensorBoard" "http://localhost:$tb_port"
}
line() {
  local label ascii
  label=$(say "$1" "$2")             # before LC_ALL is set: `say` reads the language from it
  local LC_ALL=C                     # count bytes: a Chinese character is 3 bytes long and 2 columns wide
  ascii=${label//[^ -~]/}
  printf '  %s%*s %s\n' "$label" $((16 - ${#ascii} - (${#label} - ${#ascii}) / 3 * 2)) "" "$3"
}

# warn_if_training: warn that `up` with changed settings recreates the container and stops training
warn_if_training() {
  [ "$engine_state" = ok ] || return 0
  if docker top "$container" -eo args 2>/dev/null | grep -Eq '(^|[ /])(train|sft_train|dpo_train)\.py'; then
    warn "training is running in $container and is not affected for now. If the settings have changed, the next '$compose up -d train' stops it after it saves a checkpoint; to resume, run the same training command again" \
      "$container 中有训练正在进行，目前不受影响。如果设置有变化，下次运行 '$compose up -d train' 会停止这个训练（先保存检查点），之后重新运行同一条训练命令即可继续"
  fi
}

# unset_loopback_proxies, proxy_arguments: skip loopback proxies: inside the build, 127.0.0.1 is the build container itself
unset_loopback_proxies() {
  local name value
  for name in HTTP_PROXY HTTPS_PROXY http_proxy https_proxy ALL_PROXY all_proxy; do
    eval "value=\${$name:-}"
    if [ -n "$value" ] && proxy_is_loopback "$value"; then
      warn "$name=$value is not passed to the build, where this address is the build container itself. Make the proxy listen on the network, then run: export $name=http://HOST_ADDRESS:PORT" \
        "$name=$value 不会传给构建过程，因为在构建容器中，这个地址指向容器自身。请让代理监听局域网地址，然后运行：export $name=http://主机地址:端口"
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
