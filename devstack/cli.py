"""The `headrace` command: runs the stack, checks the machine, and carries the offline commands.

Invariant: a known error is one line on stderr and exit code 1, Ctrl-C is exit code 130; nothing heavy is imported
before the command that needs it runs.
"""

import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from devstack import letters_cli, release_cli

DEFAULT_HOME = Path(".headrace")
_INTERRUPTED = 130
_DIFFERS = 2
_KAFKA_TIMEOUT_SECONDS = 5


class HeadraceGroup(TyperGroup):
    """Where every command's errors end."""

    def invoke(self, ctx: Any) -> Any:
        from core.errors import RecommenderError

        try:
            return super().invoke(ctx)
        except RecommenderError as error:
            typer.echo(f"headrace: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(_INTERRUPTED) from interrupt


app = typer.Typer(
    name="headrace",
    cls=HeadraceGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Its commands stand beside ours: headrace train, not headrace offline train.
if find_spec("offline.cli") is not None:
    app.add_typer(import_module("offline.cli").app)
app.add_typer(letters_cli.app, name="dead-letter")
app.add_typer(release_cli.app, name="release")

Home = Annotated[Path, typer.Option(help="Folder for data, logs and bundles.", file_okay=False)]
Kafka = Annotated[str, typer.Option(help="embedded, local (from KAFKA_HOME) or HOST:PORT.", metavar="WHICH")]
FixedPorts = Annotated[bool, typer.Option("--fixed-ports", help="The ports of the settings, not free ones.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of all processes.")]
Config = Annotated[Path | None, typer.Option(help="Settings, in the shape of core/defaults.toml.", dir_okay=False)]


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {version('headrace')}")
        raise typer.Exit


@app.callback()
def headrace(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A streaming recommender: what a user did a moment ago changes what the user sees next.

    Begin with [bold]headrace demo[/]: it trains on simulated data, starts everything and shows it work.
    With data of your own: [bold]headrace import[/], [bold]headrace train[/], [bold]headrace up[/].
    """


@app.command()
def replay(
    recommendation_id: Annotated[str, typer.Argument(help="From the answer.")],
    user: Annotated[str, typer.Option(help="The answer must be this user's.")] = "",
    address: Annotated[str, typer.Option(help="host:port of serving; else that of the settings.")] = "",
    config: Config = None,
) -> None:
    """Make a past answer again from its record, and say whether it is the same.

    Each serving process keeps the records of its last answers (serving.replay_log_mb) until it is started again. Exit
    code 2 where something differs.

    Example: [bold]headrace replay 6f9f3b0e-5d0e-4f43-8a63-0a4b6f6f2a10[/]
    """
    from core.settings import load_settings
    from devstack.replay import replay as ask
    from devstack.replay import told

    serving = load_settings(config).serving
    response = ask(address or f"{serving.host}:{serving.port}", recommendation_id, user)
    typer.echo(told(response))
    if not response.matches:
        raise typer.Exit(_DIFFERS)


@app.command()
def tune(
    data: Annotated[Path | None, typer.Option(help="The event log; else that of the settings.")] = None,
    registry: Annotated[Path | None, typer.Option(help="Folder of release bundles; else that of the settings.")] = None,
    limit: Annotated[int, typer.Option(min=100, help="Look at about so many moments.")] = 4000,
    promote: Annotated[bool, typer.Option(help="Let the tuned bundle serve.")] = True,
    config: Config = None,
) -> None:
    """Fit the blend's weights on what users chose after the bundle's data, for everybody and by segment.

    Batch scores, ranker, retrieval and fresh signals are weighed so that the choices become most likely. The result is
    a new bundle with the same models.

    Example: [bold]headrace train --before 2026-05-01T00:00:00Z && headrace tune[/]
    """
    from core.settings import load_settings
    from devstack.tune import tune as run

    settings = load_settings(config)
    log = data or Path(settings.streams.event_log_path)
    tuned = run(log, registry or settings.registry.path, settings, limit=limit, promote=promote)
    for name, weights in {"everybody": tuned.weights, **tuned.segments}.items():
        shown = ", ".join(f"{part} {weight:.3f}" for part, weight in weights.items())
        typer.echo(f"{name:>12}  {shown}")
    typer.echo(f"bundle {tuned.bundle_version}: from {tuned.choices:,} choices in {tuned.seconds:.0f} s")


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="simulated, movielens or trivago.")] = "simulated",
    path: Annotated[Path | None, typer.Option(help="Folder of the MovieLens or Trivago files.")] = None,
    home: Home = DEFAULT_HOME / "demo",
    kafka: Kafka = "embedded",
    redis_url: Annotated[str | None, typer.Option(help="A running Redis; else one is started.")] = None,
    fixed_ports: FixedPorts = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running, with lines to try it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as one last JSON line.")] = False,
    verbose: Verbose = False,
    config: Config = None,
) -> None:
    """Train, start everything, and watch a click change an answer.

    Example: [bold]headrace demo --data movielens --path ml-latest-small[/]
    """
    from devstack.demo import run_demo
    from devstack.options import DemoOptions

    options = DemoOptions(home, data, path, kafka, redis_url, fixed_ports, keep, json, verbose, config)
    raise typer.Exit(run_demo(options))


@app.command()
def up(
    home: Home = DEFAULT_HOME,
    kafka: Annotated[
        str, typer.Option(help="embedded, local or HOST:PORT.", metavar="WHICH", envvar="KAFKA_BOOTSTRAP_SERVERS")
    ] = "embedded",
    redis_url: Annotated[
        str | None, typer.Option(envvar="REDIS_URL", help="A running Redis; else one is started.")
    ] = None,
    fixed_ports: FixedPorts = False,
    verbose: Verbose = False,
    config: Config = None,
) -> None:
    """Run the whole stack until Ctrl-C. Needs a release bundle: see train.

    Example: [bold]headrace up --kafka local --fixed-ports[/]
    """
    from devstack.stack import Stack
    from devstack.supervisor import say_on_stderr

    begin = time.monotonic()
    stack = Stack(
        home,
        kafka=kafka,
        redis_url=redis_url,
        ports="fixed" if fixed_ports else "free",
        config=config,
        verbose=verbose,
    )
    with stack:
        say_on_stderr("headrace", f"is up after {time.monotonic() - begin:.1f} s; Ctrl-C stops everything")
        for name in ("serving", "candidate", "ranker", "kafka", "redis"):
            typer.echo(f"{name:>10}  {stack.address(name)}")
        typer.echo(f"{'logs':>10}  {stack.logs}")
        typer.echo(f"{'clients':>10}  export HEADRACE_CONFIG={stack.settings_file}")
        stack.wait()


@app.command()
def check(home: Home = DEFAULT_HOME, config: Config = None) -> None:
    """Try every dependency out; name what is missing and how to get it.

    Example: [bold]headrace check[/]
    """
    from devstack.check import print_findings, run_checks

    raise typer.Exit(print_findings(run_checks(home, config)))


@app.command()
def topics(
    check_only: Annotated[bool, typer.Option("--check", help="Change nothing, only say what is wrong.")] = False,
    config: Config = None,
) -> None:
    """Make the topics that a Kafka lacks, and check the others.

    Example: [bold]KAFKA_BOOTSTRAP_SERVERS=kafka:9092 headrace topics --check[/]
    """
    from core.kafka import wait_for_kafka
    from core.settings import load_settings
    from devstack.topics import ensure_topics, topic_problems

    settings = load_settings(config).kafka
    wait_for_kafka(settings, _KAFKA_TIMEOUT_SECONDS)
    made = [] if check_only else ensure_topics(settings)
    for name in made:
        typer.echo(f"made {name}")
    problems = topic_problems(settings)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"all topics are right at {settings.bootstrap_servers}")


@app.command()
def erase(
    user_id: Annotated[str, typer.Argument(help="The user to erase.", show_default=False)] = "",
    pending: Annotated[
        bool, typer.Option("--pending", help="Instead of a user: all whose tombstones came from elsewhere.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Event log: folder or fsspec URL. Else that of the settings.")
    ] = None,
    registry: Annotated[
        Path | None, typer.Option(help="Folder of the release bundles. Else that of the settings.", file_okay=False)
    ] = None,
    reason: Annotated[str, typer.Option(help="Goes into the receipt.")] = "",
    receipt: Annotated[
        Path | None, typer.Option(help="File for the receipt. Else erased-<time>.json here.", dir_okay=False)
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(min=1, help="How long the stream worker may take.")] = 60,
    config: Config = None,
) -> None:
    """Erase a user: online store, event log, batch scores, dead letters, caches; with a receipt of what went and stays.

    Sends the user's tombstone (a null value on the users topic, which any producer may send). The tombstone alone has
    the stream worker erase the user's rows for good and the caches forget them; from then on nobody who reads the event
    log sees the user: not training, scores, rebuild or history. This command adds what lies in files and letters: the
    event log, the bundles' batch scores and the dead letters are rewritten without the user.

    After tombstones that other producers sent, [bold]headrace erase --pending[/] does that for all of them in one pass:
    run it each night. Kafka's own topics forget by their retention; the receipt says when. A user who comes back begins
    anew.

    Example: [bold]headrace erase u-4711 --reason "request 2026-118"[/]
    """
    import orjson

    from core.errors import ConfigError
    from core.kafka import wait_for_kafka
    from core.settings import load_settings
    from devstack.erase import erase as run
    from devstack.erase import erase_pending

    if bool(user_id) == pending:
        raise ConfigError("say one of the two: a user id, or --pending")
    settings = load_settings(config)
    wait_for_kafka(settings.kafka, _KAFKA_TIMEOUT_SECONDS)
    log, folder = data or settings.streams.event_log_path, registry or settings.registry.path
    how: dict[str, Any] = {"reason": reason, "timeout_seconds": timeout_seconds}
    receipts = erase_pending(log, folder, settings, **how) if pending else [run(user_id, log, folder, settings, **how)]
    if not receipts:
        typer.echo("nothing to do: no tombstone waits for its files")
        return
    path = receipt or Path(f"erased-{receipts[0].finished_time.replace(':', '')}.json")
    content: Any = [one.as_dict() for one in receipts] if pending else receipts[0].as_dict()
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    for done in receipts:
        if pending:
            typer.echo(f"user {done.user_id}")
        for place, count in done.removed.items():
            typer.echo(f"{count:>8,}  {place}")
        for position, why in done.dead_letters_left.items():
            typer.echo(f"    left  dead letter {position}: {why}")
        typer.echo(
            f"not found in {len(done.not_found)} other places; Kafka holds {len(done.kafka_holds)} topics for a while"
        )
    typer.echo(f"receipt: {path}")
