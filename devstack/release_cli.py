"""`headrace release list | publish | promote | rollback | experiment | shadow`.

Invariant: decides nothing; asks core/registry.py and prints. Running processes follow the registry by themselves.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Which release bundle serves: list, publish, promote, roll back.")

Config = Annotated[Path | None, typer.Option(help="Settings, in the shape of core/defaults.toml.", dir_okay=False)]
Registry = Annotated[
    Path | None, typer.Option(help="Folder of the release bundles. Else that of the settings.", file_okay=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
Version = Annotated[str, typer.Argument(help="As `list` shows it.")]


@app.command("list")
def list_bundles(registry: Registry = None, json: AsJson = False, config: Config = None) -> None:
    """List the bundles: version, role, when made, of which data, whether whole.

    Example: [bold]headrace release list[/]
    """
    from core.registry import entries

    found = entries(_registry(config, registry))
    if json:
        _print_json([_summary(entry) for entry in found])
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("version", "role", "made", "data until", "items", "ranker", "whole", title=f"{len(found):,} bundles")
    for entry in found:
        manifest = entry.manifest
        facts = ["", "", "", ""]
        if manifest is not None:
            made, until = _time(manifest.created_time_ms), _time(manifest.data_watermark_ms)
            facts = [made, until, f"{manifest.item_count:,}", manifest.model_version]
        table.add_row(entry.version, entry.role, *facts, escape(entry.problem) or "yes")
    Console().print(table)


@app.command()
def publish(
    source: Annotated[Path, typer.Argument(help="A bundle's folder, from another registry.", file_okay=False)],
    promote: Annotated[bool, typer.Option("--promote", help="Let it serve.")] = False,
    registry: Registry = None,
    config: Config = None,
) -> None:
    """Copy a bundle that was made elsewhere into the registry; one that is not whole is refused.

    Example: [bold]headrace release publish /mnt/training/bundles/20260501T120000-1a2b3c4d --promote[/]
    """
    from core.registry import install

    made = install(_registry(config, registry), source, promote=promote)
    typer.echo(f"bundle {made.version} {'is current' if promote else 'is published, not promoted'}")


@app.command()
def promote(version: Version, registry: Registry = None, config: Config = None) -> None:
    """Let a bundle serve. Running processes take it up by themselves, each whole or not at all.

    Example: [bold]headrace release promote 20260501T120000-1a2b3c4d[/]
    """
    from core.registry import promote as run

    typer.echo(f"bundle {run(_registry(config, registry), version).version} is current")


@app.command()
def rollback(registry: Registry = None, config: Config = None) -> None:
    """Let the bundle serve that served before; once more, and the one before that.

    Example: [bold]headrace release rollback[/]
    """
    from core.bundle import roll_back

    typer.echo(f"bundle {roll_back(_registry(config, registry))} is current again")


@app.command()
def experiment(
    versions: Annotated[list[str] | None, typer.Argument(help="All of them; none = end the experiments.")] = None,
    registry: Registry = None,
    config: Config = None,
) -> None:
    """Keep these bundles loaded in the ranker beside the current one; requests may then name them.

    Example: [bold]headrace release experiment 20260501T120000-1a2b3c4d[/]
    """
    from dataclasses import replace

    from core.registry import read_roles, write_roles

    folder = _registry(config, registry)
    write_roles(folder, replace(read_roles(folder), experiments=tuple(versions or ())))
    typer.echo(f"loaded beside the current one: {', '.join(versions or ()) or 'none'}")


@app.command()
def shadow(
    version: Annotated[str, typer.Argument(help="As `list` shows it; none = end it.")] = "",
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the traffic.")] = 0.1,
    registry: Registry = None,
    config: Config = None,
) -> None:
    """Score a share of the traffic with a bundle as well, for its metrics (headrace_ranker_shadow_...) alone.

    Example: [bold]headrace release shadow 20260501T120000-1a2b3c4d --share 0.05[/]
    """
    from dataclasses import replace

    from core.registry import read_roles, write_roles

    folder = _registry(config, registry)
    write_roles(folder, replace(read_roles(folder), shadow=version, shadow_share=share if version else 0.0))
    typer.echo(f"shadow: {version} on {share:.0%} of the traffic" if version else "shadow: none")


def _registry(config: Path | None, registry: Path | None) -> Path:
    from core.settings import load_settings

    return registry or load_settings(config).registry.path


def _summary(entry: Any) -> dict[str, Any]:
    facts = entry.manifest.__dict__ if entry.manifest is not None else {}
    return {"version": entry.version, "role": entry.role, "problem": entry.problem, "manifest": facts}


def _time(time_ms: int) -> str:
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M}"


def _print_json(value: Any) -> None:
    import orjson

    typer.echo(orjson.dumps(value).decode())
