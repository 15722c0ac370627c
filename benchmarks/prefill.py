"""Prefill extraction compared with the forward pass alone and with a plain transformers loop: tokens/s and peak memory.

Models: bundled encoders, and a Qwen3 with random weights. Prompts are generated from a seed. Variants: `extraction`
is `TransformersEncoder` with all layers and both poolings, from texts to an Arrow table; `half` is the same up to half
of the depth; `bare` is the model's forward pass alone on the same batches, tokenised beforehand; `loop` uses
output_hidden_states=True with 32 prompts per batch in input order, applies both poolings and copies the result to the
host; `sorted` is the same loop over prompts sorted by length. Variants alternate, so that changes of the machine's
speed affect all of them; ratios are ratios of medians. The memory of each variant is measured in a separate process.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from tqdm import tqdm

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.prefill.bundled import bundled_weights
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.prefill.locating import locate
from prefill_router.prefill.tokens import token_batches

Variant = Literal["extraction", "half", "bare", "loop", "sorted"]
VARIANTS: tuple[Variant, ...] = ("extraction", "half", "bare", "loop", "sorted")
# Shapes of Qwen3: blocks, width, inner width, heads, key-value heads, head width, vocabulary (None: the tokenizer's).
SHAPES = {
    "small": (12, 384, 1024, 6, 2, 64, None),
    "0.6B": (28, 1024, 3072, 16, 8, 128, 151_936),
    "8B": (36, 4096, 12_288, 32, 8, 128, 151_936),
}
WORDS = (
    "the",
    "of",
    "question",
    "which",
    "number",
    "answer",
    "if",
    "then",
    "model",
    "word",
    "rate",
    "sum",
    "paper",
    "light",
    "speed",
    "state",
    "energy",
    "law",
    "is",
    "not",
    "a",
    "what",
    "how",
    "many",
    "does",
    "field",
    "value",
    "two",
    "three",
    "x",
    "y",
    "market",
    "water",
    "cell",
)
POSITIONS = 4096  # maximum tokens of the random model
LOOP_BATCH = 32  # prompts
MODEL = "qwen3"  # name of the random model in the configuration
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, by a part of the GPU's name


class PrefillBenchmarkConfig(FrozenModel):
    """Models, device, token budgets and generated prompts of the benchmark."""

    output: Annotated[LocalPath, Field(description="folder for prefill.json")] = Path("runs/benchmarks/prefill")
    models: Annotated[
        tuple[str, ...], Field(min_length=1, description="bundled encoders (minilm, smollm2), and qwen3")
    ] = (MINILM, MODEL)
    shape: Annotated[Literal["small", "0.6B", "8B"], Field(description="shape of the random Qwen3")] = "small"
    device: Annotated[str, Field(description="torch device")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="dtype of weights and arithmetic")] = "float32"
    batch_tokens: Annotated[tuple[int, ...], Field(min_length=1, description="token budgets of a batch, a list")] = (
        8192,
    )
    prompts: Annotated[int, Field(ge=8, description="number of generated prompts")] = 192
    median_words: Annotated[int, Field(ge=1, description="median words per prompt; lengths are lognormal")] = 80
    rounds: Annotated[int, Field(ge=1, description="measurements of every variant")] = 5
    seed: Annotated[int, Field(ge=0, description="seed of weights and prompts")] = 0


@dataclass(frozen=True)
class Measured:
    """One variant: seconds of each round, tokens per round, and peak MiB of its process without the libraries."""

    seconds: list[float]
    tokens: int
    peak_mib: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def run(config: PrefillBenchmarkConfig) -> str:
    """Measure extraction, the bare forward pass and the plain loop; print a table for every model and token budget."""
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        for model in config.models:
            if model == MODEL:
                folder = save_qwen3(Path(scratch), config.shape, config.seed)
            else:
                folder = locate(EncoderConfig(model=model))
            for budget in config.batch_tokens:
                name = f"{model}, {budget:,} tokens a batch"
                measured = _measure(config, model, folder, budget)
                found[name] = {
                    variant: {**vars(one), "tokens_per_s": one.tokens_per_s} for variant, one in measured.items()
                }
                print(_table(config, model, name, folder, measured), flush=True)
    write_json(config.output / "prefill.json", {"config": config.model_dump(mode="json"), **found})
    first = next(iter(found.values()))
    share = first["extraction"]["tokens_per_s"] / first["bare"]["tokens_per_s"]
    return f"extraction at {share:.2f} of the bare forward; figures in {config.output / 'prefill.json'}"


def save_qwen3(folder: Path, shape: str, seed: int) -> Path:
    """Saves a Qwen3 with random weights and the bundled encoder's tokenizer; large shapes in bfloat16."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(bundled_weights(MINILM).parent)
    blocks, width, inner, heads, kv_heads, head_width, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    large = vocabulary is not None
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if large else before)
    with torch.device("cuda" if large and torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocabulary or len(tokenizer),
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=blocks,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head_width,
                max_position_embeddings=POSITIONS,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=True,
            )
        )
    torch.set_default_dtype(before)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    tokenizer.model_max_length = POSITIONS
    tokenizer.save_pretrained(folder)
    return folder


def texts(config: PrefillBenchmarkConfig) -> list[str]:
    """Generated prompts of lognormal length."""
    rng = np.random.default_rng(config.seed)
    lengths = np.clip(np.exp(rng.normal(np.log(config.median_words), 0.8, config.prompts)), 3, 400).astype(int)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def _measure(config: PrefillBenchmarkConfig, model: str, folder: Path, budget: int) -> dict[Variant, Measured]:
    """Times all variants alternately in this process, then measures the memory of each in a separate process."""
    made = {variant: _make(variant, config, folder, budget) for variant in VARIANTS}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    tokens = {variant: call() for variant, call in made.items()}  # warm-up: allocations
    for _ in tqdm(range(config.rounds), desc=f"{model}, {budget:,}", unit="round", leave=False):
        for variant, call in made.items():
            began = time.perf_counter()
            call()
            seconds[variant].append(time.perf_counter() - began)
    made.clear()
    _load.cache_clear()
    _free_gpu_memory(config.device)
    peaks = _peaks(config, folder, budget)
    return {variant: Measured(seconds[variant], tokens[variant], peaks[variant]) for variant in VARIANTS}


def _peaks(config: PrefillBenchmarkConfig, folder: Path, budget: int) -> dict[Variant, float]:
    """Peak MiB of every variant, each in a process of its own.

    On a GPU the processes run side by side, except for the shape 8B: five such models do not fit on every GPU.
    """
    at_once = len(VARIANTS) if config.device.startswith("cuda") and config.shape != "8B" else 1
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn"), max_tasks_per_child=1) as own:
        found = {variant: own.submit(_peak, variant, config, folder, budget) for variant in VARIANTS}
        return {variant: one.result() for variant, one in found.items()}


def _peak(variant: Variant, config: PrefillBenchmarkConfig, folder: Path, budget: int) -> float:
    """Peak MiB of loading and one pass: of GPU memory, or of the process without its libraries."""
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  imported before the measurement

    import prefill_router.prefill.transformers_backend  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # resets the inherited high-water mark
    before = memory_kib("VmRSS")
    _make(variant, config, folder, budget)()
    if config.device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return (memory_kib("VmHWM") - before) / 1024


def memory_kib(field: str) -> int:
    """Memory of this process in KiB: a field of /proc/self/status, as in VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _make(variant: Variant, config: PrefillBenchmarkConfig, folder: Path, budget: int) -> Callable[[], int]:
    """A function that encodes all prompts once and returns their number of tokens."""
    prompts = texts(config)
    if variant in ("extraction", "half"):
        return _extraction(config, prompts, folder, budget, half=variant == "half")
    if variant == "bare":
        return _bare(config, prompts, folder, budget)
    return _loop(config, prompts, folder, by_length=variant == "sorted")


def _extraction(
    config: PrefillBenchmarkConfig, prompts: list[str], folder: Path, budget: int, half: bool
) -> Callable[[], int]:
    from transformers import AutoConfig

    from prefill_router.prefill.transformers_backend import TransformersEncoder

    n_layers = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_hidden_layers
    encoder = TransformersEncoder(
        EncoderConfig(
            model=str(folder),
            layers=tuple(range(n_layers // 2 + 1)) if half else "all",
            batch_tokens=budget,
            device=config.device,
            dtype=config.dtype,
        )
    )
    table = pa.table({"query_id": [str(row) for row in range(len(prompts))], "prompt": prompts})
    return lambda: sum(encoder(table).column("n_tokens").to_pylist())


def _bare(config: PrefillBenchmarkConfig, prompts: list[str], folder: Path, budget: int) -> Callable[[], int]:
    import torch

    model, tokenizer = _load(config, folder)
    ids = tokenizer(prompts)["input_ids"]
    batches = [
        tokenizer.pad({"input_ids": [ids[row] for row in batch]}, return_tensors="pt").to(config.device)
        for batch in token_batches(np.array([len(row) for row in ids]), budget)
    ]

    def read() -> int:
        with torch.inference_mode():
            for batch in batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        _wait(config)
        return sum(map(len, ids))

    return read


def _loop(config: PrefillBenchmarkConfig, prompts: list[str], folder: Path, by_length: bool) -> Callable[[], int]:
    import torch

    model, tokenizer = _load(config, folder)
    ordered = sorted(prompts, key=len) if by_length else prompts

    def read() -> int:
        tokens, kept = 0, []
        for start in range(0, len(ordered), LOOP_BATCH):
            batch = tokenizer(ordered[start : start + LOOP_BATCH], padding=True, return_tensors="pt").to(config.device)
            mask = batch["attention_mask"][None, :, :, None]
            with torch.inference_mode():
                states = torch.stack(
                    model(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
                    ).hidden_states
                )
            last = mask[0, :, :, 0].sum(1) - 1
            kept.append(
                (
                    states[:, torch.arange(len(last)), last].float().cpu().numpy(),
                    ((states * mask).sum(2) / mask.sum(2)).float().cpu().numpy(),
                )
            )
            tokens += int(mask.sum())
        return tokens

    return read


@lru_cache(maxsize=1)  # shared by `bare` and both loops: several large models do not fit on one GPU
def _load(config: PrefillBenchmarkConfig, folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding is masked
    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, config.dtype), trust_remote_code=False)
    model = model.eval().to(config.device)
    model.config.use_cache = False
    return model, tokenizer


def _free_gpu_memory(device: str) -> None:
    """Releases torch's unused cached GPU memory for other processes."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _wait(config: PrefillBenchmarkConfig) -> None:
    if config.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _table(
    config: PrefillBenchmarkConfig, model: str, name: str, folder: Path, measured: dict[Variant, Measured]
) -> str:
    extraction = measured["extraction"]
    shown = name if model != MODEL else name.replace(MODEL, f"random Qwen3 of shape {config.shape}", 1)
    lines = [
        f"\n{shown}, {config.dtype}, {config.device}; {config.prompts} prompts, {extraction.tokens:,} tokens, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n",
        "| variant | tokens/s | extraction speed relative to it | peak MiB |",
        "|---|---|---|---|",
    ]
    for variant, one in measured.items():
        lines.append(
            f"| {variant} | {one.tokens_per_s:,.0f} | {extraction.tokens_per_s / one.tokens_per_s:.2f} | "
            f"{one.peak_mib:,.0f} |"
        )
    half = statistics.median(measured["half"].seconds) / statistics.median(extraction.seconds)
    lines.append(f"\nUp to half of the depth: {half:.2f} of the time.")
    if (share := _share_of_peak(config, folder, extraction)) is not None:
        lines.append(f"Share of the GPU's bf16 peak: {share:.0%}.")
    return "\n".join(lines)


def _share_of_peak(config: PrefillBenchmarkConfig, folder: Path, one: Measured) -> float | None:
    """Achieved share of the GPU's bf16 peak, at two operations per token and weight outside the embedding.

    None if the GPU's peak is unknown or the dtype is not bfloat16.
    """
    if not config.device.startswith("cuda") or config.dtype != "bfloat16":
        return None
    import torch
    from transformers import AutoConfig

    peak = next((value for part, value in PEAK_TFLOPS.items() if part in torch.cuda.get_device_name()), None)
    model, text = _load(config, folder)[0], AutoConfig.from_pretrained(folder, trust_remote_code=False)
    weights = sum(p.numel() for p in model.parameters()) - text.vocab_size * text.hidden_size
    return None if peak is None else 2 * weights * one.tokens_per_s / (peak * 1e12)


if __name__ == "__main__":
    main(PrefillBenchmarkConfig, run)
