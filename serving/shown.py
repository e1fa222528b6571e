"""What users were shown and let pass: the memory behind fatigue.

Written when an answer is given, read by the re-ranker. It is this process's own memory (another replica has its own),
bounded in users and items. Invariant: what a user has dealt with since is not counted as ignored, and an erased user
leaves nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

# Items kept of a user, newest shown first to survive.
_ITEMS_MAX = 200


class Shown:
    """How often each item was shown to each user lately.

    Args:
        users: how many are kept, those who asked last.
        half_life_seconds: after so long a showing counts for half.
    """

    def __init__(self, users: int, half_life_seconds: float) -> None:
        self._users_max = users
        self._half_life_ms = half_life_seconds * 1000
        # user_id -> item_id -> (count as of the time, time)
        self._shown: OrderedDict[str, OrderedDict[str, tuple[float, int]]] = OrderedDict()
        self._erased: OrderedDict[str, None] = OrderedDict()

    def note(self, user_id: str, item_ids: Iterable[str], now_ms: int) -> None:
        """These items were shown now."""
        if user_id in self._erased:
            return
        of_user = self._shown.setdefault(user_id, OrderedDict())
        self._shown.move_to_end(user_id)
        for item_id in item_ids:
            of_user[item_id] = (1.0 + self._decayed(of_user.get(item_id), now_ms), now_ms)
            of_user.move_to_end(item_id)
        while len(of_user) > _ITEMS_MAX:
            of_user.popitem(last=False)
        if len(self._shown) > self._users_max:
            self._shown.popitem(last=False)

    def fatigue(self, user_id: str, dealt_with: frozenset[str], now_ms: int) -> dict[str, float]:
        """How tired the user is of the items shown, up to 1; of all others not at all.

        Args:
            user_id: whose.
            dealt_with: items of the user's history: shown, and not ignored.
            now_ms: to decay to.
        """
        of_user: Mapping[str, tuple[float, int]] = self._shown.get(user_id, {})
        ignored = ((item_id, entry) for item_id, entry in of_user.items() if item_id not in dealt_with)
        return {item_id: 1 - 2.0 ** -self._decayed(entry, now_ms) for item_id, entry in ignored}

    def forget(self, user_ids: Iterable[str]) -> None:
        """These users were erased; nothing of theirs is kept again."""
        for user_id in user_ids:
            self._shown.pop(user_id, None)
            self._erased[user_id] = None
            if len(self._erased) > self._users_max:
                self._erased.popitem(last=False)

    def _decayed(self, entry: tuple[float, int] | None, now_ms: int) -> float:
        if entry is None:
            return 0.0
        count, at_ms = entry
        return float(count * 0.5 ** (max(0, now_ms - at_ms) / self._half_life_ms))
