"""A pytest plugin that puts a case with a wrong contestant, and one that does not run, into the benchmark suite.

Used as `-p tests.helpers.wrong_contestant`."""

from benchmarks import cases
from benchmarks.contestant import Contestant
from benchmarks.peers import BASE, fused


def no_decay(tensors):
    optimizer = fused(tensors)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    return optimizer.step


WRONG = Contestant("torch fused, no decay", no_decay)
cases.CASES.insert(0, cases.case("wrong", cases.PEER_TIMES, [BASE, WRONG], quick=1000))


def no_memory(elements):
    print("no memory asked for")
    raise MemoryError("none is left")


cases.CASES.insert(1, cases.case("too large", cases.PEER_TIMES, [BASE, "torch foreach"], no_memory, quick=1000))
