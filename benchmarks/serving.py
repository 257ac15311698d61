"""Serving on the CPU: our engine behind HTTP, vLLM behind HTTP, and `transformers.generate`; the same work.

    python -m benchmarks.serving [--model DIR] [--concurrent 1 8 32] [--rounds 3] [--vllm-python PATH]

All read one Hugging Face folder, by default a Llama of 34M parameters made at random. In a turn so many
requests come at once, each of random tokens, greedy, for equally many new ones whatever they are; `generate`
takes them as one batch. Variants take turns within a round, in processes of their own that are idle
otherwise, on prompts that no turn before had: what counts is the ratio within a round. Time to first token is
the mean over requests; of `generate` it is that of the whole batch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.worker import Worker, serve
from core.devices import keep_freed_memory
from launch import vllm

SHAPE = {
    "hidden_size": 512, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408,
}  # fmt: skip
VOCAB, LENGTH = 4096, 1024


class Turn(NamedTuple):
    tokens_per_second: float
    first_token_seconds: float
    texts: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, such as export.hf writes")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--worker", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        start = {"ours": start_ours, "transformers": start_transformers}[args.worker]
        return serve(functools.partial(start, args.model))
    with contextlib.ExitStack() as stack:
        folder = args.model or make_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        ask = variants(stack, folder, args)
        results = measure(ask, folder, args)
    report(results, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def make_model(folder: Path) -> Path:
    """Random weights, large enough that the tokens drawn vary, and a tokenizer for them."""
    import torch
    import transformers

    from llm.data.corpus import open_corpus
    from llm.tokenizer import save, train_bpe

    corpus = open_corpus(("embedded",), None, 0.05)
    save(train_bpe([d.text for d in corpus.documents("train")], VOCAB, "llama3", name="vocabulary"), folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, rms_norm_eps=1e-5, initializer_range=0.05,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None, **SHAPE,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def variants(stack: contextlib.ExitStack, folder: Path, args) -> dict[str, Callable[..., Turn]]:
    """What answers prompts, by name."""
    workers = {
        name: Worker("benchmarks.serving", "--worker", name, "--model", str(folder))
        for name in ("ours", "transformers")
    }
    for worker in workers.values():
        stack.callback(worker.close)

    def batch(prompts: list[list[int]], new_tokens: int) -> Turn:
        return Turn(*workers["transformers"].ask(prompts=prompts, new_tokens=new_tokens))

    ask: dict[str, Callable[..., Turn]] = {
        "ours": functools.partial(
            over_http, f"{workers['ours'].facts['url']}/v1", workers["ours"].facts["name"]
        ),
        "transformers": batch,
    }
    if args.vllm_python is None:
        print("vLLM is left out: name the Python of its environment with --vllm-python", file=sys.stderr)
    else:
        url, _ = stack.enter_context(vllm.running(folder, "model", "127.0.0.1", 0, str(args.vllm_python)))
        ask["vllm"] = functools.partial(over_http, url, "model")
    return ask


def over_http(url: str, name: str, prompts: list[list[int]], new_tokens: int) -> Turn:
    """Stream all prompts at once, as so many clients."""
    import httpx

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> tuple[float, int, str]:
        body = {
            "model": name, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        first, text, count = None, [], 0
        async with client.stream("POST", f"{url}/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if chunk["choices"]:
                        first = first or time.perf_counter()
                        text.append(chunk["choices"][0]["text"])
                    if chunk.get("usage"):
                        count = chunk["usage"]["completion_tokens"]
        assert first is not None
        return first, count, "".join(text)

    async def all_of_them() -> list[tuple[float, int, str]]:
        async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    started = time.perf_counter()
    answers = asyncio.run(all_of_them())
    seconds = time.perf_counter() - started
    firsts, counts, texts = zip(*answers, strict=True)
    return Turn(sum(counts) / seconds, statistics.mean(firsts) - started, [*texts])


def start_ours(folder: Path):
    from core import devices

    devices.prepare()
    from launch.server import Limits, running
    from launch.server.model import Served

    served = Served.of(folder, "model")
    server = running(served, limits=Limits(rows=32))
    return {"url": server.__enter__()[0], "name": "model"}, lambda: server  # kept until the process ends


def start_transformers(folder: Path):
    keep_freed_memory()
    import torch
    import transformers

    from llm.generate import text_of
    from llm.tokenizer import Tokenizer

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = Tokenizer.load(folder)

    class Clock(transformers.StoppingCriteria):
        def __init__(self):
            self.first: float | None = None

        def __call__(self, ids, scores, **kwargs):
            self.first = self.first or time.perf_counter()
            return torch.zeros(len(ids), dtype=torch.bool)

    def answer(prompts: list[list[int]], new_tokens: int) -> Turn:
        ids, clock = torch.tensor(prompts), Clock()
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )  # fmt: skip
        seconds = time.perf_counter() - started
        assert clock.first is not None
        rows = out[:, ids.shape[1] :].tolist()
        texts = [text_of(tokenizer, row) for row in rows]
        return Turn(sum(map(len, rows)) / seconds, clock.first - started, texts)

    return {}, answer


def measure(ask: dict[str, Callable[..., Turn]], folder: Path, args) -> dict[int, dict[str, Any]]:
    """Tokens per second and time to first token of each turn, by number of requests and variant."""
    random, results = np.random.default_rng(0), {}
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    for count in args.concurrent:
        turns: dict[str, list[Turn]] = {name: [] for name in ask}
        for number in range(args.rounds + 1):
            prompts = random.integers(0, vocab - 300, (count, args.prompt_tokens)).tolist()
            for name, answer in ask.items():
                turn = answer(prompts=prompts, new_tokens=args.new_tokens)
                if number:  # the first compiles
                    turns[name].append(turn)
        same = [
            sum(a == b for a, b in zip(ours.texts, theirs.texts, strict=True)) / count
            for ours, theirs in zip(turns["ours"], turns["transformers"], strict=True)
        ]
        results[count] = {name: [t[:2] for t in of] for name, of in turns.items()}
        results[count]["same_as_transformers"] = statistics.mean(same)
        print(f"{count} requests: done", file=sys.stderr)
    return results


def report(results: dict[int, dict[str, Any]], args) -> None:
    names = [name for name in next(iter(results.values())) if name != "same_as_transformers"]
    print(f"{args.prompt_tokens} tokens of prompt, {args.new_tokens} new; medians of {args.rounds} rounds\n")
    print(
        "| requests | variant | tokens/s | first token, s | ours over it: tokens/s | its first token / ours |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for count, by_name in results.items():
        for name in names:
            rates, firsts = zip(*by_name[name], strict=True)
            ratios = [
                (ours[0] / theirs[0], theirs[1] / ours[1])
                for ours, theirs in zip(by_name["ours"], by_name[name], strict=True)
            ]
            rate, first = (statistics.median(r) for r in zip(*ratios, strict=True))
            print(
                f"| {count} | {name} | {statistics.median(rates):,.0f} | {statistics.median(firsts):.3f} "
                f"| {rate:.2f} | {first:.2f} |"
            )
    same = ", ".join(f"{100 * of['same_as_transformers']:.0f}% at {n}" for n, of in results.items())
    print(f"\nours and transformers drew the same text: {same}")


if __name__ == "__main__":
    main()
