"""What the figures of benchmarks.liveness and benchmarks.index are counted from."""

import numpy as np

from benchmarks.index import bare_index, tuned
from benchmarks.item_vectors import vector_world
from benchmarks.liveness_load import Answers
from candidate.index.exact import search_all


def test_vectors_are_clustered_of_length_one_and_the_same_each_time() -> None:
    world, again = vector_world(2000, 30, 16), vector_world(2000, 30, 16)
    assert (world.items == again.items).all()
    assert (world.users == again.users).all()
    for vectors in world:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # The nearest of 2,000 is far nearer than chance would have it, and no user is an item.
    similar = world.items @ world.items.T
    np.fill_diagonal(similar, -1)
    assert np.median(similar.max(axis=1)) > 3 * np.median(np.abs(similar))
    assert (world.users @ world.items.T).max() < 0.999


def test_queries_count_as_during_a_rebuild_when_they_overlap_it() -> None:
    # Due at 0, 1, 2 s; the second takes until 1.5 s.
    answers = Answers(due=[0.0, 1.0, 2.0], took_ms=[10.0, 500.0, 20.0])
    assert answers.p99([(1.4, 1.6)]) == 500.0
    assert answers.p99([(0.0, 0.005)]) == 10.0
    assert answers.p99([(3.0, 4.0)]) is None
    assert (answers.p99() or 0) > 400


def test_the_bare_index_is_tuned_to_what_was_found() -> None:
    world = vector_world(4000, 40, 64)
    wanted = search_all(world.users, world.items, 500)[0]
    bare = bare_index("IVF64,SQfp16", world.items)
    search, recall, probes = tuned(bare, world.users, wanted, 0.9)
    assert 0.9 <= recall < 1
    bare.nprobe = probes - 1
    assert np.mean([len(np.intersect1d(a, b)) for a, b in zip(search(world.users), wanted, strict=True)]) < 450
