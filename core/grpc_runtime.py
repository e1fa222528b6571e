"""gRPC servers and channels, set up one way: health, reflection, errors to status codes, bounded messages.

Used by every process with a port. Invariant: a RecommenderError leaves as its status of `core.errors`, any other
exception as INTERNAL with a log line; a handler never outlives its caller's deadline.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from core.deadline import Deadline
from core.errors import RecommenderError, grpc_status
from core.telemetry import get_logger

_log = get_logger("grpc")

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A port belongs to one process: a second start must fail, not share it.
    ("grpc.so_reuseport", 0),
]
_CHANNEL_OPTIONS = [
    *_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.enable_retries", 0),
]


class _ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = details.method

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await handler.unary_unary(request, context)
            except RecommenderError as error:
                await context.abort(grpc_status(error), str(error))
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:  # noqa: BLE001 - the last line of defence of a server
                _log.error("unexpected error in a handler", method=method, error=repr(error))
                await context.abort(grpc.StatusCode.INTERNAL, f"{method}: unexpected {type(error).__name__}")

        return grpc.unary_unary_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)


class _MethodsToo:
    """The default descriptor pool, which for reflection finds the file of a method as well (clients ask by method)."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            if method not in self._pool.FindServiceByName(service).methods_by_name:
                raise
            return self._pool.FindFileContainingSymbol(service)


class GrpcServer:
    """An aio server with health and reflection. Health says NOT_SERVING until `set_serving`."""

    def __init__(self, host: str, port: int, services: Sequence[str]) -> None:
        self.aio = grpc.aio.server(interceptors=[_ErrorInterceptor()], options=_OPTIONS)
        self._services = [*services, ""]
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.aio)
        named = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        pool: Any = _MethodsToo()
        reflection.enable_server_reflection(named, self.aio, pool)
        self._address = f"{host}:{port}"
        self.port = 0

    async def start(self) -> None:
        await self.set_serving(False)
        try:
            self.port = self.aio.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(98, f"cannot listen on {self._address}") from error
        await self.aio.start()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, status)

    async def stop(self, grace_seconds: float = 5) -> None:
        """Says NOT_SERVING, lets calls under way finish, then closes."""
        await self.set_serving(False)
        await self.aio.stop(grace_seconds)


def channel(target: str) -> grpc.aio.Channel:
    """A channel that comes back by itself, quickly, after its server was away."""
    return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)


def blocking_channel(target: str) -> grpc.Channel:
    """The same for a thread of its own."""
    return grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)


def request_deadline(context: grpc.aio.ServicerContext[Any, Any], default_ms: float) -> Deadline:
    """The caller's deadline, else `default_ms` from now."""
    remaining = context.time_remaining()
    return Deadline.after_ms(default_ms if remaining is None else max(0.0, remaining) * 1000)
