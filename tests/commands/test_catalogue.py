"""The literal table of methods says what the functions say."""

import inspect

import pytest

from fastsel.commands.catalogue import METHODS, find_method
from fastsel.commands.config import options_of
from fastsel.commands.options import OPTIONS
from fastsel.errors import UsageError

# What the command line hands over by itself: not an option of the user's.
HANDED_OVER = {"budget", "store", "executor", "progress"}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_function(name):
    function = METHODS[name].load()
    assert function.__name__ == name
    keywords = {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert keywords.pop("budget") == 0.1, "options.py prints 10 % as the default budget"
    own = {name: default for name, default in keywords.items() if name not in HANDED_OVER}
    assert METHODS[name].defaults == own


@pytest.mark.parametrize("name", METHODS)
def test_every_default_has_an_option_that_accepts_it(name):
    for option, default in METHODS[name].defaults.items():
        assert option in OPTIONS
        if default is not None:
            assert OPTIONS[option].read(default) == default


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_the_table_is_complete(name):
    row = METHODS[name]
    for attribute in ("title", "venue", "task_type", "representation", "diversity", "quality", "status"):
        assert getattr(row, attribute).strip()
    assert "budget" in options_of("select", row)
    assert "budget" not in options_of("score", row)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UsageError, match="there is no method 'superfilter'; did you mean superfiltering"):
        find_method("superfilter")
