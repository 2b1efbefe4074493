"""Modules and compiled functions that every training needs, loaded before processes are forked.

Nothing here trains: a process must not fork after autograd has started its threads.
"""

import gc
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fitsmall.compressors import KMeans, TopK, inspect, save
from fitsmall.experiments.run.picture import draw_run

for _name in ("data.images", "models.classifier", "models.networks", "run.job"):
    import_module(f"fitsmall.experiments.{_name}")
for _name in ("grids", "search"):
    import_module(f"hydra_plugins.fitsmall.{_name}")

with TemporaryDirectory() as _name:
    _file, _picture = Path(_name, "model.fitsmall"), Path(_name, "report.png")
    _weight = torch.linspace(-1, 1, 600).view(20, 30)
    _shared = (TopK(0.8) | KMeans(6)).project(_weight)
    save(_file, {"net.fc1.weight": _shared, "net.fc1.bias": _weight[0]})
    draw_run(_picture, inspect(_file), Path(_name), {"compressed": (1.0, 1.0)})

# The garbage collector of a forked process need not search what it shares with this one.
gc.collect()
gc.freeze()
