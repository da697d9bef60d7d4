# NemoCascade on NVIDIA GPUs: docker build -t nemocascade .
# The base must have nvcc of the CUDA major version that the installed torch has: 13 for torch 2.11 to 2.13.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      build-essential ca-certificates git python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# Architectures in CMake's form: A100, H100 and H200.
ARG CUDA_ARCHS="80-real;90a-real"
ENV NEMOCASCADE_CUDA_ARCHS=${CUDA_ARCHS} \
    NEMOCASCADE_REQUIRE_CUDA=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /opt/nemocascade
COPY . .
RUN make setup GPU=1

ENV PATH=/opt/nemocascade/.venv/bin:${PATH}
WORKDIR /workspace
CMD ["nemocascade", "--help"]
