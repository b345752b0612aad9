"""Make the networks that the course hands out, and the figures that a test compares them with.

    python train_ddpm.py --bf16 off
    python train_ddpm.py --bf16 off --remain-only --seed 1 --out runs/digits-tshirt/retrain
    python docs/course/make_weights.py runs/digits-tshirt/base runs/digits-tshirt/retrain

Writes docs/course/weights/base and retrain: float16, half the size, in diffusers' layout.
"""

import shutil
import sys
from pathlib import Path

import torch

from tiny_retrack.data import Split, load_split, to_float
from tiny_retrack.lab.checkpoint import load_model, save_model, write_json
from tiny_retrack.likelihood import nll_bits_per_dim
from tiny_retrack.metrics import hit_frequency
from tiny_retrack.sampling import sample_many
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel

WEIGHTS = Path(__file__).parent / "weights"
THRESHOLD = 5.7  # of a hit, as evaluate.py has it for digits-tshirt
SAMPLES = 100
DDIM_STEPS = 10


def figures(model: EpsModel, schedule: NoiseSchedule, split: Split) -> dict[str, float]:
    """Share of samples that are the T-shirt; bits per dimension of it and of a digit.

    Of few samples, so that a test can afford them: `evaluate.py` measures a thousand.
    """
    samples = sample_many(model, SAMPLES, (1, 16, 16), schedule, DDIM_STEPS)
    shirt = split.targets / 255
    images = to_float(torch.cat([split.targets, split.remain[:1]]))
    generator = torch.Generator().manual_seed(0)
    bits = nll_bits_per_dim(model, images, schedule, generator, rtol=1e-2, atol=1e-2)
    return {
        "samples": SAMPLES,
        "ddim_steps": DDIM_STEPS,
        "hit_frequency": hit_frequency((samples + 1) / 2, shirt, THRESHOLD),
        "nll_tshirt": bits[0].item(),
        "nll_digit": bits[1].item(),
    }


def main(runs: list[Path]) -> None:
    split = load_split("digits-tshirt")
    for run, name in zip(runs, ("base", "retrain"), strict=True):
        model, schedule = load_model(run)
        half = {key: weight.half() for key, weight in model.state_dict().items()}
        save_model(WEIGHTS / name, model, schedule, half)
        shutil.copy(run / "run.json", WEIGHTS / name / "run.json")
        saved, schedule = load_model(WEIGHTS / name)
        found = figures(saved.eval(), schedule, split)
        write_json(WEIGHTS / name / "figures.json", found)
        print(name, found)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
