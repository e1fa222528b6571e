"""Options that several offline commands share, and what is made of them.

Used by offline/data_cli.py, train_cli.py and store_cli.py. Invariant: nothing heavy is imported before a command runs.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from core.settings import Settings

Config = Annotated[Path | None, typer.Option(help="Settings, in the shape of core/defaults.toml.", dir_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")]
Data = Annotated[
    str | None, typer.Option(help="Event log to read: folder or fsspec URL. Else that of the settings (streams).")
]
Registry = Annotated[
    Path | None, typer.Option(help="Folder of the release bundles. Else that of the settings.", file_okay=False)
]
Before = Annotated[
    str | None, typer.Option("--before", help="Only events before this time, as in 2026-05-01T12:00:00Z.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def read_settings(config: Path | None, data: str | None, registry: Path | None) -> "tuple[Settings, str, Path]":
    """Settings, event log and registry: what was given, else what the settings say."""
    from core.settings import load_settings
    from core.telemetry import configure_logging

    settings = load_settings(config)
    configure_logging(settings.telemetry, "offline")
    return settings, data or settings.streams.event_log_path, registry or settings.registry.path


def checked_device(device: str) -> str:
    from core.errors import ConfigError

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: say auto, cpu or cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device; say cpu, or install the extra `gpu`")
    return device


def time_ms(text: str, option: str = "--end-time") -> int:
    from core.errors import ConfigError

    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: say it as in 2026-05-01T12:00:00Z") from error
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
