# A gateway. From the repository's root: docker build -f deploy/images/gateway.Dockerfile -t torchrelay-gateway .
#
# BASE is any image with Python 3.11 or newer and its venv as `python3`. Releases pin it by digest:
# --build-arg BASE=docker.io/library/python:3.13-slim-bookworm@sha256:...
ARG BASE=docker.io/library/python:3.13-slim-bookworm

# Empty, unless the build has no package index: then --build-context wheels=DIR (all that the locks name) takes its place, and
# --build-arg PIP_NO_INDEX=1 keeps pip from asking one.
FROM scratch AS wheels

# hadolint ignore=DL3006
FROM ${BASE} AS builder
ARG PIP_NO_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS=/wheels
WORKDIR /src
COPY requirements-build.lock requirements-gateway.lock ./
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    python3 -m venv /opt/build \
    && python3 -m venv --without-pip /opt/torchrelay \
    && /opt/build/bin/pip install --no-deps --require-hashes --only-binary :all: -r requirements-build.lock \
    && /opt/build/bin/pip --python /opt/torchrelay/bin/python install --no-deps --require-hashes --only-binary :all: \
        -r requirements-gateway.lock
COPY . .
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist ./protos . \
    && /opt/build/bin/pip --python /opt/torchrelay/bin/python install --no-deps --no-index /dist/*.whl

# hadolint ignore=DL3006
FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="torchrelay gateway" \
      org.opencontainers.image.description="Authenticates calls, queues them in Redis or Valkey, streams the answers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/torchrelay/torchrelay" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=builder /opt/torchrelay /opt/torchrelay
# Nothing is written but below /tmp: the root may be read-only.
ENV PATH=/opt/torchrelay/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
# A number, so that Kubernetes can tell that it is not root.
USER 10001:10001
EXPOSE 50051 50053 9464
ENTRYPOINT ["torchrelay"]
CMD ["gateway"]
