"""Prices of genai-prices: exact names, one provider, and prices per token only; the prices of pool.yaml win."""

from __future__ import annotations

import logging
import re
import sys
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, __version__, calc_price
from genai_prices.types import (
    ClauseContains,
    ClauseEquals,
    ClauseOr,
    ClauseRegex,
    ClauseStartsWith,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    Tier,
    TieredPrices,
    TimeOfDateConstraint,
)

from prefill_router.errors import InputError
from prefill_router.pool import Pool, load_pool, save_pool
from prefill_router.prices import list_price

PAST, FUTURE = StartDateConstraint(date(2000, 1, 1)), StartDateConstraint(date(9999, 1, 1))
NIGHT = TimeOfDateConstraint(time(0), time(6))


def price(read: float, written: float, **others: Any) -> ModelPrice:
    others = {name: Decimal(str(value)) if isinstance(value, float) else value for name, value in others.items()}
    return ModelPrice(input_mtok=Decimal(str(read)), output_mtok=Decimal(str(written)), **others)


def model(name: str, prices: Any, *matches: Any) -> ModelInfo:
    return ModelInfo(id=name, match=ClauseOr(or_=[ClauseEquals(equals=name), *matches]), prices=prices)


def steps(*steps: tuple[Any, ModelPrice]) -> list[ConditionalPrice]:
    return [ConditionalPrice(constraint, prices=prices) for constraint, prices in steps]


TIERED = {
    name: TieredPrices(base=Decimal(base), tiers=[Tier(start=200_000, price=Decimal(9))])
    for name, base in [("input_mtok", 1), ("output_mtok", 4)]
}
PROVIDERS = [
    Provider(
        id="alpha",
        name="Alpha",
        api_pattern=r"https://api\.alpha\.com",
        models=[
            model("large", price(2, 8, cache_read_mtok=0.2), ClauseEquals("large-2026"), ClauseRegex("^large-v")),
            model("shared", price(1, 2)),
            model("equal", price(3, 4)),
            model("dated", steps((None, price(9, 9)), (PAST, price(1, 5)), (FUTURE, price(7, 7)))),
            model("nightly", steps((None, price(2, 2)), (NIGHT, price(1, 1)))),
            model("once-nightly", steps((None, price(2, 2)), (NIGHT, price(1, 1)), (PAST, price(3, 3)))),
            model("tiered", ModelPrice(**TIERED)),
            model("search", price(1, 1, requests_kcount=5.0)),
            model("embedding", ModelPrice(input_mtok=Decimal(1))),
            ModelInfo(id="prefixed", match=ClauseStartsWith(starts_with="prefixed"), prices=price(1, 1)),
        ],
    ),
    Provider(
        id="beta",
        name="Beta",
        api_pattern=r"https://beta\.io/",
        models=[
            model("alpha/large", price(2, 8, cache_read_mtok=0.5)),
            model("shared", price(1, 3), ClauseContains(contains="large")),
            model("equal", price(3, 4)),
        ],
    ),
]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two providers in place of the package's."""
    monkeypatch.setattr("genai_prices.data.providers", PROVIDERS)


def pool_file(folder: Path, *models: str) -> Path:
    file = folder / "pool.yaml"
    file.write_text("models:\n" + "".join(f"  - {{{one}}}\n" for one in models), encoding="utf-8")
    return file


def fields(file: Path) -> list[dict[str, Any]]:
    return [one.model_dump(exclude_unset=True, exclude={"name"}) for one in load_pool(file).models]


FULL = {"input_usd_per_mtok": 2.0, "output_usd_per_mtok": 8.0, "cached_input_usd_per_mtok": 0.2}


@pytest.mark.parametrize("name", ["gpt-4o-mini", "gpt-5-mini"])
def test_the_prices_are_those_of_the_package(name: str) -> None:
    def usd(**tokens: int) -> float:
        return float(calc_price(Usage(**tokens), name, provider_id="openai").total_price)

    found, million = list_price("", priced_as=f"openai/{name}"), 1_000_000
    assert (found.input, found.output) == (usd(input_tokens=million), usd(output_tokens=million))
    assert found.cached_input == usd(input_tokens=million, cache_read_tokens=million)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    "given",
    [
        "name: large",
        "name: LARGE-2026",
        "name: x, priced_as: alpha/large",
        'name: x, endpoint: {base_url: "https://api.alpha.com/v1", model: large}',
        'name: large, endpoint: {base_url: "https://api.alpha.com/v1"}',
        'name: shared, priced_as: alpha/large, endpoint: {base_url: "https://beta.io/v1"}',
    ],
)
def test_a_model_is_found_by_priced_as_or_its_server_or_its_name(tmp_path: Path, given: str) -> None:
    filled = load_pool(pool_file(tmp_path, given)).models[0]
    assert {name: getattr(filled, name) for name in FULL} == FULL


@pytest.mark.usefixtures("data")
def test_the_address_of_the_server_chooses_between_providers(tmp_path: Path) -> None:
    file = pool_file(
        tmp_path,
        'name: a, endpoint: {base_url: "https://api.alpha.com/v1", model: shared}',
        'name: b, endpoint: {base_url: "https://beta.io/v1", model: shared}',
    )
    assert [one.output_usd_per_mtok for one in load_pool(file).models] == [2.0, 3.0]


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("input_usd_per_mtok: 1", {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 8.0}),
        ("output_usd_per_mtok: 1", FULL | {"output_usd_per_mtok": 1.0}),
        ("cached_input_usd_per_mtok: 1", FULL | {"cached_input_usd_per_mtok": 1.0}),
        ("cached_input_usd_per_mtok: null", FULL | {"cached_input_usd_per_mtok": None}),
        ("input_usd_per_mtok: 0, output_usd_per_mtok: 0", {"input_usd_per_mtok": 0.0, "output_usd_per_mtok": 0.0}),
    ],
)
def test_prices_of_the_file_win(tmp_path: Path, given: str, expected: dict[str, Any]) -> None:
    assert fields(pool_file(tmp_path, f"name: large, {given}")) == [expected]


@pytest.mark.usefixtures("data")
def test_a_model_with_own_cost_or_prices_is_not_looked_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = {"gpu_usd_per_hour": 1.0, "ttft_s_per_1k_tokens": 1.0, "itl_s": 1.0}
    file = pool_file(
        tmp_path, f"name: large, self_hosted: {own}", "name: y, input_usd_per_mtok: 1, output_usd_per_mtok: 1"
    )
    assert fields(file) == [{"self_hosted": own}, {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 1.0}]
    assert caplog.records == []


@pytest.mark.usefixtures("data")
def test_filled_prices_are_saved_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pool_file(tmp_path, "name: large", "name: equal", "name: z, input_usd_per_mtok: 1, output_usd_per_mtok: 1")
    pool = load_pool(file)
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            "prefill_router.pool",
            logging.WARNING,
            f"{file}: prices of genai-prices {__version__}: large as alpha/large (input_usd_per_mtok 2, "
            "output_usd_per_mtok 8, cached_input_usd_per_mtok 0.2); equal as alpha/equal and beta/equal "
            "(input_usd_per_mtok 3, output_usd_per_mtok 4)",
        )
    ]
    save_pool(pool, tmp_path / "checkpoint.yaml")
    monkeypatch.setattr("genai_prices.data.providers", [])
    assert load_pool(tmp_path / "checkpoint.yaml") == pool
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shared", r"alpha/shared \(input 1, output 2\); beta/shared \(input 1, output 3\); set priced_as to one$"),
        ("alpha/large", r"alpha/large .*cached input 0\.2\); beta/alpha/large .*cached input 0\.5\); set priced_as"),
    ],
)
def test_different_prices_of_several_providers_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"the providers of '{name}' have different prices: {message}"):
        load_pool(pool_file(tmp_path, f"name: {name}"))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("given", "similar"),
    [
        ("name: large-v2", "; similar: alpha/large, beta/shared; if it is one of them, set priced_as to it"),
        ("name: x, priced_as: alpha/large-v2", " of alpha; similar: alpha/large; if"),
        ("name: prefixed-1", "; similar: alpha/prefixed; if"),
        ("name: unheard-of", "; newer data: pip install --upgrade genai-prices"),
        ('name: equal-2, endpoint: {base_url: "https://api.alpha.com/v1"}', " of alpha; newer data"),
    ],
)
def test_names_that_only_resemble_one_are_refused(tmp_path: Path, given: str, similar: str) -> None:
    with pytest.raises(InputError) as error:
        load_pool(pool_file(tmp_path, given))
    assert f"genai-prices {__version__} has no model '" in str(error.value)
    assert f"'{similar}" in str(error.value)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('name: large, endpoint: {base_url: "http://localhost:8000/v1"}', "no provider with the address http://local"),
        ("name: x, priced_as: large", "priced_as: got 'large', allowed is PROVIDER/MODEL with a provider of: alpha, b"),
        ("name: x, priced_as: gamma/large", "priced_as: got 'gamma/large', allowed"),
        ("name: x, priced_as: alpha/", "priced_as: got 'alpha/', allowed"),
        ("name: nightly", "alpha/nightly of genai-prices .* changes its price during the day"),
        ("name: search", r"alpha/search .* charges more than input and output tokens \(requests_kcount\)"),
        ("name: embedding", "alpha/embedding .* has no price of input and output tokens"),
        ("name: tiered", "alpha/tiered .* above 200000 input tokens; set context_tokens to 200000 or less"),
        ("name: tiered, context_tokens: 200001", "above 200000 input tokens"),
    ],
)
def test_what_is_no_price_per_token_of_one_provider_is_refused(tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_pool(pool_file(tmp_path, given))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("dated", (1.0, 5.0)),
        ("once-nightly", (3.0, 3.0)),
        ("tiered, context_tokens: 200000", (1.0, 4.0)),
        ("prefixed", (1.0, 1.0)),
    ],
)
def test_the_price_is_that_of_today_and_of_all_prompts(tmp_path: Path, given: str, expected: Any) -> None:
    [found] = load_pool(pool_file(tmp_path, f"name: {given}")).models
    assert (found.input_usd_per_mtok, found.output_usd_per_mtok) == expected


@pytest.mark.usefixtures("data")
def test_only_a_file_is_filled() -> None:
    with pytest.raises(
        ValueError, match="model 'large' needs input_usd_per_mtok and output_usd_per_mtok, or self_hosted"
    ):
        Pool.model_validate({"models": [{"name": "large"}]})


@pytest.mark.usefixtures("data")
def test_one_error_names_all_models_without_a_price(tmp_path: Path) -> None:
    file = pool_file(tmp_path, "name: a", "name: large", "name: c")
    with pytest.raises(InputError) as error:
        load_pool(file)
    needs = "needs input_usd_per_mtok and output_usd_per_mtok, or self_hosted; genai-prices"
    assert str(error.value).startswith(f"{file}: models.0: model 'a' {needs}")
    assert f"; models.2: model 'c' {needs}" in str(error.value)
    assert "models.1" not in str(error.value)


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices.data", None)
    with pytest.raises(InputError) as error:
        load_pool(pool_file(tmp_path, "name: gpt-5-mini"))
    assert str(error.value).endswith(
        "models.0: model 'gpt-5-mini' needs input_usd_per_mtok and output_usd_per_mtok, or self_hosted; genai-prices, "
        "which has the prices of many models, is not installed: pip install 'prefill-router[prices]'"
    )


@pytest.mark.parametrize(("name", "models"), [("mixed", 9), ("frontier", 10)])
def test_the_pools_of_the_paper_have_dated_prices(name: str, models: int) -> None:
    path = Path(__file__).parents[1] / "configs" / "pools" / f"paper-{name}.yaml"
    pool = load_pool(path)
    assert len(pool.names) == models
    assert all(not model.missing_prices and model.priced_as for model in pool.models)
    assert re.search(r"genai-prices [\d.]+ had on \d{4}-\d\d-\d\d", path.read_text())
