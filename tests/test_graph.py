"""Graph router: learns from neighbours' labels, never from a query's own; attention equals a slow reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from prefill_router.errors import InputError
from prefill_router.semantic.graph import SEARCHED, GraphRouter, _Attention, _nearest, _Network
from prefill_router.semantic.router import Features

pytestmark = pytest.mark.train

SMALL = {"neighbours": 6, "second": 3, "width": 16, "heads": 2, "max_epochs": 6, "learning_rate": 0.01}


def features_of(x: np.ndarray, models: int) -> Features:
    return Features(x.astype(np.float32), np.zeros((len(x), models, 0), np.float32))


def random_data(n: int = 300, models: int = 3, seed: int = 0) -> tuple[Features, np.ndarray, np.ndarray]:
    """Embeddings, labels that are independent of them, and a validation mask."""
    rng = np.random.default_rng(seed)
    correct = (rng.random((n, models)) < 0.5).astype(np.float32)
    correct[rng.random(correct.shape) < 0.1] = np.nan
    return features_of(rng.normal(size=(n, 4)), models), correct, np.arange(n) % 5 == 0


def auc(correct: np.ndarray, p: np.ndarray) -> float:
    """Of all labelled pairs at once."""
    known = np.isfinite(correct)
    return float(roc_auc_score(correct[known], p[known]))


def test_labels_that_features_do_not_tell_are_not_told_by_the_graph():
    """Half the queries are held out; each training query and its label is in about a hundred others' graphs."""
    features, correct, _ = random_data(3000)
    training = np.arange(3000) % 2 == 0
    validation = np.arange(1500) % 5 == 0
    router = GraphRouter(**{**SMALL, "max_epochs": 8, "patience": 8})
    router.fit(features.take(training), correct[training], validation)
    assert auc(correct[~training], router.predict(features.take(~training))) == pytest.approx(0.5, abs=0.03)
    assert auc(correct[training][~validation], router.left_out()) == pytest.approx(0.5, abs=0.05)


def test_training_does_not_teach_to_trust_ones_own_label():
    """Labels are noise, and training goes on for long. Were a query's own label in its graph while it is learned from,
    by the first hop or the second, the network would look for it: a known query that is predicted as a new one finds
    itself, and AUC would be 0.75."""
    features, correct, _ = random_data(1200)
    router = GraphRouter(**{**SMALL, "max_epochs": 10, "dropout": 0.0}).fit(features, correct, np.zeros(1200, bool))
    assert auc(correct, router.predict(features)) < 0.6


def test_a_known_query_is_blind_to_its_own_label_and_sees_those_around_it():
    features, correct, validation = random_data()
    router = GraphRouter(**SMALL).fit(features, correct, validation)
    before, labels = router.left_out(), router.arrays_["known_correct"].copy()
    seen_by_others = 0
    for query in range(0, len(labels), 8):
        router.arrays_["known_correct"] = labels.copy()
        router.arrays_["known_correct"][query] = 1 - np.nan_to_num(labels[query])
        after = router.left_out()
        np.testing.assert_array_equal(after[query], before[query])
        seen_by_others += np.abs(after - before).max() > 1e-4
    assert seen_by_others > 25  # of 30


def test_a_known_query_is_blind_to_the_labels_of_its_whole_group():
    features, correct, validation = random_data(120)
    features = replace(features, groups=np.arange(120) // 6)
    router = GraphRouter(**SMALL).fit(features, correct, validation)
    before, labels = router.left_out(), router.arrays_["known_correct"].copy()
    groups = router.arrays_["known_groups"]
    for group in np.unique(groups)[:8]:
        own = groups == group
        router.arrays_["known_correct"] = np.where(own[:, None], 1 - np.nan_to_num(labels), labels)
        after = router.left_out()
        np.testing.assert_array_equal(after[own], before[own])
        assert not np.array_equal(after, before)


def test_a_known_query_learns_as_if_it_had_not_been_known():
    """Taken out of the known ones and predicted as a new query, it gets the p that it is trained on."""
    features, correct, validation = random_data(120)
    router = GraphRouter(**SMALL).fit(features, correct, validation)
    left_out, query = router.left_out(), 17
    known = router.arrays_["known"]
    rest = np.delete(np.arange(len(known)), query)
    every = np.arange(len(rest))
    hops, distance = _nearest(known[rest], known[rest], router.second + 1, every, every)
    router.arrays_ |= {
        "known": known[rest],
        "known_groups": every,
        "hops": hops,
        "hops_distance": distance,
        "known_correct": router.arrays_["known_correct"][rest],
    }
    np.testing.assert_allclose(router._p(known[[query]], None)[0], left_out[query], atol=1e-6)


def test_it_learns_what_only_neighbours_labels_tell():
    """Clusters with a coin for each, in more directions than a smooth function of so few queries could follow."""
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 150, 1500)
    x = rng.normal(size=(150, 16))[cluster] + 0.2 * rng.normal(size=(1500, 16))
    p = np.where(rng.random((150, 2)) < 0.5, 0.9, 0.1)[cluster]
    correct = (rng.random(p.shape) < p).astype(np.float32)
    features, test = features_of(x, 2), np.arange(1500) >= 1100
    router = GraphRouter(**SMALL).fit(features.take(~test), correct[~test], np.arange(1100) % 5 == 0)
    learned = auc(correct[test], router.predict(features.take(test)))
    router.arrays_["known_correct"] = np.full_like(router.arrays_["known_correct"], np.nan)
    assert learned > 0.8
    assert auc(correct[test], router.predict(features.take(test))) < learned - 0.1


def test_attention_is_that_of_the_paper_written_out():
    torch.manual_seed(0)
    layer = _Attention(6, 2)
    own, others, distance = torch.randn(6), torch.randn(3, 6), torch.rand(3)
    counts = torch.tensor([True, False, True])
    expected = []
    for head, part in enumerate((slice(0, 3), slice(3, 6))):
        nodes = [(own[part], 0.0)] + [(others[n][part], float(distance[n])) for n in (0, 2)]
        scores = torch.stack(
            [
                layer.receiver[head] @ own[part] + layer.sender[head] @ node - layer.nearness[head] * far
                for node, far in nodes
            ]
        )
        shares = torch.softmax(torch.where(scores > 0, scores, 0.2 * scores), dim=0)
        expected.append(sum(share * node for share, (node, _) in zip(shares, nodes, strict=True)))
    mixed = torch.cat(expected)
    torch.testing.assert_close(
        layer(own[None], others[None], distance[None], counts[None])[0],
        torch.where(mixed > 0, mixed, mixed.exp() - 1),
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("n_known", [3, 60])
def test_both_hops_are_those_of_loops_over_nodes(n_known: int):
    features, correct, _ = random_data(100)
    correct[:2] = [[0, 1, 0], [1, 0, 1]]
    router = GraphRouter(**SMALL).fit(features, correct, np.arange(100) >= n_known)
    learned = router.arrays_
    network = _Network(4, 3, router.width, router.heads, 0.0)
    network.load_state_dict({name: torch.from_numpy(learned[name]) for name in network.state_dict()})
    z = features.shared - learned["centre"]
    z /= np.linalg.norm(z, axis=1, keepdims=True)

    def attend(layer: _Attention, own: torch.Tensor, others: list[torch.Tensor], distance: np.ndarray) -> torch.Tensor:
        return layer(own, torch.stack(others), torch.from_numpy(distance), torch.ones(len(others), dtype=torch.bool))

    def nearest(query: np.ndarray, count: int, without: int = -1) -> tuple[np.ndarray, np.ndarray]:
        squares = np.square(learned["known"] - query).sum(axis=1)
        order = [node for node in np.argsort(squares) if node != without][:count]
        return np.array(order), squares[order]

    with torch.no_grad():
        embedded = torch.relu(network.embedding(2 * torch.from_numpy(z[80])))
        labels = learned["known_correct"]
        told = np.column_stack([np.nan_to_num(2 * labels - 1), np.isfinite(labels)]).astype(np.float32)
        known = torch.relu(network.embedding(2 * torch.from_numpy(learned["known"])))
        known = known + network.labels(torch.from_numpy(told))
        values = network.first.project(known)
        near, distance = nearest(z[80], 6)
        first = []
        for node in near:
            hop, far = nearest(learned["known"][node], 3, node)
            first.append(attend(network.first, values[node], [values[other] for other in hop], far))
        own = attend(network.first, network.first.project(embedded), [values[node] for node in near], distance)
        first = [network.then.project(node) for node in first]
        mixed = attend(network.then, network.then.project(own), first, distance)
        expected = torch.sigmoid(network.output(torch.cat([mixed, embedded])))
    np.testing.assert_allclose(router.predict(features)[80], expected.numpy(), atol=1e-5)


def test_the_nearest_are_those_of_a_sort_without_oneself_even_among_duplicates():
    x = np.random.default_rng(0).normal(size=(3 * SEARCHED, 5)).astype(np.float32)
    x[10:16] = x[10]  # oneself need not come first
    near, distance = _nearest(x, x, 4, np.arange(len(x)), np.arange(len(x)))
    assert (near != np.arange(len(x))[:, None]).all()
    expected = np.square(x[:, None] - x[None]).sum(axis=2)
    np.fill_diagonal(expected, np.inf)
    np.testing.assert_allclose(distance, np.sort(expected, axis=1)[:, :4], atol=1e-4)
    few, _ = _nearest(x[:3], x[:3], 4, np.arange(3), np.arange(3))
    assert ((few >= 0).sum(axis=1) == 2).all()


def test_rows_stand_alone_and_a_router_survives_a_round_trip(tmp_path: Path):
    features, correct, validation = random_data(150)
    features = features_of(np.round(features.shared), 3)  # duplicates, so that distances tie
    correct[validation, 1] = np.nan
    router = GraphRouter(**SMALL).fit(features, correct, validation)
    p = router.predict(features)
    for rows in (np.array([3]), np.arange(40, 90)):
        np.testing.assert_allclose(router.predict(features.take(rows)), p[rows], atol=1e-6)
    router.save(tmp_path)
    loaded = GraphRouter.load(tmp_path)
    assert loaded == router
    np.testing.assert_array_equal(loaded.predict(features), p)


def test_a_seed_decides_everything_and_leaves_the_global_generator_alone():
    features, correct, validation = random_data(100)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        GraphRouter(**SMALL).fit(features, correct, validation, seed).predict(features) for seed in (0, 0, 1)
    )
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


@pytest.mark.parametrize("n_known", [1, 2, 5])
def test_fewer_known_queries_than_neighbours_are_enough(n_known: int):
    features, correct, _ = random_data(10)
    correct[:] = np.arange(10)[:, None] % 2
    validation = np.arange(10) >= n_known
    p = GraphRouter(**SMALL).fit(features, correct, validation).predict(features)
    assert np.isfinite(p).all()


def test_without_embeddings_or_with_heads_that_do_not_fit_it_says_so():
    with pytest.raises(InputError, match=r"graph: Features\.shared has width 0"):
        GraphRouter().fit(features_of(np.zeros((4, 0)), 1), np.array([[0.0], [1], [0], [1]]), np.zeros(4, bool))
    with pytest.raises(InputError, match="width: got 30, allowed are multiples of heads"):
        GraphRouter(width=30)
