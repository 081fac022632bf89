# A worker that computes on CPUs. From the repository's root: docker build -f deploy/images/worker.Dockerfile -t torchrelay-worker .
#
# BASE and wheels as in gateway.Dockerfile. The model is not in the image: it is mounted, or comes from the Hub.
ARG BASE=docker.io/library/python:3.13-slim-bookworm

FROM scratch AS wheels

# hadolint ignore=DL3006
FROM ${BASE} AS builder
ARG PIP_NO_INDEX=""
# As in the Makefile: PyTorch's index of CPU builds is another than the one whose hashes are locked; its exact version must do.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS=/wheels
# Any g++ that the base's distribution has compiles the kernels; they are checked when a worker starts.
# hadolint ignore=DL3008
RUN command -v g++ >/dev/null || { apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*; }
WORKDIR /src
COPY requirements-build.lock requirements-gateway.lock requirements-worker.lock ./
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    python3 -m venv /opt/build \
    && python3 -m venv --without-pip /opt/torchrelay \
    && /opt/build/bin/pip install --no-deps --require-hashes --only-binary :all: -r requirements-build.lock \
    && /opt/build/bin/pip --python /opt/torchrelay/bin/python install --no-deps --require-hashes --only-binary :all: \
        -r requirements-gateway.lock -r requirements-worker.lock \
    && /opt/build/bin/pip --python /opt/torchrelay/bin/python install --no-deps --only-binary :all: \
        --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}" \
    && rm -rf /opt/torchrelay/lib/python3.*/site-packages/torch/include /opt/torchrelay/lib/python3.*/site-packages/torch/test
COPY . .
# Kernels for every CPU of this architecture: which ones run is chosen at start, by what the CPU has.
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist ./protos . \
    && /opt/build/bin/pip --python /opt/torchrelay/bin/python install --no-deps --no-index /dist/*.whl

WORKDIR /
RUN /opt/torchrelay/bin/python -m worker.engine.kernels.build --prebuild

# hadolint ignore=DL3006
FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="torchrelay worker" \
      org.opencontainers.image.description="Serves a transformer model from torchrelay's queue, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/torchrelay/torchrelay" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=builder /opt/torchrelay /opt/torchrelay
# What is written (models of the Hub, digests, verdicts) goes below XDG_CACHE_HOME: a volume, where the root is read-only.
ENV PATH=/opt/torchrelay/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp XDG_CACHE_HOME=/tmp/cache \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 9465
ENTRYPOINT ["torchrelay"]
CMD ["worker"]
