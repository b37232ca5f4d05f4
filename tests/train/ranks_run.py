"""What test_ranks.py starts in two processes: DDP, then FSDP2.

    torchrun --nproc-per-node 2 ranks_run.py DIRECTORY      each rank writes DIRECTORY/said-RANK.json: {way: {case: what it saw}}
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from ranks_cases import CASES, WAYS, environment, halted, refused


def main(out):
    said = {}
    for way in WAYS:
        with environment({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if way == "fsdp2" else {}):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                said[way] = {name: case() for name, case in CASES.items()}
            said[way]["warned"] = sum("recomputes" in str(w.message) for w in warned)
            halted(out / f"of-{way}")
            for other in ("one", *WAYS[: WAYS.index(way)]):
                said[way][f"resumed from {other}"] = halted(out / f"of-{other}-for-{way}", True, False)
            if way == "ddp":
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.copytree(out / "of-ddp", out / "of-ddp-for-fsdp2")
                dist.barrier()
            else:
                said[way]["refused"] = refused()
    (out / f"said-{dist.get_rank()}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    import faulthandler; faulthandler.dump_traceback_later(40, exit=True)
    main(Path(sys.argv[1]))
