"""From flags, `--set`, YAML and defaults to one resolved configuration: the first that names an option wins."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastsel.commands.catalogue import METHODS, WARMUP, Method, find_method
from fastsel.commands.options import ENGINE, GROUPS, MACHINE, MODEL, OPTIONS, OUTPUT, POOL, read_value
from fastsel.errors import InputError, UsageError
from fastsel.unused_options import unused, unused_options

# axolotl's words for the columns and tags, accepted beside the options in YAML.
_AXOLOTL_COLUMNS = ("field", "field_messages", "field_instruction", "field_input", "field_output", "field_system")
_AXOLOTL_TAGS = (
    "message_property_mappings", "message_field_role", "message_field_content", "message_field_training", "roles",
    "roles_to_train",
)  # fmt: skip
_CHOOSING = ("budget", "per", "order", "also", "annotate")


@dataclass(frozen=True)
class Config:
    """What a run was asked to do, completely.

    Attributes:
        command: "select" or "score".
        method: the row of the catalogue.
        values: every option that applies, in the order of fastsel.commands.options; None where nothing is set.
        given: the options that somebody named, with where: "flags", "--set" or the YAML file.
    """

    command: str
    method: Method
    values: dict[str, Any]
    given: dict[str, str]

    def to_yaml(self) -> str:
        """The resolved configuration; `fastsel COMMAND --config` reads it back to the same one."""
        import yaml

        lines = [f"# fastsel {self.command}: flags > --set > this file > defaults", f"method: {self.method.name}"]
        for group, heading in GROUPS.items():
            section = {name: value for name, value in self.values.items() if OPTIONS[name].group == group}
            if section:
                lines += ["", f"# {heading}"]
                lines.append(yaml.safe_dump(section, sort_keys=False, allow_unicode=True, width=1000).rstrip())
        return "\n".join(lines) + "\n"

    def pool_options(self) -> dict[str, Any]:
        """Keyword arguments of open_pool, without the paths."""
        return {n: v for n, v in self.values.items() if OPTIONS[n].group == POOL and n != "pool" and v is not None}

    def method_options(self) -> dict[str, Any]:
        """Keyword arguments of the method's function, without budget."""
        return {name: self.values[name] for name in self.method.defaults if name in self.values}

    def shaping(self) -> dict[str, Any]:
        """The options that decide what the result is, for comparing two requests."""
        shaping = {name: value for name, value in self.values.items() if OPTIONS[name].shapes_result}
        return {"command": self.command, "method": self.method.name, **shaping}


def options_of(command: str, method: Method) -> dict[str, Any]:
    """The options that apply to a command and a method, with their defaults."""
    defaults: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if option.group in (POOL, OUTPUT) or name == "budget":
            defaults[name] = option.default
        elif name in method.defaults:
            defaults[name] = method.defaults[name]
        elif name in ENGINE and method.runs_shards:
            defaults[name] = option.default
    if method.ready_scores == "none":
        del defaults["score_column"]
    if command == "score":
        for name in _CHOOSING:
            defaults.pop(name, None)
    return defaults


def warmup_options() -> dict[str, Any]:
    """The options of `fastsel warmup`, with their defaults."""
    of_pool = {name: option.default for name, option in OPTIONS.items() if option.group == POOL}
    del of_pool["score_column"]
    return of_pool | {"seed": OPTIONS["seed"].default} | WARMUP


def resolve(
    command: str,
    method: str | None,
    flags: Mapping[str, Any],
    sets: list[str] | None = None,
    config_path: str | None = None,
    *,
    only_known: bool = False,
) -> Config:
    """Merge the four sources.

    Args:
        command: "select" or "score".
        method: its name, or None when the YAML file names it.
        flags: option -> raw value, only those that were given.
        sets: "option=value" or "option.key=value" words, values in YAML's notation.
        config_path: the YAML file.
        only_known: pass over what the file says that does not apply, as the record of another command has it.

    Raises:
        UsageError: an unknown method or option, a value that does not fit, or an option that the method does not take.
        InputError: the file cannot be read.
    """
    raw: dict[str, Any] = {}
    given: dict[str, str] = {}
    if config_path is not None:
        loaded = _read_yaml(config_path)
        in_file = loaded.pop("method", None)
        if method is not None and in_file not in (None, method):
            raise UsageError(f"the command says {method}, {config_path} says {in_file}: name one of them")
        method = method or in_file
        raw, given = loaded, dict.fromkeys(loaded, config_path)
    for word in sets or []:
        name = _set(raw, word)
        given[name] = "--set"
    for name, value in flags.items():
        raw[name] = value
        given[name] = "flags"
    if method is None:
        names = ", ".join(METHODS)
        raise UsageError(f"which method? fastsel {command} METHOD --pool ...; METHOD is one of: {names}")
    row = find_method(method)
    values = options_of(command, row)
    if only_known:
        raw = {name: value for name, value in raw.items() if name in values or given[name] != config_path}
    for name in raw:
        if name not in values:
            raise UsageError(_does_not_apply(name, given[name], command, row))
    if row.ready_scores == "instead" and raw.get("score_column") is not None:
        _refuse_with_ready_scores(row, given)
    values |= {name: read_value(name, value, given[name]) for name, value in raw.items()}
    if row.ready_scores == "instead" and values.get("score_column") is not None:
        values = {name: value for name, value in values.items() if OPTIONS[name].group not in (MODEL, MACHINE)}
    return Config(command, row, _without_unused(values, given, options_of(command, row)), given)


def _without_unused(values: Mapping[str, Any], given: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values less those that do nothing.

    Raises:
        UsageError: somebody named one of these. A file may, with its default, as printed configurations do.
    """
    idle = unused_options(values)
    for name, why in idle.items():
        if given.get(name) in ("flags", "--set") or (name in given and values[name] != defaults[name]):
            raise UsageError(unused(name, why))
    return {name: value for name, value in values.items() if name not in idle}


def _refuse_with_ready_scores(method: Method, given: Mapping[str, str]) -> None:
    for name in given:
        if OPTIONS[name].group in (MODEL, MACHINE):
            raise UsageError(
                f"{OPTIONS[name].flag} does nothing with --score-column: the scores are ready and no model runs; "
                f"leave one of them out"
            )


def _does_not_apply(name: str, origin: str, command: str, method: Method) -> str:
    where = "" if origin == "flags" else f" (from {origin})"
    if name not in OPTIONS:
        near = get_close_matches(name, OPTIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else "--print-config lists those that there are"
        return f"there is no option {name!r}{where}; {hint}"
    if command == "score" and name in _CHOOSING:
        return f"{OPTIONS[name].flag}{where} is about choosing, and `fastsel score` only scores; use `fastsel select`"
    takers = [other.name for other in METHODS.values() if name in options_of(command, other)]
    return f"{OPTIONS[name].flag} does not apply to {method.name}{where}; it does to: {', '.join(takers)}"


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"--config {path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(loaded, dict):
        raise InputError(f"--config {path}: wants `option: value` lines; `--print-config` prints an example")
    return _from_axolotl({str(name).replace("-", "_"): value for name, value in loaded.items()})


def _from_axolotl(loaded: dict[str, Any]) -> dict[str, Any]:
    for option, words in (("columns", _AXOLOTL_COLUMNS), ("tags", _AXOLOTL_TAGS)):
        theirs = {word: loaded.pop(word) for word in words if word in loaded}
        if theirs:
            loaded[option] = {**theirs, **(loaded.get(option) or {})}
    return loaded


def _set(raw: dict[str, Any], word: str) -> str:
    import yaml

    path, equals, text = word.partition("=")
    name, _, key = path.replace("-", "_").partition(".")
    if not equals or not name:
        raise UsageError(f"--set wants option=value, as in --set budget=5%; got {word!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text  # a value such as a:b{ is a text, whatever YAML makes of it
    if key:
        mapping = raw.get(name)
        raw[name] = {**mapping, key: value} if isinstance(mapping, dict) else {key: value}
    else:
        raw[name] = value
    return name
