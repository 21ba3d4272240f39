"""What ``manage.py check`` says about ``settings.KAFKA_DELIVERY``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Warning

from kafka_delivery.errors import SettingsError
from kafka_delivery.settings import ENV_PREFIX, Settings, read

from .configuration import SETTING, variables

LONGEST_REQUEST_S = 30
"""After which gunicorn, by default, ends a worker that is still busy with a request."""

WAITS = 3
"""How often a send waits for `enqueue_timeout_s` at most, when Redis hangs."""

HINT = f'KAFKA_DELIVERY_X is the environment variable, which comes first, or {SETTING}["X"] in Django\'s settings.'


def check_settings(**_: Any) -> list[CheckMessage]:
    """Name each setting that is wrong; if none is, what is dangerous about them together."""
    given = getattr(django_settings, SETTING, {})
    if not isinstance(given, Mapping):
        return [Error(f"{SETTING} must be a dict, not {type(given).__name__}", id="kafka_delivery.E001")]
    environ = variables() | os.environ
    wrong = list(_wrong(environ))
    if wrong:
        return wrong
    try:
        s = Settings.from_env(environ)
    except SettingsError as error:
        return [Error(str(error), hint=HINT, id="kafka_delivery.E003")]
    return [*_slow(s), *_cleared(s)]


def check_deployment(**_: Any) -> list[CheckMessage]:
    """What does for a laptop, and not for more."""
    environ = variables() | os.environ
    try:
        s = Settings.from_env(environ)
    except SettingsError:
        return []  # said by `check_settings`
    return [*_unsaid(environ, s), *_evicted(s)]


def _unsaid(environ: Mapping[str, Any], s: Settings) -> Iterator[CheckMessage]:
    if f"{ENV_PREFIX}REDIS_URL" not in environ:
        yield Warning(
            f"{SETTING} does not say where Redis is: records would be sent to {s.redis_url}",
            hint=f'Set {SETTING}["REDIS_URL"], or the environment variable {ENV_PREFIX}REDIS_URL.',
            id="kafka_delivery.W003",
        )


def _wrong(environ: Mapping[str, Any]) -> Iterator[CheckMessage]:
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX):
            try:
                read(name, value)
            except SettingsError as error:
                yield Error(str(error), hint=HINT, id="kafka_delivery.E002")


def _slow(s: Settings) -> Iterator[CheckMessage]:
    if WAITS * s.enqueue_timeout_s >= LONGEST_REQUEST_S:
        yield Warning(
            f"{ENV_PREFIX}ENQUEUE_TIMEOUT_S={s.enqueue_timeout_s:g}: a request may wait for a Redis that hangs "
            f"{WAITS} times as long, and gunicorn ends its worker after {LONGEST_REQUEST_S} s",
            hint="The default is half a second.",
            id="kafka_delivery.W002",
        )


def _cleared(s: Settings) -> Iterator[CheckMessage]:
    for alias in _caches_beside(s, same_database=True):
        yield Error(
            f'CACHES["{alias}"] is in the same Redis database as the records that wait to be sent: '
            "cache.clear() would delete them",
            hint=f'Give the cache another server, or set {SETTING}["REDIS_URL"] to another one.',
            id="kafka_delivery.E004",
        )


def _evicted(s: Settings) -> Iterator[CheckMessage]:
    for alias in _caches_beside(s, same_database=False):
        yield Warning(
            f'CACHES["{alias}"] is on the same Redis server as the records that wait to be sent',
            hint=(
                "A full cache should evict, and a queue must not: maxmemory-policy is that of the whole server, and "
                "has to be noeviction."
            ),
            id="kafka_delivery.W001",
        )


def _caches_beside(s: Settings, *, same_database: bool) -> Iterator[str]:
    """Aliases of caches on the queue's own server, in its database or in another one."""
    ours = _place(s.redis_url, {})
    for alias, cache in getattr(django_settings, "CACHES", {}).items():
        databases = [theirs[1] for theirs in _locations(cache) if ours and theirs and theirs[0] == ours[0]]
        if databases and ours and (ours[1] in databases) == same_database:
            yield alias


def _locations(cache: Mapping[str, Any]) -> list[tuple[str, int] | None]:
    location = cache.get("LOCATION", "")
    urls = location if isinstance(location, list | tuple) else str(location).replace(";", ",").split(",")
    options = cache.get("OPTIONS") or {}
    return [_place(str(url).strip(), options) for url in urls]


def _place(url: str, options: Mapping[str, Any]) -> tuple[str, int] | None:
    """Server and database of a Redis, as redis-py reads its URL; None if it is none, or not to be understood."""
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        path = parts.path.strip("/")
        if parts.scheme in ("unix", "redis+socket"):
            return parts.path, int(query.get("db", query.get("virtual_host", [options.get("db", 0)]))[0])
        if parts.scheme not in ("redis", "rediss", "valkey", "valkeys"):
            return None
        host = "localhost" if parts.hostname in (None, "127.0.0.1", "::1") else parts.hostname
        return f"{host}:{parts.port or 6379}", int(query["db"][0] if "db" in query else path or options.get("db", 0))
    except (ValueError, TypeError):  # Django says so when it connects
        return None
