"""The command line: reads arguments, calls one function for each command, turns errors into exit codes.

0 done   1 the run failed   2 bad usage, configuration or input   3 done, but short of the budget
130 interrupted (Ctrl-C)   75 terminated (SIGTERM); after both the same command goes on where it was
"""

import argparse
import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from fastsel import __version__
from fastsel.catalogue import METHODS
from fastsel.config import options_of, resolve
from fastsel.console import Console, table
from fastsel.errors import FastselError, RunFailedError, UsageError
from fastsel.options import GROUPS, OPTIONS, Option
from fastsel.progress import MODES

SHORT_OF_BUDGET, TERMINATED, INTERRUPTED = 3, 75, 130
COMMANDS = ("select", "score", "methods", "doctor", "demo")
logger = logging.getLogger("fastsel")

ABOUT = """\
fastsel picks the examples worth training on.

  fastsel demo                                                    256 real rows, a real model, a finished page
  fastsel select ifd --pool pool.jsonl --budget 10% -o out        the best tenth of your own pool

commands
  select METHOD   score the rows of a pool, choose, and write the chosen rows with a record of why
  score METHOD    score the rows only; choose later with `fastsel select --from RUN`
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
    "methods": "The methods, what each looks at, and where it comes from.",
    "doctor": "What will run on this machine, and why not something faster.",
    "demo": "Choose a tenth of a bundled pool by IFD with a real language model, offline.",
}


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, nothing but the command line catches it."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to look; argparse would print all flags first."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n`{self.prog} --help` lists the flags")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(110, shutil.get_terminal_size().columns))


def _parser(command: str, usage: str) -> _Parser:
    return _Parser(
        prog=f"fastsel {command}",
        usage=usage,
        description=ABOUT_COMMAND[command],
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )


def _run_parser(command: str, method: str | None) -> _Parser:
    budget = " --budget N" if command == "select" else ""
    parser = _parser(command, f"fastsel {command} {method or 'METHOD'} --pool PATH{budget} -o DIR [flags]")
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
        shown += f" (default: {str(default).replace('%', '%%')})"
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


def _doctor_parser() -> _Parser:
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


def _demo_parser() -> _Parser:
    parser = _parser("demo", "fastsel demo [-o DIR] [flags]")
    parser.add_argument("-o", "--output", metavar="DIR", help="where to write (default: fastsel_demo)")
    parser.add_argument("--overwrite", action="store_true", help="do it again from the start")
    _add_talk(parser)
    return parser


def _methods_parser() -> _Parser:
    parser = _parser("methods", "fastsel methods [--json]")
    _add_talk(parser)
    return parser


def _parse(parser: _Parser, words: Sequence[str]) -> dict[str, Any]:
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = get_close_matches(unknown[0].partition("=")[0], flags, n=1) if unknown[0].startswith("-") else []
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"{unknown[0]!r} is not understood{hint}")
    return vars(namespace)


def _run(command: str, words: list[str], console: Console, given: dict[str, Any], method: str | None) -> int:
    own = ("dry_run", "from_run", "resume", "overwrite", "config", "set", "print_config", "offline")
    talk = ("progress", "json", "quiet", "verbose")
    flags = {name: value for name, value in given.items() if name not in own + talk}
    if given.get("offline"):
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if "from_run" in given:
        from fastsel.pipeline import resolve_again

        config = resolve_again(given["from_run"], method, flags, given.get("set"), given.get("config"))
    else:
        config = resolve(command, method, flags, given.get("set"), given.get("config"))
    if given.get("print_config"):
        print(config.to_yaml(), end="")
        return 0
    from fastsel import pipeline

    progress = "none" if given.get("quiet") else given.get("progress", "auto")
    if given.get("dry_run"):
        from fastsel.estimate import estimate

        expected = estimate(config, progress=progress)
        print(json.dumps(expected.as_dict()) if given.get("json") else expected.text())
        return 0
    outcome = pipeline.run(
        config,
        from_run=given.get("from_run"),
        resume=given.get("resume", True),
        overwrite=given.get("overwrite", False),
        progress=progress,
        argv=["fastsel", command, *words],
        on_folder=lambda folder: console.write_log(folder / "run.log"),
    )
    print(json.dumps(outcome.as_dict()) if given.get("json") else outcome.text())
    return SHORT_OF_BUDGET if outcome.short_by else 0


def _methods(given: dict[str, Any]) -> int:
    columns = ("name", "venue", "task_type", "representation", "diversity", "quality", "status")
    if given.get("json"):
        print(json.dumps([{name: getattr(row, name) for name in ("title", *columns)} for row in METHODS.values()]))
        return 0
    cells = [[getattr(row, name) for name in columns] for row in METHODS.values()]
    headings = ["method", "venue", "task type", "representation", "diversity strategy", "quality strategy", "status"]
    print(table(cells, headings, max(100, shutil.get_terminal_size().columns)))
    print()
    for row in METHODS.values():
        print(f"{row.name}: {row.title}")
    print("\nThe defaults of one: fastsel select METHOD --help")
    return 0


def _doctor(given: dict[str, Any]) -> int:
    from fastsel.doctor import examine

    findings = examine(
        device=given.get("device", "auto"),
        check=given.get("check", False),
        slow=given.get("slow", False),
        kernel=given.get("kernel"),
        progress="none" if given.get("quiet") else given.get("progress", "auto"),
    )
    print(json.dumps(findings.as_dict()) if given.get("json") else findings.text())
    return 0 if findings.passed else 1


def _demo(given: dict[str, Any], console: Console) -> int:
    from fastsel.demo import demo

    outcome = demo(
        given.get("output", "fastsel_demo"),
        overwrite=given.get("overwrite", False),
        progress="none" if given.get("quiet") else given.get("progress", "auto"),
        on_folder=lambda folder: console.write_log(folder / "run.log"),
    )
    next_step = "\nnext, your own pool: fastsel select ifd --pool POOL.jsonl --budget 10% -o DIR"
    print(json.dumps(outcome.as_dict()) if given.get("json") else outcome.text() + next_step)
    return SHORT_OF_BUDGET if outcome.short_by else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `fastsel`; sys.argv[1:] when None.

    Returns:
        The exit code; see the head of this module.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(ABOUT, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else UsageError.exit_code
    if words[0] in ("--version", "-V"):
        print(f"fastsel {__version__}")
        return 0
    verbosity = 1 if {"-v", "--verbose"} & set(words) else -1 if {"-q", "--quiet"} & set(words) else 0
    with Console(verbosity) as console:
        try:
            return _command(words, console)
        except SystemExit as leave:  # argparse's --help
            return int(leave.code or 0)
        except KeyboardInterrupt:
            return _stopped("interrupted", INTERRUPTED, words)
        except Terminated:
            return _stopped("terminated", TERMINATED, words)
        except BrokenPipeError:
            # The reader of stdout has gone (`fastsel methods | head`); stdout must not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            return _failed(error, words)


def _command(words: list[str], console: Console) -> int:
    command, rest = words[0], words[1:]
    logger.debug("fastsel %s: %s", __version__, shlex.join(["fastsel", *words]))
    if command in ("select", "score"):
        method = rest.pop(0) if rest and not rest[0].startswith("-") else None
        given = _parse(_run_parser(command, method), rest)
        return _run(command, words[1:], console, given, method)
    if command == "methods":
        return _methods(_parse(_methods_parser(), rest))
    if command == "doctor":
        return _doctor(_parse(_doctor_parser(), rest))
    if command == "demo":
        return _demo(_parse(_demo_parser(), rest), console)
    near = get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean `fastsel {near[0]}`? " if near else ""
    if command in METHODS:
        hint = f"did you mean `fastsel select {command}`? "
    raise UsageError(f"there is no command {command!r}; {hint}The commands are: {', '.join(COMMANDS)}")


def _stopped(how: str, code: int, words: list[str]) -> int:
    logger.warning("%s", how)
    if words[0] in ("select", "score", "demo"):
        logger.info("Finished parts are kept. To go on: %s", shlex.join(["fastsel", *words]))
    _result_of_failure(words, how, code)
    return code


def _failed(error: Exception, words: list[str]) -> int:
    expected = _explain(error)
    trace = "".join(traceback.format_exception(error)).rstrip()
    if expected is None:
        logger.error("%s", trace)
        message = f"{type(error).__name__}: {error}"
        logger.error("this is a bug in fastsel; `fastsel doctor --check` prints what a report about it needs")
        code = 1
    else:
        logger.debug("%s", trace)
        message, code = expected
        logger.error("%s", message)
    _result_of_failure(words, message, code)
    return code


def _result_of_failure(words: list[str], message: str, code: int) -> None:
    if "--json" in words:
        print(json.dumps({"status": "error", "exit_code": code, "message": message}))


def _explain(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code of an error that a user can do something about; None for a bug."""
    if isinstance(error, FastselError):
        return str(error), error.exit_code
    if type(error).__name__ == "NoImplementationError":  # of fastsel.kernels, which help does not import
        return f"{error}\n`fastsel doctor` says what runs on this machine", UsageError.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({error}); a smaller --batch-tokens needs less", RunFailedError.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", RunFailedError.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}; finished parts are kept", RunFailedError.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "running a model needs the package torch: pip install 'fastsel[models]'", UsageError.exit_code
    return None


def entry_point() -> NoReturn:
    """What the `fastsel` program runs: main() with SIGTERM made resumable."""

    def terminate(number: int, frame: Any) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of sources may hold what the terminal cannot show
    # Two libraries would draw bars and print notes over ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
