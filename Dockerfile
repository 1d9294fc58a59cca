# pdcluster with the engine of one platform: cpu, cuda or ascend. docs/hosts.md, "Images", says how
# a topology uses them.
#
#   docker build --build-arg ENGINE=cpu  -t pdcluster:cpu  .
#   docker build --build-arg ENGINE=cuda -t pdcluster:cuda .
#   docker build --build-arg ENGINE=ascend --build-arg CANN_CHIP=a3 \
#       --build-arg SOC_VERSION=ascend910_9391 -t pdcluster:ascend-a3 .
#   docker run --network host --shm-size 1g -v pdcluster-models:/home/pdcluster/.cache pdcluster:cpu
#
# --build-arg PIP_EXTRA_INDEX_URL=URL: an index with torch's CPU build (CONTRIBUTING.md, "Package
# indexes"); for ascend also those that vLLM-Ascend's installation page names.
# All three have Python 3.12: Ray wants the same minor version on every node of a cluster.
ARG ENGINE=cpu
# Atlas A3: a3, ascend910_9391. Atlas A2: 910b, ascend910b1.
ARG CANN_CHIP=a3
ARG SOC_VERSION=ascend910_9391

FROM python:3.12.12-slim-bookworm AS base-cpu

# CUDA and Ubuntu as in vLLM's own image (docker/versions.json); its kernels are partly compiled
# when they are first used, for which nvcc, gcc and Python's headers must be there.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04 AS base-cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# As vLLM-Ascend 0.23.0's own image; it is compiled here, for the chip that SOC_VERSION names.
FROM quay.io/ascend/cann:9.1.0-${CANN_CHIP}-ubuntu22.04-py3.12 AS base-ascend
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       clang-15 cmake g++ gcc git libhiredis-dev libibverbs-dev libjemalloc2 libnuma-dev numactl \
    && update-alternatives --install /usr/bin/clang clang /usr/bin/clang-15 20 \
    && update-alternatives --install /usr/bin/clang++ clang++ /usr/bin/clang++-15 20 \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM base-${ENGINE}

ARG ENGINE
ARG SOC_VERSION
# vllm: the one that vllm-ascend is made for. The others: what its image takes beside it.
ARG ASCEND_VLLM=0.23.0
ARG ASCEND_MOONCAKE=0.3.11.post1
ARG ASCEND_TRITON=3.2.2
# pip reads them from the environment of RUN. They stay in the image's history: no passwords in them.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# Of the user in the container: the uid of the hosts' ssh user, whose files Ray mounts into it.
ARG USER_ID=1000

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What Mooncake's transfer engine links against, and what Ray calls inside the container.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       libibverbs1 libnuma1 librdmacm1 liburing2 openssh-client rsync \
    && rm -rf /var/lib/apt/lists/*

# Login shells, which Ray's `docker exec` starts, get their PATH from /etc/profile.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:${PATH}
COPY docker/profile.sh /etc/profile.d/pdcluster.sh

WORKDIR /opt/pdcluster
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY docker/install docker/install
RUN docker/install "${ENGINE}" && rm -rf build cluster docker ./*.egg-info
COPY topologies topologies
COPY scripts/serve scripts/serve

# --non-unique: an image may have given the number to a user of its own.
RUN useradd --non-unique --create-home --shell /bin/bash --uid "${USER_ID}" pdcluster \
    && install --directory --owner pdcluster /home/pdcluster/.cache
USER ${USER_ID}
WORKDIR /home/pdcluster
VOLUME /home/pdcluster/.cache

# HOME: Ray reads from here where `~` is in the container. The level: Pythons of the three images
# differ by their last number, which Ray would refuse.
ENV HOME=/home/pdcluster \
    RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor \
    PDCLUSTER_TOPOLOGY=/opt/pdcluster/topologies/local-cpu.yaml \
    PDCLUSTER_HEALTH_URL=http://127.0.0.1:8000/health
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['PDCLUSTER_HEALTH_URL'], timeout=4)"]

# The vendors' images have entry points of their own, which Ray's `docker run IMAGE bash` must not
# meet.
ENTRYPOINT []
CMD ["bash", "--login", "-c", "exec /opt/pdcluster/scripts/serve"]
