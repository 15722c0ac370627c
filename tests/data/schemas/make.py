"""Writes kubernetes.json and compose.json from two packages, without descriptions:

python -m venv scratch && scratch/bin/pip install kubernetes==37.0.2 check-jsonschema==0.39.0 pydantic
scratch/bin/python tests/data/schemas/make.py
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from kubernetes.client.models.v1_pod_template_spec import V1PodTemplateSpec
from kubernetes.client.models.v1_service import V1Service

HERE = Path(__file__).parent
DROPPED = {"description", "title", "default", "examples", "deprecated", "$comment", "$id"}


def reduced(schema: Any, names: bool = False) -> Any:
    """The schema without annotations, and without null as an alternative. `names`: keys are names of properties."""
    if isinstance(schema, list):
        return [reduced(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: reduced(value, names=not names and key in ("properties", "patternProperties", "$defs", "definitions"))
        for key, value in schema.items()
        if names or key not in DROPPED
    }
    if not names and isinstance(some := kept.get("anyOf"), list):
        some = [one for one in some if one != {"type": "null"}]
        kept = some[0] if len(some) == 1 else {**kept, "anyOf": some}
    return kept


def write(name: str, schema: dict[str, Any]) -> None:
    (HERE / name).write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")


shared: dict[str, Any] = {}
for model in (V1PodTemplateSpec, V1Service):
    found = model.model_json_schema(by_alias=True)
    shared |= found.pop("$defs")
    shared[model.__name__] = found
write("kubernetes.json", {"$defs": reduced(shared, names=True)})
vendored = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
write("compose.json", reduced(json.loads(vendored.read_text())))
