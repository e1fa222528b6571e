"""A shop of 100,000 items with a trained bundle, for the figures of the front door; made once for each folder.

Invariant: the towers and the ranker are the default ones (how well they are trained does not change what they cost),
the data ends when it is made, and a folder that holds a bundle already is used as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.bundle import ReleaseBundle, open_current
from core.settings import Settings, load_settings
from devstack.demo_data import active_users, prepare
from features.stores.event_log import EventLog
from offline.materialize import materialize
from offline.train import train

_SEED = 7
_TRAINING = {
    "offline": {
        "max_epochs": 1,
        "ranker_epochs": 1,
        "max_train_seconds": 20,
        "ranker_max_rows": 20_000,
        "batch_scores_per_user": 100,
    }
}
_CUT = "split_ms"


@dataclass(frozen=True)
class Size:
    """How large the shop is."""

    users: int
    items: int


FULL, QUICK = Size(2000, 100_000), Size(300, 5000)


@dataclass(frozen=True)
class Shop:
    """What lies on disk."""

    root: Path
    split_ms: int
    bundle: ReleaseBundle
    # Users with a past, in a fixed random order.
    users: Sequence[str]

    def fill(self, settings: Settings) -> None:
        """Fills the online store of a running stack."""
        materialize(self.root, self.bundle, settings, before_ms=self.split_ms, progress=False)


def make_shop(home: Path, size: Size, say: Callable[[str], None]) -> Shop:
    """Simulates and trains below `home`, unless that was done before."""
    root, registry, cut = home / "dataset", home / "bundles", home / _CUT
    if not cut.is_file():
        say(f"simulating {size.users:,} users and {size.items:,} items, training a bundle")
        data = prepare("simulated", None, root, users=size.users, items=size.items, seed=_SEED)
        train(root, registry, load_settings(overrides=_TRAINING), before_ms=data.split_ms, progress=False)
        cut.write_text(str(data.split_ms), "utf-8")
    split_ms = int(cut.read_text("utf-8"))
    return Shop(root, split_ms, open_current(registry), active_users(EventLog(root), split_ms, size.users, _SEED))
