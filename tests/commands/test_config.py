"""flags > --set > YAML > defaults, and what is said about an option that does not fit."""

import pytest
import yaml

from fastsel.commands.config import resolve
from fastsel.commands.options import OPTIONS, read_value
from fastsel.errors import InputError, UsageError


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_the_first_source_that_names_an_option_wins(tmp_path):
    path = write(tmp_path, "method: ifd\npool: a.jsonl\nbudget: 5%\nseed: 1\ntemplate: none\n")
    config = resolve("select", "ifd", {"budget": "7%"}, ["seed=2", "budget=6%"], path)
    assert (config.values["budget"], config.values["seed"], config.values["template"]) == ("7%", 2, "none")
    assert config.values["overflow"] == "truncate"
    assert config.given == {
        "pool": path, "budget": "flags", "seed": "--set", "template": path,
    }  # fmt: skip


def test_the_method_may_stand_in_the_file(tmp_path):
    assert resolve("select", None, {}, None, write(tmp_path, "method: length\n")).method.name == "length"
    with pytest.raises(UsageError, match="the command says ifd, .* says length"):
        resolve("select", "ifd", {}, None, write(tmp_path, "method: length\n"))
    with pytest.raises(UsageError, match="which method"):
        resolve("select", None, {})


@pytest.mark.parametrize("method", ["ifd", "random", "scores"])
def test_the_printed_configuration_reads_back_to_itself(method, tmp_path):
    config = resolve(
        "select",
        method,
        {"pool": ["a.jsonl", "b.jsonl"], "columns": ["messages=dialogs"], "also": ["oda", "less"], "per": "source"},
        ["tags.role_tag=who"],
    )
    again = resolve("select", None, {}, None, write(tmp_path, config.to_yaml()))
    assert again.values == config.values
    assert again.to_yaml() == config.to_yaml()
    assert yaml.safe_load(config.to_yaml())["tags"] == {"role_tag": "who"}


def test_set_reaches_into_a_mapping_without_dropping_the_rest(tmp_path):
    path = write(tmp_path, "columns: {prompt: question, response: answer}\n")
    config = resolve("select", "random", {}, ["columns.response=reply", "max-error-rate=0.5"], path)
    assert config.values["columns"] == {"prompt": "question", "response": "reply"}
    assert config.values["max_error_rate"] == 0.5


@pytest.mark.parametrize(
    ("first", "second"), [("10%", "0.1"), ("1.0", "100%"), ("2Mtok", "2000ktok"), ("5.5%", "0.055")]
)
def test_equal_budgets_are_the_same_request(first, second):
    written = [resolve("select", "random", {"budget": text}).shaping() for text in (first, second)]
    assert written[0] == written[1]


def test_one_row_is_not_all_rows():
    assert read_value("budget", 1, "flags") == "1"
    assert read_value("budget", 1.0, "flags") == "100%"
    assert read_value("budget", "100%", "flags") == "100%"


def test_axolotls_words_are_read_as_columns_and_tags(tmp_path):
    text = (
        "field_messages: chat\nmessage_property_mappings: {role: from, content: value}\nroles_to_train: [assistant]\n"
    )
    config = resolve("select", "random", {}, None, write(tmp_path, text))
    assert config.values["columns"] == {"field_messages": "chat"}
    assert config.values["tags"] == {
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles_to_train": ["assistant"],
    }


@pytest.mark.parametrize(
    ("flags", "sets", "message"),
    [
        ({"template": "none"}, [], "--template does not apply to random; it does to: ifd, superfiltering, perplexity"),
        ({}, ["bugdet=5%"], r"there is no option 'bugdet' \(from --set\); did you mean budget\?"),
        ({}, ["zzz=1"], "--print-config lists those"),
        ({}, ["budget"], "--set wants option=value"),
        ({"budget": "lots"}, [], "budget 'lots' cannot be read"),
        ({"budget": "150%"}, [], "is not a share between 0 and 1"),
        ({"per": "colour"}, [], "per 'colour' cannot be read"),
        ({"limit": "0"}, [], "--limit wants a whole number, 1 or more; got '0'"),
        ({}, ["limit=2.5"], r"--limit wants a whole number, 1 or more; got 2.5 \(from --set\)"),
        ({"max_error_rate": "2"}, [], "--max-error-rate wants a share from 0 to 1"),
        ({"columns": ["messages"]}, [], "--columns wants KEY=COLUMN pairs"),
        ({"also": ["oda", "excel"]}, [], "--also takes any of: oda, dataflex, instructlab, less; got 'oda excel'"),
        ({"order": "random"}, [], "--order is one of: pool, rank"),
        ({"format": "alpaka"}, [], "--format alpaka is not known"),
        ({}, ["report=maybe"], "--report is true or false"),
    ],
)
def test_refuses_what_does_not_fit_and_says_what_would(flags, sets, message):
    with pytest.raises(UsageError, match=message):
        resolve("select", "random", flags, sets)


def test_ready_scores_need_no_model_and_refuse_its_options():
    config = resolve("select", "ifd", {"score_column": "raw.IFD"})
    assert not {"model", "template", "device"} & set(config.values)
    with pytest.raises(UsageError, match="--model does nothing with --score-column"):
        resolve("select", "ifd", {"score_column": "raw.IFD", "model": "x"})
    with pytest.raises(UsageError, match="--score-column does not apply to length"):
        resolve("select", "length", {"score_column": "raw.IFD"})


def test_score_has_no_options_of_choosing():
    with pytest.raises(UsageError, match="--budget is about choosing, and `fastsel score` only scores"):
        resolve("score", "ifd", {"budget": "5%"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "line 1: not YAML"), ("- ifd\n", "wants `option: value` lines"), (None, "No such file")],
)
def test_refuses_a_file_that_is_no_configuration(text, message, tmp_path):
    path = str(tmp_path / "missing.yaml") if text is None else write(tmp_path, text)
    with pytest.raises(InputError, match=message):
        resolve("select", "random", {}, None, path)


def test_every_option_is_one_line_of_help():
    for option in OPTIONS.values():
        assert 10 < len(option.help) < 115 and not option.help.endswith(".")
