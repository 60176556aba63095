"""Every script of examples/, run as a reader would run it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAUNCHERS = {"fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}
SAYS = {  # what must stand in the output, beside a return code of 0
    "quickstart": "step 200: loss 0.00",
    "own_loop": "epoch 3: loss .*, 100% of a matrix active",
    "sgd_equation2": r"p = 0.875: accuracy 0\.9.*, every step as equation 2 says",
    "hf_trainer": "graddrop_layers_dropped",
    "lightning_module": "epoch 2: loss .*, optimizer in epoch 2",
    "peft_lora": "base: 10% of the elements move",
    "fsdp2": "and again from the checkpoint",
    "gradual_unfreezing": "epoch 0: .*, 4 gradients, active: head\n",
    "resuming": "bit for bit: True",
}


def test_every_example_is_known():
    assert {path.stem for path in EXAMPLES} == set(SAYS)
    table = (ROOT / "examples" / "README.md").read_text()
    assert all(f"({path.name})" in table for path in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    for tool in ("lightning", "peft", "sklearn"):
        if re.search(rf"(import|from) {tool}", path.read_text()) and find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    command = [sys.executable, *LAUNCHERS.get(path.stem, []), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(SAYS[path.stem], done.stdout), done.stdout


def test_the_quickstart_is_the_readmes():
    assert f"```python\n{(ROOT / 'examples' / 'quickstart.py').read_text()}```" in (ROOT / "README.md").read_text()
