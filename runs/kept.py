"""One run of an experiment as a small file: what is there is not repeated, and what was made otherwise is not taken for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kept(where: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, kept as a small file; a run that is there is not repeated.

    Raises:
        SystemExit: a file that was made with other settings.
    """
    if where.exists():
        found = json.loads(where.read_text())
        if any(found.get(key) != value for key, value in settings.items()):
            raise SystemExit(f"{where} was made with other settings; name another --out")
        return found
    began = time.process_time()
    found = settings | make() | {"cpu seconds": round(time.process_time() - began, 1)}
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(found))
    print(where.stem, {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}, flush=True)
    return found
