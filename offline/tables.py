"""What training, evaluation and scoring print when they are done: tables on stdout.

Invariant: decides nothing; shows what they return.
"""

from collections.abc import Callable
from typing import Any

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core.bundle import ReleaseBundle
from offline.batch_scores import ScoreSummary
from offline.data.dataset import time_text
from offline.evaluate import Evaluation
from offline.feature_log import Comparison
from offline.history import HistorySummary
from offline.materialize import MaterializeSummary


def show(result: Any, as_json: dict[str, Any], table: Callable[[Any, Console], None], *, json: bool) -> None:
    """A result as one line of JSON, or as its table."""
    if json:
        typer.echo(orjson.dumps(as_json).decode())
    else:
        table(result, Console())


def print_bundle(bundle: ReleaseBundle, console: Console) -> None:
    """Versions, sizes and metrics of a bundle."""
    manifest = bundle.manifest
    table = _facts(f"bundle {bundle.version}")
    table.add_row("folder", escape(str(bundle.path)))
    table.add_row("items", f"{manifest.item_count:,}")
    table.add_row("data up to", time_text(manifest.data_watermark_ms))
    table.add_row("towers, index", f"{manifest.embedding_version}, {manifest.index_version}")
    table.add_row("ranker", manifest.model_version)
    table.add_row("megabytes", f"{sum(file['bytes'] for file in manifest.files.values()) / 1e6:.1f}")
    for name, value in sorted(manifest.metrics.items()):
        table.add_row(escape(name.replace("_", " ")), f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")
    console.print(table)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """One line per way to recommend."""
    table = Table(title=f"{escape(evaluation.dataset)}: event-time replay", title_justify="left")
    for name in ("", "HR@10", "NDCG@10", "R@100", "HR@10 warm", "NDCG@10 warm"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for row in evaluation.rows:
        numbers = (row.hr_at_10, row.ndcg_at_10, row.recall_at_100, row.warm_hr_at_10, row.warm_ndcg_at_10)
        table.add_row(escape(row.name), *(f"{number:.4f}" for number in numbers))
    console.print(table)
    console.print(
        f"{evaluation.train_events:,} events trained, {evaluation.predicted_events:,} of the later "
        f"{evaluation.events - evaluation.train_events:,} predicted ({evaluation.warm_predicted_events:,} of warm "
        f"users, {evaluation.unknown_item_events:,} of items unheard of) in {evaluation.seconds:.0f} s, "
        f"{evaluation.train_seconds:.0f} s of them training",
        highlight=False,
    )


def print_history(summary: HistorySummary, console: Console) -> None:
    table = _facts("history of feature rows")
    for view in ("user_state", "user_profile", "item_profile", "item_stats"):
        table.add_row(view, f"{getattr(summary, view):,}")
    table.add_row("seconds", f"{summary.seconds:.1f}")
    console.print(table)


def print_skew(found: Comparison, console: Console) -> None:
    table = _facts("logged features, made again")
    table.add_row("answers", f"{found.answers:,}")
    table.add_row("unreadable answers", f"{found.unreadable_answers:,}")
    table.add_row("items", f"{found.items:,}")
    table.add_row("items equal in every bit", f"{found.equal_items:,}")
    for what, count in found.not_rebuilt.most_common():
        table.add_row(f"items not made: the log lacks {what}", f"{count:,}")
    for name, count in found.differing.most_common():
        table.add_row(f"answers that differ in {escape(name)}", f"{count:,}")
    console.print(table)


def print_scored(summary: ScoreSummary, console: Console) -> None:
    table = _facts(f"batch scores of bundle {summary.bundle_version}")
    table.add_row("users", f"{summary.users:,}")
    table.add_row("data up to", time_text(summary.watermark_ms))
    table.add_row("seconds", f"{summary.seconds:.1f}")
    console.print(table)


def print_materialized(summary: MaterializeSummary, console: Console) -> None:
    table = _facts("online store")
    for name, count in vars(summary).items():
        if name in ("watermark_ms", "seconds", "project"):
            continue
        table.add_row(name.replace("_", " "), f"{count:,}")
    table.add_row("data up to", time_text(summary.watermark_ms))
    table.add_row("seconds", f"{summary.seconds:.1f}")
    console.print(table)


def _facts(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False)
