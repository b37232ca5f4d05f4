"""What test_fit.py runs in two processes: each prints its losses."""

import torch
import torch.distributed as dist
from tiny import llama, quantized, task

from qatlas.train.fit import fit
from qatlas.train.optim import SGD
from qatlas.train.run import Run

if __name__ == "__main__":
    torch.set_num_threads(1)
    history = fit(quantized(llama(), "w4"), task(batch=5, run=Run(micro=2, progress=False)), steps=3, optimizer=SGD(0.05))
    print(*history.loss)
    dist.destroy_process_group()
