#!/usr/bin/env bash
# Detect the hardware, choose settings, write .env and build the image. Needs bash 3.2 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
ROOT=$(pwd -P)
LIB=$ROOT/docker/lib
TABLE=$ROOT/configs/hardware.tsv
MIRRORS=$ROOT/docker/mirrors.conf
ENV_FILE=${ENV_FILE:-$ROOT/.env}
# shellcheck source=docker/lib/say.sh
. "$LIB/say.sh"
# shellcheck source=docker/lib/detect.sh
. "$LIB/detect.sh"
# shellcheck source=docker/lib/choose.sh
. "$LIB/choose.sh"
# shellcheck source=docker/lib/envfile.sh
. "$LIB/envfile.sh"
# shellcheck source=docker/lib/mirrors.sh
. "$LIB/mirrors.sh"
# shellcheck source=docker/lib/host.sh
. "$LIB/host.sh"
# shellcheck source=docker/lib/fixes.sh
. "$LIB/fixes.sh"
# shellcheck source=docker/lib/settings.sh
. "$LIB/settings.sh"
# shellcheck source=docker/lib/doctor.sh
. "$LIB/doctor.sh"

usage() {
  say "usage: ./build.sh [auto|$(profiles "$TABLE" | sed 's/ *$//; s/ /|/g')] [options]
       ./build.sh doctor     check everything, from the GPU to ten training steps
  --devices all|0,1|free:N   GPUs to use; default: all that are idle
  --mirror auto|cn|off       package sources; auto checks which are reachable
  --env-only                 only write .env
  --no-build                 run the checks and write .env, but do not build
  --dry-run                  show the settings and the new .env without writing anything
exit codes: 0 success, 2 invalid option or setting, 3 Docker problem, 4 GPU, driver or toolkit problem, 5 build failed, 6 doctor found a problem
language: TRAIN_LANG=en|zh" \
    "用法：./build.sh [auto|$(profiles "$TABLE" | sed 's/ *$//; s/ /|/g')] [选项]
      ./build.sh doctor      从显卡到试训练十步，逐项检查
  --devices all|0,1|free:N   要使用的显卡；默认使用所有未被他人占用的显卡
  --mirror auto|cn|off       软件源；auto 自动探测
  --env-only                 只生成 .env
  --no-build                 执行检查并生成 .env，但不构建镜像
  --dry-run                  只显示所选设置和 .env 的新内容，不写入任何文件
退出码：0 成功，2 选项或设置错误，3 Docker 问题，4 显卡、驱动或 NVIDIA 工具包问题，5 构建失败，6 doctor 发现问题
语言：TRAIN_LANG=en|zh"
}

parse_arguments() {
  profile=auto devices="" mirror=auto env_only=no dry_run=no build=yes doctor=no
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --devices | --mirror)
        [ $# -ge 2 ] || die 2 "$1 requires a value" "$1 需要指定取值"
        if [ "$1" = --devices ]; then devices=$2; else mirror=$2; fi
        shift
        ;;
      --devices=*) devices=${1#*=} ;;
      --mirror=*) mirror=${1#*=} ;;
      --env-only) env_only=yes build=no ;;
      --no-build) build=no ;;
      --dry-run) dry_run=yes build=no ;;
      doctor) doctor=yes ;;
      auto) profile=auto ;;
      *)
        case " $(profiles "$TABLE")" in
          *" $1 "*) profile=$1 ;;
          *) die 2 "unknown argument '$1'. Run ./build.sh --help. Profiles: auto $(profiles "$TABLE")" "未知参数 '$1'。请查看 ./build.sh --help。可用的显卡配置：auto $(profiles "$TABLE")" ;;
        esac
        ;;
    esac
    shift
  done
  case "$mirror" in auto | cn | off) ;; *) die 2 "--mirror $mirror: use auto, cn or off" "--mirror $mirror：请用 auto、cn 或 off" ;; esac
  case "$devices" in
    "") ;;
    free:*[!0-9]* | free: | free:0) die 2 "--devices $devices: use free:N, where N is at least 1" "--devices $devices：请用 free:N，其中 N 是大于 0 的显卡数量" ;;
    free:*) ;;
    *) valid_devices "$devices" || die 2 "--devices $devices: use all, indices such as 0,1, UUIDs, or free:N" "--devices $devices：请用 all、UUID、free:N，或形如 0,1 的编号" ;;
  esac
}

check_engine() {
  local problem_code=3
  case "$engine_state" in
    absent) die $problem_code "Docker is not installed. Install it: docs.docker.com/engine/install (on Windows and Mac, use Docker Desktop)" "没有安装 Docker。安装方法见 docs.docker.com/engine/install（Windows、Mac 请使用 Docker Desktop）" ;;
    denied) die $problem_code "no permission to use Docker. Run this once: sudo usermod -aG docker \$USER; then log out and back in" "没有使用 Docker 的权限。请执行一次：sudo usermod -aG docker \$USER，然后注销并重新登录" ;;
    down) die $problem_code "the Docker engine does not respond. Start it: sudo systemctl start docker (on Windows and Mac, open Docker Desktop)" "Docker 引擎没有响应。请先启动：sudo systemctl start docker（Windows、Mac 请打开 Docker Desktop）" ;;
  esac
  [ -n "$compose" ] || die $problem_code "no installed Docker Compose works with Docker Engine $engine_version. Run: apt-get install docker-compose-plugin (docker-compose 1.x works only up to Engine 24)" \
    "没有找到与 Docker 引擎 $engine_version 兼容的 Docker Compose。请运行：apt-get install docker-compose-plugin（docker-compose 1.x 最高只支持到引擎 24）"
}

prepare_folders() {
  # Docker would create missing folders as root.
  local folder
  for folder in runs_dir cache_dir; do
    mkdir -p "${!folder}" || die 2 "cannot create ${!folder}. Check its permissions" "无法创建 ${!folder}，请检查权限"
  done
}

build_image() {
  local log=$ROOT/.cache/docker-build.log started=$SECONDS status=0 flags=""
  if [ "$compose" = "docker compose" ]; then flags=--progress=plain; fi
  say "building $image; log: $log" "正在构建 $image；日志：$log"
  export DOCKER_BUILDKIT=1 COMPOSE_DOCKER_CLI_BUILD=1 BUILDKIT_PROGRESS=plain
  # Pass proxies by name: Docker predefines these build arguments.
  proxies=$(proxy_arguments)
  # shellcheck disable=SC2086
  (unset_loopback_proxies && $compose build $proxies $flags train) 2>&1 | tee "$log" || status=$?
  if [ "$status" != 0 ]; then
    echo >&2
    print_fixes "$log" >&2
    die 5 "the build failed; log: $log" "构建失败；日志：$log"
  fi
  say "built $image in $((SECONDS - started)) s" "已构建 $image，用时 $((SECONDS - started)) 秒"
}

next_steps() {
  local ssh_hint=""
  [ -z "${SSH_CONNECTION:-}" ] || ssh_hint=" (from your own computer: ssh -L $tb_port:localhost:$tb_port THIS_HOST)"
  say "
next steps:
  $compose up -d train
  $compose exec train python -m tools.prepare_data   (downloads the sample; skip it if dataset/ has your own data)
  $compose exec train python train.py
  $compose logs -f train
  TensorBoard: http://localhost:$tb_port$ssh_hint
  container: $container" "
下一步：
  $compose up -d train
  $compose exec train python -m tools.prepare_data   （下载样例数据；dataset/ 里已有自己的数据时可跳过）
  $compose exec train python train.py
  $compose logs -f train
  TensorBoard：http://localhost:$tb_port$ssh_hint
  容器名：$container"
}

main() {
  parse_arguments "$@"
  if [ "$doctor" = yes ]; then
    run_doctor
    return
  fi
  inspect_engine
  [ "$env_only$dry_run" != nono ] || check_engine
  inspect_cards
  choose_settings
  explain
  host_warnings "$ROOT"
  if [ "$dry_run" = yes ]; then
    say "
the new .env would be:" "
新的 .env 内容："
    env_text "$ENV_FILE" "$(env_block)"
    return
  fi
  prepare_folders
  write_generated
  write_env "$ENV_FILE" "$(env_block)" || die 2 "cannot write $ENV_FILE. Check its permissions" "无法写入 $ENV_FILE，请检查权限"
  warn_if_training
  [ "$build" = yes ] && build_image
  [ "$env_only" = yes ] || next_steps
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
