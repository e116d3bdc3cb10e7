# The image that ./build.sh builds. It does not contain the code: the repository is mounted at
# /workspace, so code changes need no rebuild. This file uses only Dockerfile 1.2 features and no
# syntax line, which would require another download from Docker Hub.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
WORKDIR /workspace

# Install C and C++ compilers for torch.compile, and procps for ps and watch. Put the CA
# certificate of a corporate proxy in docker/certs/NAME.crt.
ARG APT_MIRRORS=
RUN --mount=type=bind,source=docker/certs,target=/certs \
    --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    --mount=type=bind,source=docker/install.sh,target=/install.sh \
    sh /install.sh apt g++ gcc git libc6-dev procps && sh /install.sh certificates

# torch has its own layer, so that changing other requirements does not download it again.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URLS=
ARG PIP_INDEX_URLS=
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=docker/install.sh,target=/install.sh \
    --mount=type=bind,source=docker/pip.lock,target=/pip.lock \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_ROOT_USER_ACTION=ignore \
    sh /install.sh torch "${TORCH_VERSION}" /pip.lock

RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=docker/install.sh,target=/install.sh \
    --mount=type=bind,source=docker/requirements.lock,target=/requirements.lock \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_ROOT_USER_ACTION=ignore \
    sh /install.sh lock /requirements.lock

# Create a user with the host user's ids, so that files in runs/ belong to the host user. The home
# directory is world-writable, so other ids work too.
ARG HOST_UID=1000
ARG HOST_GID=1000
RUN --mount=type=bind,source=docker/entrypoint.sh,target=/entrypoint.sh \
    install -m 755 /entrypoint.sh /usr/local/bin/entrypoint \
    && if [ "${HOST_UID}" != 0 ]; then \
      { getent group "${HOST_GID}" >/dev/null || groupadd --gid "${HOST_GID}" train; } \
      && { getent passwd "${HOST_UID}" >/dev/null \
        || useradd --no-log-init --uid "${HOST_UID}" --gid "${HOST_GID}" --home-dir /home/train --shell /bin/bash train; }; \
    fi \
    && mkdir -p /home/train/.cache && chmod 0777 /home/train /home/train/.cache /workspace
# Without these, torch cannot look up the user name: KeyError "uid not found" (pytorch#140765).
ENV HOME=/home/train USER=train LOGNAME=train \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TORCHINDUCTOR_CACHE_DIR=/home/train/.cache/inductor TRITON_CACHE_DIR=/home/train/.cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL devcontainer.metadata='[{"customizations":{"vscode":{"extensions":["ms-python.python"]}}}]'
USER ${HOST_UID}:${HOST_GID}
ENTRYPOINT ["/usr/local/bin/entrypoint"]
CMD ["idle"]
