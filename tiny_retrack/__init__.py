"""tiny_retrack: data unlearning in diffusion models, small enough to read in one sitting."""

from tiny_retrack.lab.checkpoint import load_model, save_model
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.unet import UNet, UNetConfig

__all__ = ["NoiseSchedule", "UNet", "UNetConfig", "load_model", "save_model"]
