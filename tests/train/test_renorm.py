"""Batch norms measured anew: plain means over training batches."""

import numpy as np
import torch
from torch import nn

from qatlas.train.labelled import Images
from qatlas.train.renorm import reestimate
from qatlas.train.run import Run


def test_batch_norms_are_measured_anew(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (40, 4, 4, 3), dtype=np.uint8), y=np.arange(40) % 2)
    task = Images(str(tmp_path / "images.npz"), batch=8, run=Run(progress=False))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)).train()
    assert reestimate(model, task, 3) == 1 and all(m.training for m in model.modules()) and model[1].momentum == 0.1
    with torch.no_grad():
        each = [model[0](task.batch(step)["pixel_values"]).transpose(0, 1).flatten(1) for step in range(3)]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(1) for x in each]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var(1) for x in each]).mean(0))
    kept = model[1].running_mean.clone()
    assert reestimate(model, task, 0) == 0 and torch.equal(model[1].running_mean, kept)
