"""The jobs' command line: overrides win over the file, and bad usage is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

from jobs.cli import JobConfig, main, parse
from prefill_router.errors import InputError


class Nested(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: Annotated[float, Field(gt=0, description="per second")] = 1.0
    names: tuple[str, ...] = ()


class Config(JobConfig):
    path: Path
    count: Annotated[int, Field(ge=1)] = 3
    nested: Nested = Nested()


class Folders(JobConfig):
    folders: Annotated[
        tuple[Path, ...], Field(min_length=1, description="100 % folders", json_schema_extra={"positional": True})
    ]
    seed: int = 0


def job(config: Config) -> str:
    """Does nothing."""
    if config.count == 13:
        raise InputError("count: 13 is unlucky")
    return f"counted {config.count}"


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("path: /a\ncount: 5\nnested: {rate: 2.5}\n")
    config = parse(Config, "", ["--config", str(tmp_path / "c.yaml"), "--count", "7", "--nested.names", "[x, y]"])
    assert config == Config(path=Path("/a"), count=7, nested=Nested(rate=2.5, names=("x", "y")))


def test_a_positional_field_takes_what_stands_without_a_name_wherever_it_stands(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("folders: [c, d]\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    assert parse(Folders, "", ["a", "--seed", "3", "1"]) == Folders(folders=(Path("a"), Path("1")), seed=3)
    assert parse(Folders, "", file).folders == (Path("c"), Path("d"))
    assert parse(Folders, "", ["a", *file]).folders == (Path("a"),)
    with pytest.raises(InputError, match="folders: Field required"):
        parse(Folders, "", [])


def test_help_shows_a_positional_field(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(Folders, "", ["--help"])
    said = capsys.readouterr().out
    assert "[FOLDER ...]" in said
    assert "100 % folders" in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--path", "/a", "--count", "0"], r"count: Input should be greater than or equal to 1 \(got 0\)"),
        (["--path", "/a", "--nested.rate", "-1"], r"nested.rate: .*greater than 0"),
        ([], r"path: Field required"),
        (["--config", "/nowhere.yaml"], r"--config /nowhere.yaml: no such file"),
    ],
)
def test_bad_values_name_their_field(argv: list[str], says: str):
    with pytest.raises(InputError, match=says):
        parse(Config, "", argv)


def test_unknown_keys_in_the_file_are_refused(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("path: /a\ncolour: red\n")
    with pytest.raises(InputError, match=r"c.yaml: colour: Extra inputs are not permitted"):
        parse(Config, "", ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--path", "/a"], 0, "counted 3", ""),
        (["--path", "/a", "--count", "13"], 2, "", "error: count: 13 is unlucky"),
        (["--path", "/a", "--colour", "red"], 2, "", "unrecognized arguments: --colour"),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], argv: list[str], code: int, out: str, err: str):
    with pytest.raises(SystemExit) as ended:
        main(Config, job, argv)
    assert ended.value.code == code
    said = capsys.readouterr()
    assert out in said.out
    assert err in said.err
