"""The demo: the main job with everything chosen, on the language model that ships with the package and the text that it was trained on.

A Llama of 3.4 million parameters is judged in full precision; its layers are rounded to ternary weights and 8-bit activations, which destroys it.
Plain distillation from the full-precision model brings it back; so does Teacher Intervention, with the same losses, data and number of steps: the
teacher stands inside the student for the first tenth of them. The latter's result is packed, exported for llama.cpp (TQ2_0), and read back by the
readers of others. Sized for two cores and five minutes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from .job import Outcome, run
from .prepare import Job

STEPS = 120
PAPER, MODEL, DATA = "teacher_intervention", "zoo:gpt", "builtin:docs"
ARGUMENTS: dict[str, Any] = {"rows": True, "clip": None, "adamw": True, "lr": 2e-3}


def demo(out: str = "demo", *, steps: int | None = None, seed: int = 0, threads: int = 0, resume: bool = False,
         say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Run the demo into a new directory; see `job.run` for what comes back."""
    arguments = {**ARGUMENTS, "steps": STEPS if steps is None else steps}
    job = Job(model=MODEL, data=DATA, target="gguf:tq2_0", out=out, seed=seed, threads=threads, resume=resume, batch=8, length=256, watch=40)
    flags = {**arguments, "model": job.model, "data": job.data, "target": job.target, "out": out, "seed": seed, "watch": job.watch}
    command = shlex.join(["qatlas", "run", PAPER, *(f"--{key}={'null' if value is None else value}" for key, value in flags.items())])
    return run(PAPER, arguments, job, command=command, say=say, others={"plain distillation": {**arguments, "first": 0}})
