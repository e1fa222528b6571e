"""`headrace train | evaluate | export`: release bundles, how good they are, and other forms of their ranker.

Part of offline/cli.py. Invariant: nothing heavy is imported before the command that needs it runs; results go to
stdout, progress to stderr.
"""

from pathlib import Path
from typing import Annotated

import typer

from offline.cli_options import AsJson, Before, Config, Data, Device, Registry, checked_device, read_settings, time_ms

app = typer.Typer()


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

    settings, log, folder = read_settings(config, data, registry)
    before_ms = time_ms(before, "--before") if before else None
    made = run(log, folder, settings, device=checked_device(device), before_ms=before_ms, fresh=fresh, promote=promote)
    tables.show(made, made.manifest.__dict__ | {"path": str(made.path)}, tables.print_bundle, json=json)


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

    settings, log, folder = read_settings(config, data, registry)
    result = run(log, folder, settings, device=checked_device(device), limit=limit)
    tables.show(result, result.as_dict(), tables.print_evaluation, json=json)


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

    settings, _, folder = read_settings(config, None, registry)
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
