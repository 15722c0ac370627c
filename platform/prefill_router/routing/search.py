"""Searching a router's configuration: what all trials share, made once, and one trial, epoch by epoch.

In: outcomes, a split, states, and the configurations among whose choices of layers trials will pick. Out: `Prepared`,
plain arrays of the training (and calibration) queries alone, fit for shared memory; and from `run_trial` after every
epoch the held-out confidences of the configuration, so that a scheduler can stop it.

A trial is nothing but trunk training on prepared projections. Projections and held-out predictions are made by the
functions of fit.py, so that a trial run to its end has the held-out figures of `fit_router` with its configuration.
No label of a test query is kept. Knows nothing of samplers, schedulers or processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from prefill_router.outcomes.splits import Split, make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.pool import Pool
from prefill_router.prefill.encoder import EncoderConfig
from prefill_router.routing.calibration import calibrated_across, fit_calibrator
from prefill_router.routing.candidates import candidate_blocks
from prefill_router.routing.cost import fit_costs
from prefill_router.routing.fit import (
    N_FOLDS,
    FitConfig,
    beside,
    check_two_classes,
    chosen_blocks,
    fit_rows,
    held_out_probabilities,
    held_out_rows,
    project_block,
    score_blocks,
)
from prefill_router.routing.trunk import Fit, train_epochs
from prefill_router.signals.probe import Block, Selection, States, unique_blocks

# The fields of a FitConfig that decide which blocks are read, and how they are projected.
LAYER_FIELDS = {"mode", "encoders", "pooling", "strategy", "fixed", "each_pooling", "layers_per_target", "components"}


@dataclass(frozen=True)
class Prepared:
    """What trials share; positions are on the axis `rows`, the training and calibration queries.

    `held_out` are the rows on which trials are judged and `parts` their folds; `fits` the rows that each fit learns
    from and watches; `selections` by `layer_key`; `projected` by (fit, block, k); `costs`, by the encoder whose tokens
    count, USD and its normalisation on the rows held out.
    """

    correct: Float[np.ndarray, "rows models"]
    held_out: Int[np.ndarray, " held_out"]
    parts: Int[np.ndarray, " held_out"]
    fits: tuple[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]], ...]
    selections: Mapping[str, Selection]
    projected: Mapping[tuple[int, Block, int], Float[np.ndarray, "rows _"]]
    costs: Mapping[str, tuple[Float[np.ndarray, "held_out models"], Float[np.ndarray, "held_out models"]]]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.projected.values())

    def blocks(self, config: FitConfig) -> list[tuple[Block, ...]]:
        """The blocks that each fit of `config` reads."""
        selection = self.selections[layer_key(config)]
        return [unique_blocks(blocks) for blocks in (selection.blocks, *selection.blocks_without)][: len(self.fits)]

    def costs_of(self, config: FitConfig) -> tuple[np.ndarray, np.ndarray]:
        """(USD, normalised) [held_out, models], as the router fitted so would estimate."""
        return self.costs[self.blocks(config)[0][0].encoder]


@dataclass(frozen=True)
class HeldOut:
    """After an epoch: confidences of the rows held out, whose labels neither ensemble nor calibrator has seen."""

    epoch: int
    last: bool
    p: Float[np.ndarray, "held_out models"]


def layer_key(config: FitConfig) -> str:
    """Equal for two configurations that read the same projections."""
    return config.model_dump_json(include=LAYER_FIELDS)


def prepare(
    pool: Pool,
    outcomes: Outcomes,
    split: Split,
    blocks: Sequence[Block],
    states: States,
    n_tokens: Mapping[str, Int[np.ndarray, " queries"]],
    encoders: Mapping[str, EncoderConfig],
    configs: Sequence[FitConfig],
    progress: bool = False,
) -> Prepared:
    """Scores every candidate block, and projects those that some configuration reads, for every k and fit.

    Arguments as in `fit_router`; `configs` share seed and scheme. Each block is read to be scored once for every k (a
    search for several k at once differs by rounding from the one that `fit_router` makes, and layers may be nearly
    equal), and the chosen ones once more. Raises InputError as `fit_router` does.
    """
    train, seed, nested = split.train, configs[0].seed, configs[0].scheme == "85/15"
    assert all((config.seed, config.scheme) == (seed, configs[0].scheme) for config in configs), "one seed, one scheme"
    check_two_classes(outcomes, train)
    folds = make_folds(outcomes, train, seed, N_FOLDS)
    by_key = {layer_key(config): config for config in configs}
    candidates = {
        key: candidate_blocks(blocks, encoders, outcomes.models, config.mode, config.encoders, config.pooling)
        for key, config in by_key.items()
    }
    searching = [key for key, config in by_key.items() if config.strategy != "fixed"]
    # Fixed layers first: one that is not there is found out before the others are scored, not after.
    selections = {
        key: chosen_blocks({}, config, candidates[key], outcomes.models)
        for key, config in by_key.items()
        if config.strategy == "fixed"
    }
    ks = sorted({by_key[key].components for key in searching})
    probed = unique_blocks([unique_blocks(candidates[key]) for key in searching])
    with_auc = any(by_key[key].strategy == "cv" for key in searching)
    scores = {k: score_blocks(outcomes, train, folds, probed, states, k, with_auc, nested, progress) for k in ks}
    selections |= {
        key: chosen_blocks(scores[by_key[key].components], by_key[key], candidates[key], outcomes.models)
        for key in searching
    }
    wanted: dict[Block, set[tuple[int, int]]] = {}
    for key, selection in selections.items():
        for index, targets in enumerate((selection.blocks, *(selection.blocks_without if nested else ()))):
            for block in unique_blocks(targets):
                wanted.setdefault(block, set()).add((index, by_key[key].components))
    rows = np.sort(np.concatenate([train, split.calibration]))
    projected = {
        (index, block, k): np.asarray(z[rows], dtype=np.float32)
        for block in sorted(wanted)
        for index, k, _, z in project_block(states(block), train, folds, sorted(wanted[block]))
    }
    held_out, parts = held_out_rows(outcomes, split, folds, seed)
    fits = [fit_rows(outcomes, train, folds, seed, index) for index in range(1 + N_FOLDS if nested else 1)]
    return Prepared(
        outcomes.correct[rows],
        np.searchsorted(rows, held_out),
        parts,
        tuple((np.searchsorted(rows, own), np.searchsorted(rows, watched)) for own, watched in fits),
        selections,
        projected,
        {name: _costs(pool, outcomes, train, held_out, counts) for name, counts in n_tokens.items()},
    )


def run_trial(prepared: Prepared, config: FitConfig) -> Iterator[HeldOut]:
    """Trains the fits of `config` and judges them after every epoch, members of best validation loss so far."""
    fits = [
        Fit(beside([prepared.projected[fit, block, config.components] for block in blocks]), *prepared.fits[fit])
        for fit, blocks in enumerate(prepared.blocks(config))
    ]
    correct = prepared.correct[prepared.held_out]
    for epoch in train_epochs(fits, prepared.correct, config.trunk, config.seed):
        raw = held_out_probabilities(epoch.ensembles(), fits, prepared.held_out, prepared.parts)
        yield HeldOut(
            epoch.number,
            epoch.training == 0,
            calibrated_across(partial(fit_calibrator, config.calibrator), raw, correct, prepared.parts),
        )


def _costs(
    pool: Pool, outcomes: Outcomes, train: np.ndarray, held_out: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    costs = fit_costs(pool, outcomes, train, counts)
    cost = costs.estimate(counts[held_out], outcomes.input_tokens[held_out])
    return cost, costs.normalise(cost)
