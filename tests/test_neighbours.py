"""Neighbours and their statistics equal a brute-force reference, and nobody is their own neighbour."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_router.errors import InputError
from prefill_router.semantic.families import Sources, check_family, features_of
from prefill_router.semantic.neighbours import NEIGHBOURS, STATISTICS, search, share_right, statistics

RNG = np.random.default_rng(0)
KNOWN = RNG.normal(size=(140, 5)).astype(np.float32)
QUERIES = RNG.normal(size=(23, 5)).astype(np.float32)
CORRECT = np.where(RNG.random((140, 3)) < 0.2, np.nan, (RNG.random((140, 3)) < [0.5, 0.9, 0.1]).astype(float))


def reference(query: np.ndarray, known: np.ndarray, labels: np.ndarray) -> list[float]:
    """One query, one model, by the definitions, in plain loops."""
    prior = np.nanmean(labels)
    ordered = sorted(
        (
            (float(np.sqrt(((query - row) ** 2).sum())), label)
            for row, label in zip(known.astype(np.float64), labels, strict=True)
        ),
        key=lambda pair: pair[0],
    )
    values = []
    for k in NEIGHBOURS:
        near = ordered[:k]
        farthest = near[-1][0]

        def share(pairs, weigh, prior=prior):
            pairs = [(weigh(rank, d), label) for rank, (d, label) in enumerate(pairs, 1) if not np.isnan(label)]
            return sum(w * y for w, y in pairs) / sum(w for w, _ in pairs) if pairs else prior

        d = [pair[0] for pair in near]
        right, wrong = ([pair[0] for pair in near if pair[1] == wanted] for wanted in (1, 0))
        values += [
            share(near, lambda *_: 1),
            share(near, lambda _, d: 1 / (d + 1e-3)),
            share(near, lambda rank, _: 1 / rank),
            share(near[: max(k // 2, 1)], lambda *_: 1),
            np.mean(d),
            np.std(d),
            np.mean(right) if right else farthest,
            np.mean(wrong) if wrong else farthest,
            min(right, default=farthest),
            min(wrong, default=farthest),
        ]
    return values


def test_statistics_equal_the_brute_force_reference():
    found = statistics(KNOWN, CORRECT, QUERIES)
    assert found.shape == (23, 3, len(NEIGHBOURS) * len(STATISTICS)) == (23, 3, 50)
    for query in range(23):
        for model in range(3):
            np.testing.assert_allclose(
                found[query, model], reference(QUERIES[query], KNOWN, CORRECT[:, model]), rtol=1e-4, atol=1e-5
            )


def test_a_training_query_is_left_out_of_its_own_neighbourhood():
    found = statistics(KNOWN, CORRECT, KNOWN, np.arange(140), np.arange(140))
    for query in (0, 17, 139):
        rest = np.arange(140) != query
        for model in range(3):
            np.testing.assert_allclose(
                found[query, model], reference(KNOWN[query], KNOWN[rest], CORRECT[rest, model]), rtol=1e-4, atol=1e-5
            )


def test_a_training_querys_whole_group_is_left_out():
    """Groups of unequal sizes, whose members are near each other: by the definitions on the rest."""
    groups = np.repeat(np.arange(40), np.tile([1, 2, 4], 14)[:40])[:140]
    groups = np.concatenate([groups, np.full(140 - len(groups), 99)])
    near = KNOWN[np.searchsorted(np.unique(groups), groups)] + 0.01 * KNOWN
    found = statistics(near, CORRECT, near, groups, groups)
    for query in (0, 5, 60, 139):
        rest = groups != groups[query]
        for model in range(3):
            values = reference(near[query], near[rest], CORRECT[rest, model])
            counted = min(100, 140 - np.unique(groups, return_counts=True)[1].max())
            whole = sum(len(STATISTICS) for k in NEIGHBOURS if k <= counted)  # for larger k fewer neighbours exist
            np.testing.assert_allclose(found[query, model, :whole], values[:whole], rtol=1e-3, atol=1e-4)


def test_where_nothing_is_labelled_the_share_leaves_the_own_group_out():
    correct = np.full((8, 1), np.nan)
    correct[[0, 7], 0] = 1, 0  # too far to be among the five nearest of each other
    known = np.array([[0.0], [1], [2], [3], [4], [5], [6], [20]], dtype=np.float32)
    every = np.arange(8)
    for label in (0, 1):
        correct[0, 0] = label
        assert statistics(known, correct, known, every, every)[0, 0, 0] == 0  # the other one's


def test_nobody_is_their_own_neighbour_among_duplicates():
    known = np.repeat(KNOWN[:4], 6, axis=0)
    _, rows = search(known, known, 3, np.arange(24), np.arange(24))
    assert rows.shape == (24, 3)
    assert not (rows == np.arange(24)[:, None]).any()


def test_where_fewer_are_known_than_asked_for_all_are_neighbours():
    distances, rows = search(KNOWN[:4], QUERIES, 10)
    assert distances.shape == rows.shape == (23, 4)
    assert statistics(KNOWN[:4], CORRECT[:4], QUERIES).shape == (23, 3, 50)


def test_where_no_neighbour_is_labelled_the_models_share_stands():
    labels = np.full((1, 2, 2), np.nan)
    labels[0, 1, 0] = 1
    found = share_right(np.array([[0.1, 0.2]]), labels, "inverse", np.array([[0.3, 0.4]]))
    np.testing.assert_allclose(found, [[1.0, 0.4]])


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("uniform", 0.5), ("inverse", 2.001 / 3.002), ("gaussian", np.exp(-1 / 8) / (np.exp(-1 / 8) + np.exp(-1 / 2)))],
)
def test_kernels_by_hand(kernel: str, expected: float):
    labels = np.array([[[1.0], [0.0]]])
    np.testing.assert_allclose(
        share_right(np.array([[1.0, 2.0]]), labels, kernel, np.array([[0.5]])), [[expected]], rtol=1e-6
    )


def test_no_family_reads_a_query_that_is_not_for_training():
    """Other labels and embeddings of queries outside the training part change nothing of those inside."""
    train = np.arange(100)
    sources = Sources({"a": KNOWN}, np.array(["text"] * 140, dtype=object))
    other = Sources({"a": np.concatenate([KNOWN[:100], KNOWN[100:] + 3])}, sources.prompts)
    labels = CORRECT.copy()
    labels[100:] = 1
    for family in ("embedding", "pca128", "knn", "pca128+knn"):
        before, after = (
            features_of(family, *given, train).take(train) for given in ((sources, CORRECT), (other, labels))
        )
        np.testing.assert_array_equal(before.flat(), after.flat())
    assert features_of("pca128+knn", sources, CORRECT, train).flat().shape == (140, 5 + 3 * 50)


@pytest.mark.parametrize("family", ["embedding", "pca128", "knn", "pca128+knn+complexity"])
def test_a_family_reads_the_embedding_of_the_named_encoder(family: str):
    train, text = np.arange(100), {"complexity": KNOWN[:, :2]}
    other = np.random.default_rng(1).normal(size=(140, 7)).astype(np.float32)
    prompts = np.array([""] * 140, dtype=object)
    both = Sources({"a": KNOWN, "b": other}, prompts, text)

    def of(sources: Sources, encoder: str | None = None) -> np.ndarray:
        return features_of(family, sources, CORRECT, train, encoder=encoder).flat()

    np.testing.assert_array_equal(of(both, "b"), of(Sources({"b": other}, prompts, text)))
    np.testing.assert_array_equal(of(both), of(both, "a"))
    assert of(both).shape != of(both, "b").shape or not np.array_equal(of(both), of(both, "b"))
    with pytest.raises(InputError, match="encoder: got 'c', the encoders with an embedding are a, b"):
        check_family(family, both, "c")


def test_a_training_querys_own_label_is_not_among_its_statistics():
    sources, train = Sources({"a": KNOWN}, np.array([""] * 140, dtype=object)), np.arange(140)
    labels = CORRECT.copy()
    labels[7] = 1 - np.nan_to_num(labels[7])
    before, after = (features_of("knn", sources, given, train).own for given in (CORRECT, labels))
    np.testing.assert_array_equal(before[7], after[7])
    assert not np.array_equal(before, after)


def test_principal_components_are_uncorrelated_on_the_training_queries():
    x = features_of(
        "pca128", Sources({"a": KNOWN}, np.array([""] * 140, dtype=object)), CORRECT, np.arange(100)
    ).shared[:100]
    covariance = np.cov(x.T)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-4)
    assert (np.diff(np.diag(covariance)) <= 0).all()
    np.testing.assert_allclose(np.diag(covariance).mean(), 1, rtol=0.02)  # one scale for all: they are not whitened


@pytest.mark.parametrize(
    ("family", "message"),
    [("pca128+elo", "part 'elo'; the parts are"), ("complexity", "needs complexity.*jobs.features")],
)
def test_a_family_that_cannot_be_made_is_refused(family: str, message: str):
    with pytest.raises(InputError, match=message):
        check_family(family, Sources({"a": KNOWN}, np.array([""] * 140, dtype=object)))
