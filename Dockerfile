# syntax=docker/dockerfile:1

# What a worker needs, in a virtual environment that the second stage takes over; build tools stay behind.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tasks tasks
COPY workers workers
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheels .
# By its path: asked for by its name, pip would rather take a newer version from a package index. The linter takes the
# path for a name without a version.
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/venv \
    && set -- /wheels/celery_kafka_delivery-*.whl \
    && pip --python /opt/venv/bin/python install "$1[worker]"

FROM python:3.13-slim
# A log line that waits in a buffer is lost with the process that it is about.
ENV PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH
RUN groupadd --gid 10001 delivery \
    && useradd --uid 10001 --gid delivery --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin delivery
COPY --from=build /opt/venv /opt/venv
# `celery -A` puts this directory on the import path. It is empty and root's: mount here what settings name by a dotted
# path, such as KAFKA_DELIVERY_OAUTH_CB, and flowerconfig.py.
WORKDIR /app
# By number, which is what an orchestrator that refuses root can check.
USER 10001:10001
# SIGTERM: records in flight are finished, the rest goes back to the queue. SIGQUIT would only do the second.
STOPSIGNAL SIGTERM
# Without a shell, which as process 1 would keep SIGTERM to itself. -E: task events, for Flower.
CMD ["celery", "-A", "kafka_delivery_worker", "worker", "-E", "--loglevel=WARNING"]
