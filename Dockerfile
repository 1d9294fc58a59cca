# pdcluster with the engine of one platform.
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=URL -t pdcluster .
#   docker run --network host --shm-size 1g -v pdcluster-models:/home/pdcluster/.cache pdcluster
#
# URL: an index with torch's CPU build; see CONTRIBUTING.md, "Package indexes".
# For accelerators give EXTRA=cuda or EXTRA=ascend, and as BASE the vendor's image with its
# toolkit and Python 3.11 or 3.12 (Debian or Ubuntu).
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

ARG EXTRA=cpu
# pip reads them from the environment of RUN. They stay in the image's history: no passwords in them.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

# What Mooncake's transfer engine links against.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libibverbs1 libnuma1 librdmacm1 liburing2 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pdcluster
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
# The three come as CUDA builds, which break transformers next to the CPU build of torch.
RUN python3 -m pip install --no-cache-dir ".[${EXTRA}]" \
    && if [ "${EXTRA}" = cpu ]; then \
         python3 -m pip uninstall --yes torchvision torchaudio torchcodec; \
       fi
COPY topologies topologies
COPY scripts/serve scripts/serve

RUN useradd --create-home --uid 10001 pdcluster \
    && install --directory --owner pdcluster /home/pdcluster/.cache
USER pdcluster
VOLUME /home/pdcluster/.cache

ENV PDCLUSTER_TOPOLOGY=topologies/local-cpu.yaml \
    PDCLUSTER_HEALTH_URL=http://127.0.0.1:8000/health
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['PDCLUSTER_HEALTH_URL'], timeout=4)"]

CMD ["scripts/serve"]
