"""Several ranks at once on one machine: real processes with gloo between them.

A server imports torch once and forks each rank, which then starts in milliseconds. It ends when this process does,
however it ends; ranks end before `run` returns.
"""

import io
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # DTensor imports it when it is first used
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.nn.parallel",
        "graddrop_fused",
        "graddrop_fused.cpu",
    ]
)


def run(function: Callable, world: int, *args, timeout: float = 240) -> list[Any]:
    """``function(rank, world, *args)`` on ``world`` ranks; what each returned, by rank.

    Raises AssertionError with the traceback of the rank that failed first, or if any takes longer than ``timeout`` s.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            CONTEXT.Process(target=_rank, args=(sender, function, rank, world, f"{folder}/rendezvous", args))
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for rank, (_, sender) in zip(ranks, pipes, strict=True):
                rank.start()
                sender.close()
            return _results({receiver: rank for rank, (receiver, _) in enumerate(pipes)}, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
            for receiver, _ in pipes:
                receiver.close()


def rest() -> None:
    """For the end of a script under torchrun: lets gloo's threads free what the last backward pass left.

    They need the interpreter for it, and abort the process if it ends first, which barriers do not prevent.
    """
    time.sleep(0.5)


def _results(waiting: dict, deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(waiting)
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} did not finish in time"
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                error, result = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
            except EOFError:
                error = "ended without a word"
            assert error is None, f"rank {rank}: {error}"
            results[rank] = result
    return results


def _rank(sender, function: Callable, rank: int, world: int, rendezvous: str, args: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in pytest's own process
    error = result = None
    try:
        dist.init_process_group(
            "gloo", f"file://{Path(rendezvous)}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        result = function(rank, world, *args)
        dist.barrier()  # nobody leaves while another still needs him
    except BaseException:
        error = traceback.format_exc()
    file = io.BytesIO()
    torch.save((error, result), file)
    sender.send_bytes(file.getvalue())
    if error is None:
        dist.destroy_process_group()
