"""A pool of models on this machine, from end to end: answers, programs in the sandbox, outcomes, and a router.

In: folders of two small models. vLLM serves both on the CPU; `jobs.collect` asks them choice questions with ten choices
and code problems, whose answers this module knows; then `jobs.prefill` and `jobs.train` make a router of the outcomes,
which routes one question. Out: the figures of each step. It shows that the steps fit together, not how good a router
of such models is.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import pyarrow.parquet as pq
import yaml
from pydantic import Field
from transformers import AutoTokenizer

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import UnavailableError
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.locating import locate

LETTERS = "ABCDEFGHIJ"
# A model without a template of its own is a base model, which continues text: examples show it how an answer looks, and
# a line break ends the answer.
CHAT = """{{ bos_token }}{%- set word = 'End with a line "Answer: X", where X is the answer alone.' -%}
{%- set number = 'End with a line "Answer: X", where X is the number alone, in digits.' -%}
{%- set letter = 'End with a line "Answer: X", where X is the letter of the right choice.' -%}
Question: The capital of Germany is what? Answer in one word.\n\n{{ word }}\nAnswer: Berlin\n
Question: What is 3 + 14?\n\n{{ number }}\nAnswer: 17\n
Question: The opposite of hot is:\n\nA) red\nB) cold\nC) Oslo\nD) three\n\n{{ letter }}\nAnswer: B\n
Question: The colour of grass is what? Answer in one word.\n\n{{ word }}\nAnswer: green\n
Question: What is 25 + 31?\n\n{{ number }}\nAnswer: 56\n
Question: {% for message in messages %}{{ message['content'] }}\n{% endfor %}Answer:"""
START_S = 900  # a busy machine imports vLLM for minutes
FACTS = {
    "The capital of France": "Paris", "The capital of Japan": "Tokyo", "The capital of Italy": "Rome",
    "The capital of Egypt": "Cairo", "The capital of Spain": "Madrid", "The capital of Kenya": "Nairobi",
    "The largest planet": "Jupiter", "The planet nearest to the sun": "Mercury", "The gas that plants take in":
    "carbon dioxide", "The chemical symbol of gold": "Au", "The chemical symbol of sodium": "Na",
    "The author of Hamlet": "Shakespeare", "The author of Faust": "Goethe", "The number of sides of a hexagon": "six",
    "The number of legs of a spider": "eight", "The freezing point of water in degrees Celsius": "zero",
    "The opposite of ancient": "modern", "The opposite of generous": "stingy", "The plural of mouse": "mice",
    "The past tense of go": "went",
}  # fmt: skip
PROGRAMS = {
    "the double of the number": lambda n: 2 * n, "the square of the number": lambda n: n * n,
    "the number plus one": lambda n: n + 1, "the remainder of the number divided by 3": lambda n: n % 3,
    "the sum of all whole numbers from 1 to the number": lambda n: n * (n + 1) // 2,
    "the number of digits of the number": lambda n: len(str(n)), "the number with its digits reversed":
    lambda n: int(str(n)[::-1]), "the sum of the digits of the number": lambda n: sum(map(int, str(n))),
    "the largest digit of the number": lambda n: int(max(str(n))), "the number minus one": lambda n: n - 1,
}  # fmt: skip


class LocalPoolConfig(FrozenModel):
    """The models and the number of questions."""

    models: Annotated[
        dict[str, str], Field(min_length=2, description="encoders by name: smollm2, a folder or a GGUF file")
    ]
    choices: Annotated[int, Field(ge=10, description="number of questions with ten choices, and of those without")] = (
        100
    )
    programs: Annotated[int, Field(ge=1, le=20, description="number of code problems")] = 20
    max_tokens: Annotated[int, Field(ge=1, description="tokens of an answer at most")] = 256
    seed: Annotated[int, Field(ge=0, description="seed of the questions")] = 0
    output: Annotated[LocalPath, Field(description="folder of all results")] = Path("runs/benchmarks/local_pool")


def run(config: LocalPoolConfig) -> str:
    """Ask models on this machine, and train a router on their answers."""
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in _questions(config)))
    with ExitStack() as running:
        urls = {
            name: running.enter_context(_served(name, str(locate(EncoderConfig(model=model))), config))
            for name, model in config.models.items()
        }
        cost = {"gpu_usd_per_hour": 1.0, "ttft_s_per_1k_tokens": 1.0, "itl_s": 0.05}
        models = [{"name": name, "self_hosted": cost, "endpoint": {"base_url": url}} for name, url in urls.items()]
        (config.output / "pool.yaml").write_text(yaml.safe_dump({"models": models}))
        started = time.monotonic()
        options = {"max-tokens": str(config.max_tokens), "reasoning-effort": "null", "temperature": "0"}
        options["measure-engine"] = "2"
        _job(config, "collect", benchmarks="[own.jsonl]", output="collected", **options)
        seconds = time.monotonic() - started
    engines = yaml.safe_load((config.output / "collected/engines.yaml").read_text())
    for model in models:
        model["self_hosted"] = engines[model["name"]]
    (config.output / "pool.yaml").write_text(yaml.safe_dump({"models": models}))
    table = pq.read_table(config.output / "collected/outcomes.parquet").to_pandas()
    _job(config, "labels", outcomes="collected/outcomes.parquet", output="labels")
    _job(config, "prefill", input="collected/outcomes.parquet", output="activations")
    _job(config, "train", outcomes="collected/outcomes.parquet", activations="activations", output="router")
    rates = table.groupby(["model", "benchmark"]).agg(right=("correct", "mean"), parsed=("parsed", "mean"))
    figures = {
        "questions": 2 * config.choices + config.programs,
        "rows": len(table),
        "seconds": seconds,
        "rates": {" ".join(key): row for key, row in rates.round(3).to_dict("index").items()},
        "engines": engines,
    }
    write_json(config.output / "local_pool.json", figures)
    return f"{len(table)} answers of {len(urls)} models in {seconds:,.0f} s; {config.output / 'local_pool.json'}"


def _questions(config: LocalPoolConfig) -> Iterator[dict[str, object]]:
    """Choice questions and the same without choices, half facts and half sums, and code problems."""
    rng = random.Random(config.seed)
    answers = sorted(set(FACTS.values()))
    for number in range(config.choices):
        if number % 2:
            a, b = rng.randint(2, 60), rng.randint(2, 60)
            question, right = f"What is {a} + {b}?", str(a + b)
            wrong = rng.sample([str(one) for one in range(4, 121) if one != a + b], 9)
        else:
            about = rng.choice(sorted(FACTS))
            right = FACTS[about]
            question = f"{about} is:"
            wrong = rng.sample([one for one in answers if one != right], 9)
        choices = [right, *wrong]
        rng.shuffle(choices)
        yield {
            "id": f"choice-{number}", "question": question, "kind": "choice", "choices": choices,
            "answer": LETTERS[choices.index(right)], "benchmark": "sums" if number % 2 else "facts",
        }  # fmt: skip
        yield {
            "id": f"plain-{number}", "question": question.replace(" is:", " is what? Answer in one word."),
            "kind": "numeric" if number % 2 else "exact", "answer": int(right) if number % 2 else right,
            "benchmark": "plain sums" if number % 2 else "plain facts",
        }  # fmt: skip
    for number in range(config.programs):
        about, function = sorted(PROGRAMS.items())[number % len(PROGRAMS)]
        asked = "A whole number is read from standard input." if number < 10 else "Standard input has one whole number."
        tests = [{"input": f"{n}\n", "output": f"{function(n)}\n"} for n in (7, 12, 340, 981)]
        question = f"{asked} Print {about}."
        yield {
            "id": f"code-{number}", "question": question, "kind": "code", "tests": tests, "benchmark": "programs"
        }  # fmt: skip


@contextmanager
def _served(name: str, folder: str, config: LocalPoolConfig) -> Iterator[str]:
    """Serves a model by vLLM on a free port; its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", name, "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    template = json.loads(Path(folder, "tokenizer_config.json").read_text()).get("chat_template")
    if template is None and not Path(folder, "chat_template.jinja").exists():
        (config.output / "chat.jinja").write_text(CHAT)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        stops = [tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("\n", "\n\n")]
        write_json(config.output / "generation_config.json", {"eos_token_id": stops})
        command += ["--chat-template", str(config.output / "chat.jinja"), "--generation-config", str(config.output)]
    limits = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with (config.output / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | limits)
    try:
        ends = time.monotonic() + START_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > ends:
                raise UnavailableError(f"{name}: vLLM does not start; see {config.output / f'{name}.log'}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def _job(config: LocalPoolConfig, job: str, **arguments: str) -> None:
    """Runs a job in the output folder's terms. Raises CalledProcessError if it fails."""
    given = {"pool": "pool.yaml"} | arguments if job in ("collect", "train") else arguments
    files = ("pool", "input", "output", "outcomes", "activations")
    texts = [
        text
        for name, value in given.items()
        for text in (f"--{name}", str(config.output / value) if name in files else value)
    ]
    texts = [text.replace("[own.jsonl]", f"[{config.output / 'own.jsonl'}]") for text in texts]
    subprocess.run([sys.executable, "-m", f"jobs.{job}", *texts], check=True)


if __name__ == "__main__":
    main(LocalPoolConfig, run)
