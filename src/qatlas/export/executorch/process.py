"""The other side of runtime.py. A JSON request on stdin, a JSON answer on stdout, tensors in safetensors files. Run as a file, so that it imports
nothing of ours and none of executorch's compilers, which take 15 seconds to import: only its serializer, and its runtime, which is one library.

    {"read": path, "to": folder}    the constants of a program: weights.safetensors; the answer is what the program says of itself, and the types
    {"ask": path, "to": folder}     inputs.safetensors -> outputs.safetensors, by ExecuTorch's runtime

`constants` is what the writer looks at, too, before a file appears.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOM = 2**31                                                      # bytes that reading may take beyond six times the file
ABOUT = "qatlas"                                                  # the method that says what the tensors are called
HEADER = {"flatbuffer": (slice(10, 14), slice(14, 18))}           # of an XNNPACK payload: where its graph lies, and how long it is
INFINITE = re.compile(rb":\s*(-?(?:inf|nan))\b")                  # flatc writes what JSON has no word for: the end of a ReLU
KINDS = ("xnn_datatype_qcint8", "xnn_datatype_qcint4", "xnn_datatype_qbint4")


class Strange(Exception):
    """A program that is not of ours, or whose constants are not what it says."""


def constants(data: bytes) -> tuple[dict[str, bytes], list[dict[str, Any]], dict[str, Any]]:
    """A program's constants by the sha256 of their bytes; the quantized weights that XNNPACK is told of; what the program says of itself."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(data)
    held: dict[str, bytes] = {}
    named: dict[str, bytes] = {}
    if file.named_data is not None:
        named = {key: file.named_data.buffers[entry.buffer_index] for key, entry in file.named_data.pte_data.items()}
        held |= {digest(value): value for value in named.values()}
    said: dict[str, Any] = {}
    for plan in file.program.execution_plan:
        found = {i: _constant(value.val, file.program.constant_buffer) for i, value in enumerate(plan.values)}
        held |= {digest(value): value for value in found.values() if value is not None}
        if plan.name == ABOUT and (text := found.get(plan.outputs[0])) is not None:
            said = json.loads(text)
    weights: list[dict[str, Any]] = []
    for plan in file.program.execution_plan:
        for delegate in plan.delegates:
            payload = file.program.backend_delegate_data[delegate.processed.index].data
            weights += _weights(_graph(bytes(payload)), named)
    return held, weights, said


def digest(data: bytes) -> str:
    """The name under which XNNPACK keeps a constant."""
    return hashlib.sha256(data).hexdigest()


def _constant(value: Any, buffers: list[Any]) -> bytes | None:
    """The bytes of a constant tensor of the program itself, without what fills them up."""
    from executorch.exir.scalar_type import ScalarType

    wide = {ScalarType.FLOAT: 4, ScalarType.LONG: 8, ScalarType.INT: 4, ScalarType.BYTE: 1, ScalarType.CHAR: 1, ScalarType.BOOL: 1}
    if type(value).__name__ != "Tensor" or not value.data_buffer_idx or value.allocation_info is not None or value.scalar_type not in wide:
        return None
    size = wide[value.scalar_type]
    for n in value.sizes:
        size *= n
    return bytes(buffers[value.data_buffer_idx].storage[:size])


def _graph(payload: bytes) -> dict[str, Any]:
    """XNNPACK's graph, by its schema and flatc, both of the package."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    start, size = (int.from_bytes(payload[at], "little") for at in HEADER["flatbuffer"])
    schema = Path(_home()) / "backends" / "xnnpack" / "serialization" / "schema.fbs"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "graph.bin").write_bytes(payload[start : start + size])
        Path(folder, "schema.fbs").write_bytes(schema.read_bytes())
        _flatc_decompile(folder, f"{folder}/schema.fbs", f"{folder}/graph.bin", ["--raw-binary"])
        found: dict[str, Any] = json.loads(INFINITE.sub(rb': "\1"', Path(folder, "graph.json").read_bytes()))
    return found


def _weights(graph: dict[str, Any], named: dict[str, bytes]) -> list[dict[str, Any]]:
    """The quantized constants that a product of the graph reads."""
    keys = [entry["named_key"] for entry in graph["constant_data"]]
    filters = {node["xnode_union"].get("filter_id") for node in graph["xnodes"]}
    out = []
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor, how = union.get("tensor_value", {}), union.get("quant_params", {})
        if tensor.get("datatype") in KINDS and tensor.get("id_out") in filters:
            key, steps = keys[tensor["constant_buffer_idx"]], keys[how["scale_buffer_idx"]]
            out.append({"type": tensor["datatype"].removeprefix("xnn_datatype_"), "shape": tensor["dims"], "codes": key, "axis": how["channel_dim"],
                        "scale": digest(named[steps]), "group": how.get("group_size", 0)})
    return out


def _home() -> str:
    spec = importlib.util.find_spec("executorch.extension")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return str(Path(places[0]).parent)


def decoded(entry: dict[str, Any], held: dict[str, bytes]) -> Tensor:
    """(out, in) or (out, in, height, width): s q, as XNNPACK's types say; a convolution's codes lie (out, height, width, in)."""
    n, *rest = entry["shape"]
    k = math.prod(rest)
    raw = torch.frombuffer(bytearray(held[entry["codes"]]), dtype=torch.uint8)
    if entry["type"] == "qcint8":
        codes = raw.view(torch.int8).reshape(n, k).float()
    else:
        pairs = raw.reshape(n, -1)
        codes = torch.stack([pairs & 15, pairs >> 4], -1).reshape(n, -1)[:, :k].float() - 8
    steps = torch.frombuffer(bytearray(held[entry["scale"]]), dtype=torch.bfloat16 if entry["type"] == "qbint4" else torch.float32).float()
    found = (codes * steps.reshape(n, -1).repeat_interleave(entry["group"] or k, 1)).reshape(n, *rest)
    return found if len(rest) == 1 else found.permute(0, 3, 1, 2).contiguous()


def read(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a program of ours by name, and what it says of itself with the number of weights of each type.

    Raises:
        Strange: a program that is not of ours, or whose constants are not what it says.
    """
    held, weights, said = constants(Path(path).read_bytes())
    if not said:
        raise Strange("it was not written by qatlas: it has no method that names its tensors")
    out: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, entry in said["tensors"].items():
        if "plain" in entry:
            if entry["plain"] not in held:
                raise Strange(f"no constant of the program is {name}")
            out[name] = torch.frombuffer(bytearray(held[entry["plain"]]), dtype=getattr(torch, entry["dtype"])).reshape(entry["shape"])
            continue
        if entry not in weights or not {entry["codes"], entry["scale"]} <= held.keys():
            raise Strange(f"no product of XNNPACK reads {name} as {entry['type']} of shape {entry['shape']}")
        out[name] = decoded(entry, held)
        counts[entry["type"]] = counts.get(entry["type"], 0) + 1
    known = [entry for entry in said["tensors"].values() if "plain" not in entry]
    if any(weight not in known for weight in weights):
        raise Strange("a product of XNNPACK reads a quantized weight that has no name")
    return out, {"types": dict(sorted(counts.items())), **{key: value for key, value in said.items() if key != "tensors"}}


def ask(path: str, inputs: list[Tensor]) -> list[Tensor]:
    """What ExecuTorch's runtime computes, on one thread."""
    from executorch.extension.pybindings import _C

    _C._unsafe_reset_threadpool(1)
    program = _C._load_for_executorch(path)
    return [program.forward([x])[0].clone() for x in inputs]


def main() -> None:
    """Read, do, answer."""
    from safetensors.torch import load_file, save_file

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                                 # whatever C++ prints is log
    request = json.load(sys.stdin)
    folder = Path(request["to"])
    if "read" in request:
        compilers = types.ModuleType("executorch.exir")           # a package whose __init__, which imports them all, never runs
        compilers.__path__ = [f"{_home()}/exir"]
        sys.modules["executorch.exir"] = compilers
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 2**34
        limit = used + ROOM + 6 * Path(request["read"]).stat().st_size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            tensors, said = read(request["read"])
            answer = said
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "weights.safetensors")
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    else:
        inputs = load_file(folder / "inputs.safetensors")
        try:
            found = ask(request["ask"], [inputs[str(i)] for i in range(len(inputs))])
            save_file({str(i): x.contiguous() for i, x in enumerate(found)}, folder / "outputs.safetensors")
            answer = {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    json.dump(answer, out)
    out.close()


if __name__ == "__main__":
    main()
