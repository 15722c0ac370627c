"""How pooled states travel in `kv_transfer_params`, from an engine to whoever asked: written and read here.

    {"prefill_states": {"n_tokens": 12, "columns": ["last_L3", ...], "float32": base64 of the array [columns, hidden],
                        "encoder": {"weights_digest", "dtype"} where the engine identifies itself}}
    {"prefill_states": {"error": "why there are none"}}

Imports no vLLM: a client needs none.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

ASKED = "prefill_states"  # the key; in a request's `kv_transfer_params` it is true


def write_answer(n_tokens: int, columns: Sequence[str], pooled: Float[np.ndarray, "columns hidden"]) -> dict[str, Any]:
    """What an engine answers for one prompt."""
    return {
        "n_tokens": n_tokens,
        "columns": list(columns),
        "float32": base64.b64encode(np.ascontiguousarray(pooled, dtype="<f4").tobytes()).decode(),
    }


def read_answer(
    params: dict[str, Any] | None, n_tokens: int, columns: Sequence[str]
) -> Float[np.ndarray, "columns hidden"]:
    """The states of `columns` for a prompt of `n_tokens` tokens, float32. Raises RuntimeError where they are not there:
    that is the engine's fault, not the prompt's."""
    answer = (params or {}).get(ASKED)
    if answer is None:
        raise RuntimeError("the engine answered without states")
    if "error" in answer:
        raise RuntimeError(answer["error"])
    if answer["n_tokens"] != n_tokens:
        raise RuntimeError(f"the engine pooled the states of {answer['n_tokens']} tokens, the prompt has {n_tokens}")
    missing = [column for column in columns if column not in answer["columns"]]
    if missing:
        raise RuntimeError(f"the engine pools no {missing[0]}, only {', '.join(answer['columns'])}")
    pooled = np.frombuffer(base64.b64decode(answer["float32"]), dtype="<f4").reshape(len(answer["columns"]), -1)
    return pooled[[answer["columns"].index(column) for column in columns]]
