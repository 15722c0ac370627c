"""The command line: spellings, values, precedence, help, one-line errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from prefill_router.cli import main, main_known, parse, parse_known
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError, one_line
from prefill_router.pool import Pool


class Part(FrozenModel):
    """How the part runs.

    A second paragraph.
    """

    batch_tokens: Annotated[int, Field(ge=1, description="tokens per batch")] = 8
    rate: Annotated[float, Field(gt=0, description="queries per second")] = 1.0
    names: tuple[str, ...] = ()
    layers: tuple[int, ...] | Literal["upper", "all"] = "upper"
    eager: bool = False


class Override(FrozenModel):
    """Settings that replace the usual ones."""

    device: str | None = None
    inner: Part | None = None


class Config(FrozenModel):
    path: Path
    count: Annotated[int, Field(ge=1)] = 3
    name: str = "x"
    revision: str | None = "main"
    side: Annotated[Literal["left", "right"], Field(description="side to cut")] = "left"
    undo: bool = False
    baselines: bool = True
    prices: dict[str, float] | None = None
    source: str | dict[str, str] = "a"
    sizes: tuple[Annotated[int, Field(ge=1)], ...] | Annotated[int, Field(ge=1)] = 2
    weights: dict[str, float] = {"b": 2.0, "a": 1.0}
    nested: Part = Part()
    other_part: Annotated[Override | None, Field(description="what differs")] = None


class Folders(FrozenModel):
    folders: Annotated[
        tuple[Path, ...], Field(min_length=1, description="100 % folders", json_schema_extra={"positional": True})
    ]
    seed: int = 0
    fast: bool = False


class Server(FrozenModel):
    model: Annotated[str, Field(description="hub id", json_schema_extra={"positional": True})]
    port: int = 8001
    layers: tuple[int, ...] | Literal["all"] = "all"


def job(config: Config) -> str:
    """Counts.

    Slowly.
    """
    if config.count == 13:
        raise InputError("count: 13 is\nunlucky")
    if config.count == 14:
        raise UnavailableError("the counter does not answer")
    if config.count == 15:
        raise RuntimeError("broken")
    return f"counted {config.count}"


def serve(config: Server, rest: list[str]) -> str:
    """Serves."""
    return f"{config.model} at {config.port} with {rest}"


def given(*argv: str) -> dict[str, Any]:
    """The fields that the arguments set, without `path`."""
    config = parse(Config, "", ["--path", "/a", *argv])
    return config.model_dump(exclude_unset=True, exclude={"path"})


def ended(capsys: pytest.CaptureFixture[str], *call: Any) -> tuple[Any, str, str]:
    """The exit code, stdout and stderr of `main` or `main_known`."""
    with pytest.raises(SystemExit) as end:
        call[0](*call[1:])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: Any, columns: int = 100) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = ended(capsys, parse, kind, "Counts.", ["--help"])
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize(
    "option",
    [
        ["--nested.batch-tokens", "5"],
        ["--nested.batch_tokens", "5"],
        ["--nested.batch-tokens=5"],
        ["--nested.batch_tokens=5"],
    ],
)
def test_both_spellings_of_an_option_are_accepted(option: list[str]):
    assert given(*option) == {"nested": {"batch_tokens": 5}}


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--nested.batch-token", "unknown option --nested.batch-token; did you mean --nested.batch-tokens?"),
        ("--nested.batch_token=5", "unknown option --nested.batch_token; did you mean --nested.batch-tokens?"),
        ("--batch-tokens", "did you mean --nested.batch-tokens or --other-part.inner.batch-tokens?"),
        ("--batch_tokens", "did you mean --nested.batch-tokens or --other-part.inner.batch-tokens?"),
        ("--no-baseline", "did you mean --no-baselines?"),
        ("--confg", "did you mean --config?"),
        ("--flavour", "unknown option --flavour; --help lists the options"),
    ],
)
def test_an_unknown_option_names_similar_options(option: str, answer: str):
    with pytest.raises(InputError) as error:
        parse(Config, "", [option, "5"])  # the missing path is not what the user has to know first
    assert str(error.value).endswith(answer)


@pytest.mark.parametrize(
    ("argv", "fields"),
    [
        (["--undo"], {"undo": True}),
        (["--no-undo"], {"undo": False}),
        (["--undo", "true"], {"undo": True}),
        (["--undo", "false"], {"undo": False}),
        (["--undo=true"], {"undo": True}),
        (["--no-baselines"], {"baselines": False}),
        (["--undo", "--count", "5"], {"undo": True, "count": 5}),
        (["--nested.eager"], {"nested": {"eager": True}}),
        (["--no-other_part.inner.eager"], {"other_part": {"inner": {"eager": False}}}),
    ],
)
def test_booleans_are_flags_that_may_have_a_value(argv: list[str], fields: dict[str, Any]):
    assert given(*argv) == fields


def test_a_flag_does_not_take_a_positional_argument_as_its_value():
    assert parse(Folders, "", ["--fast", "a"]) == Folders(folders=(Path("a"),), fast=True)
    assert parse(Folders, "", ["--no-fast", "a"]) == Folders(folders=(Path("a"),))


@pytest.mark.parametrize(
    ("argv", "fields"),
    [
        (["--name", "[a, b"], {"name": "[a, b"}),
        (["--name", "12"], {"name": "12"}),
        (["--revision", "1e10"], {"revision": "1e10"}),
        (["--revision", "null"], {"revision": None}),
        (["--name", "null"], {"name": "null"}),
        (["--side", "right"], {"side": "right"}),
        (["--prices", "{a: 1.5}"], {"prices": {"a": 1.5}}),
        (["--prices", "null"], {"prices": None}),
        (["--source", "2024"], {"source": "2024"}),
        (["--source", "{a: b}"], {"source": {"a": "b"}}),
        (["--nested.names", "[x, y]"], {"nested": {"names": ("x", "y")}}),
        (["--nested.layers", "all"], {"nested": {"layers": "all"}}),
        (["--nested.layers", "[1, 2]"], {"nested": {"layers": (1, 2)}}),
    ],
)
def test_text_is_kept_as_typed_and_other_values_are_yaml(argv: list[str], fields: dict[str, Any]):
    assert given(*argv) == fields


def test_a_field_of_an_absent_model_creates_it(tmp_path: Path):
    assert given() == {}
    assert given("--other-part.inner.rate", "2") == {"other_part": {"inner": {"rate": 2.0}}}
    (tmp_path / "c.yaml").write_text("path: /a\nother_part: null\n")
    config = parse(Config, "", ["--config", str(tmp_path / "c.yaml"), "--other_part.device", "cpu"])
    assert config.other_part == Override(device="cpu")


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("path: /a\ncount: 5\nnested: {rate: 2.5, batch_tokens: 4}\n")
    config = parse(Config, "", ["--config", str(tmp_path / "c.yaml"), "--count", "7", "--nested.names", "[x, y]"])
    assert config == Config(path=Path("/a"), count=7, nested=Part(rate=2.5, batch_tokens=4, names=("x", "y")))


def test_a_positional_field_takes_unnamed_arguments_in_any_place(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("folders: [c, d]\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    assert parse(Folders, "", ["a", "--seed", "3", "1"]) == Folders(folders=(Path("a"), Path("1")), seed=3)
    assert parse(Folders, "", file).folders == (Path("c"), Path("d"))
    assert parse(Folders, "", ["a", *file]).folders == (Path("a"),)
    with pytest.raises(InputError, match=r"folders: Field required \(give FOLDER\)"):
        parse(Folders, "", [])


def test_unknown_arguments_are_returned_in_their_order():
    argv = ["m", "--dtype", "half", "--port", "9", "-q", "awq", "--layers=[1, 2]", "--lora-modules=a=b"]
    config, rest = parse_known(Server, "", argv)
    assert config == Server(model="m", port=9, layers=(1, 2))
    assert rest == ["--dtype", "half", "-q", "awq", "--lora-modules=a=b"]
    assert parse_known(Server, "", ["m"])[1] == []


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--path", "/a", "--count", "0"], r"^count: Input should be greater than or equal to 1 \(got 0\)$"),
        (["--path", "/a", "--nested.rate", "-1"], r"^nested\.rate: .*greater than 0"),
        (["--path", "/a", "--side", "up"], r"^side: Input should be 'left' or 'right' \(got 'up'\)"),
        (["--path", "/a", "--undo", "maybe"], r"^undo: Input should be a valid boolean.*got 'maybe'"),
        (["--path", "/a", "--prices", ""], r"^prices: Input should be a valid dictionary \(got ''\)"),
        (["--path", "/a", "--prices", "{a: [}"], r"^--prices '{a: \[}': not a YAML value; a list is '\[a, b\]'"),
        ([], r"^path: Field required \(give --path\)"),
        (["--path"], r"^--path: no value follows; a value that begins with a dash is written --path=VALUE"),
        (["--path", "a", "b"], r"^unexpected argument 'b'; .* a list is '\[a, b\]'"),
        (["--config", "/nowhere.yaml"], r"^--config /nowhere\.yaml: no such file"),
        (["--config", "/"], r"^--config /: cannot be read"),
    ],
)
def test_bad_usage_names_field_value_and_correction(argv: list[str], answer: str):
    with pytest.raises(InputError, match=answer):
        parse(Config, "", argv)


@pytest.mark.parametrize(
    ("text", "argv", "answer"),
    [
        ("path: /a\ncolour: red\n", [], r"c\.yaml: colour: Extra inputs are not permitted \(--help lists the fields\)"),
        ("path: /a\nnested: {rat: 1}\n", [], r"c\.yaml: nested\.rat: Extra .* \(did you mean nested\.rate\?\)"),
        ("path: /a\nnestd: {rate: 1}\n", [], r"c\.yaml: nestd: Extra .* \(did you mean nested\?\)"),
        ("path: /a\nother_part: {inner: {rat: 1}}\n", [], r"\(did you mean other_part\.inner\.rate\?\)"),
        ("path: /a\ncount: 0\n", [], r"c\.yaml: count: .*greater than or equal to 1 \(got 0\)"),
        ("path: /a\nnested: 5\n", ["--nested.rate", "2"], r"nested: got 5, but nested\.rate needs a mapping"),
        ("[a]\n", [], r"c\.yaml: expected a mapping of fields, got list"),
        ("a: [\n", [], r"c\.yaml: not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Path, text: str, argv: list[str], answer: str):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=answer):
        parse(Config, "", ["--config", str(tmp_path / "c.yaml"), *argv])


def test_an_error_of_an_option_does_not_blame_the_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("path: /a\nnested: {rate: 2}\n")
    with pytest.raises(InputError, match=r"^nested\.names\.0: Input should be a valid string"):
        parse(Config, "", ["--config", str(tmp_path / "c.yaml"), "--nested.names", "[1]"])


def test_help_groups_options_by_nested_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    said = help_of(capsys, monkeypatch, Config)
    assert "\nnested:\n  How the part runs.\n\n  --nested.batch-tokens INT" in said
    assert "\nother_part:\n  what differs Absent unless one of its fields is given.\n\n  --other-part.device" in said
    assert said.index("--baselines") < said.index("nested:") < said.index("--nested.rate") < said.index("other_part:")
    assert "second paragraph" not in said
    assert "batch_tokens" not in said


def test_help_shows_type_default_and_description(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    said = " ".join(help_of(capsys, monkeypatch, Config).split())
    for part in [
        "Counts.",
        "--path PATH (required)",
        "--count INT (default: 3)",
        "--revision TEXT|null (default: main)",
        "--side {left,right} side to cut (default: left)",
        "--undo [true|false] (default: false)",
        "--baselines [true|false] (default: true; --no-baselines sets false)",
        "--prices {TEXT: NUMBER}|null (default: null)",
        "--sizes [INT, ...]|INT (default: 2)",
        "--weights {TEXT: NUMBER} (default: {b: 2.0, a: 1.0})",
        "--nested.batch-tokens INT tokens per batch (default: 8)",
        "--nested.names [TEXT, ...] (default: [])",
        "--nested.layers [INT, ...]|{upper,all} (default: upper)",
        "A flag --name means true, --no-name means false.",
    ]:
        assert part in said


def test_help_shows_a_positional_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    said = help_of(capsys, monkeypatch, Folders)
    assert "[FOLDER ...]" in said
    assert "100 % folders (required)" in said
    assert "[MODEL]\n" in help_of(capsys, monkeypatch, Server)


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_help_is_at_most_100_columns_wide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
):
    assert max(map(len, help_of(capsys, monkeypatch, Config, columns).splitlines())) <= min(columns, 100)


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        ([], 0, "job: counted 3\n", ""),
        (["--count", "13"], 2, "", "job: error: count: 13 is unlucky\n"),
        (["--count", "14"], 1, "", "job: error: the counter does not answer\n"),
        (["--colour", "red"], 2, "", "job: error: unknown option --colour; --help lists the options\n"),
        (["--count", "0"], 2, "", "job: error: count: Input should be greater than or equal to 1 (got 0)\n"),
    ],
)
def test_exit_codes_and_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], code: int, out: str, err: str):
    assert ended(capsys, main, Config, job, ["--path", "/a", *argv]) == (code, out, err)


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(RuntimeError, match="broken"):
        main(Config, job, ["--path", "/a", "--count", "15"])


def test_a_forwarding_program_receives_unknown_arguments(capsys: pytest.CaptureFixture[str]):
    assert ended(capsys, main_known, Server, serve, ["m", "--dtype", "half"]) == (
        0,
        "job: m at 8001 with ['--dtype', 'half']\n",
        "",
    )
    assert ended(capsys, main_known, Server, serve, ["m", "--port", "x"])[0] == 2


PROGRAM = """
import json, sys
from prefill_router.cli import main
from prefill_router.config import FrozenModel

class Config(FrozenModel):
    seed: int = 0

def run(config: Config) -> str:
    "Lists heavy modules."
    return json.dumps(sorted({"torch", "ray", "mlflow", "pandas", "pyarrow", "numpy"} & set(sys.modules)))

if __name__ == "__main__":
    main(Config, run)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    for path in ("tools/count.py", "server/__main__.py"):
        (folder / path).parent.mkdir()
        (folder / path).write_text(PROGRAM)
    return folder


@pytest.mark.parametrize(("module", "name"), [("tools.count", "count"), ("server", "server")])
def test_messages_begin_with_the_name_of_the_module(programs: Path, module: str, name: str):
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", module, *argv], cwd=programs, capture_output=True, text=True)

    done = run("--seed", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{name}: ")
    assert json.loads(done.stdout.removeprefix(f"{name}: ")) == []  # a command line that answers at once
    assert run("--sed", "1").stderr == f"{name}: error: unknown option --sed; did you mean --seed?\n"
    assert run("--help").stdout.startswith(f"usage: python -m {module} [--config FILE.yaml]")


def test_an_error_of_a_list_says_list():
    model = {"name": "a", "input_usd_per_mtok": 1, "output_usd_per_mtok": 1, "capabilities": "tools"}
    with pytest.raises(ValidationError) as error:
        Pool.model_validate({"models": [model]})
    assert one_line(error.value).startswith("models.0.capabilities: Input should be a list (got 'tools')")
