# TokenFlow for NVIDIA GPUs, with flash-attn. From the root of the repository, on any machine with
# time and memory to compile (about 4 GB for each of MAX_JOBS; no GPU is needed):
#
#     docker build -f deploy/images/gpu.Dockerfile -t tokenflow-serve:0.1.0-gpu .
#
# Torch's wheels bring CUDA 13.0's libraries with them; the CUDA image is only for nvcc.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-rockylinux9

# There is no flash-attn wheel for this torch: it is compiled against it.
FROM ${CUDA_IMAGE} AS flash-attn
ARG FLASH_ATTN_VERSION=2.8.3.post2
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    FLASH_ATTENTION_FORCE_BUILD=TRUE \
    FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_CUDA_ARCHS} \
    MAX_JOBS=${MAX_JOBS}
# hadolint ignore=DL3041
RUN dnf install -y python3.11 python3.11-devel python3.11-pip gcc-c++ \
 && dnf clean all \
 && python3.11 -m venv /opt/build
ENV PATH=/opt/build/bin:$PATH
COPY deploy/images/requirements-gpu.txt /build/
RUN pip install --no-deps --require-hashes -r /build/requirements-gpu.txt \
 && pip install --no-cache-dir ninja==1.13.0 wheel==0.45.1 \
 && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels "flash-attn==${FLASH_ATTN_VERSION}"

FROM ${BASE_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tokenflow/bin:$PATH
RUN python3.11 -m venv /opt/tokenflow
COPY deploy/images/requirements-gpu.txt /build/
RUN pip install --no-deps --require-hashes -r /build/requirements-gpu.txt
COPY --from=flash-attn /wheels /build/wheels
RUN pip install --no-deps einops==0.8.1 /build/wheels/*.whl
COPY pyproject.toml README.md LICENSE /build/src/
COPY cluster /build/src/cluster
COPY kvstore /build/src/kvstore
COPY loadgen /build/src/loadgen
COPY replicas /build/src/replicas
RUN pip install --no-deps --no-build-isolation /build/src

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="tokenflow-serve" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# wget and bash are what KubeRay's probes run; Triton compiles its launchers with gcc.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends bash ca-certificates gcc libc6-dev openssl wget \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 tokenflow \
 && useradd --uid 1000 --gid 1000 --create-home tokenflow
COPY --from=build /opt/tokenflow /opt/tokenflow
# A login shell, which KubeRay may use, sets PATH anew: there they are found all the same.
RUN ln -s /opt/tokenflow/bin/ray /opt/tokenflow/bin/serve /opt/tokenflow/bin/tokenflow /usr/local/bin/
ENV PATH=/opt/tokenflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/tokenflow
EXPOSE 8000 9000
CMD ["tokenflow", "serve", "--host", "0.0.0.0"]
