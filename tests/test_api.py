"""The Python API: its names, what importing it costs, and a router trained and asked through it alone."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_router import tiny_router

import prefill_router as pr

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "python.md"


def test_every_public_name_is_there_and_documented():
    for name in pr.__all__:
        value = getattr(pr, name)
        assert inspect.getdoc(value), name
    assert sorted(pr.__all__, key=str.lower) == sorted(set(pr.__all__), key=str.lower)
    assert set(pr.__all__) <= set(dir(pr))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        pr.fitt  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import prefill_router", "import prefill_router as pr; pr.load_pool; pr.Outcomes"]
)
def test_importing_the_package_loads_neither_torch_ray_nor_mlflow(statement: str):
    heavy = "'torch', 'transformers', 'ray', 'mlflow', 'pandas', 'matplotlib', 'sklearn'"
    code = f"{statement}\nimport sys\nprint([name for name in ({heavy}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_function_prefill_survives_imports_of_its_package():
    code = "import prefill_router as pr, prefill_router.prefill.local; assert callable(pr.prefill), pr.prefill"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.train
@pytest.mark.usefixtures("minilm")
def test_the_guide_uses_every_public_name_and_its_examples_run():
    text = GUIDE.read_text(encoding="utf-8")
    statements = "\n".join(example.source for example in doctest.DocTestParser().get_examples(text))
    assert [name for name in pr.__all__ if not re.search(rf"\bpr\.{name}\b", statements)] == []
    results = doctest.testfile(str(GUIDE), module_relative=False, encoding="utf-8", optionflags=doctest.ELLIPSIS)
    assert results.attempted > 30
    assert results.failed == 0


def test_the_training_example_has_at_most_twelve_lines_and_only_public_names():
    lines = (ROOT / "examples" / "train_your_own.py").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip() and not line.startswith('"""')]
    assert len(code) <= 12
    assert {name for line in code for name in re.findall(r"\bpr\.(\w+)", line)} <= set(pr.__all__)


def test_a_string_is_not_a_list_of_strings(tmp_path):
    router = pr.LocalRouter(tiny_router("f" * 16))
    with pytest.raises(pr.InputError, match=r"prompts: got the string 'hello', expected a list of strings"):
        router.route_batch("hello")
    with pytest.raises(pr.InputError, match=r"models: got the string 'cheap', expected a list of strings"):
        router.route("hello", models="cheap")
    with pytest.raises(pr.InputError, match=r"require: got the string 'vision', expected a list of strings"):
        router.route("hello", require="vision")


@pytest.mark.parametrize("bound", [-0.1, 1.0, float("nan")])
def test_a_novelty_bound_that_is_no_bound_is_refused(bound):
    with pytest.raises(pr.InputError, match=r"novelty_above: got .*, allowed is at least 0 and less than 1"):
        pr.NoveltyFallback(bound, "cheap")
