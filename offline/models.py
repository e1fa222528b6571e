"""The models of one release, run in-process: encode, retrieve, rank, as the services do it over gRPC.

For batch scores and evaluation, which have all users at hand and no deadline. Invariant: candidates come through the
sources that the ranker was trained with and features from `features.vectors`, so it is asked what it will be asked in
serving.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from candidate.co_visitation import CoVisitation, load_co_visitation
from candidate.encoder import UserEncoder
from candidate.towers import load_towers
from core.bundle import CO_VISITATION_FACTS, ITEM_VECTORS
from core.errors import ArtifactError
from core.settings import Settings
from features import item_vectors
from features.catalog import Catalog, Floats, Rows
from features.vectors import ranker_input
from features.windows import UserState
from offline.training.ranker_candidates import CandidateSources, Moment, Pool
from ranker.calibration import load_calibration
from ranker.model import load_ranker
from ranker.scorer import Scorer

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Models:
    """Towers, item vectors and ranker of one folder; their rows are those of the catalogue that it was made with."""

    sources: CandidateSources
    item_vectors: Floats
    scorer: Scorer
    settings: Settings
    # Of a bundle that has them.
    pairs: CoVisitation | None = None

    @classmethod
    def load(cls, folder: Path, catalog: Catalog, settings: Settings, device: str = "cpu") -> "Models":
        """Loads what training wrote.

        Args:
            folder: a bundle's folder.
            catalog: begins with the bundle's items, in its order.
            settings: of features and candidates.
            device: where the ranker runs: cpu, cuda or auto.

        Raises:
            ArtifactError: a file is missing or does not fit the others.
        """
        vectors = read_item_vectors(folder)
        if len(vectors) > len(catalog):
            raise ArtifactError(f"{folder} has vectors of {len(vectors)} items for {len(catalog)} items; train again")
        categories = catalog.column("categories")[: len(vectors)]
        scorer = Scorer(load_ranker(folder), vectors, categories, load_calibration(folder), _device(device))
        encoder = UserEncoder(load_towers(folder), settings.features)
        pairs = None
        if (folder / CO_VISITATION_FACTS).is_file():
            pairs = load_co_visitation(folder, settings.candidate.co_visitation, settings.features)
        return cls(CandidateSources(encoder, vectors, settings), vectors, scorer, settings, pairs)

    def moment(self, catalog: Catalog, known: Mask, now_ms: int) -> Moment:
        """The items that have vectors, as of `now_ms`; `known` says which of all items may be recommended."""
        count = len(self.item_vectors)
        popularity = catalog.popularity(now_ms, half_life_index=0)[:count]
        return Moment(known[:count], popularity, catalog.column("publish_ms")[:count], self.pairs, now_ms)

    def pools(
        self,
        states: Sequence[UserState],
        catalog: Catalog,
        moment: Moment,
        excluded: Sequence[Rows],
        limit: int | None = None,
    ) -> list[Pool]:
        """Candidates of B users, best first, without the rows that each of them must not get."""
        return [
            _without(pool, rows, limit)
            for pool, rows in zip(self.sources.pools(states, catalog, moment), excluded, strict=True)
        ]

    def rank(self, states: Sequence[UserState], catalog: Catalog, pools: Sequence[Pool], now_ms: int) -> list[Floats]:
        """The ranker's score of each candidate, by which to order. B arrays [C]."""
        inputs = [
            ranker_input(state, catalog, pool.rows, pool.scores, pool.source_bits, now_ms, self.settings.features)
            for state, pool in zip(states, pools, strict=True)
        ]
        return [one.score for one in self.scorer.score(inputs, [pool.user_vector for pool in pools])]


def read_item_vectors(folder: Path) -> Floats:
    """Item vectors of a bundle, [n, d]. Raises ArtifactError where the file cannot be read."""
    return item_vectors.read_item_vectors(folder / ITEM_VECTORS)[0]


def _without(pool: Pool, excluded: Rows, limit: int | None) -> Pool:
    kept = np.flatnonzero(~np.isin(pool.rows, excluded))[:limit]
    lists = [rows[~np.isin(rows, excluded)] for rows in pool.lists]
    return Pool(pool.user_vector, pool.rows[kept], pool.scores[kept], pool.source_bits[kept], lists)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
