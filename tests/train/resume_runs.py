"""What test_resume.py runs in processes of its own: a run of two phases that is killed, forked from one warm parent.

    python resume_runs.py DIRECTORY      writes DIRECTORY/result.json: for each case how it ended, and the weights' and the history's hash
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny import llama, quantized, task

from qatlas.train import resume
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.tactic import Tactic

FIRST, SECOND, EVERY = 6, 8, 2


class Wobble(Tactic):
    """A tactic with state of its own, and noise from the process's random state."""

    def __init__(self, strength=1e-3):
        self.strength = strength
        self._count, self._mean = 0, torch.zeros(())

    def after(self, loop):
        self._count += 1
        self._mean = 0.9 * self._mean + 0.1 * torch.rand(())
        with torch.no_grad():
            for parameter in loop.names:
                parameter.add_(self._mean * self.strength / self._count)

    def state_dict(self):
        return {"count": self._count, "mean": self._mean}

    def load_state_dict(self, state):
        self._count, self._mean = state["count"], state["mean"]


class Killer(Tactic):
    """kill -9 of this process in the middle of a step."""

    def __init__(self, phase, step):
        self._phase, self._step = phase, step

    def loss(self, loop, loss, batch):
        if loop.task.run.phases == self._phase and loop.step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def paper(out, again, killer=None):
    """Two phases, the second with fewer parameters; dropout, a tactic with state, a kept buffer."""
    subject = task(run=Run(out, seed=3, save_every=EVERY, resume=again, progress=False))
    model = quantized(llama(dropout=0.1), "w2", keep="buffer")
    extra = [] if killer is None else [killer]
    one = fit(model, subject, optimizer=AdamW(3e-3, 0.1), schedule=cosine(0.2), steps=FIRST, tactics=[Wobble(), *extra])
    two = fit(model, subject, train=["*scale", "*norm*"], optimizer=AdamW(1e-3), steps=SECOND, tactics=[Wobble(), *extra])
    histories = [{name: value for name, value in vars(h).items() if name != "seconds"} for h in (one, two)]
    subject.run.finish()
    weights = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    return {"weights": weights, "history": histories}


def at_write(n, where):
    """kill -9 in the n-th write of a point: in the middle of a file, before the renaming, or just after it."""
    count = [0]
    plain = {"rename": os.replace, "file": resume.save_file, "remove": resume.shutil.rmtree}

    def replace(source, target):
        count[0] += 1
        if where == "rename" and count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        plain["rename"](source, target)
        if where == "remove" and count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors, path):
        plain["file"](tensors, path)
        if where == "file" and count[0] == n - 1 and Path(path).name == "optimizer.safetensors":
            with open(path, "r+b") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

    resume.os.replace, resume.save_file = replace, save_file


def child(job):
    """Run `job` in a forked process; how it ended (negative: the signal)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def into(path, *arguments):
    path.write_text(json.dumps(paper(*arguments)))


def main(root):
    torch.set_num_threads(1)
    found = {"whole": {"ended": child(lambda: into(root / "whole.json", root / "whole", False))}}
    cases = {f"phase {p}, step {s}": (lambda p=p, s=s: Killer(p, s), None) for p, s in ((1, 0), (1, 1), (1, 3), (1, 5), (2, 0), (2, 3), (2, 7))}
    cases |= {f"write {n}, {where}": (None, (n, where)) for n, where in
              ((1, "file"), (2, "file"), (2, "rename"), (2, "remove"), (3, "rename"), (3, "remove"), (4, "rename"), (5, "file"), (7, "rename"))}
    resume.sync = lambda path: None                               # kill -9 spares what the kernel holds; only a power failure needs the disk
    for name, (killer, write) in cases.items():
        out = root / name.replace(" ", "-").replace(",", "")

        def first(out=out, killer=killer, write=write):
            at_write(*write) if write is not None else None
            paper(out, False, None if killer is None else killer())

        killed = child(first)
        left = sorted(str(p.relative_to(out)) for p in out.glob("state/phase-*/*"))
        result = out.parent / f"{out.name}.json"
        # the killer is no part of the method: the resumed run has one that never strikes
        ended = child(lambda out=out, result=result, killer=killer: into(result, out, True, None if killer is None else Killer(0, 0)))
        found[name] = {"killed": killed, "left": left, "ended": ended, "state": (out / "state").exists()}
    for name, entry in found.items():
        path = root / (name.replace(" ", "-").replace(",", "") + ".json")
        entry["result"] = json.loads(path.read_text()) if path.exists() else None
    (root / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
