"""Memory and time of an encoder by the number of loaded transformer blocks, for each backend.

The model is the random Qwen3 of benchmarks/prefill.py. For every depth, an encoder of that layer alone is loaded,
without the blocks above it, and encodes the same generated prompts several times. `weights` is the size of the loaded
weights, including the embedding. `peak` is the peak memory of a separate process without its libraries, or of the GPU;
it is measured for the transformers backend only, because vLLM reserves cache memory in advance.
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import Field
from tqdm import tqdm

from benchmarks.prefill import PrefillBenchmarkConfig, memory_kib, save_qwen3, texts
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.prefill.config import EncoderConfig


class DepthConfig(FrozenModel):
    """Backends, depths and generated prompts of the benchmark."""

    output: Annotated[LocalPath, Field(description="folder for depth.json")] = Path("runs/benchmarks/depth")
    backends: Annotated[tuple[Literal["transformers", "vllm"], ...], Field(min_length=1)] = ("transformers", "vllm")
    shape: Annotated[Literal["small", "0.6B", "8B"], Field(description="shape of the random Qwen3")] = "small"
    depths: Annotated[tuple[int, ...], Field(min_length=1, description="layers, each measured alone")] = (3, 6, 9, 12)
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="dtype of weights and arithmetic")] = "float32"
    prompts: Annotated[int, Field(ge=8, description="number of generated prompts")] = 192
    rounds: Annotated[int, Field(ge=1, description="measurements of every depth")] = 5
    seed: Annotated[int, Field(ge=0, description="seed of weights and prompts")] = 0


def run(config: DepthConfig) -> str:
    """Measure weights, memory and time by the number of loaded blocks; print a table for every backend."""
    found = {}
    with TemporaryDirectory() as scratch:
        folder = save_qwen3(Path(scratch), config.shape, config.seed)
        for backend in config.backends:
            found[backend] = _measure(config, backend, folder)
            print(_table(config, backend, found[backend]), flush=True)
    write_json(config.output / "depth.json", {"config": config.model_dump(mode="json"), **found})
    return f"figures in {config.output / 'depth.json'}"


def _encoder(config: DepthConfig, backend: str, folder: Path, depth: int) -> Any:
    from prefill_router.prefill.backends import load_encoder

    return load_encoder(
        EncoderConfig.model_validate(
            {
                "backend": backend,
                "model": str(folder),
                "layers": (depth,),
                "poolings": ("mean",),
                "dtype": config.dtype,
                "batch_tokens": 8192,
            }
        )
    )


def _prompts(config: DepthConfig) -> pa.Table:
    made = texts(PrefillBenchmarkConfig(prompts=config.prompts, seed=config.seed))
    return pa.table({"query_id": [str(row) for row in range(len(made))], "prompt": made})


def _measure(config: DepthConfig, backend: str, folder: Path) -> dict[str, dict[str, Any]]:
    prompts = _prompts(config)
    found: dict[str, dict[str, Any]] = {}
    for depth in tqdm(config.depths, desc=backend, unit="depth", leave=False):
        # Encoders run one after another, because an idle vLLM engine uses CPU time.
        encoder, seconds = _encoder(config, backend, folder, depth), []
        encoder(prompts)
        for _ in range(config.rounds):
            began = time.perf_counter()
            encoder(prompts)
            seconds.append(time.perf_counter() - began)
        encoder.close()
        loaded = encoder.loaded
        del encoder
        torch.cuda.empty_cache()  # for the processes below; does nothing without a GPU
        peak = None
        if backend == "transformers":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
                peak = own.submit(_peak, config, backend, folder, depth).result()
        found[str(depth)] = {
            "blocks": loaded.blocks,
            "of_blocks": loaded.total_blocks,
            "weights_mib": loaded.bytes / 2**20,
            "seconds": seconds,
            "peak_mib": peak,
        }
    return found


def _peak(config: DepthConfig, backend: str, folder: Path, depth: int) -> float:
    """Peak MiB of loading and encoding one prompt, without the libraries."""
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  imported before the measurement

    import prefill_router.prefill.transformers_backend  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # resets the inherited high-water mark
    before = memory_kib("VmRSS")
    _encoder(config, backend, folder, depth)(_prompts(config).slice(0, 1))
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return (memory_kib("VmHWM") - before) / 1024


def _table(config: DepthConfig, backend: str, found: dict[str, dict[str, Any]]) -> str:
    deepest = statistics.median(found[str(max(config.depths))]["seconds"])
    lines = [
        f"\n{backend}, random Qwen3 of shape {config.shape}, {config.dtype}; {config.prompts} prompts, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n",
        "| loaded blocks | weights MiB | peak MiB | seconds | relative to the deepest |",
        "|---|---|---|---|---|",
    ]
    for one in found.values():
        seconds = statistics.median(one["seconds"])
        peak = "" if one["peak_mib"] is None else f"{one['peak_mib']:,.0f}"
        lines.append(
            f"| {one['blocks']} of {one['of_blocks']} | {one['weights_mib']:,.1f} | {peak} | {seconds:.2f} | "
            f"{seconds / deepest:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(DepthConfig, run)
