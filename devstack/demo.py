"""`headrace demo`: the whole system on one machine, shown by what it does.

Trains, starts every process, streams the newest events, lets users click, kills the ranker, and sums up. Invariant:
every figure that it prints was measured in this run, from outside the processes.
"""

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.bundle import ReleaseBundle
from core.errors import ConfigError, StageTimeoutError
from core.settings import load_settings
from devstack.backend import Backend, EventSender, Tally, percentiles, reason_names, tier_name
from devstack.click_probe import ClickReport, click_series, order_without
from devstack.demo_data import DemoData, active_users, prepare
from devstack.options import DemoOptions
from devstack.stack import Stack, only_one
from features.stores.feast_repo import apply_feature_repo
from features.stores.online import OnlineStore
from headrace.v1.events_pb2 import Item
from headrace.v1.recommender_service_pb2 import RecommendResponse
from offline.materialize import materialize
from offline.train import train

# How many ask while the ranker is dead, and how long it stays so.
_BACKGROUND_RATE = 20
_RANKER_DEAD_SECONDS = 3.0
_RECOVERY_SECONDS = 60.0
# Of the simulated data; clicks are made by as many users.
_USERS, _ITEMS, _CLICKS, _SEED = 1200, 1000, 60, 7
# A demo is watched: each training stops where more time would no longer show.
_TRAINING = {"offline": {"max_train_seconds": 12, "ranker_max_rows": 40_000}}


class Demo:
    """One run of the demo: a method a step, in the order in which they are shown."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.tally = Tally()
        # Standard output keeps to the summary where a program reads it.
        self.console = Console(stderr=options.json)
        self.titles: dict[str, Item] = {}

    def run(self) -> int:
        options = self.options
        registry = options.home / "bundles"
        _clear(options.home)
        data = self._prepare()
        self._step("Training a release bundle: towers, ranker, index, batch scores")
        bundle = train(data.root, registry, load_settings(options.config, _TRAINING), before_ms=data.split_ms)
        self._step("Starting Redis, Kafka, streams, candidate, ranker and serving")
        with Stack(
            options.home,
            kafka=options.kafka,
            redis_url=options.redis_url,
            ports="fixed" if options.fixed_ports else "free",
            bundles=registry,
            config=options.config,
            say=self._say,
            verbose=options.verbose,
            fresh=True,
        ) as stack:
            sender = EventSender(stack.settings)
            backend = Backend(stack.address("serving"), self.tally)
            try:
                self._fill(stack, data, bundle)
                self._stream(stack, data, sender)
                users = active_users(data.log, data.split_ms, _CLICKS + 1, _SEED)
                self._show_click(backend, sender, users[0])
                clicks = self._measure_clicks(backend, sender, users[1:])
                self._kill_ranker(stack, backend, users)
                summary = self._summary(clicks)
                self._print_summary(summary)
                if options.keep:
                    # Nobody clicks any more, and a client left open would report every trouble of Kafka to the screen.
                    sender.close()
                    self._keep(stack, users[0], next(iter(self.titles)))
            finally:
                backend.close()
                sender.close()
        if options.json:
            print(json.dumps(summary))
        return 0

    # --- the steps ---

    def _prepare(self) -> DemoData:
        options = self.options
        self._step(f"Preparing data: {options.data}")
        data = prepare(
            options.data,
            options.path,
            options.home / "dataset",
            users=_USERS,
            items=_ITEMS,
            seed=_SEED,
        )
        self.titles = {item.item_id: item for item in data.log.items()}
        summary = data.summary
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in list(summary.kinds.items())[:5])
        self.console.print(f"  {summary.events:,} events of {summary.event_users:,} users ({kinds})")
        return data

    def _fill(self, stack: Stack, data: DemoData, bundle: ReleaseBundle) -> None:
        self._step("Registering the feature views with Feast, filling the online store up to the training cut")
        apply_feature_repo(stack.settings, stack.folder / "feast_registry.db")
        filled = materialize(data.root, bundle, stack.settings, before_ms=data.split_ms)
        self.console.print(f"  {filled.users:,} users, {filled.items:,} items")

    def _stream(self, stack: Stack, data: DemoData, sender: EventSender) -> None:
        self._step("Streaming the newest events through Kafka, in event time")
        begin = time.monotonic()
        events = list(data.live_events())
        newest = sender.send_all(events)
        _wait_for_marker(stack, newest)
        seconds = time.monotonic() - begin
        self.console.print(
            f"  {len(events):,} events produced, applied and stored in {seconds:.1f} s ({len(events) / seconds:,.0f}/s)"
        )

    def _show_click(self, backend: Backend, sender: EventSender, user_id: str) -> None:
        self._step(f"Recommendations for {user_id}, and what one click does")
        report = click_series(backend, sender, [user_id], self._categories)
        if not report.clicks:
            raise StageTimeoutError("streams", f"the click of {user_id} was not reflected; see the logs of streams")
        click = report.clicks[0]
        before, after = order_without(click.before, click.item.item_id), order_without(click.after, click.item.item_id)
        table = Table(title=f"{user_id} clicks “{self._title(click.item.item_id)}”", title_justify="left")
        table.add_column("#", justify="right")
        table.add_column("before")
        table.add_column(f"{click.elapsed_ms:.0f} ms later")
        table.add_column("moved")
        for place, (left, right) in enumerate(zip(before[:10], after[:10], strict=False)):
            was = before.index(right) if right in before else None
            moved = "new" if was is None else "" if was == place else f"{was - place:+d}"
            table.add_row(str(place + 1), self._title(left), self._title(right), moved)
        self.console.print(table)

    def _measure_clicks(self, backend: Backend, sender: EventSender, users: list[str]) -> ClickReport:
        self._step(f"{len(users)} users click, one after the other: from produced click to changed answer")
        with self.console.status("clicking"):
            report = click_series(backend, sender, users, self._categories)
        spread = percentiles(report.changed_ms)
        unchanged = len(report.clicks) - len(report.changed_ms)
        self.console.print(
            f"  {len(report.changed_ms)} of {len(report.clicks)} clicks changed the order of the other items, "
            f"p50 {spread['p50']} ms, p99 {spread['p99']} ms; "
            f"{unchanged} ({unchanged / max(1, len(report.clicks)):.0%}) changed nothing"
        )
        if report.changed_without_click:
            self.console.print(f"  {report.changed_without_click} answers changed without a click (statistics move)")
        if report.never_reflected:
            self.console.print(f"  [red]{report.never_reflected} clicks were never reflected[/red]")
        return report

    def _kill_ranker(self, stack: Stack, backend: Backend, users: list[str]) -> None:
        self._step("Killing the ranker (SIGKILL) while users go on asking, then starting it again")
        with _Background(stack.address("serving"), users, self.tally):
            self._say_tier(backend, users[0], "before")
            stack.kill("ranker", signal.SIGKILL, restart=False)
            time.sleep(_RANKER_DEAD_SECONDS)  # not a wait for anything: this is how long it is dead
            self._say_tier(backend, users[0], "ranker dead")
            stack.start("ranker")
            begin = time.monotonic()
            stack.wait_ready("ranker", _RECOVERY_SECONDS)
            ready = time.monotonic()
            while True:
                answer = backend.recommend(users[0])
                if answer is not None and tier_name(answer) == "RANKED":
                    break
                if time.monotonic() - begin > _RECOVERY_SECONDS:
                    raise StageTimeoutError("serving", "not RANKED again after the ranker came back; see its log")
            again = time.monotonic()
            self._say_tier(backend, users[0], "ranker back")
            self.console.print(
                f"  ready {ready - begin:.1f} s after its start, RANKED again {(again - ready) * 1000:.0f} ms later"
            )

    def _keep(self, stack: Stack, user_id: str, item_id: str) -> None:
        self._step("Still running; Ctrl-C stops everything. To try it:")
        self.console.print(hints(stack, user_id, item_id), highlight=False, markup=False, soft_wrap=True)
        stack.wait()

    # --- the summary ---

    def _summary(self, clicks: ClickReport) -> dict[str, Any]:
        tally = self.tally
        return {
            "click_to_change_ms": percentiles(clicks.changed_ms),
            "clicks": len(clicks.clicks) + clicks.never_reflected,
            "clicks_changed": len(clicks.changed_ms),
            "clicks_never_reflected": clicks.never_reflected,
            "changed_without_click": clicks.changed_without_click,
            "recommend_ms": percentiles(tally.elapsed_ms),
            "stage_ms": {stage: percentiles(values) for stage, values in tally.stage_ms.items()},
            "answers": tally.answers,
            "empty_answers": tally.empty,
            "failed_answers": tally.failed,
            "tiers": dict(tally.tiers.most_common()),
            "reasons": dict(tally.reasons.most_common()),
            "wall_seconds": round(time.monotonic() - self.begin, 1),
        }

    def _print_summary(self, summary: dict[str, Any]) -> None:
        table = Table(title="Summary", title_justify="left", show_header=False)
        spread = summary["click_to_change_ms"]
        table.add_row("clicks that changed the order", f"{summary['clicks_changed']} of {summary['clicks']}")
        table.add_row("click → changed answer", f"p50 {spread['p50']} ms, p99 {spread['p99']} ms")
        spread = summary["recommend_ms"]
        table.add_row("recommend, as the caller sees it", f"p50 {spread['p50']} ms, p99 {spread['p99']} ms")
        for stage, spread in summary["stage_ms"].items():
            table.add_row(f"  {stage}", f"p50 {spread['p50']} ms, p99 {spread['p99']} ms")
        table.add_row("answers", f"{summary['answers']}")
        table.add_row("empty, failed", f"{summary['empty_answers']}, {summary['failed_answers']}")
        table.add_row("tiers", ", ".join(f"{name} {count}" for name, count in summary["tiers"].items()))
        table.add_row("degraded because", ", ".join(f"{n} {c}" for n, c in summary["reasons"].items()) or "never")
        table.add_row("wall time", f"{summary['wall_seconds']} s")
        self.console.print(table)

    # --- small things ---

    def _step(self, text: str) -> None:
        elapsed = time.monotonic() - self.begin
        self.console.print(f"\n[bold cyan]{elapsed:5.1f} s[/bold cyan]  [bold]{text}[/bold]", highlight=False)

    def _say(self, name: str, text: str) -> None:
        self.console.print(f"  [dim]{name}: {text}[/dim]", highlight=False)

    def _say_tier(self, backend: Backend, user_id: str, when: str) -> None:
        answer: RecommendResponse | None = backend.recommend(user_id)
        if answer is None:
            self.console.print(f"  {when}: [red]no answer[/red]")
            return
        why = ", ".join(reason_names(answer)) or "nothing degraded"
        self.console.print(f"  {when}: {tier_name(answer)}, {len(answer.items)} items ({why})")

    def _title(self, item_id: str) -> str:
        item = self.titles.get(item_id)
        return item.title or item_id if item is not None else item_id

    def _categories(self, item_id: str) -> list[str]:
        item = self.titles.get(item_id)
        return list(item.categories) if item is not None else []


def _clear(home: Path) -> None:
    """Takes away what an earlier demo left.

    Raises:
        ConfigError: a stack is running in this folder, or what would be taken away is not a demo's.
    """
    made_by_demo = home / ".demo"
    with only_one(home / "stack"):
        old = [folder for name in ("dataset", "bundles", "event_log") if (folder := home / name).exists()]
        if old and not made_by_demo.exists():
            raise ConfigError(
                f"a demo starts afresh, but {old[0]} was not made by one; give another folder with --home"
            )
        made_by_demo.touch()
        for folder in old:
            shutil.rmtree(folder)


class _Background:
    """Users who ask at a steady rate for as long as the block lasts."""

    def __init__(self, address: str, users: list[str], tally: Tally) -> None:
        self._address, self._users, self._tally = address, users, tally
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="background", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _ask(self) -> None:
        backend = Backend(self._address, self._tally)
        number = 0
        while not self._stopping.wait(1 / _BACKGROUND_RATE):
            backend.recommend(self._users[number % len(self._users)])
            number += 1
        backend.close()


def _wait_for_marker(stack: Stack, newest: dict[int, int], timeout_seconds: float = 60) -> None:
    """Returns when the stream has written all rows up to these offsets of the events topic."""
    store = OnlineStore(stack.settings.redis, stack.settings.features.project)
    end = time.monotonic() + timeout_seconds
    waiting = dict(newest)
    while waiting:
        for partition, offset in list(waiting.items()):
            if max(store.read_marker(partition).values(), default=-1) >= offset:
                del waiting[partition]
        if waiting and time.monotonic() > end:
            raise StageTimeoutError("streams", f"partitions {sorted(waiting)} did not catch up; see its log")
        time.sleep(0.02)
    store.close()


def hints(stack: Stack, user_id: str, item_id: str) -> str:
    """Lines to copy: grpcurl, a Python client, a Kafka producer. Not indented: a shell ends `<<'END'` at its margin."""
    address, kafka = stack.address("serving"), stack.address("kafka")
    return f"""
grpcurl -plaintext -d '{{"user_id": "{user_id}", "num_items": 5}}' {address} \\
  headrace.v1.RecommenderService/Recommend

python - <<'END'
import grpc
from headrace.v1 import recommender_service_pb2 as pb, recommender_service_pb2_grpc as rpc
stub = rpc.RecommenderServiceStub(grpc.insecure_channel("{address}"))
answer = stub.Recommend(pb.RecommendRequest(user_id="{user_id}", num_items=5), timeout=0.25)
for item in answer.items: print(item.position, item.title, list(item.sources))
END

python - <<'END'
import json, time, uuid
from confluent_kafka import Producer
producer = Producer({{"bootstrap.servers": "{kafka}", "partitioner": "murmur2_random"}})
now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
event = {{"eventId": uuid.uuid4().hex, "userId": "{user_id}", "itemId": "{item_id}",
         "kind": "click", "eventTime": now}}
producer.produce("headrace.events.v1", json.dumps(event), key="{user_id}",
                 headers={{"content-type": "application/json"}})
producer.flush()
END
"""


def run_demo(options: DemoOptions) -> int:
    """Runs the demo; returns the exit code."""
    return Demo(options).run()
