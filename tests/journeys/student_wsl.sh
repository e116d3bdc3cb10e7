#!/usr/bin/env bash
# A student in China who uses Windows. Git rewrites line endings, WSL has 8 GB of memory and an RTX
# 4060, and Docker Hub is slow. WSL and the GPU are simulated; the Docker engine is real.
# shellcheck source=tests/journeys/steps.sh
. "$(dirname "$0")/steps.sh"
home=$JOURNEY/train_llm
trap 'tidy_up "$home"; rm -rf "$JOURNEY"' EXIT
export TRAIN_LANG=zh

step "clone with Git for Windows, whose CRLF conversion must not break the scripts"
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=core.autocrlf GIT_CONFIG_VALUE_0=true
fresh_clone "$home"
cd "$home"
if grep -lq $'\r' build.sh docker/entrypoint.sh docker/lib/*.sh; then exit 1; fi

step "read the warnings and the settings, in Chinese"
wsl=$JOURNEY/host
mkdir -p "$wsl/proc" "$wsl/usr/lib/wsl/lib"
echo "Linux version 5.15.167.4-microsoft-standard-WSL2" >"$wsl/proc/version"
echo "MemTotal:        8000000 kB" >"$wsl/proc/meminfo"
cp "$HERE/tests/docker/fakes/nvidia-smi" "$wsl/usr/lib/wsl/lib/"
echo "0|NVIDIA GeForce RTX 4060 Laptop GPU|8188|8.9|572.16|[N/A]|900|3|GPU-0" >"$JOURNEY/cards"
HOST_ROOT=$wsl FAKE_CARDS=$JOURNEY/cards ./build.sh rtx40 --dry-run >"$JOURNEY/output" 2>&1
grep -q "wslconfig" "$JOURNEY/output"
grep -q "配置 .*rtx40" "$JOURNEY/output"
grep -q "^TORCH_VERSION=2.10.0$" "$JOURNEY/output"

step "an invalid argument prints an error in both languages"
expect "unknown argument 'rtx4060'" ./build.sh rtx4060
expect "未知参数 'rtx4060'" ./build.sh rtx4060

step "build (for the CPU, because this Docker host has no GPU) and run the doctor"
./build.sh cpu >"$JOURNEY/build.log" 2>&1 || { tail -20 "$JOURNEY/build.log" && exit 1; }
grep -q "已构建" "$JOURNEY/build.log"
expect "OK ten steps" ./build.sh doctor

step "train and close the terminal: the run continues"
docker compose up -d train
# shellcheck disable=SC2086
setsid docker compose exec -T train $LONG out_dir=runs/wsl </dev/null >/dev/null 2>&1 &
terminal=$!
eventually 120 grep -q "^step 3 " runs/wsl/train.log
kill -KILL "$terminal"
before=$(tail -1 runs/wsl/train.log)
sleep 5
test "$before" != "$(tail -1 runs/wsl/train.log)"

step "Windows restarts for an update: after stop and up, the same command resumes the run"
docker compose stop
docker compose up -d train
# shellcheck disable=SC2086
docker compose exec -T train $LONG out_dir=runs/wsl >/dev/null 2>&1 &
eventually 120 grep -q "^resuming from step" runs/wsl/train.log
docker compose stop
