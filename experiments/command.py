"""How the commands here start: absl's flags, and one line for what the user can mend."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from gpart_jax.commands import clear_errors


def run_command(main: Callable) -> None:
    """`app.run(main)`; see `gpart_jax.commands.clear_errors`."""
    with clear_errors():
        app.run(main, flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:  # of a config file with the whole traceback, whose last line says what is wrong
        lines = str(error).strip().splitlines()
        sys.exit(f"error: {' '.join([lines[0], *lines[1:][-1:]])}\nPass --helpshort or --helpfull to see help on flags.")
    except AttributeError as error:
        key = str(error).strip("\"'")
        sys.exit(f"error: the config has no key {key!r}, which a flag sets. Correct that --config.... flag.")
    except SyntaxError as error:
        sys.exit(f"error: {error.filename}, line {error.lineno}: {error.msg}. Is this a config file? See configs/.")
