"""How commands end: with one line where it is the user's to mend, with a traceback where it is ours."""

import contextlib
import dis
import errno
import re
import sys
from collections.abc import Iterator

OURS = ("gpart_jax", "experiments", "launch", "benchmarks", "configs")
ADVICE = {  # what to do about an error of the system
    errno.ENOENT: "Check the path.",
    errno.EACCES: "Choose a place that you may read and write.",
    errno.EPERM: "Choose a place that you may read and write.",
    errno.EROFS: "Choose a place that you may read and write.",
    errno.EEXIST: "Move it away, or choose another path.",
    errno.EISDIR: "A folder lies where a file should: move it away, or choose another path.",
    errno.ENOTDIR: "A file lies where a folder should: move it away, or choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ELOOP: "Its links lead back to one another: give the file itself.",
    errno.ENOSPC: "Make room, or choose another disk.",
    errno.EDQUOT: "Make room, or choose another disk.",
}


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Within it, what `explain` can say of an error is all that is printed, and the process ends with 1."""
    try:
        yield
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        sys.exit(f"error: {line}")


def explain(error: Exception) -> str | None:
    """What to tell the user of an error; None: nothing, for it is a fault of ours, whose traceback is needed.

    The user's are those of the system, a package that is missing, and what our code raises in so many words: a ValueError that
    comes out of someone else's code, or of an operation instead of a `raise`, is a fault.
    """
    if isinstance(error, OSError):
        said = error.strerror or str(error) or type(error).__name__
        if error.filename is None:
            return said
        return f"{said}: {error.filename}. {ADVICE.get(error.errno or 0, 'Check the path and the disk.')}"
    if isinstance(error, ImportError):
        return None if (error.name or "").startswith(OURS) else str(error)
    if isinstance(error, re.error) and error.pattern is not None:
        return f"The pattern {error.pattern!r} is no regular expression: {error.msg}."
    return str(error) if isinstance(error, ValueError | FloatingPointError) and _raised_by_us(error) else None


def _raised_by_us(error: Exception) -> bool:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    code, names = trace.tb_frame.f_code, trace.tb_frame.f_globals
    module = getattr(names.get("__spec__"), "name", None) or names.get("__name__", "")  # of a command __name__ is __main__
    return module.split(".")[0] in OURS and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
