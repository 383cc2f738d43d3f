"""The words of the command line: flags and help of each command, made from the tables of options and methods."""

import argparse
import shutil
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from fastsel.commands.catalogue import METHODS
from fastsel.commands.config import options_of, warmup_options
from fastsel.commands.options import CHOICE, GROUPS, OPTIONS, Option
from fastsel.errors import UsageError
from fastsel.progress import MODES

ABOUT = """\
fastsel picks the examples worth training on.

  fastsel demo                                                    256 real rows, a real model, a finished page
  fastsel select ifd --pool pool.jsonl --budget 10% -o out        the best tenth of your own pool

commands
  select METHOD   score the rows of a pool, choose, and write the chosen rows with a record of why
  score METHOD    score the rows only; choose later with `fastsel select --from RUN`
  warmup POOL     train LoRA on a few rows of a pool, for methods that ask a model in training (less)
  metrics SUBSET  how diverse a subset is, beside random draws of the same size
  methods         the table of methods
  doctor          which implementation of each kernel runs on this machine, and why not the others
  demo            the first thing to try; offline, writes ./fastsel_demo

`fastsel COMMAND --help` lists its flags, `fastsel select METHOD --help` those of one method with their defaults.
Results go to stdout, messages to stderr. Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 short of the
budget, 130 and 75 interrupted (run the same command again to go on).
"""
ABOUT_COMMAND = {
    "select": "Score the rows of a pool, choose some, and write them with a record of why.",
    "score": "Score the rows of a pool without choosing; `fastsel select --from RUN` chooses later.",
    "metrics": "How diverse a subset is: its value by each metric, beside random draws of the same size, and the cost.",
    "warmup": "Train a LoRA adapter on rows drawn from a pool, with a checkpoint and Adam's moments after each epoch.",
    "methods": "The methods, what each looks at, and where it comes from.",
    "doctor": "What will run on this machine, and why not something faster.",
    "demo": "Choose a tenth of a bundled pool by IFD with a real language model, offline.",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to look; argparse would print all flags first."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n`{self.prog} --help` lists the flags")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(110, shutil.get_terminal_size().columns))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        return super()._format_action_invocation(action)


def _parser(command: str, usage: str) -> _Parser:
    return _Parser(
        prog=f"fastsel {command}",
        usage=usage,
        description=ABOUT_COMMAND[command.split()[0]],
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )


def run_parser(command: str, method: str | None) -> _Parser:
    """Flags of `fastsel select` or `fastsel score`; for a named method only those that it takes, with its defaults."""
    budget = " --budget N" if command == "select" else ""
    named = f"{command} {method}" if method in METHODS else command
    parser = _parser(named, f"fastsel {command} {method or 'METHOD'} --pool PATH{budget} -o DIR [flags]")
    if method is None:
        parser.epilog = f"METHOD is one of: {', '.join(METHODS)}. `fastsel {command} METHOD --help` shows its defaults."
    rows = [METHODS[method]] if method in METHODS else list(METHODS.values())
    applicable: dict[str, Any] = {}
    for row in reversed(rows):
        applicable |= options_of(command, row)
    for group, heading in GROUPS.items():
        section = parser.add_argument_group(heading)
        for option in OPTIONS.values():
            if option.group == group:
                _add_option(section, option, option.name in applicable, applicable.get(option.name), method)
    run = parser.add_argument_group("the run")
    run.add_argument("--dry-run", action="store_true", help="estimate tokens, memory, disk and time; write nothing")
    if command == "select":
        run.add_argument(
            "--from", dest="from_run", metavar="RUN", help="choose again from a finished run's scores; no model runs"
        )
    run.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on with an unfinished run (default), or start it anew",
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run that is in the output folder")
    run.add_argument("--config", metavar="YAML", help="options from a file; flags and --set win over it")
    run.add_argument(
        "--set", nargs="+", action="extend", metavar="OPTION=VALUE", help="options by name: columns.messages=dialogs"
    )
    run.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and stop")
    run.add_argument("--offline", action="store_true", help="never ask the network (sets HF_HUB_OFFLINE=1)")
    _add_talk(run)
    return parser


def _add_option(section: Any, option: Option, applies: bool, default: Any, method: str | None) -> None:
    words = [option.short, option.flag] if option.short else [option.flag]
    shown = option.help
    if default is not None and method is not None and default is not False and default is not True:
        words_of_default = " ".join(default) if isinstance(default, tuple) else str(default)
        shown += f" (default: {words_of_default.replace('%', '%%')})"
    given: dict[str, Any] = {"dest": option.name, "help": shown if applies else argparse.SUPPRESS}
    if option.metavar is None:
        section.add_argument(*words, action=argparse.BooleanOptionalAction, **given)
    elif option.many:
        section.add_argument(*words, nargs="+", action="extend", metavar=option.metavar, **given)
    else:
        section.add_argument(*words, metavar=option.metavar, **given)


def _add_talk(section: Any) -> None:
    section.add_argument("--progress", choices=MODES, metavar="HOW", help=f"{', '.join(MODES)} (on stderr)")
    section.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    section.add_argument("-q", "--quiet", action="store_true", help="warnings and errors only")
    section.add_argument("-v", "--verbose", action="store_true", help="details, and tracebacks of errors")


def doctor_parser() -> _Parser:
    """Flags of `fastsel doctor`."""
    parser = _parser("doctor", "fastsel doctor [--check] [flags]")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run every kernel against its reference: error, time, share of the roofline",
    )
    parser.add_argument("--slow", action="store_true", help="with --check: the large cases too (minutes on a CPU)")
    parser.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:1 (default: auto)")
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel")
    _add_talk(parser)
    return parser


def metrics_parser() -> _Parser:
    """Flags of `fastsel metrics`."""
    parser = _parser("metrics", "fastsel metrics SUBSET --reference POOL [flags]")
    parser.add_argument(
        "subset",
        nargs="?",
        metavar="SUBSET",
        help="a file of rows such as selected.jsonl, a run's folder, or a .npy of row numbers of the reference",
    )
    parser.add_argument("--reference", metavar="POOL", help="the pool that random draws and coverage are taken from")
    parser.add_argument("--metrics", metavar="A,B", help="some of them, by name (default: all)")
    parser.add_argument(
        "--encoder", metavar="ENCODER", help=OPTIONS["encoder"].help + ", a row for each of the reference"
    )
    parser.add_argument(
        "--text",
        metavar="WHICH",
        help="what is embedded and whose words count: instruction (default), answer, conversation",
    )
    parser.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:1 (default: auto)")
    parser.add_argument("--draws", type=int, metavar="N", help="random draws to measure beside (default: 5)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the result there too, as JSON")
    _add_talk(parser)
    return parser


def warmup_parser() -> _Parser:
    """Flags of `fastsel warmup`; the defaults are those of the function."""
    parser = _parser("warmup", "fastsel warmup POOL -o DIR [flags]")
    parser.add_argument("pool", nargs="*", metavar="POOL", help=OPTIONS["pool"].help)
    for group, heading in GROUPS.items():
        options = [name for name in warmup_options() if OPTIONS[name].group == group and name != "pool"]
        section = parser.add_argument_group("what is drawn" if group == CHOICE else heading) if options else None
        for name in options:
            _add_option(section, OPTIONS[name], True, warmup_options()[name], "warmup")
    run = parser.add_argument_group("the run")
    run.add_argument("-o", "--output", metavar="DIR", help="a folder of its own; an unfinished run in it goes on")
    run.add_argument("--offline", action="store_true", help="never ask the network (sets HF_HUB_OFFLINE=1)")
    _add_talk(run)
    return parser


def demo_parser() -> _Parser:
    """Flags of `fastsel demo`."""
    parser = _parser("demo", "fastsel demo [-o DIR] [flags]")
    parser.add_argument("-o", "--output", metavar="DIR", help="where to write (default: fastsel_demo)")
    parser.add_argument("--overwrite", action="store_true", help="do it again from the start")
    _add_talk(parser)
    return parser


def methods_parser() -> _Parser:
    """Flags of `fastsel methods`."""
    parser = _parser("methods", "fastsel methods [--json]")
    _add_talk(parser)
    return parser


def parse(parser: _Parser, words: Sequence[str]) -> dict[str, Any]:
    """Only what was given, by name.

    Raises:
        UsageError: a flag that is not known (the nearest is named), or a value that is missing.
    """
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = get_close_matches(unknown[0].partition("=")[0], flags, n=1) if unknown[0].startswith("-") else []
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"{unknown[0]!r} is not understood{hint}")
    return vars(namespace)
