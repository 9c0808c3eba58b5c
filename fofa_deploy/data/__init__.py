"""Images and labels: sources, a three-way split, and batches. Everything is uint8 (B,C,H,W) until the sidecar normalizes it."""

from fofa_deploy.data.batches import augmented, epoch_batches, eval_batches
from fofa_deploy.data.sources import preprocessing
from fofa_deploy.data.splits import Data, Split, load_data, scan, write_split, write_splits

__all__ = [
    "Data",
    "Split",
    "augmented",
    "epoch_batches",
    "eval_batches",
    "load_data",
    "preprocessing",
    "scan",
    "write_split",
    "write_splits",
]
