"""Collecting answers: the ledger, the plan, and models that are asked through the faults of real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.collect.ledger import Charge, Ledger, answer_usd
from prefill_router.collect.plan import Benchmark, Question, chosen, estimate_usd, keys_of, pairs_of
from prefill_router.errors import InputError
from prefill_router.importing.answers import outcomes_of
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import Endpoint, Pool, SelfHostedCost, TargetModel, load_pool, save_pool
from prefill_router.routing.cost import CostModel, output_prices

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed; pip install 'prefill-router[eval]'")

from stub_models import INPUT_TOKENS, OUTPUT_TOKENS
from stub_upstream import stub_upstream

from jobs.collect import CollectConfig, run
from prefill_router.collect import asking
from prefill_router.collect.inspect_models import Settings
from prefill_router.collect.results import Collected

ROOT = Path(__file__).parents[1]
CHARGE = Charge("sums", "a", "a", 0.25, 100, 50)


def priced(name: str, **given: object) -> TargetModel:
    return TargetModel.model_validate({"name": name, "input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0} | given)


def test_charges_of_an_earlier_process_count(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.jsonl", 1.0)
    for _ in range(3):
        first.add(CHARGE)
    again = Ledger(tmp_path / "ledger.jsonl", 1.0)
    assert (again.usd, again.answers) == (0.75, 3)
    assert again.admits()
    again.add(CHARGE)
    assert not again.admits()


def test_a_line_that_a_killed_process_left_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).add(CHARGE)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    ledger = Ledger(path)
    ledger.add(CHARGE)
    assert path.read_bytes() == whole * 2
    assert (ledger.usd, ledger.answers) == (0.5, 2)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"usd": 1}\n')
    with pytest.raises(InputError, match="not a line of charges"):
        Ledger(tmp_path / "ledger.jsonl")


def test_answers_without_a_price_are_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", 1.0)
    ledger.add(replace(CHARGE, usd=None, asked="judge"))
    assert ledger.unpriced == {"judge"}
    assert (ledger.usd, ledger.answers) == (0.0, 1)


def test_costs_are_those_of_the_cost_model() -> None:
    engine = SelfHostedCost(gpu_usd_per_hour=3.6, ttft_s_per_1k_tokens=0.5, itl_s=0.02)
    pool = Pool(models=(priced("api"), TargetModel(name="own", self_hosted=engine)))
    per_input = np.array([1e-6, 0.001 * 0.5 / 1000])
    model = CostModel(per_input, np.zeros(2), np.zeros(2), np.ones(2), 0.0, 0.0, output_prices(pool))
    expected = model.of_tokens(np.array([[700.0, 700.0]]), np.array([[90.0, 90.0]]))[0]
    np.testing.assert_allclose([answer_usd(one, 700, 90) for one in pool.models], expected)


def test_cached_input_has_its_own_price() -> None:
    assert answer_usd(priced("a", cached_input_usd_per_mtok=0.1), 1000, 0, 400) == pytest.approx(0.00064)
    assert answer_usd(priced("a"), 1000, 0, 400) == pytest.approx(0.001)


def test_a_benchmark_is_a_file_or_a_task() -> None:
    assert Benchmark.model_validate("own/sums.jsonl").label == "sums"
    assert Benchmark.model_validate("inspect_evals.mmlu_pro:mmlu_pro").label == "mmlu_pro"
    for value, named in (({}, "questions"), ({"questions": "a.jsonl", "task": "a:b"}, "questions"), ("a b", "task")):
        with pytest.raises(ValueError, match=named):
            Benchmark.model_validate(value)


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_no_name_leads_out_of_the_folder(benchmark: str, model: str) -> None:
    (pair,) = pairs_of([Benchmark(name=benchmark, task="a:b")], [own(model)], 1, 1)
    assert len(pair.place.parts) == 2
    assert not any(part.startswith(".") for part in pair.place.parts)


def own(name: str, url: str = "http://127.0.0.1:9/v1") -> TargetModel:
    return priced(name, endpoint=Endpoint(base_url=url))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5), st.integers(1, 4))
def test_processes_share_the_connections_of_a_server(connections: int, cpus: int, models: int, benchmarks: int) -> None:
    pairs = pairs_of(
        [Benchmark(name=str(one), task="a:b") for one in range(benchmarks)],
        [own(str(one)) for one in range(models)],
        connections,
        cpus,
    )
    at_once = sorted((pair.connections for pair in pairs), reverse=True)[: min(cpus, connections)]
    assert 1 <= sum(at_once) <= connections


def test_two_benchmarks_of_one_name_are_refused() -> None:
    twice = [Benchmark(task="a:sums"), Benchmark(task="b:sums")]
    with pytest.raises(InputError, match="benchmarks: more than one is called sums"):
        pairs_of(twice, [own("a")], 1, 1)


def test_a_model_without_an_endpoint_is_refused() -> None:
    with pytest.raises(InputError, match=r"'a' has no endpoint.*--models"):
        pairs_of([Benchmark(task="a:b")], [priced("a")], 1, 1)


def test_the_estimate_is_the_price_of_all_answers() -> None:
    (pair,) = pairs_of([Benchmark(task="a:b", epochs=2)], [own("a")], 1, 1)
    assert estimate_usd(pair, [Question("1", 100), Question("2", 300)], 50.0) == pytest.approx(2 * (400 + 200) / 1e6)


def test_models_are_chosen_by_name() -> None:
    pool = Pool(models=(priced("a"), priced("b")))
    assert [one.name for one in chosen(pool, ["b"])] == ["b"]
    assert chosen(pool, []) == list(pool.models)


@dataclass
class Local:
    """A gate in this process."""

    ledger: Ledger
    done: int = 0

    async def admits(self) -> bool:
        return self.ledger.admits()

    async def add(self, charge: Charge) -> None:
        self.ledger.add(charge)

    async def answered(self) -> None:
        self.done += 1


@dataclass
class Server:
    """A running stub of several models."""

    url: str
    file: Path

    def answers(self) -> Counter[tuple[str, str]]:
        """Complete answers by model and question."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return Counter((model, question) for model, question, *_ in map(json.loads, lines))


@contextmanager
def server(folder: Path, faults: float = 0.0, *kinds: str) -> Iterator[Server]:
    port, answers = folder / "port", folder / "answers.jsonl"
    process = subprocess.Popen([sys.executable, ROOT / "tests/stub_models.py", port, answers, str(faults), *kinds])
    try:
        deadline = time.monotonic() + 30
        while not port.exists():
            assert process.poll() is None, "the stub ended"
            assert time.monotonic() < deadline, "the stub did not start"
            time.sleep(0.05)
        yield Server(f"http://127.0.0.1:{port.read_text()}/v1", answers)
    finally:
        process.kill()
        process.wait()


def sums(folder: Path, n: int) -> Benchmark:
    path = folder / "sums.jsonl"
    lines = [
        {"question": f"What is {i} + {i * 7 % 13}?", "kind": "numeric", "answer": i + i * 7 % 13} for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Benchmark(questions=path)


def asked(
    folder: Path, benchmark: Benchmark, models: list[TargetModel], budget: float | None = None, connections: int = 8
) -> tuple[Local, Collected]:
    gate = Local(Ledger(folder / "out/ledger.jsonl", budget))
    pairs = pairs_of([benchmark], models, connections, 1)
    for pair in pairs:
        asking.ask(pair, Settings(), folder / "out", gate)
    keys = {benchmark.label: keys_of(benchmark, asking.questions_of(benchmark))}
    return gate, Collected(pairs, folder / "out", keys)


def test_every_question_gets_one_answer_in_spite_of_faults(tmp_path: Path) -> None:
    with server(tmp_path, faults=0.3) as stub:
        models = [own("share-1.0", stub.url), own("share-0.5", stub.url)]
        gate, collected = asked(tmp_path, sums(tmp_path, 16), models)
        answers = stub.answers()
    table = outcomes_of(collected.answers(), texts=True).table.to_pandas()
    assert not collected.failed
    assert table.groupby("model").size().to_dict() == {"share-1.0": 16, "share-0.5": 16}
    assert table[table.model == "share-1.0"].correct.eq(1).all()
    assert 0 < table[table.model == "share-0.5"].correct.mean() < 1
    assert set(answers.values()) == {1}
    assert gate.ledger.answers == gate.done == 32
    assert table.parsed.all()
    reported = table[table.tokens_from == "reported"]
    assert set(reported.output_tokens) == {OUTPUT_TOKENS}
    assert reported.cost_usd.iloc[0] == pytest.approx((INPUT_TOKENS + 2 * OUTPUT_TOKENS) / 1e6)
    assert gate.ledger.usd == pytest.approx(table.cost_usd.sum())


def test_answers_without_usage_are_estimated_once_and_broken_ones_cost_nothing(tmp_path: Path) -> None:
    with server(tmp_path, 0.6, "malformed", "drop", "no usage") as stub:
        gate, collected = asked(tmp_path, sums(tmp_path, 12), [own("share-1.0", stub.url)])
        answers = stub.answers()
    rows = outcomes_of(collected.answers()).table.to_pylist()
    assert len(rows) == sum(answers.values()) == gate.ledger.answers == 12
    assert {row["tokens_from"] for row in rows} == {"reported", "estimated with 4 characters per token"}
    charges = [json.loads(line) for line in gate.ledger.path.read_text().splitlines()]
    assert sum(one["estimated"] for one in charges) == sum(row["tokens_from"] != "reported" for row in rows)
    assert gate.ledger.usd == pytest.approx(sum(row["cost_usd"] for row in rows))


def test_answers_of_the_cache_cost_nothing_again(tmp_path: Path) -> None:
    with server(tmp_path, 1.0, "no usage") as stub:
        gate, _ = asked(tmp_path, sums(tmp_path, 4), [own("share-1.0", stub.url)])
        for log in (tmp_path / "out").rglob("*.eval"):  # as a killed process leaves it
            log.unlink()
        again, collected = asked(tmp_path, sums(tmp_path, 4), [own("share-1.0", stub.url)])
        assert sum(stub.answers().values()) == 4
    assert outcomes_of(collected.answers()).table.num_rows == 4
    assert again.done == 4
    assert gate.ledger.answers == again.ledger.answers == 4


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with server(tmp_path) as stub:
        models = [own("share-1.0", stub.url)]
        asked(tmp_path, sums(tmp_path, 6), models)
        asked(tmp_path, sums(tmp_path, 9), models)
        gate, collected = asked(tmp_path, sums(tmp_path, 9), models)
        answers = stub.answers()
    assert len(answers) == sum(answers.values()) == 9
    assert gate.ledger.answers == 9
    assert sum(1 for _ in collected.answers()) == 9


def test_a_spent_budget_ends_the_questions_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    price = (INPUT_TOKENS + 2 * OUTPUT_TOKENS) / 1e6
    with server(tmp_path) as stub:
        models = [own("share-1.0", stub.url)]
        gate, collected = asked(tmp_path, sums(tmp_path, 20), models, budget=5 * price, connections=2)
        assert 5 * price <= gate.ledger.usd <= (5 + 2) * price
        assert not collected.failed
        gate, collected = asked(tmp_path, sums(tmp_path, 20), models, budget=1.0)
        answers = stub.answers()
    assert len(answers) == sum(answers.values()) == 20
    assert outcomes_of(collected.answers()).table.num_rows == 20
    assert gate.ledger.usd == pytest.approx(20 * price)


def test_a_killed_process_loses_at_most_the_answers_on_their_way(tmp_path: Path) -> None:
    benchmark = sums(tmp_path, 40)
    with server(tmp_path) as stub:
        code = (
            "import sys, test_collect as t; from pathlib import Path; p = Path(sys.argv[1]); "
            "models = [t.own('share-1.0', sys.argv[2])]; "
            "t.asked(p, t.Benchmark(questions=p / 'sums.jsonl'), models, connections=4)"
        )
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT / 'tests'}"}
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path, stub.url], env=environment)
        deadline = time.monotonic() + 120
        while sum(stub.answers().values()) < 10:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, collected = asked(tmp_path, benchmark, [own("share-1.0", stub.url)], connections=4)
        answers = stub.answers()
    assert outcomes_of(collected.answers()).table.num_rows == 40
    assert len(answers) == 40
    assert 40 <= sum(answers.values()) <= 44


def test_answers_under_other_settings_are_not_mixed(tmp_path: Path) -> None:
    (pair,) = pairs_of([sums(tmp_path, 1)], [own("a")], 1, 1)
    place = tmp_path / "logs" / pair.place
    place.mkdir(parents=True)
    asking._same_settings(place / "settings.json", asking._settings(pair, Settings(max_tokens=10)))
    with pytest.raises(InputError, match=r"max_tokens: got 20, but the answers in .* were made with 10"):
        asking._same_settings(place / "settings.json", asking._settings(pair, Settings(max_tokens=20)))


def test_a_question_that_changed_is_not_mixed_with_its_earlier_answer(tmp_path: Path) -> None:
    benchmark = sums(tmp_path, 2)

    def digests() -> dict[str, str]:
        return {question.id: question.digest for question in asking.questions_of(benchmark)}

    asking.check_questions(tmp_path, benchmark, digests())
    sums(tmp_path, 3)
    asking.check_questions(tmp_path, benchmark, digests())
    path = tmp_path / "sums.jsonl"
    path.write_text(path.read_text().replace('"answer": 0', '"answer": 1'))
    with pytest.raises(InputError, match=r"benchmarks: question '1' of sums is not the one that was asked before"):
        asking.check_questions(tmp_path, benchmark, digests())


def test_a_task_that_cannot_be_made_is_named() -> None:
    with pytest.raises(InputError, match=r"the task nowhere:sums cannot be made: No module named 'nowhere'"):
        asking.questions_of(Benchmark(task="nowhere:sums"))


def test_an_unset_key_is_named_before_anything_is_asked() -> None:
    from prefill_router.collect.inspect_models import model_of

    model = priced("a", endpoint=Endpoint(base_url="http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY"))
    with pytest.raises(InputError, match="environment variable NO_SUCH_KEY of model 'a' is not set"):
        model_of(model, Settings())


def test_a_pool_in_yaml_has_efforts() -> None:
    pool = Pool.model_validate(
        yaml.safe_load(
            "models: [{name: o@low, input_usd_per_mtok: 1, output_usd_per_mtok: 2, "
            "endpoint: {base_url: 'http://x/v1', model: o, reasoning_effort: low}}]"
        )
    )
    assert pool.models[0].endpoint is not None
    assert pool.models[0].endpoint.reasoning_effort == "low"
    with pytest.raises(ValueError, match="reasoning_effort"):
        Endpoint.model_validate({"base_url": "http://x/v1", "reasoning_effort": "much"})


# The job


def config_of(folder: Path, url: str, **given: object) -> CollectConfig:
    pool = Pool(models=(own("share-1.0", url), own("share-0.5", url)))
    save_pool(pool, folder / "pool.yaml")
    fields = {"pool": folder / "pool.yaml", "benchmarks": [sums(folder, 12)], "output": folder / "out"}
    return CollectConfig.model_validate(fields | {"connections": 4} | given)


def test_a_plan_asks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(tmp_path) as stub:
        assert run(config_of(tmp_path, stub.url, plan_only=True)) == "nothing was asked"
        assert not stub.answers()
    out = capsys.readouterr().out
    assert "questions: sums 12" in out
    assert "share-0.5: about 0.05 USD" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_job_stops_at_its_budget_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    price = (INPUT_TOKENS + 2 * OUTPUT_TOKENS) / 1e6
    with server(tmp_path) as stub:
        summary = run(config_of(tmp_path, stub.url, budget_usd=6 * price))
        assert "the budget of 0.0012 USD is spent" in summary
        assert "answers are missing, the same command asks for them again" in summary
        assert 6 <= sum(stub.answers().values()) <= 6 + 4
        summary = run(config_of(tmp_path, stub.url))
        answers = stub.answers()
    assert summary.startswith("24 answers, 24 rows: 12 queries, 2 models, 1 benchmarks")
    assert len(answers) == sum(answers.values()) == 24
    again = run(config_of(tmp_path, "http://127.0.0.1:9/v1"))
    assert again.startswith("24 answers, 24 rows")
    pool = load_pool(tmp_path / "pool.yaml")
    outcomes = load_outcomes(tmp_path / "out/outcomes.parquet", pool)
    assert outcomes.correct.shape == (12, 2)
    assert outcomes.correct[:, 0].tolist() == [1.0] * 12


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_benchmark_that_is_added_is_asked_though_another_has_more_answers(tmp_path: Path) -> None:
    with server(tmp_path) as stub:
        run(config_of(tmp_path, stub.url))
        more = [{"questions": tmp_path / "sums.jsonl", "limit": 6}]
        more += [{"name": "again", "questions": tmp_path / "sums.jsonl", "limit": 6}]
        summary = run(config_of(tmp_path, stub.url, benchmarks=more))
    assert summary.startswith("24 answers, 24 rows: 12 queries, 2 models, 2 benchmarks")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_server_that_refuses_everything_is_quoted(tmp_path: Path) -> None:
    with stub_upstream() as stub:
        stub.script = ["400"] * 1000
        with pytest.raises(InputError, match=r"no question has an answer: .*share-1.0: .*status 400"):
            run(config_of(tmp_path, stub.url))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_times_of_an_engine_are_written(tmp_path: Path) -> None:
    with server(tmp_path) as stub:
        config = config_of(tmp_path, stub.url, measure_engine=3, models=["share-1.0"])
        with pytest.raises(InputError, match="measure_engine: no chosen model has `self_hosted`"):
            run(config)
        engine = SelfHostedCost(gpu_usd_per_hour=3.0, ttft_s_per_1k_tokens=1.0, itl_s=1.0)
        hosted = TargetModel(name="share-1.0", self_hosted=engine, endpoint=Endpoint(base_url=stub.url))
        save_pool(Pool(models=(hosted,)), tmp_path / "pool.yaml")
        run(config)
    (measured,) = yaml.safe_load((tmp_path / "out/engines.yaml").read_text()).values()
    assert measured["gpu_usd_per_hour"] == 3.0
    assert measured["ttft_s_per_1k_tokens"] > 0
    assert 0 <= measured["itl_s"] < 1.0
