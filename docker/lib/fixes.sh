# shellcheck shell=bash
# Known failures: the message that a tool prints, and the fix. See also docs/troubleshooting.md.

# print_fixes FILE: print the fix for each known failure in a log
print_fixes() {
  local log=$1
  if grep -Eqi 'failed to resolve source metadata|load metadata for docker.io|registry-1.docker.io.*(timeout|refused|reset|EOF)|toomanyrequests' "$log"; then
    say "Docker Hub is not reachable. Use a mirror: ./build.sh --mirror cn. Or use a local image: set BASE_IMAGE=... in .env" \
      "无法访问 Docker Hub。请使用镜像站：./build.sh --mirror cn，或使用本地已有的镜像：在 .env 中设置 BASE_IMAGE=..."
  fi
  if grep -Eqi 'no space left on device|disk quota exceeded' "$log"; then
    say "The disk is full. See usage: docker system df. Free space: docker builder prune --filter until=24h, and remove your own images with docker image rm" \
      "磁盘空间已满。查看占用：docker system df。清理空间：docker builder prune --filter until=24h，并用 docker image rm 删除你自己的镜像"
  fi
  if grep -Eqi 'buildx component is missing|--mount option requires BuildKit|buildkit is enabled but the buildx' "$log"; then
    say "The Docker buildx plugin is missing. Run: apt-get install docker-buildx-plugin (if Docker came from Docker's own apt repository) or apt-get install docker-buildx (if it came from Debian or Ubuntu)" \
      "缺少 Docker 构建插件。请运行：apt-get install docker-buildx-plugin（Docker 官方软件源），或 docker-buildx（Debian、Ubuntu 软件源）"
  fi
  if grep -Eqi 'CERTIFICATE_VERIFY_FAILED|self.signed certificate|certificate signed by unknown authority' "$log"; then
    say "A proxy uses its own certificate. Copy its CA certificate to docker/certs/NAME.crt and run ./build.sh again" \
      "代理使用了自己的证书。请把代理的 CA 证书复制到 docker/certs/NAME.crt，再重新运行 ./build.sh"
  fi
  if grep -Eqi 'could not select device driver' "$log"; then
    say "The NVIDIA Container Toolkit is missing. Run: apt-get install nvidia-container-toolkit; nvidia-ctk runtime configure --runtime=docker; systemctl restart docker. Until then, use the CPU: ./build.sh cpu" \
      "未安装 NVIDIA Container Toolkit。请依次运行：apt-get install nvidia-container-toolkit；nvidia-ctk runtime configure --runtime=docker；systemctl restart docker。装好之前可以先用 CPU：./build.sh cpu"
  fi
  if grep -Eqi '403 Forbidden|from versions: none|No matching distribution found' "$log"; then
    say "A package mirror refused the request or lacks a package. Use other sources: ./build.sh --mirror off, or set PIP_INDEX_URLS=\"URL URL\" in .env" \
      "镜像站拒绝访问或缺少所需的包。请更换软件源：./build.sh --mirror off，或在 .env 中设置 PIP_INDEX_URLS=\"地址 地址\""
  fi
  if grep -Eqi 'THESE PACKAGES DO NOT MATCH THE HASHES' "$log"; then
    say "A mirror served a damaged or modified file. Run ./build.sh again. If it fails again, run ./build.sh --mirror off" \
      "镜像站返回的文件已损坏或被修改。请重新运行 ./build.sh；如果仍然失败，请运行：./build.sh --mirror off"
  fi
  if grep -Eqi "ContainerConfig|client version 1.[0-9]+ is too old|Minimum supported API version" "$log"; then
    say "docker-compose 1.x is too old for this engine. Use docker compose instead: apt-get install docker-compose-plugin" \
      "docker-compose 1.x 版本过旧，与当前 Docker 引擎不兼容。请改用 docker compose：apt-get install docker-compose-plugin"
  fi
  if grep -Eqi 'port is already allocated|address already in use' "$log"; then
    say "TensorBoard's port is already in use. Run ./build.sh --env-only to choose another one" \
      "TensorBoard 的端口已被占用。请运行 ./build.sh --env-only 换一个端口"
  fi
  if grep -Eqi 'TLS handshake timeout|i/o timeout|Temporary failure (in name resolution|resolving)|Read timed out|ProxyError' "$log"; then
    say "A network connection failed. Finished downloads are kept, so run ./build.sh again. Behind a proxy, first run export HTTPS_PROXY=http://HOST:PORT; HOST must not be 127.0.0.1" \
      "网络出错。已完成的下载会保留，请重新运行 ./build.sh。需要代理时，请先运行：export HTTPS_PROXY=http://主机:端口（主机不能是 127.0.0.1）"
  fi
}
