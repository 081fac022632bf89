# A worker for NVIDIA GPUs. From the repository's root: docker build -f deploy/images/worker-cuda.Dockerfile -t torchrelay-worker-cuda .
#
# BASE and wheels as in gateway.Dockerfile. CUDA's libraries come with torch; the node has the driver and NVIDIA's container toolkit.
ARG BASE=docker.io/library/python:3.13-slim-bookworm

FROM scratch AS wheels

# hadolint ignore=DL3006
FROM ${BASE} AS builder
ARG PIP_NO_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS=/wheels
WORKDIR /src
COPY requirements-build.lock requirements-gateway.lock requirements-worker.lock requirements-cuda.lock requirements-worker-cuda.lock ./
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    python3 -m venv /opt/build \
    && python3 -m venv --without-pip /opt/torchrelay \
    && /opt/build/bin/pip install --no-deps --require-hashes --only-binary :all: -r requirements-build.lock \
    && /opt/build/bin/pip --python /opt/torchrelay/bin/python install --no-deps --require-hashes --only-binary :all: \
        -r requirements-gateway.lock -r requirements-worker.lock -r requirements-cuda.lock -r requirements-worker-cuda.lock
COPY . .
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist ./protos . \
    && /opt/build/bin/pip --python /opt/torchrelay/bin/python install --no-deps --no-index /dist/*.whl

# hadolint ignore=DL3006
FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="torchrelay worker for CUDA" \
      org.opencontainers.image.description="Serves a transformer model from torchrelay's queue, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/torchrelay/torchrelay" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Triton compiles the launcher of each kernel with a C compiler where it runs.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/torchrelay /opt/torchrelay
# What is written (models of the Hub, compiled kernels, verdicts) goes below XDG_CACHE_HOME.
ENV PATH=/opt/torchrelay/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp XDG_CACHE_HOME=/tmp/cache TRITON_CACHE_DIR=/tmp/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 9465
ENTRYPOINT ["torchrelay"]
CMD ["worker"]
