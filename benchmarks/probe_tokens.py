"""Probe tokens compared with the frozen encoder on real outcomes: AUC on test queries, and time per decision.

Arms: `none` (no suffix, states of the prompt), `question` (the text as a fixed suffix), `tokens` (learnt embeddings),
`lora` (learnt embeddings and LoRA at the probe tokens) and `full` (LoRA at all positions, which changes the prompt's
keys and values). All arms read the same training queries, a sample of the split's training part, and one layer. For
each arm the table has the AUC of the linear head of the training (`head`; for `none` it is the same logistic
regression on the states), of the probe of the layer search (64 principal components), and of the router's trunk
ensemble on the same components. `difference` is the head's AUC minus that of the frozen states, with a 95 % interval
from resampled test queries. With `activations` of the frozen encoder, `best layer` is the layer key with the highest
cross-validated AUC.

A finished arm is read from OUTPUT; the prompts' keys and values are kept in OUTPUT until all arms are finished.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from prefill_router.adapt.batches import PrefixStore
from prefill_router.adapt.train import Learner, ProbeTokensConfig, attach_new, logistic_head
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import read_json, write_atomically, write_json
from prefill_router.locations import LocalPath, Location
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.outcomes.table import Outcomes, load_outcomes
from prefill_router.pool import load_pool
from prefill_router.prefill.config import SMOLLM2, EncoderConfig
from prefill_router.prefill.dataset import read_activations
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.routing.layers import N_FOLDS
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.join import join
from prefill_router.signals.logistic import fit_logistic
from prefill_router.signals.projection import Moments, fit_projection
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.signals.search import search_layers
from prefill_router.workflows.adapt import load_base, training_parts, training_queries

Arm = Literal["none", "question", "tokens", "lora", "full"]
COMPONENTS = 64
RESAMPLES = 500
TIMED = 48  # prompts of the time per decision


class ProbeTokensBenchmarkConfig(FrozenModel):
    """Inputs, sizes and arms of the comparison."""

    outcomes: Annotated[Location, Field(description="outcomes table, a Parquet file")]
    pool: Annotated[Location, Field(description="pool of target models, a YAML file")]
    output: Annotated[LocalPath, Field(description="folder for figures, scores and the prompts' keys and values")]
    activations: Annotated[
        Location | None, Field(description="activations of the frozen encoder for the row `best layer`; None: no row")
    ] = None
    limit: Annotated[int, Field(ge=40, description="maximum number of training queries")] = 2500
    test_limit: Annotated[int, Field(ge=20, description="maximum number of test queries")] = 1000
    seed: Annotated[int, Field(ge=0, description="seed of split, sample and training")] = 0
    layer: Annotated[int | None, Field(ge=1, description="hidden-state index; None: two thirds of the blocks")] = None
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, description="arms to run, in this order")] = (
        "none",
        "question",
        "tokens",
        "lora",
    )
    model: Annotated[str, Field(description="encoder: a causal language model, as for prefill")] = SMOLLM2
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="dtype of weights and arithmetic")] = "bfloat16"
    max_length: Annotated[int, Field(ge=2, description="maximum tokens per prompt; longer prompts keep the end")] = 1024
    batch_tokens: Annotated[int, Field(ge=1, description="token budget of a padded batch")] = 4096
    probe_tokens: ProbeTokensConfig = ProbeTokensConfig()
    full_epochs: Annotated[int, Field(ge=1, description="maximum number of epochs of the arm `full`")] = 2
    store_gib: Annotated[float, Field(ge=0, description="GiB on disk for the prompts' keys and values")] = 20.0

    @property
    def encoder(self) -> EncoderConfig:
        """The configuration of the frozen encoder."""
        return EncoderConfig(
            model=self.model, dtype=self.dtype, max_length=self.max_length, batch_tokens=self.batch_tokens
        )


class Task:
    """The queries of a comparison: `rows` of the outcomes with token ids; `training`, `validation` and `test` index
    them."""

    def __init__(self, config: ProbeTokensBenchmarkConfig, outcomes: Outcomes, encoder: TransformersEncoder) -> None:
        train = training_queries(outcomes, config.seed, "85/15", config.limit)
        test = split_queries(outcomes, config.seed, "85/15").test
        if config.test_limit < len(test):
            rng = np.random.default_rng(config.seed)
            test = np.sort(rng.choice(test, config.test_limit, replace=False))
        rows = np.concatenate([train, test])
        read = encoder.tokenizer(outcomes.prompts[rows].tolist())
        readable = np.array([one.error is None for one in read])
        self.rows, self.ids = rows[readable], [one.ids for one in read if one.error is None]
        self.n_train = int(readable[: len(train)].sum())
        self.outcomes, self.correct = outcomes, outcomes.correct[self.rows]
        self.training, self.validation = training_parts(outcomes, self.rows[: self.n_train], config.seed)
        self.test = np.arange(self.n_train, len(self.rows))
        self.tokens = sum(map(len, self.ids))


def run(config: ProbeTokensBenchmarkConfig) -> str:
    """Compare probe tokens with the frozen encoder; print a table and write OUTPUT/probe_tokens.json."""
    outcomes = load_outcomes(config.outcomes, load_pool(config.pool))
    encoder = load_base(config.encoder, config.layer, config.probe_tokens)
    attach_new(encoder, config.probe_tokens, config.seed)  # refuses an encoder without probe tokens before the prefill
    task = Task(config, outcomes, encoder)
    prefixes = config.output / "prefixes"
    _check_output(config, encoder)
    prefixes.mkdir(parents=True, exist_ok=True)
    store = PrefixStore(encoder, task.ids, prefixes, int(config.store_gib * 2**30))
    learner = Learner(encoder, task.ids, task.correct, store, config.batch_tokens)
    print(
        f"{encoder.info.model}, {encoder.columns[0]}; {len(task.training):,} training, {len(task.validation):,} "
        f"validation and {len(task.test):,} test queries, {task.tokens:,} tokens",
        flush=True,
    )
    found: dict[str, dict[str, Any]] = {}
    if config.activations is not None:
        found["best layer"] = _arm(config, "best layer", partial(_best_layer, config, task))
    for arm in config.arms:
        if arm == "none":
            for pooling in ("last", "mean"):
                name = f"none, {pooling}"
                found[name] = _arm(config, name, partial(_frozen, config, task, encoder, store, pooling))
        else:
            found[arm] = _arm(config, arm, partial(_trained, config, task, learner, arm))
    table = _table(config, task, found)
    print(table, flush=True)
    figures = {name: {key: value for key, value in one.items() if key != "scores"} for name, one in found.items()}
    write_json(
        config.output / "probe_tokens.json",
        {"config": config.model_dump(mode="json"), "arms": figures, "table": table, "load": _load()},
    )
    shutil.rmtree(prefixes)
    return f"figures in {config.output / 'probe_tokens.json'}"


def _check_output(config: ProbeTokensBenchmarkConfig, encoder: TransformersEncoder) -> None:
    """Raises InputError if OUTPUT holds arms of other inputs, encoder or sizes."""
    fields = {"outcomes", "pool", "limit", "test_limit", "seed", "activations"}
    identity = config.model_dump(mode="json", include=fields) | {
        "encoder": encoder.info.fingerprint,
        "column": encoder.columns[0],
        "batches": [config.batch_tokens, config.probe_tokens.batch_size],
    }
    path = config.output / "inputs.json"
    if path.is_file() and read_json(path) != identity:
        raise InputError(f"output: {config.output} holds figures of other inputs or settings; choose another folder")
    write_json(path, identity)


def _arm(config: ProbeTokensBenchmarkConfig, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of an arm, from OUTPUT if it is finished."""
    settings = (
        "" if name.startswith(("none", "best")) else config.probe_tokens.model_dump_json() + str(config.full_epochs)
    )
    stem = f"{name.replace(', ', '-').replace(' ', '-')}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    figures, scores = config.output / f"{stem}.json", config.output / f"{stem}.npy"
    if figures.is_file() and scores.is_file():
        print(f"{name}: read from {figures}", flush=True)
        return {**read_json(figures), "scores": np.load(scores)}
    print(f"{name}: started", flush=True)
    began = time.perf_counter()
    made = make() | {"total_seconds": time.perf_counter() - began}
    write_atomically(scores, lambda temporary: _save(temporary, made["scores"]))
    write_json(figures, {key: value for key, value in made.items() if key != "scores"})
    print(f"{name}: head AUC {made['head_auc']:.4f}, {made['total_seconds']:.0f} s", flush=True)
    return made


def _save(path: Path, scores: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, scores)


def _frozen(
    config: ProbeTokensBenchmarkConfig, task: Task, encoder: TransformersEncoder, store: PrefixStore, pooling: str
) -> dict[str, Any]:
    """The states of the prompts, captured while their keys and values are computed."""
    path = config.output / "frozen.npz"
    if not path.is_file():
        states = _prompt_states(config, task, encoder, store)
        write_atomically(path, lambda temporary: _save_states(temporary, states))
    with np.load(path) as arrays:
        return _evaluated(config, task, arrays[pooling])


def _save_states(path: Path, states: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, last=states["last"], mean=states["mean"])


def _prompt_states(
    config: ProbeTokensBenchmarkConfig, task: Task, encoder: TransformersEncoder, store: PrefixStore
) -> dict[str, np.ndarray]:
    """Last and mean state of every prompt, from the parts that the other arms read too."""
    captured: list[torch.Tensor] = []
    handle = encoder.blocks[-1].register_forward_hook(
        lambda _, __, output: captured.append(output[0] if isinstance(output, tuple) else output), prepend=True
    )
    learner = Learner(encoder, task.ids, task.correct, store, config.batch_tokens)
    parts = [
        part
        for rows, size in (
            (task.training, config.probe_tokens.batch_size),
            (task.validation, len(task.validation)),
            (task.test, len(task.test)),
        )
        for batch in learner.batches(rows, size)
        for part in batch
    ]
    shape = (len(task.ids), encoder.info.hidden_size)
    states = {"last": np.zeros(shape, np.float32), "mean": np.zeros(shape, np.float32)}
    began = reported = time.perf_counter()
    done = 0
    with torch.no_grad():
        for part in parts:
            captured.clear()
            prefix = store(part)
            if not captured:  # read from disk by an interrupted run
                prefix = store.compute(part)
            hidden, lengths = captured[0].float(), prefix.mask.sum(dim=1)
            states["last"][part] = hidden[torch.arange(len(part)), lengths - 1].cpu().numpy()
            real = hidden.masked_fill(~prefix.mask.bool()[..., None], 0)
            states["mean"][part] = (real.sum(dim=1) / lengths[:, None]).cpu().numpy()
            done += int(lengths.sum())
            if (now := time.perf_counter()) - reported > 15:
                reported = now
                rate = done / (now - began)
                print(f"  prefill: {done:,} of {task.tokens:,} tokens, {rate:,.0f} tokens/s", flush=True)
    handle.remove()
    print(f"  prefill: {done:,} tokens in {time.perf_counter() - began:.0f} s", flush=True)
    return states


def _trained(config: ProbeTokensBenchmarkConfig, task: Task, learner: Learner, arm: str) -> dict[str, Any]:
    """Trains an arm and evaluates its states."""
    changed: dict[str, dict[str, Any]] = {
        "question": {"learn_tokens": False, "rank": 0},
        "tokens": {"rank": 0},
        "lora": {},
        "full": {"positions": "all", "max_epochs": config.full_epochs},
    }
    settings = config.probe_tokens.model_copy(update=changed[arm])
    tokens = attach_new(learner.encoder, settings, config.seed)
    trained = learner.train(
        tokens, task.training, task.validation, settings, config.seed, lambda line: print(f"  {line}", flush=True)
    )
    batches = [
        *learner.batches(task.training, settings.batch_size),
        *learner.batches(task.validation, len(task.validation)),
        *learner.batches(task.test, len(task.test)),
    ]
    states = learner.states(tokens, batches)
    with torch.no_grad():
        scores = trained.head(states[torch.from_numpy(task.test)]).cpu().numpy()
    best = min(trained.epochs, key=lambda epoch: epoch.validation_loss)
    prefill_ms, suffix_ms = _time_decisions(learner.encoder, [task.ids[row] for row in task.test[:TIMED]])
    return _evaluated(config, task, states.cpu().numpy(), scores) | {
        "tokens": tokens.count,
        "parameters": sum(one.numel() for one in tokens.parameters.values()),
        "kept_epoch": best.epoch,
        "losses": [[epoch.training_loss, epoch.validation_loss] for epoch in trained.epochs],
        "seconds_per_epoch": statistics.mean([epoch.seconds for epoch in trained.epochs[1:]] or [0.0]),
        "prefill_ms": prefill_ms,
        "suffix_ms": suffix_ms,
    }


@torch.inference_mode()
def _time_decisions(encoder: TransformersEncoder, ids: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Median milliseconds of a prompt's prefill and of the probe tokens after it, one prompt at a time."""
    prefills, suffixes = [], []
    for row in ids:
        began = time.perf_counter()
        prefix = encoder.prefill([row])
        _wait(encoder)
        middle = time.perf_counter()
        encoder.suffix_states(prefix)
        _wait(encoder)
        suffixes.append(time.perf_counter() - middle)
        prefills.append(middle - began)
    return statistics.median(prefills) * 1e3, statistics.median(suffixes) * 1e3


def _wait(encoder: TransformersEncoder) -> None:
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)


def _best_layer(config: ProbeTokensBenchmarkConfig, task: Task) -> dict[str, Any]:
    """The layer key of the frozen encoder with the highest cross-validated AUC on the training queries."""
    signals = join(task.outcomes.take(task.rows), [read_activations(str(config.activations))])
    if signals.left_out:
        raise InputError(f"activations: {len(signals.left_out)} queries have no states; give complete activations")
    train = np.arange(task.n_train)
    folds = make_folds(signals.outcomes, train, config.seed, N_FOLDS)
    found = search_layers(
        signals.layer_keys,
        lambda key: signals.states(key, train),
        task.correct[train],
        folds,
        [COMPONENTS],
        nested=False,
        progress="layer search",
    )
    best = max(found, key=lambda key: float(np.nanmean(found[key].at(COMPONENTS).auc)))
    return _evaluated(config, task, signals.states(best)) | {"column": best.column}


def _evaluated(
    config: ProbeTokensBenchmarkConfig, task: Task, states: np.ndarray, scores: np.ndarray | None = None
) -> dict[str, Any]:
    """Test scores and AUC of the head (None: logistic regression on `states`), the probe and the trunk ensemble."""
    train = np.concatenate([task.training, task.validation])
    scores = _logistic_scores(task, states) if scores is None else scores
    moments = Moments.of(states[train], states[train].mean(axis=0, dtype=np.float64))
    z = fit_projection(moments, COMPONENTS)(states)
    weights = fit_logistic(z[train], task.correct[train])
    probe = z[task.test] @ weights[:-1] + weights[-1]
    fit = Fit(z.astype(np.float32), task.training, task.validation)
    trunk = train_ensembles([fit], task.correct, TrunkConfig(), config.seed)[0].probabilities(fit.features[task.test])
    made = {"head": scores, "probe": probe, "trunk": trunk}
    return {
        **{f"{name}_auc": _auc(task, score) for name, score in made.items()},
        "head_auc_per_model": auc_per_model(task.correct[task.test], scores).tolist(),
        "scores": scores,
    }


def _logistic_scores(task: Task, states: np.ndarray) -> np.ndarray:
    """Test scores of the logistic regression that the training of probe tokens starts with."""
    tensor = torch.from_numpy(states)
    head, _ = logistic_head(tensor, task.correct, task.training, task.validation)
    with torch.no_grad():
        return np.asarray(head(tensor[torch.from_numpy(task.test)]).numpy())


def _auc(task: Task, scores: np.ndarray) -> float:
    return float(np.nanmean(auc_per_model(task.correct[task.test], scores)))


def _difference(task: Task, scores: np.ndarray, other: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Difference of the mean AUC, with a 95 % percentile interval from resampled test queries."""
    correct, rng = task.correct[task.test], np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(correct), len(correct))
        one, two = (auc_per_model(correct[rows], given[rows]) for given in (scores, other))
        found.append(float(np.nanmean(one - two)))
    low, high = np.percentile(found, [2.5, 97.5])
    return _auc(task, scores) - _auc(task, other), float(low), float(high)


def _load() -> list[float]:
    return [float(value) for value in Path("/proc/loadavg").read_text().split()[:3]]


def _table(config: ProbeTokensBenchmarkConfig, task: Task, found: dict[str, dict[str, Any]]) -> str:
    base = max(
        (name for name in found if name.startswith("none")), key=lambda name: found[name]["head_auc"], default=None
    )
    lines = [
        f"\n{Path(str(config.pool)).stem}, seed {config.seed}: {task.n_train:,} training queries, {len(task.test):,} "
        f"test queries; difference from `{base}`\n",
        "| arm | head AUC | difference (95 %) | probe AUC | trunk AUC | epoch | s per epoch | prefill + suffix ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        difference = ""
        if base is not None and name != base:
            middle, low, high = _difference(task, one["scores"], found[base]["scores"], config.seed)
            one["difference"] = [middle, low, high]
            difference = f"{middle:+.4f} ({low:+.4f} to {high:+.4f})"
        label = f"{name} ({one['column']})" if "column" in one else name
        cells = [label, f"{one['head_auc']:.4f}", difference, f"{one['probe_auc']:.4f}", f"{one['trunk_auc']:.4f}"]
        if "tokens" in one:
            times = f"{one['prefill_ms']:.0f} + {one['suffix_ms']:.0f}"
            cells += [str(one["kept_epoch"]), f"{one['seconds_per_epoch']:.0f}", times]
        lines.append(f"| {' | '.join([*cells, '', '', ''][:8])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(ProbeTokensBenchmarkConfig, run)
