"""The offline commands, as `headrace ...` and as `python -m offline ...`.

Invariant: nothing heavy is imported before the command that needs it runs; results go to stdout, progress to stderr;
known errors leave as core.errors types, for whoever runs `app` to say in one line.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from core.settings import Settings
    from offline.data.dataset import DatasetSummary
    from offline.data.mapping import ImportMapping

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path | None, typer.Option(help="Settings, in the shape of core/defaults.toml.", dir_okay=False)]
Out = Annotated[
    str | None, typer.Option(help="Event log to write: folder or fsspec URL. Else that of the settings (streams).")
]
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

    settings = SimulatorConfig(users, items, days, seed, events, _time_ms(end_time) if end_time else None)
    with progress_bar() as progress:
        summary = run(settings, out or _default_log(config), progress)
    _say(summary, json=json)


@app.command()
def train(
    data: Data = None,
    registry: Registry = None,
    before: Before = None,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: forget finished steps and bundles.")] = False,
    promote: Annotated[bool, typer.Option(help="Let the new bundle serve.")] = True,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Make a release bundle from an event log: towers, ranker, index, popularity, batch scores.

    A run that was cut off goes on after its last finished step. What serves takes the bundle up by itself.

    Example: [bold]headrace train --data shop --registry bundles[/]
    """
    from offline import tables
    from offline.train import train as run

    settings, log, folder = _read_settings(config, data, registry)
    before_ms = _time_ms(before, "--before") if before else None
    made = run(log, folder, settings, device=_checked(device), before_ms=before_ms, fresh=fresh, promote=promote)
    _show(made, made.manifest.__dict__ | {"path": str(made.path)}, tables.print_bundle, json=json)


@app.command()
def evaluate(
    data: Data = None,
    registry: Registry = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Predict about this many moments. Else all.")] = None,
    device: Device = "auto",
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Say how good recommendations are: HR@10 and NDCG@10 by event-time replay, beside three baselines.

    The first 80% of the events train (a bundle that never serves, kept for the next time), the rest is predicted event
    by event from what was known just before.

    Example: [bold]headrace evaluate --data shop --limit 2000[/]
    """
    from offline import tables
    from offline.evaluate import evaluate as run

    settings, log, folder = _read_settings(config, data, registry)
    result = run(log, folder, settings, device=_checked(device), limit=limit)
    _show(result, result.as_dict(), tables.print_evaluation, json=json)


@app.command()
def export(
    form: Annotated[str, typer.Option(help="onnx, onnx-int8, bf16, or triton (a model repository in OUT).")],
    version: Annotated[str | None, typer.Option("--bundle", help="Of this bundle. Else of the current one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model repository.", file_okay=False)] = None,
    registry: Registry = None,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Make another form of a ranker, refused where it drifts: probabilities by 0.02, or NDCG@10 by 1% of itself.

    A form is published as a bundle of its own, VERSION-FORM, not promoted; [bold]headrace release promote[/] lets it
    serve. train puts the onnx form into every bundle where the extra `export` is installed.

    Example: [bold]headrace export --form onnx-int8[/]
    """
    from core.bundle import current_version
    from core.errors import ConfigError
    from offline.export import export_form, write_triton

    settings, _, folder = _read_settings(config, None, registry)
    chosen = version or current_version(folder)
    if form == "triton":
        if out is None:
            raise ConfigError("--form triton needs --out DIR, the folder of the model repository")
        typer.echo(f"written: {write_triton(folder / chosen, out, settings)}")
        return
    made, drift = export_form(folder, chosen, form, settings)
    if json:
        import orjson

        typer.echo(orjson.dumps({"bundle_version": made.version, **vars(drift)}).decode())
        return
    typer.echo(
        f"bundle {made.version}: a score changes by {drift.max_score_change:.5f} at most, NDCG@10 from "
        f"{drift.reference_ndcg_at_10:.4f} to {drift.ndcg_at_10:.4f}; `headrace release promote` lets it serve"
    )


@app.command()
def score(
    data: Data = None,
    registry: Registry = None,
    device: Device = "auto",
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Score the top items of all users anew with the current bundle, into the online store.

    Example: [bold]headrace score --data shop[/] (Redis as in the settings, or REDIS_URL)
    """
    from offline import tables
    from offline.batch_scores import score as run

    settings, log, folder = _read_settings(config, data, registry)
    summary = run(log, folder, settings, device=_checked(device))
    _show(summary, vars(summary), tables.print_scored, json=json)


@app.command()
def materialize(
    data: Data = None,
    registry: Registry = None,
    before: Before = None,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Fill the online store with what was imported, as the stream would have; for a first start, before streaming.

    Do not send the same events to the topics as well: they would be counted twice. What the log has from the topics is
    left to the stream, whose rows stay; to bring those back into a lost Redis, use [bold]headrace rebuild[/].

    Example: [bold]headrace materialize --data shop[/]
    """
    from core.bundle import open_current
    from offline import tables
    from offline.materialize import materialize as run

    settings, log, folder = _read_settings(config, data, registry)
    before_ms = _time_ms(before, "--before") if before else None
    summary = run(log, open_current(folder), settings, before_ms=before_ms)
    _show(summary, vars(summary), tables.print_materialized, json=json)


@app.command()
def rebuild(
    data: Data = None,
    registry: Registry = None,
    project: Annotated[
        str | None, typer.Option(help="Write beside the live rows, under this project (features.project).")
    ] = None,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Rebuild the online store from the event log: states, statistics, profiles, and where the stream goes on.

    For a Redis that lost what Kafka no longer holds: stop the stream workers, rebuild, start them. For a changed
    feature definition: rebuild with [bold]--project NEW[/] while everything runs, then cut over by setting
    features.project and restarting the stream workers and serving; the workers read what has come since. Nothing is
    counted twice, and rows that are newer than the log stay. A user who was erased stays erased.

    Example: [bold]headrace rebuild --data log --project headrace-2[/]
    """
    from offline import tables
    from offline.rebuild import rebuild as run

    settings, log, folder = _read_settings(config, data, registry)
    summary = run(log, folder, settings, project=project)
    _show(summary, vars(summary), tables.print_materialized, json=json)
    if summary.project != settings.features.project:
        typer.echo(
            f'to cut over: set features.project = "{summary.project}" (or HEADRACE_FEATURES__PROJECT) and restart '
            "streams and serving; the old rows stay until you remove them",
            err=True,
        )


@app.command()
def history(
    out: Annotated[Path, typer.Option(help="Folder for the files; HEADRACE_FEAST_OFFLINE names it to Feast.")],
    data: Data = None,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Write what users' and items' rows held at which event time, for Feast's get_historical_features.

    Of the views user_state, user_profile, item_profile and item_stats. The last has a row for each event and each item
    shown, per source partition, as online: add them up.

    Example: [bold]headrace history --data log --out .headrace/feast[/]
    """
    from offline import tables
    from offline.history import write_history

    settings, log, _ = _read_settings(config, data, None)
    summary = write_history(log, out, settings)
    _show(summary, vars(summary), tables.print_history, json=json)


@app.command()
def skew(
    data: Data = None,
    registry: Registry = None,
    before: Before = None,
    answers: Annotated[
        int, typer.Option(min=1, help="So many of the newest answers that logged their features.")
    ] = 500,
    json: AsJson = False,
    config: Config = None,
) -> None:
    """Compare what the ranker read when it served with what the event log gives, number by number, bit by bit.

    Answers that logged their features (serving.feature_log_share) are made again. Of erased users nothing is compared,
    and items that they touched may lack events. [bold]--before[/] as `headrace materialize` was told. Ends with 1 where
    a number differs.

    Example: [bold]headrace skew --data log[/]
    """
    from offline import tables
    from offline.feature_log import skew as run

    settings, log, folder = _read_settings(config, data, registry)
    found = run(log, folder, settings, answers, _time_ms(before, "--before") if before else None)
    _show(found, vars(found), tables.print_skew, json=json)
    raise typer.Exit(bool(found.differing))


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


def _show(result: Any, as_json: dict[str, Any], table: Callable[[Any, Any], None], *, json: bool) -> None:
    if json:
        import orjson

        typer.echo(orjson.dumps(as_json).decode())
        return
    from rich.console import Console

    table(result, Console())


def _read_settings(config: Path | None, data: str | None, registry: Path | None) -> "tuple[Settings, str, Path]":
    """Settings, event log and registry: what was given, else what the settings say."""
    from core.settings import load_settings
    from core.telemetry import configure_logging

    settings = load_settings(config)
    configure_logging(settings.telemetry, "offline")
    return settings, data or settings.streams.event_log_path, registry or settings.registry.path


def _checked(device: str) -> str:
    from core.errors import ConfigError

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: say auto, cpu or cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device; say cpu, or install the extra `gpu`")
    return device


def _default_log(config: Path | None) -> str:
    from core.settings import load_settings

    return load_settings(config).streams.event_log_path


def _time_ms(text: str, option: str = "--end-time") -> int:
    from core.errors import ConfigError

    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: say it as in 2026-05-01T12:00:00Z") from error
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
