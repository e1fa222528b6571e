"""gRPC servers and channels, set up one way: health, reflection, errors to status codes, bounded messages.

Used by every process with a port. Invariant: a RecommenderError leaves as its status of `core.errors`, any other
exception as INTERNAL with a log line; a handler never outlives its caller's deadline.
"""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.deadline import Deadline
from core.errors import RecommenderError, grpc_status
from core.telemetry import get_logger

_log = get_logger("grpc")

# A call holds a thread as long as it lasts (made when first needed); one method may hold half of them, and streams,
# which last, a few.
_THREADS = 256
_CALLS_OF_A_METHOD, _STREAMS_OF_A_METHOD = _THREADS // 2, 16
# More than that are refused before anything is read of them.
_CALLS_MAX = 1024
# What gRPC's threaded server says where the caller sent none is some hundred million years.
_NO_DEADLINE_SECONDS = 1e9
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


class _OnLoop(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Runs coroutine handlers on the event loop; the thread that took the call in waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._adapted: dict[str, Any] = {}

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        adapted = self._adapted.get(details.method)
        if adapted is None and (handler := continuation(details)) is not None:
            adapted = self._adapted[details.method] = self._adapt(details.method, handler)
        return adapted

    def _adapt(self, method: str, handler: Any) -> Any:
        coders = handler.request_deserializer, handler.response_serializer
        if inspect.iscoroutinefunction(handler.unary_unary):
            places = threading.BoundedSemaphore(_CALLS_OF_A_METHOD)
            answer = partial(self._answer, method, places, handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(answer, *coders)
        places = threading.BoundedSemaphore(_STREAMS_OF_A_METHOD)
        if handler.unary_stream is not None:
            stream = handler.unary_stream
            if inspect.isasyncgenfunction(stream):
                stream = partial(self._messages, stream)
            return grpc.unary_stream_rpc_method_handler(partial(_limited, places, stream), *coders)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(partial(_limited, places, handler.stream_stream), *coders)
        return handler

    def _answer(
        self,
        method: str,
        places: threading.BoundedSemaphore,
        handle: Callable[[Any, grpc.ServicerContext], Coroutine[Any, Any, Any]],
        request: Any,
        context: grpc.ServicerContext,
    ) -> Any:
        if not places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{method}: too many calls at once; try again later")
        try:
            future = asyncio.run_coroutine_threadsafe(handle(request, context), self._loop)
            # Called when the call is over: where the caller has gone or its deadline passed, the work ends with it.
            if not context.add_callback(partial(_cancel, future)):
                future.cancel()
            return future.result()
        except RecommenderError as error:
            context.abort(grpc_status(error), str(error))
        except CancelledError:
            context.abort(grpc.StatusCode.CANCELLED, "nobody waits for the answer any more")
        except Exception as error:  # noqa: BLE001 - the last line of defence of a server
            _log.error("unexpected error in a handler", method=method, error=repr(error))
            context.abort(grpc.StatusCode.INTERNAL, f"{method}: unexpected {type(error).__name__}")
        finally:
            places.release()

    def _messages(
        self,
        handle: Callable[[Any, grpc.ServicerContext], AsyncIterator[Any]],
        request: Any,
        context: grpc.ServicerContext,
    ) -> Iterator[Any]:
        messages = handle(request, context)

        async def following() -> Any:
            return await anext(messages, None)

        while context.is_active():
            message = asyncio.run_coroutine_threadsafe(following(), self._loop).result()
            if message is None:
                return
            yield message


def _cancel(future: "Future[Any]") -> None:
    future.cancel()


def _limited(
    places: threading.BoundedSemaphore,
    handle: Callable[..., Iterator[Any]],
    request: Any,
    context: grpc.ServicerContext,
) -> Iterator[Any]:
    """A stream holds its thread as long as it lasts: so many at once, and no more."""
    if not places.acquire(blocking=False):
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams at once; end one of them")
    try:
        yield from handle(request, context)
    finally:
        places.release()


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
    """A server for handlers that are coroutines, with health (NOT_SERVING until `set_serving`) and reflection.

    gRPC's own threads take calls in, however busy the event loop is, and the loop sees all of them on its next turn.
    `grpc.aio` takes one call after the other, each over several turns of the loop: with turns of some milliseconds the
    calls wait unseen until their deadlines are over (benchmarks/serve.md). Made on the loop that runs the handlers.

    Args:
        host: to listen on.
        port: 0 = a free one, see `port`.
        services: full names, for health and reflection.
    """

    def __init__(self, host: str, port: int, services: Sequence[str]) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grpc")
        # What services are added to.
        self.grpc = grpc.server(
            self._threads,
            interceptors=[_OnLoop(asyncio.get_running_loop())],
            options=_OPTIONS,
            maximum_concurrent_rpcs=_CALLS_MAX,
        )
        self._services = [*services, ""]
        self._health = health.HealthServicer(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        named = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        pool: Any = _MethodsToo()
        reflection.enable_server_reflection(named, self.grpc, pool)
        self._address = f"{host}:{port}"
        self.port = 0

    def start(self) -> None:
        """Raises OSError where the address is taken."""
        self.set_serving(False)
        try:
            self.port = self.grpc.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(98, f"cannot listen on {self._address}") from error
        self.grpc.start()

    def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            self._health.set(service, status)

    async def stop(self, grace_seconds: float = 5) -> None:
        """Says NOT_SERVING, lets calls under way finish, cancels those that do not, then closes."""
        self.set_serving(False)
        await asyncio.to_thread(self.grpc.stop(grace_seconds).wait)
        self._threads.shutdown(wait=False)


def channel(target: str) -> grpc.aio.Channel:
    """A channel that comes back by itself, quickly, after its server was away."""
    return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)


def blocking_channel(target: str) -> grpc.Channel:
    """The same for a thread of its own."""
    return grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)


def request_deadline(context: grpc.ServicerContext, default_ms: float) -> Deadline:
    """The caller's deadline, else `default_ms` from now."""
    remaining = context.time_remaining()
    return Deadline.after_ms(default_ms if remaining > _NO_DEADLINE_SECONDS else remaining * 1000)
