"""Runs inside the peer's own environment: ISO/IEC 15938-17's reference coder over one network at several step sizes.

    python bench/nnc_peer.py STATE.npz OUT_FOLDER QP [QP ...]

For each qp: OUT/qp<N>.npz holds the decoded tensors, and a line of JSON tells bytes and seconds. Dependent quantization
is on, nonweight_qp is -40, as the anchors say. Make the environment with: python -m venv ENV; ENV/bin/pip install
torch==2.13.0 "numpy<2" scipy pandas; ENV/bin/pip install --no-deps nncodec==2.1.3.
"""

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from table import in_rounds


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that the coder imports for its data sets alone (there is no torchvision build here)."""

    names = ("torchvision", "torchmetrics", "ptflops", "cv2", "h5py", "sklearn", "flwr", "tqdm", "wandb", "PIL")

    def find_spec(self, fullname, path=None, target=None):
        found = fullname.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if found else None

    def create_module(self, spec):
        made = mock.MagicMock(name=spec.name)
        made.__path__, made.__spec__ = [], spec
        return made

    def exec_module(self, module):
        """A stand-in has nothing to run."""


def main(source: str, folder: str, *steps: str) -> None:
    sys.meta_path.append(Absent())
    from nncodec import nn

    with np.load(source) as opened:
        state = {name: opened[name].astype(np.float32) for name in opened.files}
    out, rows, streams = Path(folder), [], []
    with tempfile.TemporaryDirectory() as results:
        for step in steps:
            qp, dq = int(step.rstrip("u")), not step.endswith("u")
            settings = {"qp": qp, "nonweight_qp": -40, "use_dq": dq, "results": results, "model": "net"}
            with contextlib.redirect_stdout(io.StringIO()):
                begin = time.process_time()
                stream = nn.encode(dict(state), settings)
                rows.append({"qp": step, "bytes": len(stream), "encode": time.process_time() - begin})
                decoded = nn.decode(stream, settings)
            np.savez(out / f"qp{step}.npz", **{name: np.asarray(array) for name, array in decoded.items()})
            streams.append((stream, settings))
        with contextlib.redirect_stdout(io.StringIO()):
            told = in_rounds([lambda given=given: nn.decode(*given) for given in streams])
        for row, (clock, spent) in zip(rows, told, strict=True):
            print(json.dumps(row | {"decode_clock": clock, "decode": spent}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
