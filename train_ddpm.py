"""Train a small DDPM from scratch. `python train_ddpm.py` writes runs/digits-tshirt/base/."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tiny_retrack.lab import datasets, flags, runs
from tiny_retrack.lab.presets import PRESETS, TrainSettings, resolve_training
from tiny_retrack.training import rank, use_bf16


def make_parser() -> flags.Parser:
    parser = flags.make_parser(__doc__)
    flags.add_settings(parser, "train", TrainSettings)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        help="start from this model's weights, with a new learning rate schedule and optimiser; by "
        "default on the data that it was trained on",
    )
    add(
        "--widths",
        type=flags.positive,
        nargs="+",
        metavar="C",
        help="channels of the UNet's levels, from the finest: a smaller network is faster",
    )
    add(
        "--remain-only",
        action="store_true",
        help="leave the forget set out: the retrained model, which unlearning should reach",
    )
    hold_out = "share of the images to keep from all models; evaluate.py reports on them, too"
    add("--hold-out", type=float, metavar="SHARE", help=hold_out)
    add("--compile", action="store_true", help="torch.compile the UNet")
    add("--save-every", type=flags.positive, default=1000, help="steps between checkpoints")
    add(
        "--keep",
        type=flags.positive,
        metavar="N",
        help="also keep the last N checkpoints, in OUT/step-* (for vdu)",
    )
    add("--log-every", type=flags.positive, default=20, help="steps between lines of log.jsonl")
    add("--out", type=Path, help="run folder (default: runs/DATASET/base, or .../retrain)")
    add("--overwrite", action="store_true", help="replace what is in the run folder")
    add("--resume", action="store_true", help="continue from the run folder's last checkpoint")
    return parser


def run(args: Namespace, command: str) -> None:
    from tiny_retrack.lab.pretraining import (  # after --help: takes seconds
        PretrainPlan,
        pretrain,
        unet_for,
    )

    device = runs.pick_device(args.device)
    recorded = runs.recorded_data(args.checkpoint) if args.checkpoint else None
    data, split = datasets.load_data(flags.data_settings(args, recorded), args.download)
    preset = PRESETS[data["preset"]]
    kind = "retrain" if args.remain_only else "base"
    plan = PretrainPlan(
        out=args.out or Path("runs", data["dataset"], kind),
        data=data,
        settings=resolve_training(preset.train, flags.given(args, TrainSettings)),
        unet=unet_for(split, preset.unet, args.widths, args.checkpoint),
        checkpoint=args.checkpoint,
        remain_only=args.remain_only,
        seed=args.seed,
        device=device,
        bf16=use_bf16(args.bf16, device),
        compiled=args.compile,
        save_every=args.save_every,
        keep=args.keep,
        log_every=args.log_every,
        overwrite=args.overwrite,
        resume=args.resume,
        command=command,
    )
    history = pretrain(plan, split)
    if rank() > 0 or not history:  # a finished run whose log was lost has nothing to report
        return
    speeds = sorted(record["images_per_s"] for record in history)
    print(
        f"{plan.out}: {plan.settings.steps} steps, {speeds[len(speeds) // 2]} images/s (median), "
        f"loss {history[-1]['loss']:.2f}"
    )
    script = "evaluate.py" if args.remain_only else "unlearn.py --checkpoint"
    print(f"now run: python {script} {plan.out}")


def main(argv: Sequence[str] | None = None) -> None:
    run(make_parser().parse_args(argv), runs.command_line(__file__, argv))


if __name__ == "__main__":
    runs.run_command(main)
