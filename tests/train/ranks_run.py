"""What test_ranks.py starts in two processes: DDP, then FSDP2.

    torchrun --nproc-per-node 2 ranks_run.py DIRECTORY      each rank writes DIRECTORY/said-RANK.json: {way: {case: what it saw}}
"""

import faulthandler
import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from ranks_cases import CASES, WAYS, environment, halted, refused


def copied(out, origin, way):
    """A copy of a broken run for the way that shall go on with it."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(out / f"of-{origin}", out / f"of-{origin}-for-{way}")
    dist.barrier()
    return out / f"of-{origin}-for-{way}"


def main(out):
    said = {}
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for way in WAYS:
        with environment(sharded if way == "fsdp2" else {}):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                said[way] = {name: case() for name, case in CASES.items()}
            said[way]["warned"] = sum("recomputes" in str(w.message) for w in warned)
            halted(out / f"of-{way}")
            said[way]["resumed from one"] = halted(out / f"of-one-for-{way}", True, False)
    said["ddp"]["resumed from fsdp2"] = halted(copied(out, "fsdp2", "ddp"), True, False)
    with environment(sharded):
        said["fsdp2"]["resumed from ddp"] = halted(copied(out, "ddp", "fsdp2"), True, False)
        said["fsdp2"]["refused"] = refused()
    (out / f"said-{dist.get_rank()}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(200, exit=True)             # a process that waits for ever says where
    main(Path(sys.argv[1]))
