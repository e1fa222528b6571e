"""`headrace score | materialize | rebuild | history | skew`: what the feature stores hold, and whether it was served.

Part of offline/cli.py. Invariant: nothing heavy is imported before the command that needs it runs; results go to
stdout, progress to stderr.
"""

from pathlib import Path
from typing import Annotated

import typer

from offline.cli_options import AsJson, Before, Config, Data, Device, Registry, checked_device, read_settings, time_ms

app = typer.Typer()


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

    settings, log, folder = read_settings(config, data, registry)
    summary = run(log, folder, settings, device=checked_device(device))
    tables.show(summary, vars(summary), tables.print_scored, json=json)


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

    settings, log, folder = read_settings(config, data, registry)
    before_ms = time_ms(before, "--before") if before else None
    summary = run(log, open_current(folder), settings, before_ms=before_ms)
    tables.show(summary, vars(summary), tables.print_materialized, json=json)


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

    settings, log, folder = read_settings(config, data, registry)
    summary = run(log, folder, settings, project=project)
    tables.show(summary, vars(summary), tables.print_materialized, json=json)
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

    settings, log, _ = read_settings(config, data, None)
    summary = write_history(log, out, settings)
    tables.show(summary, vars(summary), tables.print_history, json=json)


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

    settings, log, folder = read_settings(config, data, registry)
    found = run(log, folder, settings, answers, time_ms(before, "--before") if before else None)
    tables.show(found, vars(found), tables.print_skew, json=json)
    raise typer.Exit(bool(found.differing))
