"""Dense weights as others keep them: the bytes of a .safetensors, .npz or .pt file, with every name a plain key.

A name that such a file could only hold as a path, or not at all, is refused; none is changed.
"""

import io
import re
import zipfile

import numpy as np

from tersenet.artifact import Artifact

ENDS = (".safetensors", ".pt", ".npz")


def dense_file(artifact: Artifact, end: str) -> bytes:
    """The file's bytes, of one of the `ENDS`: .npz has bfloat16 as float32 and 8-bit floats as bytes.

    Raises ValueError for a name that it cannot hold, with the ends that can.
    """
    makers = {".npz": _npz, ".pt": _torch, ".safetensors": _safetensors}
    if end not in makers:
        raise ValueError(f"give a name that ends in {', '.join(ENDS[:-1])} or {ENDS[-1]}")
    return makers[end](artifact)


def _npz(artifact: Artifact) -> bytes:
    names, buffer = artifact.tensors.keys(), io.BytesIO()
    for name in names:
        if ".." in name.split("/") or re.match("/|[A-Za-z]:", name) or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r}: an .npz would hold this name as a path; unpack to .safetensors or .pt")
        if f"{name}.npy" in names:
            raise ValueError(f"{name!r}: an .npz cannot tell it from '{name}.npy'; unpack to .safetensors or .pt")
    with zipfile.ZipFile(buffer, "w") as archive:  # np.savez takes some names for its own arguments
        for name, array in artifact.unpack().items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def _torch(artifact: Artifact) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(artifact.state_dict(), buffer)
    return buffer.getvalue()


def _safetensors(artifact: Artifact) -> bytes:
    from safetensors.torch import save

    if "__metadata__" in artifact.tensors:
        raise ValueError("'__metadata__': a .safetensors file has no tensor of this name; unpack to .npz or .pt")
    state, seen = artifact.state_dict(), set[int]()
    for name, tensor in state.items():  # it holds no tied tensors
        state[name] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    text = artifact.meta.get("metadata")
    made: bytes = save(state, {str(k): str(v) for k, v in text.items()} if isinstance(text, dict) else None)
    return made
