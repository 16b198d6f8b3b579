"""Decode on the GPU with what a real model selects: RTPURBO_BENCH_MODEL names its folder.

A `step` is a layer's `sparse_decode` on its own caches, against dense SDPA over as many keys of all
heads; `layer=all` is one token's time in all layers that have retrieval heads. The other parts are
those of `real_lists`. A case rotates over texts, each with tensors of its own.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rtpurbo
from benchmarks import real_lists
from benchmarks.decode_layer import LAYER
from benchmarks.dense import dense_in_turn
from benchmarks.recorded import Call, recorded, selection_facts, texts
from benchmarks.registry import Case, Wanted, benchmark, in_turn
from rtpurbo import HeadMap, RTPurboConfig
from rtpurbo.checkpoint import read_manifest
from rtpurbo.families import geometry
from rtpurbo.patching import state

VARIABLE = "RTPURBO_BENCH_MODEL"
LENGTHS, WINDOW_DIVISOR = (8192, 16384, 32768), 8
TEXTS, ROUNDS = ("needles", "prose"), 4
BITS = (16, 4)

Steps = list[list[Call]]
"""The calls of a decode step by layer, for each text."""
QKV = tuple[Tensor, Tensor, Tensor]


def parameters_at(heads: HeadMap, text: str, keys: int) -> Iterator[dict[str, Any]]:
    """Of all cases of a text and a length; lists are drawn from the longest texts."""
    counts = {i: len(heads.retrieval_heads(i)) for i in range(len(heads.roles))}
    counts = {layer: count for layer, count in counts.items() if count}
    total = sum(counts.values())
    for bits in BITS:
        for layer, count in [*counts.items(), ("all", total)]:
            yield dict(part="step", text=text, bits=bits, layer=layer, retrieval=count, keys=keys)
    if keys == LENGTHS[-1]:
        for part in real_lists.PARTS:
            for group in [*range(-(-total // len(LAYER.retrieval_heads))), "all"]:
                yield dict(part=part, text=text, group=group, keys=keys)


def draw(heads: int, kv_heads: int, dim: int, keys: int, device: str) -> QKV:
    """q, k, v of a dense decode step."""
    q, k, v = (
        torch.randn(1, count, length, dim, device=device, dtype=torch.bfloat16)
        for count, length in ((heads, 1), (kv_heads, keys), (kv_heads, keys))
    )
    return q, k, v


def step_cases(
    chosen: list[dict[str, Any]], steps: dict[int, Steps], layers: list[int], inputs: list[QKV]
) -> list[Case]:
    """`inputs`: one of each layer for the dense baselines, and at least one of each text."""
    one, every = map(dense_in_turn, (inputs[:ROUNDS], inputs[: len(layers)] * ROUNDS))
    cases = []
    for parameters in chosen:
        layer, by_text = parameters["layer"], steps[parameters["bits"]]
        if layer == "all":
            calls = list(chain.from_iterable(by_text))
        else:
            calls = [step[layers.index(layer)] for step in by_text]
        cases.append(
            Case(
                parameters=parameters,
                run=in_turn(calls),
                baselines=every if layer == "all" else one,
                bytes=sum(call.bytes for call in calls) / ROUNDS,
                rounds=ROUNDS,
                device=inputs[0][0].device.type,
                facts=selection_facts(calls),
            )
        )
    return cases


class Loaded:
    """A saved sparse model, which is read once its first case is wanted."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.heads = RTPurboConfig.from_dict(read_manifest(folder)["config"]).heads
        self.layers = [i for i in range(len(self.heads.roles)) if self.heads.retrieval_heads(i)]

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        model, tokenizer = rtpurbo.from_pretrained(self.folder, dtype=torch.bfloat16)
        return model.to(self.device), tokenizer

    def steps(self, text: str, keys: int, bits: int) -> Steps:
        """Of texts as long as `keys`; every retrieval head selects."""
        model, tokenizer = self.parts
        found = state(model)
        found.config = replace(
            found.config, window=keys // WINDOW_DIVISOR, index_bits=bits, prefill="dense",
            select_from=0,
        )  # fmt: skip
        return [recorded(model, tokens) for tokens in texts(text, tokenizer, keys, ROUNDS)]

    def dense_inputs(self, keys: int) -> list[QKV]:
        sizes = geometry(self.parts[0])
        shape = sizes.query_heads, sizes.kv_heads, sizes.head_dim, keys
        return [draw(*shape, self.device) for _ in range(max(ROUNDS, len(self.layers)))]


def cases_at(model: Loaded, text: str, chosen: list[dict[str, Any]]) -> Iterator[list[Case]]:
    keys = chosen[0]["keys"]
    all_bits = {parameters.get("bits", 16) for parameters in chosen}
    steps = {bits: model.steps(text, keys, bits) for bits in all_bits}
    of_steps = [parameters for parameters in chosen if parameters["part"] == "step"]
    if of_steps:
        yield step_cases(of_steps, steps, model.layers, model.dense_inputs(keys))
    of_lists = [parameters for parameters in chosen if parameters["part"] != "step"]
    if of_lists:
        sizes = LAYER.heads, LAYER.kv_heads, LAYER.dim, keys
        lists = [real_lists.TextLists.of(draw(*sizes, model.device), calls) for calls in steps[16]]
        yield [real_lists.case_of(parameters, lists) for parameters in of_lists]


def model_cases(folder: Path, wanted: Wanted, device: str) -> Iterator[list[Case]]:
    model = Loaded(folder, device)
    for keys in LENGTHS:
        for text in TEXTS:
            chosen = [p for p in parameters_at(model.heads, text, keys) if wanted(p)]
            if chosen:
                yield from cases_at(model, text, chosen)
                torch.cuda.empty_cache()


@benchmark
def decode_model_cuda(wanted: Wanted) -> Iterator[list[Case]]:
    if not torch.cuda.is_available():
        return
    folder = os.environ.get(VARIABLE)
    if not folder:
        print(
            f"decode_model_cuda: no model; set {VARIABLE} to a folder that "
            "rtpurbo.save_pretrained wrote",
            file=sys.stderr,
        )
        return
    yield from model_cases(Path(folder), wanted, "cuda")
