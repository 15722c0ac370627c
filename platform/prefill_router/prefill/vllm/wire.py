"""Encoding of pooled states in `kv_transfer_params`, between vLLM's engine and its clients.

    {"prefill_states": {"n_tokens": 12, "columns": ["last_L3", ...], "float32": base64 of the array [columns, hidden],
                        "encoder": {"weights_digest", "dtype"} if the engine identifies its encoder}}
    {"prefill_states": {"error": "reason why there are no states"}}

Does not import vLLM, so that clients do not need it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

STATES_KEY = "prefill_states"  # key of the states in a response; true under this key in a request asks for them


def encode_states(n_tokens: int, columns: Sequence[str], pooled: Float[np.ndarray, "columns hidden"]) -> dict[str, Any]:
    """The JSON object with the pooled states of a prompt of `n_tokens` tokens."""
    return {
        "n_tokens": n_tokens,
        "columns": list(columns),
        "float32": base64.b64encode(np.ascontiguousarray(pooled, dtype="<f4").tobytes()).decode(),
    }


def decode_states(
    params: dict[str, Any] | None, n_tokens: int, columns: Sequence[str]
) -> Float[np.ndarray, "columns hidden"]:
    """The states of `columns`, float32, from the `kv_transfer_params` of a response to a prompt of `n_tokens` tokens.

    Raises RuntimeError if the states are missing or do not match the request, which is a fault of the engine.
    """
    response = (params or {}).get(STATES_KEY)
    if response is None:
        raise RuntimeError("vLLM's response has no states")
    if "error" in response:
        raise RuntimeError(response["error"])
    if response["n_tokens"] != n_tokens:
        raise RuntimeError(f"vLLM pooled the states of {response['n_tokens']} tokens, the prompt has {n_tokens}")
    missing = [column for column in columns if column not in response["columns"]]
    if missing:
        raise RuntimeError(f"vLLM does not pool {missing[0]}, only {', '.join(response['columns'])}")
    pooled = np.frombuffer(base64.b64decode(response["float32"]), dtype="<f4").reshape(len(response["columns"]), -1)
    return pooled[[response["columns"].index(column) for column in columns]]
