# Two stages: build the wheel with a compiler, run it without one. No model is inside; it lives in the volume /cache.
# What the server must never lose (traces, keys, adapters) lives in the volume /data.
# Documented in docs/operations.md.

FROM python:3.11-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index /wheels/*.whl \
    && useradd --create-home --uid 10001 sterna \
    && install --directory --owner sterna --group sterna /cache \
    && install --directory --mode 700 --owner sterna --group sterna /data
USER 10001
WORKDIR /home/sterna
ENV STERNA_HOST=0.0.0.0 \
    STERNA_CACHE_DIR=/cache \
    STERNA_DATA_DIR=/data \
    PYTHONUNBUFFERED=1
VOLUME ["/cache", "/data"]
EXPOSE 8000
# 503 while the model loads and while the server drains; Kubernetes should ask /health itself.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# SIGTERM drains; `docker stop --time 40` leaves room for the 30 seconds that running requests may take.
STOPSIGNAL SIGTERM
ENTRYPOINT ["sterna"]
CMD ["serve"]
