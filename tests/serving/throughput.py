"""Questions per second: ``monkey ask --batch`` beside vLLM's server, on the same questions.

    .venv-vllm/bin/python -m tests.serving.throughput --out throughput.json

A model of random weights, of a shape that keeps both busy; float32, every core for each, one after
the other in each round, with pictures that no cache has seen. Loading and start-up are not counted.
The replies are compared before a time counts.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openai
import torch
from PIL import Image

from monkey_model.commands.demo_checkpoint import demo_config, write_demo_checkpoint
from monkey_model.serving.answer import Answerer, Question, answer_file
from tests.serving.conftest import serving

WIDTH = 512  # of the language model
TOKENS = 32  # of a reply


def write_checkpoint(folder: Path) -> Path:
    """19 million weights in 6 blocks, and an encoder of 2 layers with the real one's heads."""
    visual = {**demo_config().visual, "width": 416, "layers": 2, "heads": 4, "output_dim": WIDTH}
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 4, "kv_channels": 128}
    config = demo_config(hidden_size=WIDTH, intermediate_size=2816, visual=visual, **sizes)
    write_demo_checkpoint(folder, config)
    return folder


def picture(seed: str) -> bytes:
    pixels = np.random.default_rng(list(seed.encode())).integers(0, 256, (48, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((1024, 768)).save(file, "JPEG")
    return file.getvalue()


def ask_server(address: str, questions: list[Question], pictures: dict[str, bytes]) -> list[str]:
    """All at once, as clients would."""
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

    def ask(question: Question) -> str:
        data = base64.b64encode(pictures[question.images[0]]).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
            {"type": "text", "text": question.text},
        ]
        response = client.chat.completions.create(
            model="monkey",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=TOKENS,
            extra_body={"min_tokens": 1},
        )
        return response.choices[0].message.content

    with ThreadPoolExecutor(len(questions)) as threads:
        return list(threads.map(ask, questions))


def ask_batch(answerer: Answerer, questions: list[Question], size: int, out: Path) -> list[str]:
    answer_file(answerer, questions, out, batch_size=size)
    return [json.loads(line)["answer"] for line in out.read_text().splitlines()]


def measure(folder: Path, count: int, rounds: int) -> list[dict]:
    checkpoint = write_checkpoint(folder / "DIR")
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(len(cores))
    # vLLM leaves a core to its other processes, which wait while the worker works.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    answerer = Answerer.from_pretrained(checkpoint, max_new_tokens=TOKENS)
    seconds: dict[tuple[str, str], list[float]] = {}
    with serving(checkpoint, "--plain", "--served-model-name", "monkey") as address:
        for number in range(-1, rounds):  # the first warms up, on a question
            for name, different in (("a picture each", count), ("4 pictures", 4)):
                asked = count if number >= 0 else 1
                seed = f"{number + 1}, {name}"
                pictures = {}
                for index in range(min(different, asked)):
                    path = folder / f"{seed}-{index}.jpg"
                    path.write_bytes(picture(f"{seed}, {index}"))
                    pictures[str(path)] = path.read_bytes()
                paths = list(pictures)
                questions = [
                    Question(f"What is the {index}?", (paths[index % different],), index)
                    for index in range(asked)
                ]
                runs: dict[str, Callable[[], list[str]]] = {
                    "monkey serve (vLLM)": partial(ask_server, address, questions, pictures)
                }
                for size in (1, 8):
                    out = folder / f"{seed}-{size}.jsonl"
                    runs[f"monkey ask --batch, batch size {size}"] = partial(
                        ask_batch, answerer, questions, size, out
                    )
                replies = {}
                for provider, run in runs.items():
                    start = time.perf_counter()
                    # vLLM holds back the bytes of a character that the reply does not end.
                    replies[provider] = [text.strip().rstrip("\ufffd").strip() for text in run()]
                    if number >= 0:
                        taken = time.perf_counter() - start
                        seconds.setdefault((name, provider), []).append(taken)
                first, *others = replies.values()
                if any(other != first for other in others):
                    raise SystemExit(f"the replies differ: {json.dumps(replies, indent=1)}")
    return [
        {
            "workload": f"{count} questions, {workload}",
            "provider": provider,
            "seconds": times,
            "questions_per_second": count / statistics.median(times),
        }
        for (workload, provider), times in seconds.items()
    ]


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of the result.")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it the server
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.questions, arguments.rounds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    result = {
        "machine": f"{processor_name()}, {len(os.sched_getaffinity(0))} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm")},
        "commit": commit.stdout.strip(),
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(f"{row['workload']:32} {row['provider']:36} {row['questions_per_second']:.2f}/s")


if __name__ == "__main__":
    main()
