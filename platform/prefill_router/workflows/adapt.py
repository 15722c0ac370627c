"""Training of probe tokens on outcomes, written as an adapter for the prefill encoder.

Reads the training part of the split only; a tenth of it decides when the training stops.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from prefill_router.adapt.batches import PrefixStore
from prefill_router.adapt.train import Learner, ProbeTokensConfig, attach_new, initial_ids
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.locations import LocalPath, Location
from prefill_router.outcomes.splits import Scheme, make_folds, split_queries
from prefill_router.outcomes.table import Outcomes, load_outcomes
from prefill_router.pool import load_pool
from prefill_router.prefill.adapter import MANIFEST, WEIGHTS
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.loading import describe
from prefill_router.prefill.probe_tokens import save_adapter
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.routing.fit import check_two_classes
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.version import code_version

N_VALIDATION_FOLDS = 10
PREFIXES = ".prefixes-"  # prefix of the temporary folder of keys and values


class AdaptConfig(FrozenModel):
    """Inputs, the split, the encoder, and the training of its probe tokens."""

    outcomes: Annotated[Location, Field(description="outcomes table, a Parquet file")]
    pool: Annotated[Location, Field(description="pool of target models, a YAML file")]
    output: Annotated[LocalPath, Field(description="output folder; the adapter goes to OUTPUT/adapter")]
    seed: Annotated[int, Field(ge=0, description="seed of the split and of the training")] = 0
    scheme: Annotated[Scheme, Field(description="split scheme; only the training part is read")] = "85/15"
    queries: Annotated[
        int | None, Field(ge=20, description="maximum number of training queries, a random sample; None: all")
    ] = None
    layer: Annotated[
        int | None,
        Field(ge=1, description="hidden-state index that the training reads; None: two thirds of the blocks"),
    ] = None
    encoder: Annotated[
        EncoderConfig,
        Field(description="the encoder without adapter; layers and poolings are ignored, the prefill job sets them"),
    ] = EncoderConfig()
    probe_tokens: ProbeTokensConfig = ProbeTokensConfig()
    store_gib: Annotated[
        float,
        Field(
            ge=0,
            description="GiB on disk for the prompts' keys and values, deleted afterwards; prompts beyond it are "
            "prefilled in every epoch",
        ),
    ] = 8.0


def plan(config: AdaptConfig) -> list[str]:
    """What a dry run says of the training. Raises InputError as `run` does for outcomes and place."""
    folder = config.output / "adapter"
    _refuse_other_files(folder)
    outcomes = load_outcomes(config.outcomes, load_pool(config.pool))
    rows = training_queries(outcomes, config.seed, config.scheme, config.queries)
    return [
        f"writes adapter: {folder}{', in place of the one there' if folder.exists() else ''}",
        f"costs nothing but the time of this machine: {len(rows):,} queries through {config.encoder.model} in at most "
        f"{config.probe_tokens.max_epochs} epochs, and up to {config.store_gib:g} GiB on disk meanwhile",
    ]


def run(config: AdaptConfig) -> str:
    """Train probe tokens through a frozen encoder on the training split; write OUTPUT/adapter."""
    folder = config.output / "adapter"
    _check_place(folder)
    outcomes = load_outcomes(config.outcomes, load_pool(config.pool))
    rows = training_queries(outcomes, config.seed, config.scheme, config.queries)
    encoder = load_base(config.encoder, config.layer, config.probe_tokens)
    tokens = attach_new(encoder, config.probe_tokens, config.seed)
    read = encoder.tokenizer(outcomes.prompts[rows].tolist())
    readable = np.array([one.error is None for one in read])
    if not readable.all():
        print(f"{int((~readable).sum()):,} training queries without tokens are left out")
    rows, ids = rows[readable], [one.ids for one in read if one.error is None]
    training, validation = training_parts(outcomes, rows, config.seed)
    layer = int(encoder.columns[0].rpartition("L")[2])
    print(
        f"{encoder.info.architecture} {encoder.info.model}, layer {layer} of {encoder.info.n_layers}; "
        f"{tokens.count} probe tokens, {sum(one.numel() for one in tokens.parameters.values()):,} parameters; "
        f"{len(training):,} training and {len(validation):,} validation queries, {sum(map(len, ids)):,} tokens",
        flush=True,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PREFIXES, dir=config.output) as scratch:
        store = PrefixStore(encoder, ids, Path(scratch), int(config.store_gib * 2**30))
        _print_estimate(encoder, ids, config.store_gib)
        learner = Learner(encoder, ids, outcomes.correct[rows], store, config.encoder.batch_tokens)
        trained = learner.train(
            tokens, training, validation, config.probe_tokens, config.seed, lambda line: print(f"  {line}", flush=True)
        )
        states = learner.states(tokens, learner.batches(validation, len(validation)))[torch.from_numpy(validation)]
        with torch.no_grad():
            logits = trained.head(states).cpu().numpy()
    auc = float(np.nanmean(auc_per_model(outcomes.correct[rows[validation]], logits)))
    best = min(trained.epochs, key=lambda epoch: epoch.validation_loss)
    save_adapter(
        folder,
        tokens,
        dict(trained.head.state_dict()),
        {
            "base": encoder.info,
            "layer": layer,
            "targets": outcomes.models,
            "prompts": tuple(sorted({outcomes.prompt_digests[row] for row in rows})),
            "training": {
                "config": config.model_dump(mode="json"),
                "code_version": code_version(),
                "outcomes_digest": outcomes.digest(),
                "epochs": [asdict(epoch) for epoch in trained.epochs],
                "kept_epoch": best.epoch,
                "validation_auc": auc if math.isfinite(auc) else None,
            },
        },
    )
    return (
        f"adapter in {folder}: {tokens.count} probe tokens, epoch {best.epoch} kept, validation log loss "
        f"{trained.epochs[0].validation_loss:.4f} before and {best.validation_loss:.4f} after training, "
        f"validation AUC {auc:.4f}"
    )


def training_queries(outcomes: Outcomes, seed: int, scheme: Scheme, queries: int | None) -> Int[np.ndarray, " part"]:
    """Positions of the training part of the split, or of a random sample of at most `queries` of it, sorted.

    Raises InputError as `split_queries` and `check_two_classes` do.
    """
    rows = split_queries(outcomes, seed, scheme).train
    if queries is not None and queries < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, queries, replace=False))
    check_two_classes(outcomes, rows)
    return rows


def training_parts(
    outcomes: Outcomes, rows: Int[np.ndarray, " part"], seed: int
) -> tuple[Int[np.ndarray, " training"], Int[np.ndarray, " validation"]]:
    """Indices into `rows` of the queries to train on, and of the tenth that decides when the training stops.

    Queries of one group are in one of the two.
    """
    folds = make_folds(outcomes, rows, seed, N_VALIDATION_FOLDS)
    return np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)


def load_base(config: EncoderConfig, layer: int | None, tokens: ProbeTokensConfig) -> TransformersEncoder:
    """The encoder without adapter, with the pooling `last` at `layer` (None: two thirds of the blocks).

    If max_length is None, prompts are limited so that the probe tokens fit after them. Raises InputError for an encoder
    with an adapter or another backend than transformers, and as `TransformersEncoder` does.
    """
    if config.adapter is not None or config.backend != "transformers":
        raise InputError(
            f"encoder: got adapter {config.adapter!r} and backend {config.backend}; allowed are backend transformers "
            "and no adapter"
        )
    n_layers = describe(config.model_copy(update={"layers": "all"})).n_layers
    if layer is not None and layer > n_layers:
        raise InputError(f"layer: got {layer}, allowed are hidden-state indices 1..{n_layers}")
    read = layer or max(round(n_layers * 2 / 3), 1)
    config = config.model_copy(update={"layers": (read,), "poolings": ("last",)})
    encoder = TransformersEncoder(config)
    room = None if encoder.positions is None else encoder.positions - len(initial_ids(encoder, tokens))
    if config.max_length is None and room is not None and encoder.tokenizer.max_length > room > 1:
        encoder = TransformersEncoder(config.model_copy(update={"max_length": room}))
    return encoder


def _print_estimate(encoder: TransformersEncoder, ids: Sequence[Sequence[int]], limit_gib: float) -> None:
    """Prints the disk space of the prompts' keys and values, from the prefix of the first prompt."""
    with torch.no_grad():
        prefix = encoder.prefill([ids[0]])
    size = sum(one.nbytes for pair in prefix.keys_values for one in pair) / len(ids[0]) * sum(map(len, ids)) / 2**30
    print(
        f"keys and values of the prompts: {size:,.1f} GiB, of which up to {limit_gib:g} GiB are kept on disk",
        flush=True,
    )


def _check_place(folder: Path) -> None:
    """Removes the temporary files of an interrupted run. Raises InputError if `folder` has other files."""
    for scratch in folder.parent.glob(f"{PREFIXES}*"):
        shutil.rmtree(scratch, ignore_errors=True)
    for path in _refuse_other_files(folder):
        path.unlink(missing_ok=True)


def _refuse_other_files(folder: Path) -> list[Path]:
    """The temporary files of an interrupted save. Raises InputError for any other files in `folder`."""
    temporary = [path for name in (MANIFEST, WEIGHTS) for path in folder.glob(f".{name}.*.tmp")]
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or names - {MANIFEST, WEIGHTS, *(path.name for path in temporary)}:
        raise InputError(f"{folder}: exists and is not an adapter; choose another output folder")
    return temporary
