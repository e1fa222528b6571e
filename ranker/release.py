"""One release as the ranker holds it: catalogue, statistics and model that agree, and users' jobs on them.

Loaded from a bundle, then kept fresh by one writer (ranker/feed.py). Invariant: a job is scored by one release from
beginning to end; a bundle whose parts do not fit each other, or whose warm-up fails, refuses to load.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.bundle import (
    ITEM_VECTORS,
    RANKER_FORM,
    RANKER_INT8,
    RANKER_LIGHT,
    RANKER_LIGHT_ONNX,
    RANKER_ONNX,
    RANKER_PROBE,
    ReleaseBundle,
)
from core.clock import Clock
from core.deadline import Deadline
from core.errors import ArtifactError, StageError
from core.settings import RankerSettings, Settings
from core.telemetry import get_logger
from features import feature_log
from features.catalog import Catalog, Floats, Rows
from features.item_vectors import read_item_vectors
from features.vectors import SIGNATURE, RankerInput, ranker_input
from features.windows import Interaction, UserState
from headrace.v1.events_pb2 import Item, ItemStats
from headrace.v1.feature_log_pb2 import LoggedFeatures
from ranker import metrics
from ranker.calibration import load_calibration
from ranker.cascade import Cascade
from ranker.forms import (
    BF16,
    FORMS,
    MAX_SCORE_CHANGE,
    ONNX,
    ONNX_INT8,
    TORCH,
    TRITON,
    Bf16Network,
    Network,
    OnnxNetwork,
    TorchNetwork,
    score_change,
)
from ranker.health import Health, Reference, rows_of
from ranker.model import LIGHT, RankerBatch, load_ranker
from ranker.probe import EMPTY, Probe, load_probe
from ranker.scorer import Scorer, Scores, collate
from ranker.triton import TritonNetwork

_log = get_logger("ranker")

_WARM_UP_ROUNDS, _WARM_UP_CANDIDATES = 10, 500
# Of the probe: enough to see a form that drifts, few enough to load quickly.
_CHECKED_LISTS = 32


@dataclass(frozen=True, slots=True)
class UserJob:
    """What is to be ranked for one user: C candidates."""

    release: "Release"
    state: UserState
    user_vector: Floats | None
    item_ids: Sequence[str]
    # [C] each.
    retrieval_scores: Floats
    source_bits: Rows
    now_ms: int
    # So many candidates' features are told, best first.
    log_features_of: int = 0
    # Of the call; None = no hurry.
    deadline: Deadline | None = None


class Release:
    """What jobs are scored with. Methods that change it are for one thread."""

    def __init__(
        self, bundle: ReleaseBundle, catalog: Catalog, scorer: Scorer, cascade: Cascade, load_time_ms: int
    ) -> None:
        # None until the warm-up is over: it is no traffic.
        self.health: Health | None = None
        self.manifest = bundle.manifest
        self.catalog = catalog
        self.scorer = scorer
        self.cascade = cascade
        self.load_time_ms = load_time_ms

    @property
    def version(self) -> str:
        return self.manifest.bundle_version

    @property
    def model_version(self) -> str:
        return self.scorer.model.config.model_version

    @property
    def dimension(self) -> int:
        return self.scorer.model.config.dimension

    def score(self, jobs: Sequence[UserJob], settings: Settings) -> list[Scores]:
        """Scores of users that are all to be scored by this release."""
        with _timed("features"):
            inputs, noted = self._inputs(jobs, settings)
        vectors = [job.user_vector for job in jobs]
        counts = [len(job.item_ids) for job in jobs]
        keep = self.cascade.keep(sum(counts), (job.deadline for job in jobs))
        with _timed("model"), self.cascade.measured(sum(min(count, keep or count) for count in counts)):
            made = self.scorer.score(inputs, vectors, keep)
        metrics.cut_candidates.inc(sum(int(one.cut.sum()) for one in made if one.cut is not None))
        if self.health is not None:
            with _timed("health"):
                states, times_ms = [job.state for job in jobs], [job.now_ms for job in jobs]
                # Scores of two models in one list are not spread like those of one.
                scores = [one.score if one.cut is None else one.score[:0] for one in made]
                self.health.see(states, vectors, times_ms, inputs, scores)
        for index, features in noted.items():
            best = np.argsort(-made[index].score, kind="stable")[: jobs[index].log_features_of]
            feature_log.keep(features, best.tolist())
            made[index] = made[index]._replace(features=features)
        return made

    def _inputs(
        self, jobs: Sequence[UserJob], settings: Settings
    ) -> tuple[list[RankerInput], dict[int, LoggedFeatures]]:
        """What the model reads of each job; and of those that log it, by index, what it was made from."""
        inputs: list[RankerInput] = []
        noted: dict[int, LoggedFeatures] = {}
        for index, job in enumerate(jobs):
            if not job.log_features_of:
                inputs.append(self._input(job, settings))
                continue
            # A row that changed meanwhile would be of neither revision.
            with self.catalog.held():
                made = self._input(job, settings)
                noted[index] = feature_log.note(
                    job.state, job.item_ids, made, self.catalog, job.now_ms, self.manifest.bundle_version
                )
            inputs.append(made)
        return inputs, noted

    def _input(self, job: UserJob, settings: Settings) -> RankerInput:
        rows = self.catalog.rows(job.item_ids)
        metrics.candidates.inc(len(rows))
        metrics.unknown_candidates.inc(int((rows < 0).sum()))
        scores, bits = job.retrieval_scores, job.source_bits
        return ranker_input(job.state, self.catalog, rows, scores, bits, job.now_ms, settings.features)

    def put_item(self, item: Item) -> None:
        row = self.catalog.upsert(item)
        self.scorer.table.put_categories(row, self.catalog.column("categories")[row : row + 1])

    def remove_item(self, item_id: str) -> None:
        self.catalog.remove(item_id)

    def put_stats(self, stats: ItemStats) -> None:
        self.catalog.put_stats(stats)


def load_release(bundle: ReleaseBundle, settings: Settings, clock: Clock) -> Release:
    """Reads the ranker's part of a bundle and tries it out.

    Raises:
        ArtifactError: a part is missing, broken, does not fit the others, or does not score.
    """
    try:
        return _load(bundle, settings, clock)
    except StageError as error:
        raise ArtifactError(f"bundle {bundle.version} could not be tried out: {error}") from error


def _load(bundle: ReleaseBundle, settings: Settings, clock: Clock) -> Release:
    manifest = bundle.manifest
    if manifest.feature_signature != SIGNATURE:
        raise ArtifactError(
            f"bundle {bundle.version} has features {manifest.feature_signature}, this version computes {SIGNATURE}; "
            "train again with `headrace train`"
        )
    model = load_ranker(bundle.path)
    if model.config.model_version != manifest.model_version:
        raise ArtifactError(f"bundle {bundle.version} names ranker {manifest.model_version} but holds another")
    # What costs little comes first: a bundle that must not serve is refused before its items are read.
    calibration = load_calibration(bundle.path)
    catalog = Catalog.of_items(bundle.items(), settings.features, with_revisions=True)
    vectors, _ = read_item_vectors(bundle.file(ITEM_VECTORS))
    if vectors.shape != (len(catalog), model.config.dimension):
        raise ArtifactError(
            f"bundle {bundle.version}: {len(catalog)} items, a ranker for {model.config.dimension} dimensions, but "
            f"vectors {vectors.shape}; train again with `headrace train`"
        )
    device = choose_device(settings.ranker.device)
    scorer = Scorer(model, vectors, catalog.column("categories"), calibration, device)
    probe = load_probe(bundle.path) if bundle.has(RANKER_PROBE) else EMPTY
    scorer.network = choose_network(bundle, scorer, probe, settings.ranker)
    scorer.light = _light(bundle, scorer, probe, settings.ranker.form)
    catalog.put_all_stats(bundle.item_stats())
    cascade = Cascade(settings.ranker.cascade_keep, clock)
    release = Release(bundle, catalog, scorer, cascade, clock.now_ms())
    warm_up(release, settings)
    release.health = Health(_reference(probe, scorer), settings.features)
    if isinstance(scorer.network, TritonNetwork):
        scorer.network.begin_to_serve()
    return release


def choose_network(bundle: ReleaseBundle, scorer: Scorer, probe: Probe, own: RankerSettings) -> Network:
    """The network in the form of the setting `ranker.form`, checked against the one as trained.

    Raises:
        ArtifactError: the form that the setting names is not in the bundle, cannot run here, or drifts.
        StageError: the server that computes it does not answer.
    """
    wanted: str = own.form
    if own.form == "auto":
        wanted = _own_form(bundle) if scorer.device.type == "cpu" else TORCH
    if wanted == TORCH:
        return scorer.network
    try:
        network = _network(bundle, scorer, wanted, own)
        _check(network, scorer.network, bundle, scorer, probe)
    except ArtifactError as error:
        if own.form != "auto":
            raise
        _log.warning("scores are computed by torch", bundle=bundle.version, problem=str(error))
        return scorer.network
    return network


def _check(network: Network, reference: Network, bundle: ReleaseBundle, scorer: Scorer, probe: Probe) -> None:
    """Raises ArtifactError where a form is too far from the network as trained."""
    change = score_change(network, reference, _probe_batches(probe, scorer), scorer.table)
    if not change <= MAX_SCORE_CHANGE:
        raise ArtifactError(
            f"bundle {bundle.version}: form {network.form} changes a score by {change:.4f} (allowed "
            f"{MAX_SCORE_CHANGE}); export it again or set ranker.form to torch"
        )


def _light(bundle: ReleaseBundle, scorer: Scorer, probe: Probe, form: str) -> Network | None:
    """The light scorer of the bundle's ranker; None where it has none: lists are never cut then."""
    if not bundle.has(RANKER_LIGHT):
        return None
    model = load_ranker(bundle.path, LIGHT)
    if model.config.teacher_version != scorer.model.config.model_version:
        raise ArtifactError(
            f"bundle {bundle.version}: the light scorer {model.config.model_version} was made for ranker "
            f"{model.config.teacher_version}, the bundle holds another; train again with `headrace train`"
        )
    trained = TorchNetwork(model, scorer.device)
    if form == TORCH or scorer.device.type != "cpu" or not bundle.has(RANKER_LIGHT_ONNX):
        return trained
    try:
        network = OnnxNetwork(bundle.file(RANKER_LIGHT_ONNX), ONNX)
        _check(network, trained, bundle, scorer, probe)
    except ArtifactError as error:
        _log.warning("the light scorer is computed by torch", bundle=bundle.version, problem=str(error))
        return trained
    return network


def _reference(probe: Probe, scorer: Scorer) -> Reference | None:
    """What the probe's features, and this release's scores of them, look like."""
    if not any(len(one.candidate_rows) for one in probe.inputs):
        return None
    inputs, vectors = probe.inputs[:_CHECKED_LISTS], probe.user_vectors[:_CHECKED_LISTS]
    scores = scorer.score(inputs, vectors)
    return Reference(np.concatenate([rows_of(one, made.score) for one, made in zip(inputs, scores, strict=True)]))


def _own_form(bundle: ReleaseBundle) -> str:
    if bundle.has(RANKER_FORM):
        return bundle.file(RANKER_FORM).read_text("utf-8").strip()
    return ONNX if bundle.has(RANKER_ONNX) else TORCH


def _network(bundle: ReleaseBundle, scorer: Scorer, form: str, own: RankerSettings) -> Network:
    if form == BF16:
        return Bf16Network(scorer.model, scorer.device)
    files = {ONNX: RANKER_ONNX, ONNX_INT8: RANKER_INT8}
    if form not in (*files, TRITON):
        raise ArtifactError(f"bundle {bundle.version} asks for form {form!r}, this version knows {', '.join(FORMS)}")
    if scorer.device.type != "cpu":
        raise ArtifactError(f"form {form} runs on a CPU only; set ranker.device to cpu, or form to torch or bf16")
    if form == TRITON:
        return TritonNetwork(own.triton_target, own.triton_timeout_ms, bundle.version, scorer.model.config.dimension)
    return OnnxNetwork(bundle.file(files[form]), form)


def _probe_batches(probe: Probe, scorer: Scorer) -> list[RankerBatch]:
    chosen = list(zip(probe.inputs, probe.user_vectors, strict=True))[:_CHECKED_LISTS]
    dimension, count = scorer.model.config.dimension, len(scorer.table)
    return [collate([one], [vector], dimension, count) for one, vector in chosen if len(one.candidate_rows)]


def choose_device(name: str) -> torch.device:
    """The device of the setting `ranker.device`; `auto` is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ArtifactError("ranker.device is cuda but torch sees no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def score_jobs(jobs: Sequence[UserJob], settings: Settings) -> list[Scores]:
    """Scores of users, in their order; each by its own release."""
    scores: dict[int, Scores] = {}
    for release in {id(job.release): job.release for job in jobs}.values():
        chosen = [index for index, job in enumerate(jobs) if job.release is release]
        made = release.score([jobs[index] for index in chosen], settings)
        scores.update(zip(chosen, made, strict=True))
    replaced = sum(one.replaced_count for one in scores.values())
    if replaced:
        metrics.not_finite.inc(replaced)
    return [scores[index] for index in range(len(jobs))]


@contextmanager
def _timed(stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    metrics.stage_ms.labels(stage).observe((time.perf_counter() - started) * 1000)


def warm_up(release: Release, settings: Settings) -> None:
    """Scores a made-up user: kernels are chosen, memory is there. Raises ArtifactError where no sound score comes."""
    item_ids = release.catalog.item_ids[:_WARM_UP_CANDIDATES]
    now_ms = release.manifest.data_watermark_ms + 1000
    history = [Interaction(now_ms - 1, number, item_id, "click", 1.0) for number, item_id in enumerate(item_ids[:20])]
    count = len(item_ids)
    vector = np.full(release.dimension, release.dimension**-0.5, np.float32)
    state = UserState(revision=len(history), watermark_ms=now_ms - 1, history=history)
    retrieval = np.linspace(1, 0, count, dtype=np.float32)
    job = UserJob(release, state, vector, item_ids, retrieval, np.ones(count, np.int32), now_ms)
    # The first one is too late for the whole list.
    for one, size in ((replace(job, deadline=Deadline(0.0)), 1), *((job, size) for size in (1, 4) * _WARM_UP_ROUNDS)):
        for scores in score_jobs([one] * size, settings):
            if scores.replaced_count:
                raise ArtifactError(
                    f"bundle {release.manifest.bundle_version}: the ranker's scores are not finite; train again"
                )
