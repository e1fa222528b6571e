"""`headrace dead-letter list | show | redrive | remove`.

Invariant: decides nothing; asks devstack/letters.py and prints.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from core.settings import KafkaSettings
    from devstack.letters import Letter

app = typer.Typer(no_args_is_help=True, help="What could not be processed: look at it, send it again, remove it.")

Config = Annotated[Path | None, typer.Option(help="Settings, in the shape of core/defaults.toml.", dir_okay=False)]
Topic = Annotated[str, typer.Option(help="Only of this topic: events, feedback, impressions, items or users.")]
Reason = Annotated[str, typer.Option(help="Only where the reason contains this.")]
Key = Annotated[str, typer.Option(help="Only of this message key (a user or an item).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON per letter.")]

_SHOWN_BYTES = 4096


@app.command("list")
def list_letters(
    topic: Topic = "",
    reason: Reason = "",
    key: Key = "",
    limit: Annotated[int, typer.Option(min=1, help="The newest this many.")] = 100,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """List dead letters: position, time, reason, key, and whether they were sent again.

    Example: [bold]headrace dead-letter list --topic events --reason event_time[/]
    """
    from devstack.letters import Choice, read_letters

    letters = read_letters(_kafka(config), Choice((), topic, reason, key))
    if json:
        for one in letters[-limit:]:
            _print_json(_summary(one))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("position", "time", "reason", "key", "sent again", title=f"{len(letters):,} dead letters")
    for one in letters[-limit:]:
        table.add_row(
            one.position, _time(one), escape(one.letter.reason), escape(_text(one.letter.key)[:40]), one.sent or "no"
        )
    Console().print(table)


@app.command()
def show(
    position: Annotated[str, typer.Argument(help="As `list` shows it: events/0/17.")],
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Show one dead letter with its bytes.

    Example: [bold]headrace dead-letter show events/0/17[/]
    """
    from devstack.letters import Choice, read_letters

    (one,) = read_letters(_kafka(config), Choice((position,)))
    letter = one.letter
    if json:
        headers = {name: content.hex() for name, content in sorted(letter.headers.items())}
        _print_json(_summary(one) | {"key_hex": letter.key.hex(), "value_hex": letter.value.hex(), "headers": headers})
        return
    facts = {
        "position": one.position,
        "source": f"{letter.topic} partition {letter.partition} offset {letter.offset}",
        "time": _time(one),
        "reason": letter.reason,
        "sent again": one.sent or "no",
        "key": f"{_text(letter.key)!r} ({len(letter.key)} bytes)",
        **{f"header {name}": _text(content) for name, content in sorted(letter.headers.items())},
        "value": f"{len(letter.value)} bytes",
    }
    for name, fact in facts.items():
        typer.echo(f"{name:>12}  {fact}")
    typer.echo(_as_json(letter.value) or _as_hex(letter.value))


@app.command()
def redrive(
    positions: Annotated[list[str] | None, typer.Argument(help="As `list` shows them: events/0/17.")] = None,
    topic: Topic = "",
    reason: Reason = "",
    key: Key = "",
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also those that were sent before.")] = False,
    set_header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header to add or correct; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")] = False,
    config: Config = None,
) -> None:
    """Send dead letters to their topics again: the original bytes, key and headers.

    By position, by filter, or all of them. A letter is sent once; the command remembers that, in Kafka. What is still
    wrong with a message makes a new dead letter. Letters of users who were erased since are not sent.

    Example: [bold]headrace dead-letter redrive --reason "not protobuf" --set-header content-type=application/json[/]
    """
    from core.errors import ConfigError
    from core.settings import load_settings
    from devstack.letters import Choice, erased_letters, read_letters
    from devstack.letters import redrive as run

    if not (positions or topic or reason or key or everything):
        raise ConfigError("say which: positions, --topic, --reason, --key, or --all")
    pairs = [text.partition("=") for text in set_header or []]
    if any(not separator or not name for name, separator, _ in pairs):
        raise ConfigError("--set-header: say NAME=VALUE, as in content-type=application/json")
    kafka = _kafka(config)
    letters = read_letters(kafka, Choice(tuple(positions or ()), topic, reason, key))
    headers = {name: value.encode() for name, _, value in pairs}
    is_erased = erased_letters(load_settings(config))
    result = run(kafka, letters, again=again, set_headers=headers, is_erased=is_erased)
    if json:
        sent = {one: f"{w.topic}/{w.partition}/{w.offset}" for one, w in result.sent.items()}
        _print_json({"sent": sent, "skipped": result.skipped})
        return
    for position, written in result.sent.items():
        typer.echo(f"sent {position} to {written.topic} partition {written.partition} offset {written.offset}")
    for position, why in result.skipped.items():
        typer.echo(f"left {position}: {why}")
    typer.echo(f"{len(result.sent)} sent, {len(result.skipped)} left")


@app.command()
def remove(
    positions: Annotated[list[str] | None, typer.Argument(help="As `list` shows them: events/0/17.")] = None,
    topic: Topic = "",
    reason: Reason = "",
    key: Key = "",
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")] = False,
    config: Config = None,
) -> None:
    """Remove dead letters: by position, by filter, or all of them. The others keep their positions.

    Nobody can read them any more; the broker's files hold them until it drops the segment that they lie in.

    Example: [bold]headrace dead-letter remove events/0/17[/]
    """
    from core.errors import ConfigError
    from devstack.letter_removal import remove_letters
    from devstack.letters import Choice, read_letters

    if not (positions or topic or reason or key or everything):
        raise ConfigError("say which: positions, --topic, --reason, --key, or --all")
    kafka = _kafka(config)
    chosen = {one.position for one in read_letters(kafka, Choice(tuple(positions or ()), topic, reason, key))}
    removed = remove_letters(kafka, lambda letter: letter.position in chosen)
    if json:
        _print_json({"removed": removed})
        return
    for position in removed:
        typer.echo(f"removed {position}")
    typer.echo(f"{len(removed)} removed")


def _kafka(config: Path | None) -> "KafkaSettings":
    from core.kafka import wait_for_kafka
    from core.settings import load_settings

    settings = load_settings(config).kafka
    wait_for_kafka(settings, 5)
    return settings


def _summary(one: "Letter") -> dict[str, Any]:
    letter = one.letter
    return {
        "position": one.position,
        "time": _time(one),
        "reason": letter.reason,
        "key": _text(letter.key),
        "sent_again": one.sent,
        "source": f"{letter.topic}/{letter.partition}/{letter.offset}",
    }


def _time(one: "Letter") -> str:
    return datetime.fromtimestamp(one.time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _as_json(value: bytes) -> str:
    import orjson

    try:
        return orjson.dumps(orjson.loads(value), option=orjson.OPT_INDENT_2).decode() if value else ""
    except orjson.JSONDecodeError:
        return ""


def _as_hex(value: bytes) -> str:
    lines = []
    for start in range(0, min(len(value), _SHOWN_BYTES), 16):
        part = value[start : start + 16]
        plain = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{start:08x}  {part.hex(' '):<47}  {plain}")
    if len(value) > _SHOWN_BYTES:
        lines.append(f"... {len(value) - _SHOWN_BYTES} more bytes; --json has all of them")
    return "\n".join(lines)


def _print_json(row: dict[str, Any]) -> None:
    import orjson

    typer.echo(orjson.dumps(row).decode())
