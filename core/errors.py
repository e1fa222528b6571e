"""The error tree, and the one table from errors to gRPC and HTTP codes.

    RecommenderError            INTERNAL            500
    ├── InvalidRequestError     INVALID_ARGUMENT    400   the caller's fault; names the field
    ├── NotFoundError           NOT_FOUND           404   what was asked for by name is not there
    ├── OverloadedError         RESOURCE_EXHAUSTED  429   full; try again later
    ├── StageError              UNAVAILABLE         503   a dependency did not answer
    │   └── StageTimeoutError   DEADLINE_EXCEEDED   504   ... in time
    ├── ArtifactError           FAILED_PRECONDITION 503   bundle, model or index missing or broken
    ├── MalformedEventError     INVALID_ARGUMENT    400   a message that no retry will mend
    └── ConfigError             FAILED_PRECONDITION 500   settings or files that cannot work

Invariant: third-party errors are translated into these at the client seams and nowhere else; messages are
one line and say what to do next.
"""

from grpc import StatusCode


class RecommenderError(Exception):
    """Base of everything that Headrace raises on purpose."""


class InvalidRequestError(RecommenderError):
    """The request cannot be served as it is. `field` is the path of the offending field."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class NotFoundError(RecommenderError):
    """Something asked for by name does not exist."""


class OverloadedError(RecommenderError):
    """A bounded queue is full."""


class StageError(RecommenderError):
    """A stage's dependency is unavailable. `dependency` is its process name."""

    def __init__(self, dependency: str, problem: str) -> None:
        super().__init__(f"{dependency}: {problem}")
        self.dependency = dependency


class StageTimeoutError(StageError):
    """A stage's dependency did not answer within its budget."""


class ArtifactError(RecommenderError):
    """A release bundle, or a part of it, is missing, corrupt or does not fit."""


class MalformedEventError(RecommenderError):
    """A message that can never be processed; it goes to the dead letters. `field` may be empty."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field


class ConfigError(RecommenderError):
    """Settings, or files that they name, that cannot work."""


# Most specific first.
_STATUS: tuple[tuple[type[RecommenderError], StatusCode, int], ...] = (
    (InvalidRequestError, StatusCode.INVALID_ARGUMENT, 400),
    (NotFoundError, StatusCode.NOT_FOUND, 404),
    (OverloadedError, StatusCode.RESOURCE_EXHAUSTED, 429),
    (StageTimeoutError, StatusCode.DEADLINE_EXCEEDED, 504),
    (StageError, StatusCode.UNAVAILABLE, 503),
    (ArtifactError, StatusCode.FAILED_PRECONDITION, 503),
    (MalformedEventError, StatusCode.INVALID_ARGUMENT, 400),
    (ConfigError, StatusCode.FAILED_PRECONDITION, 500),
    (RecommenderError, StatusCode.INTERNAL, 500),
)


def grpc_status(error: RecommenderError) -> StatusCode:
    return next(code for kind, code, _ in _STATUS if isinstance(error, kind))


def http_status(error: RecommenderError) -> int:
    return next(status for kind, _, status in _STATUS if isinstance(error, kind))
