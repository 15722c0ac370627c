"""Small synthetic outcomes, states and routers for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import Outcomes, pivot, validate_outcomes
from prefill_router.pool import Pool, save_pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import EncoderInfo, Tokens, activations_table
from prefill_router.prefill.shards import PARQUET, ActivationsHeader, finish, open_dataset
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import FittedRouter, fit_router
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey

ENCODER, OTHER = "0123456789abcdef", "fedcba9876543210"
QUICK = TrunkConfig(widths=(16,), learning_rate=1e-2, batch_size=64, members=3, kept=2, max_epochs=8)


def make_pool(*names: str) -> Pool:
    """A pool of models `names`, each twice as expensive as the previous one."""
    return Pool.model_validate(
        {
            "models": [
                {"name": name, "input_usd_per_mtok": 0.1 * 2**i, "output_usd_per_mtok": 0.4 * 2**i}
                for i, name in enumerate(names or ("small", "medium", "large"))
            ]
        }
    )


def make_table(
    n: int = 400,
    models: tuple[str, ...] = ("small", "medium", "large"),
    seed: int = 0,
    missing: float = 0.0,
    group_size: int = 1,
) -> tuple[pa.Table, np.ndarray]:
    """An outcomes table with labels that depend on a hidden difficulty, and the difficulty [queries]."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=n)
    rows = []
    for q in range(n):
        for m, model in enumerate(models):
            right = rng.random() < 1 / (1 + np.exp(2.5 * difficulty[q] - 0.8 * m))
            rows.append(
                {
                    "query_id": f"q{q:04d}",
                    "benchmark": f"bench{q % 3}",
                    "prompt": f"question {q}",
                    "model": model,
                    "correct": None if rng.random() < missing else int(right),
                    "input_tokens": 10 + q % 7,
                    "output_tokens": 20 + 10 * m,
                    "group": f"g{q // group_size}",
                }
            )
    return pa.Table.from_pylist(rows), difficulty


def make_outcomes(**options: object) -> tuple[Outcomes, np.ndarray]:
    table, difficulty = make_table(**options)
    return pivot(validate_outcomes(table), ("small", "medium", "large")), difficulty


@dataclass(frozen=True)
class MadeSignals(Signals):
    """Signals whose states come from a function instead of datasets on disk."""

    read: Callable[[LayerKey], np.ndarray]
    encoder_configs: Mapping[str, EncoderConfig]

    def states(self, key: LayerKey, rows: np.ndarray | None = None) -> np.ndarray:
        return self.read(key) if rows is None else self.read(key)[rows]

    @property
    def encoders(self) -> dict[str, EncoderConfig]:
        return dict(self.encoder_configs)


def make_signals(
    outcomes: Outcomes,
    read: Callable[[LayerKey], np.ndarray],
    layer_keys: Sequence[LayerKey],
    encoders: Mapping[str, EncoderConfig] | None = None,
    n_tokens: Mapping[str, np.ndarray] | None = None,
) -> Signals:
    encoders = encoders or {ENCODER: EncoderConfig()}
    n_tokens = n_tokens or {name: np.full(len(outcomes), 12) for name in encoders}
    return MadeSignals(outcomes, {}, tuple(layer_keys), n_tokens, (), read, encoders)


class MadeStates:
    """States of four layer keys: one predicts the difficulty well, one badly, one is noise, one is constant."""

    layer_keys = tuple(LayerKey(ENCODER, pooling, layer) for layer in (1, 2) for pooling in ("last", "mean"))

    def __init__(self, difficulty: np.ndarray, hidden: int = 12, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        noise = {key: rng.normal(size=(len(difficulty), hidden)).astype(np.float32) for key in self.layer_keys}
        noise[self.layer_keys[2]][:, 0] += 0.7 * difficulty
        noise[self.layer_keys[3]][:, :3] += 1.5 * difficulty[:, None]
        noise[self.layer_keys[0]] = np.ones_like(noise[self.layer_keys[0]])
        self.values = noise

    def __call__(self, key: LayerKey) -> np.ndarray:
        return self.values[key]


def make_router(
    seed: int = 0, lineage: dict[str, object] | None = None, **fit: object
) -> tuple[FittedRouter, Outcomes, MadeStates]:
    """A router fitted on 400 synthetic queries in about a second."""
    outcomes, difficulty = make_outcomes(missing=0.02)
    states = MadeStates(difficulty)
    config = FitConfig.model_validate(
        {"seed": seed, "components": 4, "each_pooling": False, "trunk": QUICK.model_dump()} | fit
    )
    fitted = fit_router(
        make_signals(outcomes, states, states.layer_keys),
        make_pool(),
        split_queries(outcomes, seed, config.scheme),
        config,
        lineage or {},
    )
    return fitted, outcomes, states


def rows_of(states: MadeStates, queries: list[int]) -> dict[str, pa.Table]:
    """Activations rows as an encoder returns them."""
    columns: dict[str, pa.Array] = {
        "query_id": pa.array([f"q{q:04d}" for q in queries]),
        "n_tokens": pa.array([12] * len(queries), pa.int32()),
        "error": pa.nulls(len(queries), pa.string()),
    }
    for key in states.layer_keys:
        values = states(key)[queries]
        columns[key.column] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return {ENCODER: pa.table(columns)}


class TwoEncoders:
    """States of two encoders: layer 2 of the first predicts target 0, layer 2 of the second target 1; others are noise.

    `write` writes outcomes, pool and activations to disk.
    """

    def __init__(self, n: int = 400, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.outcomes, _ = make_outcomes(n=n)
        hidden = rng.normal(size=(n, 3))
        for target in range(3):
            self.outcomes.correct[:, target] = rng.random(n) < 1 / (1 + np.exp(-3 * hidden[:, target]))
        self.values = {}
        for encoder, target in ((ENCODER, 0), (OTHER, 1)):
            for layer in (1, 2):
                x = rng.normal(size=(n, 8)).astype(np.float32)
                if layer == 2:
                    x[:, :4] += 2 * hidden[:, [target]]
                self.values[LayerKey(encoder, "mean", layer)] = x
        self.layer_keys = tuple(sorted(self.values))
        self.encoders = {ENCODER: EncoderConfig(model="a"), OTHER: EncoderConfig(model="b")}
        self.n_tokens = {name: np.full(n, 12) for name in self.encoders}

    def __call__(self, key: LayerKey) -> np.ndarray:
        return self.values[key]

    @property
    def signals(self) -> Signals:
        return make_signals(self.outcomes, self, self.layer_keys, self.encoders, self.n_tokens)

    def write(self, folder: Path) -> dict[str, object]:
        """The inputs of jobs.train and its like: outcomes, pool, activations."""
        table = make_table(n=len(self.outcomes))[0].to_pylist()
        for index, row in enumerate(table):
            row["correct"] = int(self.outcomes.correct[divmod(index, 3)])
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), folder / "outcomes.parquet")
        save_pool(make_pool(), folder / "pool.yaml")
        for encoder, config in self.encoders.items():
            self._write_activations(folder / config.model, encoder)
        return {
            "outcomes": folder / "outcomes.parquet",
            "pool": folder / "pool.yaml",
            "activations": tuple(folder / config.model for config in self.encoders.values()),
        }

    def _write_activations(self, folder: Path, encoder: str) -> None:
        name, own = (
            self.encoders[encoder].model,
            [key for key in self.layer_keys if key.encoder == encoder],
        )
        info = EncoderInfo(
            model=name,
            revision=None,
            architecture="MadeUp",
            weights_digest=name,
            tokenizer_digest=name,
            attention="causal",
            last_token="last real token",
            n_layers=2,
            hidden_size=8,
            max_length=512,
            truncation_side="left",
            template=None,
            dtype="float32",
            states_dtype="float32",
            backend="none",
        )
        header = ActivationsHeader(
            encoder=info,
            columns=tuple(key.column for key in own),
            config={"encoder": self.encoders[encoder].model_dump(mode="json")},
        )
        ids, prompts = (
            pa.chunked_array([pa.array(values, pa.string())])
            for values in (self.outcomes.query_ids, self.outcomes.prompts)
        )
        open_dataset(folder, header, pa.table({"query_id": ids, "prompt": prompts}))
        states = np.stack([self.values[key] for key in own])
        tokens = [Tokens(ids=[row] * 12, n_tokens=12) for row in range(len(ids))]
        rows = activations_table(ids, prompts, tokens, header.columns, states, np.abs(states).max(axis=2))
        pq.write_table(rows, folder / f"all-{len(ids)}.parquet", **PARQUET)
        finish(folder, header)
