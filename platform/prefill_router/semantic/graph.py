"""Graph router: two graph attention layers over a query's nearest training queries and their labels.

In: `Features.shared` as an embedding (centred on the training mean, scaled to unit length), and labels of training
queries. Out: p(right) of every model. Known queries are the training queries that are not validation queries. The graph
of a query holds its `neighbours` nearest known queries (Euclidean; FAISS flat L2 index) and the `second` nearest known
queries of each of these. A node's input is its projected embedding, plus its projected labels if it is a known query
(a missing label contributes 0). The layers are those of Velickovic et al. (2018), Graph Attention Networks, equations
1-6, with self-loops and several heads; the score also subtracts the weighted squared distance to the neighbour. Does
not read `Features.own`, and does not handle texts, costs or calibration.

Training shows a query the graph that it would have as a new query, so its own label cannot leak: the query enters
without labels, and its whole group is excluded from its neighbours and from the neighbours of those. Validation queries
are never known queries, so that the validation loss measures prediction. A known query that is predicted after training
has itself as a neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from prefill_router.errors import InputError
from prefill_router.semantic.neighbours import Embedding, search
from prefill_router.semantic.router import Count, Features, Positive, SemanticRouter, Share, Weight
from prefill_router.semantic.stopping import Labels, shuffled_batches, train

SEARCHED = 16  # queries per search; from 20, FAISS uses a matrix product whose rounding depends on the batch
SLOPE = 0.2  # negative slope of the leaky ReLU of scores (Velickovic et al. 2018)


@dataclass
class GraphRouter(SemanticRouter):
    """Graph attention over known queries and their labels, trained by AdamW on the masked log loss."""

    kind: ClassVar[str] = "graph"

    neighbours: Count = 16
    second: Count = 8  # neighbours per neighbour
    width: Count = 64  # of a node, all heads together
    heads: Count = 4
    dropout: Share = 0.3  # probability, on node embeddings and before the output layer
    learning_rate: Positive = 2e-3
    weight_decay: Weight = 0.05  # decoupled: each step subtracts learning rate x weight decay x parameter
    max_epochs: Count = 40
    patience: Count = 8
    batch_size: Count = 256

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(f"width: got {self.width}, allowed are multiples of heads ({self.heads})")

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        if not features.shared.shape[1]:
            raise InputError("graph: Features.shared has width 0; add a part with an embedding, such as pca128")
        embed = Embedding(features.shared[~validation].mean(axis=0))
        known = embed(features.shared[~validation])
        validation_embedding = embed(features.shared[validation])
        every = np.arange(len(known))
        groups = every if features.groups is None else features.groups[~validation]
        # As many more as the query's own group may take up.
        largest = int(np.unique(groups, return_counts=True)[1].max())
        hops = _nearest(known, known, self.second + largest, every, every)
        self.arrays_ |= {
            "centre": embed.mean,
            "known": known,
            "known_correct": correct[~validation].astype(np.float32),
            "known_groups": groups,
            "hops": hops[0],
            "hops_distance": hops[1],
        }
        graph = _Graph.of(self.arrays_, self.second)
        labels, validation_labels = Labels.of(correct[~validation]), Labels.of(correct[validation])
        near, distance = map(torch.from_numpy, _nearest(known, known, self.neighbours, groups, groups))
        validation_near = tuple(map(torch.from_numpy, _nearest(known, validation_embedding, self.neighbours)))
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):  # dropout uses the global generator
            torch.manual_seed(seed)
            network = _Network(known.shape[1], correct.shape[1], self.width, self.heads, self.dropout)
            optimiser = torch.optim.AdamW(
                network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
            )

            def epoch() -> None:
                network.train()
                for rows in shuffled_batches(every, self.batch_size, rng):
                    optimiser.zero_grad(set_to_none=True)
                    logits = network(graph, graph.known[rows], near[rows], distance[rows], graph.groups[rows])
                    labels.loss(logits, rows).backward()
                    optimiser.step()

            def validation_loss() -> float | None:
                if not validation_labels.labelled.any():
                    return None
                logits = self._logits(network, graph, torch.from_numpy(validation_embedding), *validation_near)
                return float(validation_labels.loss(logits, torch.arange(len(logits))))

            train(list(network.parameters()), epoch, validation_loss, self.max_epochs, self.patience, "graph")
        self.arrays_ |= {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        return self._p(Embedding(self.arrays_["centre"])(features.shared), None)

    def left_out(self) -> Float[np.ndarray, "known fitting"]:
        """p of the known queries as in training: without their own groups' labels, for the fitted models only."""
        return self._p(self.arrays_["known"], self.arrays_["known_groups"])

    def _p(self, embedded: np.ndarray, own: Int[np.ndarray, " queries"] | None) -> np.ndarray:
        """p of queries. `own`: their groups, whose known queries are excluded; None for new queries."""
        learned = self.arrays_
        with torch.device("meta"):  # no initial values are drawn
            network = _Network(embedded.shape[1], learned["known_correct"].shape[1], self.width, self.heads, 0.0)
        network.load_state_dict({name: torch.from_numpy(learned[name]) for name in network.state_dict()}, assign=True)
        near, distance = map(
            torch.from_numpy,
            _nearest(
                learned["known"], embedded, self.neighbours, own, None if own is None else learned["known_groups"]
            ),
        )
        logits = self._logits(
            network,
            _Graph.of(learned, self.second),
            torch.from_numpy(embedded),
            near,
            distance,
            None if own is None else torch.from_numpy(own),
        )
        return torch.sigmoid(logits.double()).numpy()

    @torch.no_grad()
    def _logits(
        self,
        network: _Network,
        graph: _Graph,
        embedded: Tensor,
        near: Tensor,
        distance: Tensor,
        own: Tensor | None = None,
    ) -> Tensor:
        network.eval()
        return torch.cat(
            [
                network(graph, embedded[rows], near[rows], distance[rows], None if own is None else own[rows])
                for rows in torch.arange(len(embedded)).split(self.batch_size)
            ]
        )


@dataclass(frozen=True)
class _Graph:
    """The known queries: embeddings, signed labels and label masks [known, 2 models], groups, nearest known queries."""

    known: Tensor
    labels: Tensor
    groups: Tensor
    hops: Tensor
    hops_distance: Tensor
    second: int

    @classmethod
    def of(cls, learned: dict[str, np.ndarray], second: int) -> _Graph:
        labels = Labels.of(learned["known_correct"])
        signed = (2 * labels.correct - 1) * labels.labelled
        return cls(
            torch.from_numpy(learned["known"]),
            torch.cat([signed, labels.labelled], dim=1),
            torch.from_numpy(learned["known_groups"]),
            torch.from_numpy(learned["hops"]),
            torch.from_numpy(learned["hops_distance"]),
            second,
        )

    def hop(self, near: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Second-hop neighbours: (positions, squared distances, mask), each [queries, neighbours, candidates].

        The mask keeps the `second` nearest that are not in the query's group `own`.
        """
        found = self.hops[near]
        counts = found >= 0
        if own is not None:
            counts &= self.groups[found.clamp(min=0)] != own[:, None, None]
        return found.clamp(min=0), self.hops_distance[near], counts & (counts.cumsum(dim=-1) <= self.second)


class _Attention(torch.nn.Module):
    """One attention layer: per head, the softmax-weighted mean of the values of a node and its neighbours."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = torch.nn.Linear(width, width, bias=False)
        self.receiver, self.sender = (
            torch.nn.Parameter(torch.randn(heads, width // heads) / (width // heads) ** 0.5) for _ in range(2)
        )
        self.nearness = torch.nn.Parameter(torch.ones(heads))
        self.offset = torch.nn.Parameter(torch.zeros(width))

    def forward(self, own: Tensor, others: Tensor, distance: Tensor, counts: Tensor) -> Tensor:
        """`own` [*, width] and `others` [*, n, width] are projected; `distance` and the mask `counts` are [*, n]."""
        values = torch.cat([own.unsqueeze(-2), others], dim=-2).unflatten(-1, (self.heads, -1))
        receiver = (values[..., :1, :, :] * self.receiver).sum(dim=-1)
        distance = functional.pad(distance, (1, 0))[..., None]  # the self-loop has distance 0
        scores = functional.leaky_relu(receiver + (values * self.sender).sum(dim=-1) - distance * self.nearness, SLOPE)
        scores = scores.masked_fill(~functional.pad(counts, (1, 0), value=True)[..., None], -torch.inf)
        mixed = torch.einsum("...nh,...nhd->...hd", scores.softmax(dim=-2), values).flatten(-2)
        return functional.elu(mixed + self.offset)


class _Network(torch.nn.Module):
    """Maps queries' embeddings and graphs to logits."""

    def __init__(self, features: int, models: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(features, width)
        self.labels = torch.nn.Linear(2 * models, width, bias=False)
        self.first, self.then = _Attention(width, heads), _Attention(width, heads)
        self.dropout = torch.nn.Dropout(dropout)
        self.output = torch.nn.Linear(2 * width, models)

    def forward(self, graph: _Graph, embedded: Tensor, near: Tensor, distance: Tensor, own: Tensor | None) -> Tensor:
        """Logits [queries, models]. `near` and `distance` are [queries, neighbours]; `near` is padded with -1."""
        counts, near = near >= 0, near.clamp(min=0)
        query = self._embed(embedded)
        values = self.first.project(self._embed(graph.known) + self.labels(graph.labels))
        hop, hop_distance, hop_counts = graph.hop(near, own)
        neighbours = values[near]
        neighbours_then = self.first(neighbours, _rows(values, hop), hop_distance, hop_counts)
        query_then = self.first(self.first.project(query), neighbours, distance, counts)
        mixed = self.then(self.then.project(query_then), self.then.project(neighbours_then), distance, counts)
        return self.output(self.dropout(torch.cat([mixed, query], dim=-1)))

    def _embed(self, embedded: Tensor) -> Tensor:
        scaled = embedded * embedded.shape[1] ** 0.5  # so that components are of order 1
        return self.dropout(functional.relu(self.embedding(scaled)))


def _rows(values: Tensor, at: Tensor) -> Tensor:
    return values.index_select(0, at.flatten()).view(*at.shape, values.shape[1])


def _nearest(
    known: Float[np.ndarray, "known features"],
    queries: Float[np.ndarray, "queries features"],
    count: int,
    own: Int[np.ndarray, " queries"] | None = None,
    groups: Int[np.ndarray, " known"] | None = None,
) -> tuple[Int[np.ndarray, "queries count"], Float[np.ndarray, "queries count"]]:
    """Positions of the nearest known queries of other groups (padded with -1), and squared distances."""
    distance, near = search(known, queries, count, own, groups, SEARCHED)
    missing = ((0, 0), (0, count - near.shape[1]))
    return np.pad(near, missing, constant_values=-1), np.square(np.pad(distance, missing))
