"""The network that the LC toolkit's example starts from, as a file that training starts from.

    python -m fitsmall.experiments.benchmarks.lc_reference reference.fitsmall
    fitsmall train experiment=learn_ranks data=mnist model=lenet300 init=reference.fitsmall

Idelbayev and Carreira-Perpinan's LeNet-300-100 with tanh, for images minus their mean; its weights
are looked for as ``lc/lenet300_reference.npz`` in a folder of ``$FITSMALL_DATA``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from fitsmall.compressors import save
from fitsmall.experiments.data.sources import found

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="file to write")
    options = parser.parse_args()
    with np.load(found("lc", "lenet300_reference.npz")) as arrays:
        tensors = {
            f"net.fc{number + 1}.{kind}": torch.from_numpy(
                arrays[f"output.compressible_{number}.{kind}"]
            )
            for number in range(3)
            for kind in ("weight", "bias")
        }
    print(f"{options.file}: {save(options.file, tensors):,} bytes")


if __name__ == "__main__":
    main()
