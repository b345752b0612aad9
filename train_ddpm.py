"""Train a small DDPM from scratch. `python train_ddpm.py` writes runs/digits-tshirt/base/."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from tiny_retrack import NoiseSchedule, UNet, save_model
from tiny_retrack.data import random_batch, to_uint8
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.checkpoint import atomic, load_state, save_state, write_json
from tiny_retrack.lab.plots import save_curves, save_grid, smooth
from tiny_retrack.lab.presets import PRESETS, TrainSettings, add_flags, resolve
from tiny_retrack.losses import EpsModel, ddpm_loss
from tiny_retrack.sampling import sample_many
from tiny_retrack.training import (
    EMA,
    cosine_with_warmup,
    denoiser,
    fit,
    load_training_state,
    make_optimizer,
    place,
    rank,
    training_state,
    use_bf16,
)
from tiny_retrack.types import InputError, NonFiniteError


def read_log(path: Path, last_step: int) -> list[dict[str, float]]:
    """The records up to `last_step`; a run that was killed may have left later ones, the last of
    them cut short.
    """
    history = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if not all(
                isinstance(record[name], int | float) for name in ("step", "loss", "images_per_s")
            ):
                break
            history.append(record)
        except (ValueError, TypeError, KeyError):
            break
    return [record for record in history if record["step"] <= last_step]


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags.make_parser(__doc__)
    add_flags(parser, TrainSettings)
    parser.add_argument(
        "--widths", type=flags.positive, nargs="+", metavar="C",
        help="channels of the UNet's levels, from the finest: a smaller network for a smaller machine",
    )  # fmt: skip
    parser.add_argument(
        "--remain-only", action="store_true", help="leave the forget set out: the retrained oracle"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument(
        "--save-every", type=flags.positive, default=1000, help="steps between checkpoints"
    )
    parser.add_argument(
        "--keep",
        type=flags.positive,
        metavar="N",
        help="also keep the last N of these, in OUT/step-* (for vdu)",
    )
    parser.add_argument(
        "--log-every", type=flags.positive, default=20, help="steps between lines of log.jsonl"
    )
    parser.add_argument(
        "--out", type=Path, help="run folder (default: runs/DATASET/base, or .../retrain)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is in the run folder"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint"
    )
    args = parser.parse_args(argv)

    device = runs.pick_device(args.device)
    data = flags.data_settings(args)
    split = runs.load_data(data, args.download)
    preset = PRESETS[data["dataset"]]
    settings = resolve(preset.train, args)
    channels, size = split.remain.shape[1:3]
    unet = replace(preset.unet, sample_size=size, in_channels=channels, out_channels=channels)
    widths = args.widths or unet.block_out_channels
    if len(widths) != len(unet.block_out_channels):
        raise InputError(
            f"--widths: the UNet has {len(unet.block_out_channels)} levels, got {len(widths)} numbers"
        )
    unet = replace(unet, block_out_channels=tuple(widths))
    out = args.out or Path("runs", data["dataset"], "retrain" if args.remain_only else "base")
    runs.check_folder(out, args.overwrite, args.resume)
    saves = settings.steps // args.save_every
    if (args.keep or 0) > saves:
        raise InputError(
            f"--keep {args.keep}: {settings.steps} steps have {saves} checkpoints, lower --save-every"
        )

    torch.manual_seed(args.seed)
    schedule = NoiseSchedule.linear()
    images = (split.remain if args.remain_only else split.everything).to(device)
    bf16 = use_bf16(args.bf16, device)
    model = place(UNet(unet), device, bf16)
    optimizer, ema = make_optimizer(model, settings.lr), EMA(model)
    run = {"data": data, "train": asdict(settings), "seed": args.seed, "widths": [*widths]}
    run |= {
        "remain_only": args.remain_only,
        "bf16": bf16,
        "keep": args.keep and [args.keep, args.save_every],
    }
    start, history = 0, []
    if args.resume:
        tensors, meta = load_state(out)
        start = runs.check_resumed(out, meta, run)
        load_training_state(tensors, model, optimizer, ema)
        history = read_log(out / "log.jsonl", start)
        if rank() == 0:
            with atomic(out / "log.jsonl") as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in history))
    elif rank() == 0:
        runs.prepare_folder(out, args.overwrite)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[torch.Tensor]:
        x0, t, noise = random_batch(images, settings.batch_size, schedule.num_steps, generator)
        return (ddpm_loss(eps_model, x0, t, noise, schedule),)

    def save(step: int) -> None:
        if rank() == 0:
            if step % args.save_every == 0 and step // args.save_every > saves - (args.keep or 0):
                save_model(out / f"step-{step}", model, schedule, state=ema.shadow)
            save_model(out, model, schedule, state=ema.shadow)
            save_state(out, training_state(model, optimizer, ema), {"step": step, "run": run})
            write_json(out / "run.json", {**run, "step": step, **runs.provenance(device)})
            runs.discard_old(out)

    recent, saved, clock = [], start, time.perf_counter()
    progress = fit(
        model,
        losses,
        optimizer,
        start=start,
        steps=settings.steps,
        lr_at=cosine_with_warmup(settings.lr, settings.warmup, settings.steps),
        seed=args.seed,
        device=device,
        ema=ema,
        bf16=bf16,
        compiled=args.compile,
        accumulate=settings.accumulate,
    )
    bar = tqdm(
        progress, "training", total=settings.steps, initial=start, unit="step", disable=rank() > 0
    )
    with runs.stop_on_signal() as stop:
        for done in bar:
            recent.append(done.losses)
            last = done.step == settings.steps or stop.signal
            if last or done.step % args.log_every == 0 or done.step % args.save_every == 0:
                loss, norm = torch.stack(recent).mean().item(), done.grad_norm.item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    good = f"{out} holds step {saved}" if saved else "nothing was saved yet"
                    raise NonFiniteError(
                        f"the loss is not finite by step {done.step}; {good}; lower --lr"
                    )
                images_per_s = (
                    len(recent)
                    * settings.batch_size
                    * settings.accumulate
                    / (time.perf_counter() - clock)
                )
                record = {"step": done.step, "loss": loss, "grad_norm": norm, "lr": done.lr}
                history.append({**record, "images_per_s": round(images_per_s, 1)})
                if rank() == 0:
                    with (out / "log.jsonl").open("a") as log:
                        log.write(json.dumps(history[-1]) + "\n")
                bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
                recent, clock = [], time.perf_counter()
            if last or done.step % args.save_every == 0:
                save(done.step)
                saved = done.step
            if stop.signal:
                sys.exit(128 + stop.signal)
    if rank() > 0:
        return
    model.load_state_dict(ema.shadow)
    model.eval()
    samples = sample_many(
        denoiser(model, bf16),
        64,
        tuple(images.shape[1:]),
        schedule,
        25,
        seed=args.seed,
        device=device,
        progress="samples",
    )
    with atomic(out / "samples.png") as path:
        save_grid(path, to_uint8(samples), columns=8, scale=max(1, 64 // size))
    steps, values = [line["step"] for line in history], [line["loss"] for line in history]
    curves = {"loss": (steps, values), "running mean": (steps, smooth(values))}
    with atomic(out / "loss.png") as path:
        save_curves(path, curves, "step", "squared error per image", log=True)
    images_per_s = sorted(line["images_per_s"] for line in history)[len(history) // 2]
    print(
        f"{out}: {settings.steps} steps, {images_per_s} images/s (median), loss {curves['running mean'][1][-1]:.2f}"
    )


if __name__ == "__main__":
    runs.run_command(main)
