# TokenFlow without a GPU. From the root of the repository:
#
#     docker build -f deploy/images/cpu.Dockerfile -t tokenflow-serve:0.1.0-cpu .
#
# For a build that gives the same image again, name the base by digest: --build-arg
# BASE_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH_VERSION=2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tokenflow/bin:$PATH
RUN python3.11 -m venv /opt/tokenflow
COPY deploy/images/requirements-cpu.txt /build/
# Torch without CUDA has an index of its own; everything else is locked by hash.
RUN pip install --no-deps --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}" \
 && pip install --no-deps --require-hashes -r /build/requirements-cpu.txt
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
# wget and bash are what KubeRay's probes run.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends bash ca-certificates openssl wget \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 tokenflow \
 && useradd --uid 1000 --gid 1000 --create-home tokenflow
COPY --from=build /opt/tokenflow /opt/tokenflow
# A login shell, which KubeRay may use, sets PATH anew: there they are found all the same.
RUN ln -s /opt/tokenflow/bin/ray /opt/tokenflow/bin/serve /opt/tokenflow/bin/tokenflow /usr/local/bin/
ENV PATH=/opt/tokenflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/tokenflow
EXPOSE 8000 9000
CMD ["tokenflow", "serve", "--host", "0.0.0.0"]
