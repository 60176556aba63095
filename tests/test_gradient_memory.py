"""The timed runs of benchmarks/gradient_memory.py do what they are compared for."""

import torch

from benchmarks import gradient_memory
from benchmarks.layer_skipping import batch

FLAGS = ["--layers", "2", "--width", "32", "--batch", "2", "8", "--steps", "2", "--p", "0.9"]


def test_benchmark(capsys):
    gradient_memory.main(FLAGS + ["--only", "time"])
    assert "| 0.9 | released / masked | " in capsys.readouterr().out

    options = gradient_memory.parser().parse_args(FLAGS)
    runs = {name: gradient_memory.Run(name, 0.9, options) for name in gradient_memory.RUNS}
    steps = len([run.step(batch(step, options)) for run in runs.values() for step in (1, 2)])
    assert steps == 2 * len(runs)
    trained = {name: list(run.model.parameters()) for name, run in runs.items()}
    assert all(map(torch.equal, trained["released"], trained["masked"]))
    assert all(map(torch.equal, trained["rows, released"], trained["rows"]))
    for name, other in (("rows", "masked"), ("all", "active"), ("torch in backward", "fine-tuning")):
        for p, q in zip(trained[name], trained[other], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert not torch.equal(trained["masked"][0], trained["fine-tuning"][0])
