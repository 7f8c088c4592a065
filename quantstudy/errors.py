"""One line for a user's mistake, and the wrapper that prints it.

Every mistake a user can make (a wrong key, a missing file, a full disk) ends as a `UserError`, whose
message names the key or file, the value found and the choices. A stage script ends with
`run_stage(main)`, which prints that line and exits with status 1, without a traceback.
"""

import difflib
import errno
import reprlib
import sys
import textwrap
from collections.abc import Callable, Iterable

LONGEST = 190
"""Characters of a line that shows what a user wrote."""


class UserError(Exception):
    """A mistake of the user's; its text is one line. Several mistakes are an argument and a line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def unknown(key: str, value: object, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not one of `choices`, with the nearest one suggested."""
    names = list(choices)
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) and len(value) < 100 else []
    hint = f" (did you mean {near[0]}?)" if near else ""
    line = f"{key}: {shown(value)} is unknown{hint}; choose one of "
    room = max(40, LONGEST - len(line))
    return UserError(line + textwrap.shorten(", ".join(names) or "(none)", room, placeholder=" …"))


def shown(value: object) -> str:
    """Return what a user wrote as an error shows it: 60 characters of its repr, however large it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 60, 60
    try:
        return cut(short.repr(value), 60)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return "a number of thousands of digits"


def cut(text: str, most: int = LONGEST) -> str:
    """Return a text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def one_line(error: BaseException, line: int = 0) -> str:
    """Return the type and one line, the first, of an exception that is reported, not raised; some have no text."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[line][:200]}"


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; print a `UserError` or what the file system refuses as a line and exit with status 1."""
    try:
        main()
    except UserError as error:
        sys.exit("\n".join(f"error: {' '.join(str(line).split())}" for line in error.args))
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        if not error.filename:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        sys.exit(f"error: the disk is full{where}; free some space and run the stage again")
