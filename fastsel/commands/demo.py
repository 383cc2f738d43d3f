"""The first thing to try: a tenth of a bundled pool, chosen by IFD with a real language model, offline."""

import logging
from collections.abc import Callable
from pathlib import Path

from fastsel.commands.config import resolve
from fastsel.commands.run import Outcome, run

logger = logging.getLogger("fastsel")


def demo(
    output: str = "fastsel_demo",
    *,
    overwrite: bool = False,
    progress: str = "auto",
    on_folder: Callable[[Path], None] = lambda folder: None,
) -> Outcome:
    """Choose 10 % of the 256 bundled rows by IFD with the bundled model; nothing comes from the network.

    Args:
        output: the folder to write; a finished demo in it is left as it is.
        overwrite: do it anew.
        progress: see fastsel.progress.
        on_folder: called with the folder as soon as it may be written to.

    Raises:
        MissingExtraError: a package of the extra `demo` is missing.
    """
    from fastsel.io import bundled_pool_path

    config = resolve("select", "ifd", {"pool": [str(bundled_pool_path())], "budget": "10%", "output": output})
    return run(config, overwrite=overwrite, progress=progress, argv=["fastsel", "demo"], on_folder=on_folder)
