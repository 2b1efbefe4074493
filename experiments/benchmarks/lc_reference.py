"""Convert the reference network of the LC toolkit's example to a file that training starts from.

    python -m fitsmall.experiments.benchmarks.lc_reference reference.fitsmall
    fitsmall train experiment=learn_ranks data=mnist model=lenet300 init=reference.fitsmall

It is Idelbayev and Carreira-Perpinan's LeNet-300-100 with tanh, for images minus their mean. Its
weights are read from ``lc/lenet300_reference.npz`` in the folder ``$FITSMALL_DATA``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from fitsmall.compressors import save
from fitsmall.experiments.data.sources import find_file

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="file to write")
    options = parser.parse_args()
    with np.load(find_file("lc", "lenet300_reference.npz")) as arrays:
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
