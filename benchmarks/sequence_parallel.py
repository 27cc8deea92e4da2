"""Memory, time and communication of a long row that several processes share.

    python benchmarks/sequence_parallel.py --prompt 2048 --answer 1024 --processes 1 2

One pair is scored without gradient, and trained on, by a random model in fp32 on the CPU, by each
number of processes. Memory is what the resident memory of the first process grew by at its peak,
with gradients already there (Linux). Traffic is what it sent in exchanges of attention.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import in_processes
from layout_memory import resident_mib
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.batching.layout import Layout, build_layout
from preftune.batching.shards import RowPart
from preftune.distributed import sequence
from preftune.distributed.runtime import Runtime, leave_process_group
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel, pair_logps
from preftune.schema import Completion, TokenizedExample


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.measure:
        measure(options)
        return
    print(f"torch {torch.__version__}  {options}")
    print("processes  scoring MiB  s       training MiB  s       sent MiB  by formula")
    for size in options.processes:
        found = in_processes(size, 1, __file__, *sys.argv[1:], "--measure")
        scoring, scored, training, trained, sent = found
        print(
            f"{size:9}  {scoring:11.0f}  {scored:6.1f}  {training:12.0f}  {trained:6.1f}  "
            f"{sent:8.1f}  {formula(options, size):10.1f}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--answer", type=int, default=1024, help="tokens, of each of the two")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key_heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", action="store_true", help="in a process of torchrun")
    return parser.parse_args()


def formula(options: argparse.Namespace, size: int) -> float:
    """MiB that a process sends in the attention of a step: forward and backward in fp32.

    Queries, keys and values of its tokens go out and the results come back, each but for the part
    that stays; and so do their gradients. Activation checkpointing has the forward twice.
    """
    tokens = -(-(options.prompt + 2 * options.answer) // size)
    width = (2 * options.heads + 2 * options.key_heads) * (options.hidden // options.heads)
    passes = 3 if options.checkpointing else 2
    return passes * options.layers * tokens * width * 4 * (size - 1) / size / 2**20


def make_policy(options: argparse.Namespace) -> PolicyModel:
    """A random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_heads,
        max_position_embeddings=options.prompt + options.answer,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(SEGMENTS)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModel(model).train()


def make_pair(options: argparse.Namespace) -> TokenizedExample:
    """One pair of random tokens."""

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(options.vocabulary, (length,)).tolist())

    answers = Completion(ids(options.answer)), Completion(ids(options.answer))
    prompt = ids(options.prompt)
    return TokenizedExample("row", prompt, answers, ("chosen", "rejected"), "random", 0)


def measure(options: argparse.Namespace) -> None:
    """Print MiB and seconds without gradient and with, and MiB sent in the latter."""
    runtime = Runtime("fp32", 0)
    runtime.share_rows(runtime.world_size)
    policy = make_policy(options)
    group = policy.sequence_group = runtime.sequence_group
    part = None if group is None else RowPart(group.rank, group.size)
    layout = build_layout([make_pair(options)], Layout("shared_prefix", policy.limits, part=part))
    sent = count_traffic()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = resident_mib("VmRSS")
    results: list[float] = []
    for with_gradient in (False, True):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        sent[0] = 0
        runtime.barrier()
        began = time.perf_counter()
        with torch.set_grad_enabled(with_gradient):
            sums = pair_logps(policy, layout).sums
        if with_gradient:
            (sums[0] - sums[1]).backward()
        results += [resident_mib("VmHWM") - before, time.perf_counter() - began]
    if runtime.is_main:
        print(json.dumps([*results, sent[0] / 2**20]), flush=True)
    leave_process_group()


def count_traffic() -> list[int]:
    """Bytes that exchanges send from now on, but for what stays."""
    sent = [0]
    exchange = sequence.dist.all_to_all_single

    def counted(output: Any, given: torch.Tensor, **options: Any) -> Any:
        sent[0] += given.nbytes * (len(given) - 1) // len(given)
        return exchange(output, given, **options)

    sequence.dist.all_to_all_single = counted
    return sent


if __name__ == "__main__":
    main()
