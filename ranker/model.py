"""The ranker's network and its files: a score for every candidate of a user, several heads at once.

Trained by offline/training/ranker.py, run by ranker/scorer.py. Each candidate sees the user's history through
dot-product target attention, then low-rank DCN-v2 crosses (Wang et al., "DCN V2", WWW 2021) and a small MLP.
Invariant: candidates do not see each other, so a score does not depend on what else is in the list or the batch.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad, relu

from core.bundle import RANKER, RANKER_CONFIG, RANKER_LIGHT, RANKER_LIGHT_CONFIG
from core.errors import ArtifactError
from features.catalog import CATEGORY_VOCABULARY, Floats, Rows
from features.vectors import CANDIDATE_FEATURES, SIGNATURE, USER_FEATURES
from ranker.similarities import SIMILARITIES, USER_SIMILARITIES, similarities, user_similarities

HEADS = ("click", "conversion", "value")
CLICK, CONVERSION, VALUE = range(len(HEADS))
# Weights and configuration in a bundle: of the ranker, and of the light scorer that cuts its lists.
MAIN, LIGHT = (RANKER, RANKER_CONFIG), (RANKER_LIGHT, RANKER_LIGHT_CONFIG)
# Features far outside what training saw say no more than "very large".
_CLIP = 6.0
# Of a cosine of unit vectors, before training.
FIRST_SHARPNESS = 8.0
# Attention logits of padding: far below any real one, yet finite.
_MASKED = -1e4


@dataclass(frozen=True)
class RankerConfig:
    """Shape of the network, and what the artifact says of itself. A part of width, or of layers, 0 is left out."""

    dimension: int
    # Items of the catalogue that it was trained on, and the width of what it knows of each beside the towers' vectors.
    items: int = 0
    taste_width: int = 0
    item_width: int = 24
    category_width: int = 8
    attention_width: int = 32
    user_width: int = 24
    cross_layers: int = 2
    cross_rank: int = 32
    hidden: tuple[int, ...] = (96, 48)
    dropout: float = 0.1
    # Of lists, in training, whose categories are not told: those that name a list (its city) are learnt by heart.
    category_dropout: float = 0.25
    # Positions that have their own bias in training; later ones share the last.
    positions: int = 50
    # Heads that the log had labels for; the others score 0.
    trained_heads: tuple[str, ...] = ("click",)
    # False: of the user only the vector and the statistics count, which makes a scorer light enough to cut lists with.
    reads_history: bool = True
    # Of the model that it learnt from and works for.
    teacher_version: str = ""
    feature_signature: str = SIGNATURE
    model_version: str = ""


class RankerBatch(NamedTuple):
    """Tensors of B users with C candidates (padded behind) and L history entries (padded in front)."""

    # [B, d], zeros where there is none, and whether there is one [B, 1].
    user_vectors: Tensor
    has_vector: Tensor
    # Rows of the item table, -1 = padding or unknown [B, L], with weights and ages [B, L].
    history_rows: Tensor
    history_weights: Tensor
    history_ages: Tensor
    # [B, len(USER_FEATURES)]
    users: Tensor
    # [B, C] and [B, C, len(CANDIDATE_FEATURES)]
    candidate_rows: Tensor
    candidates: Tensor

    def to(self, device: torch.device) -> "RankerBatch":
        return RankerBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Tables(Protocol):
    """What rows of items mean: vectors [n + 1, d + taste_width], category numbers [n + 1, 4]; row 0: not known."""

    @property
    def vectors(self) -> Tensor: ...

    @property
    def categories(self) -> Tensor: ...


class ItemTable:
    """Vectors and categories of the items on the device, by catalogue row. One writer; readers may run beside it."""

    def __init__(self, vectors: Floats, categories: Rows, device: torch.device | None = None) -> None:
        count = len(vectors)
        # Rows below this have a vector from training.
        self.vector_count = count
        self._device = device or torch.device("cpu")
        # Row 0 stands for whatever is not known; item r is in row r + 1.
        self.vectors = torch.zeros(count + 1, vectors.shape[1], device=self._device)
        self.vectors[1:] = torch.from_numpy(np.nan_to_num(vectors)).to(self._device)
        self.categories = torch.zeros(count + 1, categories.shape[1], dtype=torch.int32, device=self._device)
        self.put_categories(0, categories)

    def __len__(self) -> int:
        return len(self.vectors) - 1

    def put_categories(self, row: int, categories: Rows) -> None:
        """Sets the categories of the items from `row` on, [n, 4]; later items have no vector (zeros)."""
        end = row + 1 + len(categories)
        if end > len(self.vectors):
            more = max(end, 2 * len(self.vectors)) - len(self.vectors)
            width = self.categories.shape[1]
            grown = torch.cat([self.categories, torch.zeros(more, width, dtype=torch.int32, device=self._device)])
            # `vectors` decides the length: it comes last to grow.
            self.categories = grown
            self.vectors = torch.cat([self.vectors, torch.zeros(more, self.vectors.shape[1], device=self._device)])
        self.categories[row + 1 : end] = torch.from_numpy(np.ascontiguousarray(categories)).to(self._device)


def item_table(model: "RankerModel", item_vectors: Floats, categories: Rows, device: torch.device) -> ItemTable:
    """The towers' vectors [n, d] with the model's tastes beside them; zeros for items that it was not trained on."""
    tastes = np.zeros((len(item_vectors), model.config.taste_width), np.float32)
    trained = model.tastes.cpu().numpy()[: len(tastes)]
    tastes[: len(trained)] = trained
    return ItemTable(np.concatenate([item_vectors, tastes], 1), categories, device)


class Cross(nn.Module):
    """One DCN-v2 layer with a low-rank matrix: x0 * (U V x + b) + x."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.addcmul(x, first, self.up(self.down(x)))
        return out


class RankerModel(nn.Module):
    """Logits of every head for every candidate."""

    user_mean: Tensor
    user_std: Tensor
    candidate_mean: Tensor
    candidate_std: Tensor
    similarity_mean: Tensor
    similarity_std: Tensor
    # [items, taste_width]: which items the same people like; the scorer puts them beside the towers' vectors.
    tastes: Tensor

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.config = config
        dimension, width = config.dimension, config.attention_width
        similar = SIMILARITIES if config.reads_history else USER_SIMILARITIES
        widths_of = {"user": len(USER_FEATURES), "candidate": len(CANDIDATE_FEATURES), "similarity": similar}
        for name, features in widths_of.items():
            self.register_buffer(f"{name}_mean", torch.zeros(features))
            self.register_buffer(f"{name}_std", torch.ones(features))
        self.register_buffer("tastes", torch.zeros(config.items, config.taste_width))
        if config.item_width:
            self.item = nn.Linear(dimension, config.item_width)
        if config.category_width:
            self.category = nn.Embedding(CATEGORY_VOCABULARY, config.category_width, padding_idx=0)
            nn.init.normal_(self.category.weight, std=0.1)
            with torch.no_grad():
                self.category.weight[0] = 0.0
        if width:
            self.query = nn.Linear(dimension, width)
            self.key_value = nn.Linear(dimension, 2 * width)
            # What weight and age of a history entry add to its key and value.
            self.event = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2 * width))
            # The attention on "nothing in the history": an empty history has all of it.
            self.no_match = nn.Parameter(torch.zeros(1))
        self.user = nn.Linear(len(USER_FEATURES) + dimension + 1, config.user_width)
        total = (
            len(CANDIDATE_FEATURES) + similar + config.item_width + config.category_width + width
        ) + config.user_width
        self.crosses = nn.ModuleList(Cross(total, config.cross_rank) for _ in range(config.cross_layers))
        widths = [total, *config.hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(config.dropout)
        self.category_dropout = nn.Dropout(config.category_dropout)
        self.heads = nn.Linear(widths[-1] + total, len(HEADS))
        # Of the user's vector's own say, to which the network adds.
        self.sharpness = nn.Parameter(torch.full((1,), FIRST_SHARPNESS))
        # Index 0 = unknown position, as in every request.
        self.position = nn.Embedding(config.positions + 1, 1, padding_idx=0)
        nn.init.zeros_(self.position.weight)

    def forward(self, batch: RankerBatch, table: Tables, positions: Tensor | None = None) -> Tensor:
        """Logits [B, C, len(HEADS)].

        Args:
            batch: B users, C candidates, L history entries.
            table: what the rows mean.
            positions: only in training: where the candidate was shown, 0 = first, -1 = unknown [B, C].
        """
        candidates, history = self._vectors(batch, table)
        alike = self._alike(candidates, history, batch)
        users = torch.cat([self._standard(batch.users, "user"), batch.user_vectors, batch.has_vector], -1)
        parts = [self._standard(torch.cat([batch.candidates, alike], -1), "candidate", "similarity")]
        if self.config.item_width:
            parts.append(self.item(candidates[..., : self.config.dimension]))
        if self.config.category_width:
            parts.append(self._categories(batch.candidate_rows, table))
        if self.config.attention_width:
            parts.append(self._attend(candidates, history, batch))
        parts.append(relu(self.user(users)).unsqueeze(1).expand(-1, candidates.shape[1], -1))
        x = torch.cat(parts, -1)
        crossed = x
        for cross in self.crosses:
            crossed = cross(x, crossed)
        deep = x
        for layer in self.layers:
            deep = self.dropout(relu(layer(deep)))
        # As of the two side by side, without putting them there; and in the heads' digits, where the rest has fewer.
        weight, width = self.heads.weight, crossed.shape[-1]
        crossed, deep = crossed.to(weight.dtype), deep.to(weight.dtype)
        logits: Tensor = linear(crossed, weight[:, :width]) + linear(deep, weight[:, width:], self.heads.bias)
        logits = logits + alike[..., :1] * pad(self.sharpness, (0, len(HEADS) - 1))
        if positions is not None:
            shown = positions.clamp(-1, self.config.positions - 1) + 1
            logits = logits + self.position(shown)
        return logits

    def begin_as_retrieved(self) -> None:
        """Sets the network to nothing: its order is that of the user's vector until it has learnt better."""
        with torch.no_grad():
            self.heads.weight.zero_()
            self.heads.bias.zero_()

    def alike(self, batch: RankerBatch, table: Tables) -> Tensor:
        """The similarities as they are, [B, C, S]."""
        return self._alike(*self._vectors(batch, table), batch)

    def _vectors(self, batch: RankerBatch, table: Tables) -> tuple[Tensor, Tensor]:
        """Of the candidates [B, C, d + k] and, where it is read, of the history [B, L, d + k]."""
        history = batch.history_rows if self.config.reads_history else batch.history_rows[:, :0]
        return embedding(batch.candidate_rows + 1, table.vectors), embedding(history + 1, table.vectors)

    def _alike(self, candidates: Tensor, history: Tensor, batch: RankerBatch) -> Tensor:
        if not self.config.reads_history:
            return user_similarities(candidates, batch, self.config.dimension)
        return similarities(candidates, history, batch, self.config.dimension)

    def set_scale(self, users: Tensor, candidates: Tensor, similarities: Tensor | None = None) -> None:
        """Takes mean and standard deviation of the inputs from training rows, [n, F] each."""
        for name, rows in (("user", users), ("candidate", candidates), ("similarity", similarities)):
            if rows is None:
                continue
            getattr(self, f"{name}_mean").copy_(rows.mean(0))
            spread = rows.std(0) if len(rows) > 1 else torch.zeros(rows.shape[1])
            # What never varied in training must not shout when it does.
            getattr(self, f"{name}_std").copy_(torch.where(spread > 1e-3, spread, torch.ones_like(spread)))

    def _standard(self, values: Tensor, *names: str) -> Tensor:
        mean, std = (torch.cat([getattr(self, f"{name}_{part}") for name in names]) for part in ("mean", "std"))
        scaled = ((values - mean.to(values.dtype)) / std.to(values.dtype)).clamp(-_CLIP, _CLIP)
        # What is not a number stands at the mean.
        return torch.where(scaled.isnan(), 0.0, scaled).to(mean.dtype)

    def _categories(self, rows: Tensor, table: Tables) -> Tensor:
        """Mean embedding of each candidate's categories, [B, C, category_width]."""
        ids = embedding(rows + 1, table.categories)
        count = (ids > 0).sum(-1, keepdim=True).clamp(min=1)
        # A product: ONNX Runtime takes ten times as long to sum over an inner axis.
        of_each = self.category(ids)
        ones = torch.eye(of_each.shape[-1], dtype=of_each.dtype, device=of_each.device)
        summed = of_each.flatten(-2) @ ones.repeat(ids.shape[-1], 1)
        mean: Tensor = summed / count
        return mean * self.category_dropout(mean.new_ones(len(mean), 1, 1)) if self.training else mean

    def _attend(self, candidates: Tensor, history: Tensor, batch: RankerBatch) -> Tensor:
        """What of the history speaks to each candidate, [B, C, attention_width]."""
        candidates, history = (one[..., : self.config.dimension] for one in (candidates, history))
        event = torch.stack([batch.history_weights, batch.history_ages], -1)
        keys, values = (self.key_value(history) + self.event(event)).chunk(2, -1)
        # "Nothing" comes first: a key and a value of zeros, whose logit is its own.
        keys, values = (pad(one, (0, 0, 1, 0)) for one in (keys, values))
        hidden = torch.where(batch.history_rows < 0, _MASKED, 0.0).to(keys.dtype)
        own = torch.cat([self.no_match.expand(hidden.shape[0], 1), hidden], 1).unsqueeze(1)
        scaled = self.query(candidates) * self.config.attention_width**-0.5
        attended: Tensor = (scaled @ keys.transpose(1, 2) + own).softmax(-1) @ values
        return attended

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def save_ranker(model: RankerModel, folder: Path, files: tuple[str, str] = MAIN) -> RankerModel:
    """Writes weights and configuration into `folder`; the model then bears the version made from its content."""
    weights, config = files
    raw = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    model.config = replace(model.config, model_version=_version(raw, model.config))
    (folder / weights).write_bytes(raw)
    (folder / config).write_text(json.dumps(asdict(model.config), indent=2, sort_keys=True) + "\n", "utf-8")
    return model


def load_ranker(folder: Path, files: tuple[str, str] = MAIN) -> RankerModel:
    """Reads what `save_ranker` wrote, ready for inference on the CPU.

    Raises:
        ArtifactError: files missing or changed, or features of another signature than this version computes.
    """
    weights, described = files
    try:
        values = json.loads((folder / described).read_text("utf-8"))
        values["hidden"], values["trained_heads"] = tuple(values["hidden"]), tuple(values["trained_heads"])
        config = RankerConfig(**values)
        if config.feature_signature != SIGNATURE:
            raise ArtifactError(
                f"ranker {config.model_version} in {folder} reads features {config.feature_signature}, this version "
                f"computes {SIGNATURE}; train again with `headrace train`"
            )
        raw = (folder / weights).read_bytes()
        if _version(raw, config) != config.model_version:
            raise ArtifactError(f"{folder / weights} is not what {described} describes; train again or roll back")
        model = RankerModel(config)
        state = load_file(folder / weights)
        if broken := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(f"{broken[0]} is not finite")
        model.load_state_dict(state)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ArtifactError(f"ranker in {folder} cannot be read ({problem}); train again or roll back") from error
    return model.eval().requires_grad_(requires_grad=False)


def _version(raw: bytes, config: RankerConfig) -> str:
    shape = repr(sorted(asdict(replace(config, model_version="")).items()))
    return hashlib.blake2b(shape.encode() + raw, digest_size=6).hexdigest()
