"""tiny_retrack: data unlearning in diffusion models, small enough to read in an afternoon.

The lesson, in reading order: types, schedule, pictures, data, unet, prompts, posterior, losses,
methods, training, sampling, likelihood, metrics, attacks. (`pictures`, and the loaders at the end
of `data`, only read files: skip them at first.) What makes experiments repeatable is in `lab`.
"""

from tiny_retrack.data import load_split, to_float, to_uint8
from tiny_retrack.lab.checkpoint import load_model, save_model
from tiny_retrack.losses import ddpm_loss, retrack_loss
from tiny_retrack.posterior import exact_target, knn_target, nearest_neighbors, topk_target
from tiny_retrack.sampling import sample_many
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.unet import UNet, UNetConfig

__all__ = [
    "NoiseSchedule",
    "UNet",
    "UNetConfig",
    "ddpm_loss",
    "exact_target",
    "knn_target",
    "load_model",
    "load_split",
    "nearest_neighbors",
    "retrack_loss",
    "sample_many",
    "save_model",
    "to_float",
    "to_uint8",
    "topk_target",
]
