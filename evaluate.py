"""Is the image forgotten, is the rest intact?

`python evaluate.py` compares the last unlearned model with its base, `python evaluate.py DIR ...`
any checkpoints. `python evaluate.py compare` unlearns with every method and seed first.
docs/evaluation.md explains the columns.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tiny_retrack.data import Split
from tiny_retrack.lab import datasets, flags, runs, spec
from tiny_retrack.lab.jobs import works_alone
from tiny_retrack.lab.presets import PRESETS, EvalSettings, resolve
from tiny_retrack.training import use_bf16

FOLDERS = "checkpoints (default: the last unlearned model and its base)"


def make_parser(doc: str | None) -> flags.Parser:
    parser = flags.make_parser(doc)
    spec.add_evaluation(parser)
    return parser


def make_compare_parser() -> flags.Parser:
    parser = make_parser("Unlearn with every method and seed, evaluate all, write a table.")
    parser.prog = "evaluate.py compare"
    spec.add_comparison(parser)
    return parser


def build_evaluator(
    args: Namespace,
    data: dict[str, Any],
    folders: Sequence[Path],
    outs: Sequence[Path],
    check: Callable[[Split], None] = lambda split: None,
) -> Any:
    from tiny_retrack.lab import evaluation  # after --help: this import takes seconds

    def check_all(split: Split) -> None:
        spec.check_evaluation(args, split)
        check(split)

    device = runs.pick_device(args.device)
    settings = resolve(PRESETS[data["preset"]].evaluate, flags.given(args, EvalSettings))
    return evaluation.build_evaluator(
        folders,
        data,
        settings,
        outs=outs,
        check=check_all,
        device=device,
        bf16=use_bf16(args.bf16, device),
        **spec.evaluation_options(args),
    )


def evaluate(args: Namespace) -> None:
    from tiny_retrack.lab import evaluation

    folders = args.folders or evaluation.newest_checkpoints(flags.runs_folder(args))
    data = flags.data_settings(args, evaluation.recorded_data(folders, bool(args.forget)))
    evaluator = build_evaluator(args, data, folders, outs=folders)
    if evaluator.split.prompts is not None:
        from tiny_retrack.lab import prompts  # only here, as it imports SciPy's statistics

        print(prompts.evaluate_all(folders, evaluator))
        return
    evaluation.describe(evaluator)
    print(evaluation.evaluate_all(folders, evaluator, args.retrained))
    if args.attack is not None:
        print(evaluation.attack_all(folders, evaluator))


def compare(args: Namespace) -> None:
    from tiny_retrack.lab import compare

    spec.check_comparison(args)
    bases = args.base or [flags.runs_folder(args) / "base"]
    data = flags.data_settings(args, compare.recorded_data(bases))
    comparison = compare.Comparison(
        bases=bases,
        out=args.out or Path("runs", data["dataset"], "compare"),
        specs=[spec.Spec.parse(text) for text in args.methods],
        seeds=args.seeds or ([0] if args.forget_each else range(5)),
        curve_every=args.curve_every,
        attack=args.attack is not None,
        jobs=args.jobs,
        forget_each=args.forget_each,
        retrained=args.retrained,
        command=args.command,
    )
    comparison = compare.plan_comparison(comparison, data)
    if comparison.forget_each:
        # Refuse a bad image now, not after the runs of the images before it.
        datasets.load_image_set({**data, "forget": args.forget_each}, args.download).split()
    compare.compare(comparison, data, partial(build_evaluator, args))


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        run, args = compare, make_compare_parser().parse_args(argv[1:])
    else:
        parser = make_parser(__doc__)
        parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=FOLDERS)
        run, args = evaluate, parser.parse_args(argv)
    args.command = runs.command_line(__file__, argv)
    if works_alone():
        run(args)


if __name__ == "__main__":
    runs.run_command(main)
