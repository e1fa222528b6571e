"""Logs (structlog), metrics (Prometheus), spans (OpenTelemetry): one line an event, one prefix a process.

Set up first thing in every process. Invariant: a metric's name starts with `headrace_<process>_` and ends in its
unit; logs go to stderr and never hold secrets or whole item lists.
"""

import logging
import sys
from typing import Any

import structlog
from opentelemetry import trace
from prometheus_client import Counter, Gauge, Histogram

from core.settings import TelemetrySettings

# Milliseconds; from a Redis read to a late answer.
LATENCY_BUCKETS_MS = (0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 1000, 3000)


class Logger:
    """`logger.info("what happened", key=value)`."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Unbound until used: it is made at import, before `configure_logging`.
        self._logger: Any = structlog.get_logger(name, part=name)

    @property
    def stdlib(self) -> logging.Logger:
        """For libraries that want one of the standard library."""
        return logging.getLogger(self._name)

    def debug(self, event: str, **values: object) -> None:
        self._logger.debug(event, **values)

    def info(self, event: str, **values: object) -> None:
        self._logger.info(event, **values)

    def warning(self, event: str, **values: object) -> None:
        self._logger.warning(event, **values)

    def error(self, event: str, **values: object) -> None:
        self._logger.error(event, **values)


def get_logger(name: str) -> Logger:
    return Logger(name)


def configure_logging(settings: TelemetrySettings, process: str) -> None:
    """Sends this process's logs, and those of the libraries it uses, to stderr in one format."""
    level = getattr(logging, settings.log_level.upper())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        # Not as a context variable: threads do not inherit those.
        lambda _logger, _method, event: {**event, "process": process},
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        # Plain: rich would draw every local variable, users' data among them, and on the event loop's time.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up at use: whoever runs us may have put another stream in its place, and closed it since.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=renderer))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)


def tracer(process: str) -> trace.Tracer:
    """Spans of a process. Without an OpenTelemetry SDK set up beside us they cost a microsecond and go nowhere."""
    return trace.get_tracer(f"headrace.{process}")


def counter(process: str, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
    return Counter(f"headrace_{process}_{name}", meaning, labels)


def gauge(process: str, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Gauge:
    return Gauge(f"headrace_{process}_{name}", meaning, labels)


def histogram_ms(process: str, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Histogram:
    return Histogram(f"headrace_{process}_{name}", meaning, labels, buckets=LATENCY_BUCKETS_MS)
