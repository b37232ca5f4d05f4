"""What test_cached.py runs in two processes: both may fill one cache; each prints how many rows its teacher was asked about, then its losses."""

import sys

import torch
import torch.distributed as dist
from tiny import llama, quantized, task

from qatlas.train.cached import cached
from qatlas.train.fit import fit
from qatlas.train.optim import SGD
from qatlas.train.run import Run
from qatlas.train.teacher import Distil, Teacher


class Counted(Teacher):
    rows = 0

    def __call__(self, task, batch):
        self.rows += len(batch["labels"])
        return super().__call__(task, batch)


def taught(directory):
    """Rows asked, and the losses."""
    teacher, subject = Counted(llama(seed=1)), task(batch=5, run=Run(micro=2, progress=False))
    source = cached(directory, teacher, subject, 3, k=8)
    return teacher.rows, fit(quantized(llama(), "w4"), subject, steps=3, optimizer=SGD(0.05), loss=Distil(subject, source)).loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows, losses = taught(sys.argv[1])
    print(rows, *losses)
    dist.destroy_process_group()
