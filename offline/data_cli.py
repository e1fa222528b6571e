"""`headrace import | simulate`: what fills an event log.

Part of offline/cli.py. Invariant: nothing heavy is imported before the command that needs it runs; results go to
stdout, progress to stderr.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offline.cli_options import AsJson, Config, time_ms

if TYPE_CHECKING:
    from offline.data.dataset import DatasetSummary
    from offline.data.mapping import ImportMapping

app = typer.Typer()

Out = Annotated[
    str | None, typer.Option(help="Event log to write: folder or fsspec URL. Else that of the settings (streams).")
]


@app.command("import")
def import_data(
    paths: Annotated[list[Path], typer.Argument(help="Files of one kind, or the folder of a public data set.")],
    kind: Annotated[
        str | None, typer.Option(help="items, users or events; or movielens, trivago (a folder tells by its files).")
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="TOML file that says which column is what.")] = None,
    map_: Annotated[
        list[str] | None, typer.Option("--map", metavar="FIELD=COLUMN", help="One column; may be repeated.")
    ] = None,
    event_kind: Annotated[str | None, typer.Option(help="Kind of all rows: click, rating, or one's own.")] = None,
    time_unit: Annotated[str | None, typer.Option(help="s, ms, us or iso. Else recognised.")] = None,
    delimiter: Annotated[str | None, typer.Option(help="Between CSV columns. Else recognised.")] = None,
    columns: Annotated[str | None, typer.Option(help="Names, comma-separated, for CSV without a first line.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of the text, as in latin-1. Else UTF-8.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what is understood; write nothing.")] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Count broken rows and keep them in OUT/broken, instead of stopping.")
    ] = False,
    out: Out = None,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Bring items, users and events of your own into the event log: CSV, JSON lines, Parquet, also packed (.gz).

    Columns are recognised by their names; see with [bold]--check[/]. What is no field becomes a free attribute:
    labels or numbers of items and users, tags of events. Import the items before the events: events then carry their
    categories. The same file again replaces what it brought before.

    A mapping file says what the names do not:

        [bold]kind = "events"[/]
        [bold]time_unit = "ms"[/]
        [bold]fields = {user_id = "customer", item_id = "sku", "tags.shop" = "branch"}[/]
        [bold]constants = {surface = "app"}[/]
        [bold]kinds = {"add to basket" = "cart"}[/]

    and also: delimiter, encoding, columns, list_separator, time_format, ignore (see offline/data/mapping.py).

    Example: [bold]headrace import products.csv --kind items --map title=name --check[/]
    """
    from offline.data import public
    from offline.data.mapping import ImportMapping, parse_pairs, read_mapping

    public_kind = kind if kind in public.LOADERS else None
    if public_kind is None and kind is None and mapping is None and len(paths) == 1:
        public_kind = public.recognise(paths[0])
    target = out or _default_log(config)
    if public_kind is not None:
        _import_public(public_kind, paths, target, check=check, json=json)
        return
    given = (read_mapping(mapping) if mapping else ImportMapping()).updated(
        kind=kind,
        fields=parse_pairs(map_ or []),
        constants={"kind": event_kind} if event_kind else {},
        time_unit=time_unit,
        delimiter={"\\t": "\t", "tab": "\t"}.get(delimiter or "", delimiter),
        columns=tuple(name.strip() for name in columns.split(",")) if columns else None,
        encoding=encoding,
    )
    _import_own(paths, target, given, check=check, skip_broken=skip_broken, json=json)


@app.command()
def simulate(
    users: Annotated[int, typer.Option(help="How many users.")] = 2000,
    items: Annotated[int, typer.Option(help="How many items.")] = 1000,
    days: Annotated[int, typer.Option(help="Over how many days.")] = 14,
    events: Annotated[int | None, typer.Option(help="About how many events. Else 30 per user.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and end time give the same log.")] = 7,
    end_time: Annotated[
        str | None, typer.Option(help="All happens before it, as in 2026-05-01T12:00:00Z. Else the last full hour.")
    ] = None,
    out: Out = None,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Make up a shop with known ground truth: items, users, sessions, lists shown, clicks, carts, purchases.

    The truth (interests, item vectors, the click model) lies beside the log, in truth.json and truth.safetensors.

    Example: [bold]headrace simulate --users 500 --items 300 --days 7 --seed 1 --out shop[/]
    """
    from offline.data.report import progress_bar
    from offline.data.simulator import SimulatorConfig
    from offline.data.simulator import simulate as run

    settings = SimulatorConfig(users, items, days, seed, events, time_ms(end_time) if end_time else None)
    with progress_bar() as progress:
        summary = run(settings, out or _default_log(config), progress)
    _say(summary, json=json)


def _import_public(kind: str, paths: list[Path], out: str, *, check: bool, json: bool) -> None:
    from tempfile import TemporaryDirectory

    from core.errors import ConfigError
    from offline.data import public
    from offline.data.report import progress_bar

    if len(paths) != 1:
        raise ConfigError(f"--kind {kind} takes one folder, not {len(paths)} paths")
    with progress_bar() as progress, TemporaryDirectory() as scratch:
        summary = public.load(kind, paths[0], scratch if check else out, progress)
    _say(summary, json=json, written=not check)


def _import_own(
    paths: list[Path], out: str, given: "ImportMapping", *, check: bool, skip_broken: bool, json: bool
) -> None:
    from rich.console import Console

    from offline.data.importer import Importer
    from offline.data.report import print_check, progress_bar

    with progress_bar() as progress:
        result = Importer(out, given, skip_broken=skip_broken, check_only=check, progress=progress).run(paths)
    if check and not json:
        print_check(result, Console())
    _say(result.summary, json=json, written=not check)
    if check and result.broken and not skip_broken:
        raise typer.Exit(1)


def _say(summary: "DatasetSummary", *, json: bool, written: bool = True) -> None:
    if json:
        import orjson

        typer.echo(orjson.dumps(summary.as_dict()).decode())
        return
    from rich.console import Console

    from offline.data.report import print_summary

    print_summary(summary, Console(), written=written)


def _default_log(config: Path | None) -> str:
    from core.settings import load_settings

    return load_settings(config).streams.event_log_path
