"""`sterna train`: a ternary model from dialogues, from scratch, from a model or a teacher; resumed where it stopped.

What trains is imported when it is needed (finetune/, torch); without the extra that is one line naming the command that
installs it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from server.commands.arguments import Parser, add_part_settings, part_flags
from server.commands.progress import show_status
from server.errors import SternaError, UsageError
from server.units import format_bytes

if TYPE_CHECKING:
    from finetune.qat.config import QatSettings

HELP = """\
Train a ternary model on dialogues and write it as a GGUF file that is served as it was trained.

DATA is a folder of `sterna dataset generate` or a .jsonl file in OpenAI's fine-tuning form; OUT is a folder, and a run
that was stopped goes on from what is in it. Several processes: torchrun --no-python --nproc-per-node=2 sterna train."""


class TrainFault(SternaError):
    """A named failure of the training room."""


def main(arguments: Sequence[str]) -> int:
    from finetune.errors import FinetuneError
    from finetune.extra import check_extra

    parser = Parser("train", HELP, "sterna train ./dialogues ./nano --layers 8 --epochs 2")
    parser.add_argument("data", metavar="DATA", type=Path, help="what to learn from")
    parser.add_argument("out", metavar="OUT", type=Path, help="the run's folder")
    parser.add_argument("--config", metavar="FILE", type=Path, help="a TOML file with a table [train] [sterna.toml]")
    parser.add_argument("--json", action="store_true", help="the finished run as JSON")
    options, settings = _parse(parser, arguments)
    check_extra()
    try:
        facts = _run(options.data, options.out, settings)
    except FinetuneError as error:
        raise TrainFault(str(error)) from error
    if options.json:
        print(json.dumps(facts))
    elif "model" in facts:  # of several processes the first one tells
        print(_text(facts))
    return 0


def _parse(parser: Parser, arguments: Sequence[str]) -> "tuple[Any, QatSettings]":
    from finetune.qat.config import PART, QatSettings, load_qat_settings

    add_part_settings(parser, QatSettings, PART)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UsageError(f"{unknown[0]}: no such flag, or one argument too many (sterna train --help)")
    return options, load_qat_settings(part_flags(options, QatSettings, PART), file=options.config)


def _run(data: Path, out: Path, settings: "QatSettings") -> dict[str, Any]:
    from finetune.qat.run import Console, run

    with tqdm(unit=" steps", disable=None, dynamic_ncols=True) as bar:

        def on_step(step: int, num_steps: int) -> None:
            if bar.total != num_steps or step < bar.n:
                bar.reset(num_steps)
            bar.update(step - bar.n)

        return run(data, out, settings, Console(lambda text: bar.write(text, file=sys.stderr), show_status, on_step))


def _text(facts: dict[str, Any]) -> str:
    held = facts["held_out"]
    measured = "" if held is None else f", held-out loss {held['loss']:.4f}, {held['accuracy']:.1%} of tokens right"
    memory = facts["memory"]
    return (
        f"{facts['model']}: {facts['num_parameters']:,} parameters in {format_bytes(facts['model_bytes'])},"
        f" {facts['num_steps']:,} steps{measured}\n"
        f"memory: {format_bytes(memory['total'])} planned, {format_bytes(memory['peak'])} at the peak"
    )
