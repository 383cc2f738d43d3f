"""The command line: reads arguments, calls one function for each command, turns errors into exit codes.

0 done   1 the run failed   2 bad usage, configuration or input   3 done, but short of the budget
130 interrupted (Ctrl-C)   75 terminated (SIGTERM); after both the same command goes on where it was
"""

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
from fastsel.commands.arguments import (
    ABOUT,
    demo_parser,
    doctor_parser,
    methods_parser,
    metrics_parser,
    parse,
    run_parser,
    warmup_parser,
)
from fastsel.commands.catalogue import METHODS
from fastsel.commands.config import resolve
from fastsel.commands.console import Console, table
from fastsel.errors import FastselError, RunFailedError, UsageError

SHORT_OF_BUDGET, TERMINATED, INTERRUPTED = 3, 75, 130
COMMANDS = ("select", "score", "warmup", "metrics", "methods", "doctor", "demo")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
logger = logging.getLogger("fastsel")


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, nothing but the command line catches it."""


def _run(command: str, words: list[str], console: Console, given: dict[str, Any], method: str | None) -> int:
    own = ("dry_run", "from_run", "resume", "overwrite", "config", "set", "print_config", "offline")
    talk = ("progress", "json", "quiet", "verbose")
    flags = {name: value for name, value in given.items() if name not in own + talk}
    if given.get("offline"):
        os.environ |= OFFLINE
    if "from_run" in given:
        from fastsel.commands.run import resolve_again

        config = resolve_again(given["from_run"], method, flags, given.get("set"), given.get("config"))
    else:
        config = resolve(command, method, flags, given.get("set"), given.get("config"))
    if given.get("print_config"):
        print(config.to_yaml(), end="")
        return 0
    from fastsel.commands.run import run

    progress = _progress(given)
    if given.get("dry_run"):
        from fastsel.commands.estimate import estimate

        expected = estimate(config, progress=progress)
        print(json.dumps(expected.as_dict()) if given.get("json") else expected.text())
        return 0
    outcome = run(
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


def _progress(given: dict[str, Any]) -> str:
    mode: str = given.get("progress", "none" if given.get("quiet") else "auto")
    return mode


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


def _warmup(given: dict[str, Any]) -> int:
    from fastsel.commands.warmup import warm_up

    if given.pop("offline", False):
        os.environ |= OFFLINE
    talk = {name: given.pop(name, None) for name in ("progress", "json", "quiet", "verbose")}
    outcome = warm_up(given, progress=_progress({name: value for name, value in talk.items() if value}))
    print(json.dumps(outcome.as_dict()) if talk["json"] else outcome.text())
    return 0


def _metrics(given: dict[str, Any]) -> int:
    if "subset" not in given or given["subset"] is None:
        raise UsageError("which subset? fastsel metrics SUBSET --reference POOL")
    from fastsel.commands.metrics import measure, write

    own = ("subset", "metrics", "output", "progress", "json", "quiet", "verbose")
    names = given["metrics"].split(",") if "metrics" in given else None
    options = {name: value for name, value in given.items() if name not in own}
    measurements = measure(given["subset"], metrics=names, progress=_progress(given), **options)
    if "output" in given:
        write(measurements, given["output"])
    width = max(100, shutil.get_terminal_size().columns)
    print(json.dumps(measurements.as_dict()) if given.get("json") else measurements.as_text(width))
    return 0


def _doctor(given: dict[str, Any]) -> int:
    from fastsel.commands.doctor import examine

    findings = examine(
        device=given.get("device", "auto"),
        check=given.get("check", False),
        slow=given.get("slow", False),
        kernel=given.get("kernel"),
        progress=_progress(given),
    )
    print(json.dumps(findings.as_dict()) if given.get("json") else findings.text())
    return 0 if findings.passed else 1


def _demo(given: dict[str, Any], console: Console) -> int:
    from fastsel.commands.demo import demo

    outcome = demo(
        given.get("output", "fastsel_demo"),
        overwrite=given.get("overwrite", False),
        progress=_progress(given),
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
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:  # the manifest and the configuration could not hold it
            raise UsageError(f"{os.fsencode(word)!r} is not UTF-8: rename that file or folder") from None
    command, rest = words[0], words[1:]
    logger.debug("fastsel %s: %s", __version__, shlex.join(["fastsel", *words]))
    if command in ("select", "score"):
        method = rest.pop(0) if rest and not rest[0].startswith("-") else None
        given = parse(run_parser(command, method), rest)
        return _run(command, words[1:], console, given, method)
    if command == "warmup":
        return _warmup(parse(warmup_parser(), rest))
    if command == "methods":
        return _methods(parse(methods_parser(), rest))
    if command == "metrics":
        return _metrics(parse(metrics_parser(), rest))
    if command == "doctor":
        return _doctor(parse(doctor_parser(), rest))
    if command == "demo":
        return _demo(parse(demo_parser(), rest), console)
    near = get_close_matches(command, COMMANDS, n=1)
    hint = f"; did you mean `fastsel {near[0]}`?" if near else "."
    if command in METHODS:
        hint = f"; did you mean `fastsel select {command}`?"
    raise UsageError(f"there is no command {command!r}{hint} The commands are: {', '.join(COMMANDS)}")


def _stopped(how: str, code: int, words: list[str]) -> int:
    logger.warning("%s", how)
    if words[0] in ("select", "score", "warmup", "demo"):
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
    # Threads that spin while they wait cost more than twice the CPU time and the wall time on a machine with other
    # jobs (docs/measured.md); waking sleeping ones costs microseconds. Read when torch loads its OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Two libraries would draw bars and print notes over ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
