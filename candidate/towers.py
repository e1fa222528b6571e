"""The two towers: a sequential one for users, one of ids and content for items; both give unit vectors.

Trained by offline/training/towers.py, loaded by the candidate service. The user tower is causal self-attention over
the last interactions (Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018), pre-norm with gated
residuals (Borisyuk et al., "LiGR", 2025) behind a short causal convolution, aware of kind, time gap and weight; the
item tower adds an id part, for items that it was trained on, to a content part.
Invariant: `embedding_version` names weights and configuration; vectors of two versions never meet.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from candidate.content import NUMBERS, WORD_BUCKETS, Bags, Content
from candidate.history import GAP_BUCKETS
from core.bundle import TOWERS, TOWERS_CONFIG
from core.errors import ArtifactError
from features.catalog import CATEGORY_VOCABULARY

FORMAT = 2
# How many steps before each one its input takes in, ahead of the attention: what follows what is mostly local.
_CONVOLVED = 3
# Inverse temperature: where it begins and where it ends at most.
_FIRST_SCALE, _MAX_SCALE = 12.0, 60.0
# Spread of weights that begin as next to nothing.
_SMALL = 0.02


@dataclass(frozen=True, slots=True)
class TowersConfig:
    """Shape of the towers, and what their numbers stand for."""

    dimension: int
    blocks: int
    heads: int
    # Most interactions that the user tower reads.
    history_length: int
    # Kind numbers 1, 2, ... (candidate.history.kind_names).
    kinds: tuple[str, ...]
    # Items with an id part: row r of the id table is item_ids[r].
    item_ids: tuple[str, ...]
    dropout: float = 0.0
    format: int = FORMAT


class MaskDropout(nn.Module):
    """Dropout by slices of one mask drawn in advance: drawing anew is most of a training step on a CPU."""

    pool: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share
        self.register_buffer("pool", torch.empty(0), persistent=False)

    def renew(self) -> None:
        """Draws another mask at the next use."""
        self.pool = torch.empty(0, device=self.pool.device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self._share == 0.0:
            return x
        count = x.numel()
        if len(self.pool) < 2 * count:
            kept = torch.rand(4 * count, device=x.device) >= self._share
            self.pool = kept.to(x.dtype) / (1 - self._share)
        start = int(torch.randint(len(self.pool) - count, ()))
        return x * self.pool[start : start + count].view_as(x)


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward, each behind a gate that is made of its input."""

    def __init__(self, dimension: int, heads: int, dropout: float) -> None:
        super().__init__()
        self._heads = heads
        self.gate_attention = nn.Linear(dimension, dimension)
        self.gate_feed = nn.Linear(dimension, dimension)
        self.norm_attention = nn.LayerNorm(dimension)
        self.query = nn.Linear(dimension, dimension)
        self.key_value = nn.Linear(dimension, 2 * dimension)
        self.project = nn.Linear(dimension, dimension)
        self.norm_feed = nn.LayerNorm(dimension)
        self.feed = nn.Sequential(
            nn.Linear(dimension, 4 * dimension), nn.GELU(approximate="tanh"), nn.Linear(4 * dimension, dimension)
        )
        self.drop = MaskDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """All positions, each seeing itself and those before. [B, T, d] -> [B, T, d]."""
        normed = self.norm_attention(x)
        return self._finish(x, normed, self._attend(normed, normed, None))

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The last position of each row alone. [B, T, d], [B] -> [B, d]."""
        normed = self.norm_attention(x)
        at = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
        visible = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        # A row without history sees its padding: no NaN, and the caller drops it.
        visible = (visible | (lengths == 0)[:, None])[:, None, None, :]
        newest = normed.gather(1, at)
        return self._finish(x.gather(1, at), newest, self._attend(newest, normed, visible))[:, 0]

    def _attend(self, queries: Tensor, context: Tensor, visible: Tensor | None) -> Tensor:
        query = self._split(self.query(queries))
        key, value = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        mixed = functional.scaled_dot_product_attention(query, key, value, visible, is_causal=visible is None)
        return cast(Tensor, self.project(mixed.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self._heads, -1).transpose(1, 2)

    def _finish(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        x = x + cast(Tensor, self.drop(attended * torch.sigmoid(self.gate_attention(normed))))
        normed = self.norm_feed(x)
        return x + cast(Tensor, self.drop(self.feed(normed) * torch.sigmoid(self.gate_feed(normed))))


class UserTower(nn.Module):
    """From a sequence of interactions to a unit vector. Steps first, padding behind."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        d = config.dimension
        self.kind = nn.Embedding(len(config.kinds) + 1, d)
        self.gap = nn.Embedding(GAP_BUCKETS, d)
        self.position = nn.Embedding(config.history_length, d)
        self.weight = nn.Parameter(torch.zeros(d))
        self.convolution = nn.Parameter(torch.zeros(_CONVOLVED, d))
        self.blocks = nn.ModuleList(Block(d, config.heads, config.dropout) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(d)
        self.drop = MaskDropout(config.dropout)
        for table in (self.kind, self.gap, self.position):
            nn.init.normal_(table.weight, std=_SMALL)

    def forward(self, items: Tensor, kinds: Tensor, gaps: Tensor, weights: Tensor) -> Tensor:
        """A vector for each position, as if it were the last. [B, T, d], [B, T] x 3 -> [B, T, d]."""
        x = self._enter(items, kinds, gaps, weights)
        for block in self.blocks:
            x = block(x)
        return functional.normalize(self.norm(x).float(), dim=-1)

    def last(self, items: Tensor, kinds: Tensor, gaps: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        """The vector of each row's last step; the final block does that position only. -> [B, d]."""
        x = self._enter(items, kinds, gaps, weights)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        newest = cast(Block, self.blocks[-1]).last(x, lengths)
        return functional.normalize(self.norm(newest).float(), dim=-1)

    def _enter(self, items: Tensor, kinds: Tensor, gaps: Tensor, weights: Tensor) -> Tensor:
        x = items * math.sqrt(items.shape[-1])
        x = x + self.kind(kinds) + self.gap(gaps) + self.position.weight[: items.shape[1]]
        x = x + weights[..., None] * self.weight
        before = functional.pad(x, (0, 0, _CONVOLVED, 0))
        for steps in range(1, _CONVOLVED + 1):
            x = x + before[:, _CONVOLVED - steps : -steps] * self.convolution[steps - 1]
        return cast(Tensor, self.drop(x))


class ItemTower(nn.Module):
    """From an item's id and content to a unit vector."""

    number_mean: Tensor
    number_scale: Tensor

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        d = config.dimension
        self.ids = nn.Embedding(max(1, len(config.item_ids)), d)
        self.categories = nn.EmbeddingBag(CATEGORY_VOCABULARY, d, mode="sum", include_last_offset=True)
        self.words = nn.EmbeddingBag(WORD_BUCKETS, d, mode="sum", include_last_offset=True)
        self.numbers = nn.Linear(NUMBERS, d, bias=False)
        mixed = nn.Linear(2 * d, d)
        self.mix = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(approximate="tanh"), mixed)
        # What all items share. Before this, an item that training met seldom stays small, and so near all others of its
        # kind: a unit vector of its own would be noise that outranks what is known.
        self.shared = nn.Parameter(functional.normalize(torch.randn(d), dim=0))
        self.register_buffer("number_mean", torch.zeros(NUMBERS))
        self.register_buffer("number_scale", torch.ones(NUMBERS))
        for weight in (self.ids.weight, self.categories.weight, self.numbers.weight):
            nn.init.normal_(weight, std=_SMALL)
        nn.init.zeros_(mixed.weight)
        nn.init.zeros_(mixed.bias)
        # A word that training never met must say nothing, not noise.
        nn.init.zeros_(self.words.weight)

    def fit_numbers(self, numbers: Tensor) -> None:
        """Takes mean and spread of the numbers [n, NUMBERS] of the items in training."""
        known = ~numbers.isnan()
        count = known.sum(0).clamp(min=1)
        self.number_mean.copy_(numbers.nan_to_num().sum(0) / count)
        spread = ((numbers - self.number_mean).nan_to_num().square().sum(0) / count).sqrt()
        self.number_scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def forward(self, content: "ContentTensors", ids: Tensor, ids_kept: Tensor | None = None) -> Tensor:
        """Unit vectors of n items.

        Args:
            content: their content.
            ids: rows of the id table, -1 = the item has none. [n]
            ids_kept: 1 or 0 for each, in training: 0 makes the content stand alone. [n]
        """
        by_content = self.categories(content.categories[0], content.categories[1], content.categories[2])
        by_content = by_content + self.words(content.words[0], content.words[1], content.words[2])
        # A number that is not known counts as the mean.
        numbers = ((content.numbers - self.number_mean) / self.number_scale).nan_to_num().clamp(-3, 3)
        by_content = by_content + self.numbers(numbers)
        by_content = (by_content + self.mix(by_content)).index_select(0, content.at)
        has_id = (ids >= 0).to(by_content.dtype)
        if ids_kept is not None:
            has_id = has_id * ids_kept
        own = by_content + self.ids(ids.clamp(min=0)) * has_id[:, None]
        return functional.normalize(self.shared + own.float(), dim=-1)


@dataclass(frozen=True, slots=True)
class ContentTensors:
    """`candidate.content.Content` on a device, items of which nothing is known sharing one row.

    Bags as (buckets, offsets, weights).
    """

    categories: tuple[Tensor, Tensor, Tensor]
    words: tuple[Tensor, Tensor, Tensor]
    numbers: Tensor
    # The row of each item. [n]
    at: Tensor

    @classmethod
    def of(cls, content: Content, device: torch.device | str = "cpu") -> "ContentTensors":
        known = content.any()
        first_unknown = np.flatnonzero(~known)[:1]
        at = np.where(known, len(first_unknown) + np.cumsum(known) - 1, 0)
        content = content.take(np.concatenate([first_unknown, np.flatnonzero(known)]))

        def bags(part: Bags) -> tuple[Tensor, Tensor, Tensor]:
            arrays = (part.buckets, part.offsets, part.weights)
            buckets, offsets, weights = (torch.from_numpy(array).to(device) for array in arrays)
            return buckets, offsets, weights

        numbers, rows = (torch.from_numpy(array).to(device) for array in (content.numbers, at))
        return cls(bags(content.categories), bags(content.words), numbers, rows)


class Towers(nn.Module):
    """Both towers and the temperature that they were trained with."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.config = config
        self.user = UserTower(config)
        self.item = ItemTower(config)
        # The user tower reads items without what they share: it says nothing of the user.
        with torch.no_grad():
            self.user.position.weight -= self.item.shared * math.sqrt(config.dimension)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))
        self.id_row = {item_id: row for row, item_id in enumerate(config.item_ids)}

    def scale(self) -> Tensor:
        """Factor from a cosine to a logit."""
        return self.log_scale.exp().clamp(max=_MAX_SCALE)

    def id_rows(self, item_ids: Sequence[str]) -> Tensor:
        """Rows of the id table, -1 for items that were not in training [n]."""
        return torch.tensor([self.id_row.get(item_id, -1) for item_id in item_ids], dtype=torch.int64)

    @property
    def embedding_version(self) -> str:
        """Hash of weights and configuration; costs a pass over the weights."""
        digest = hashlib.blake2b(_config_json(self.config).encode(), digest_size=6)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"e{digest.hexdigest()}"


def save_towers(towers: Towers, folder: Path) -> None:
    """Writes weights and configuration into `folder`."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in towers.state_dict().items()}
    save_file(weights, folder / TOWERS)
    config = {**_config_dict(towers.config), "embedding_version": towers.embedding_version}
    (folder / TOWERS_CONFIG).write_text(json.dumps(config, sort_keys=True) + "\n", "utf-8")


def load_towers(folder: Path) -> Towers:
    """Loads towers for serving.

    Raises:
        ArtifactError: a file is missing, cut short, or not of the other one.
    """
    try:
        raw: dict[str, Any] = json.loads((folder / TOWERS_CONFIG).read_text("utf-8"))
        version = str(raw.pop("embedding_version"))
        config = TowersConfig(**{**raw, "kinds": tuple(raw["kinds"]), "item_ids": tuple(raw["item_ids"])})
        if config.format != FORMAT:
            raise ArtifactError(f"{folder / TOWERS_CONFIG}: format {config.format}, this version reads {FORMAT}")
        towers = Towers(config)
        towers.load_state_dict(load_file(folder / TOWERS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"towers in {folder} cannot be read ({reason}); train again with `headrace train`"
        ) from error
    if towers.embedding_version != version:
        raise ArtifactError(
            f"towers in {folder} do not have the version that they say ({version}); train again with `headrace train`"
        )
    return towers.eval().requires_grad_(requires_grad=False)


def _config_dict(config: TowersConfig) -> dict[str, Any]:
    return asdict(config)


def _config_json(config: TowersConfig) -> str:
    return json.dumps(_config_dict(config), sort_keys=True)
