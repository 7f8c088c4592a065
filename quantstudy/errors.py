"""One line for a user's mistake, and the wrapper that prints it.

Every mistake that a user can make, such as a wrong key or a missing file, is a `UserError`. Its message names the key
or the file, the value found and the choices. A stage script ends with `run_stage(main)`, which prints that line and
exits with status 1; a full disk gets one line too. No traceback reaches the terminal. `run_stage` writes the traceback
of any other error to a log file, and the line names that file.
"""

import difflib
import errno
import io
import reprlib
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

LOGS = Path(".cache") / "logs"
MOST_TEXT = 4000
"""The most characters of an error line."""

LONGEST = 190
"""The most characters of an error line that quotes what the user wrote."""


class UserError(Exception):
    """A mistake of the user. Each argument is one mistake, written as one line."""

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
    """Return what a user wrote, in the form that errors show: its repr, cut to 60 characters."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 60, 60
    try:
        return cut(short.repr(value), 60)
    except ValueError:  # Python refuses to print a number of more than 4300 digits
        return "a number of thousands of digits"


def cut(text: str, most: int = LONGEST) -> str:
    """Return a text as one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def one_line(error: BaseException, line: int = 0) -> str:
    """Return an exception's type and one line of its text, by default the first; `-` if it has no text."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[line][:200]}"


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; any error prints one line and exits with status 1, a signal with the shell's status for it.

    SIGTERM raises `SystemExit`, so temporary files are deleted and the stage's own processes end.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal shows other characters as escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        _fail(*map(str, error.args))
    except OSError as error:
        if _disk_is_full(error):
            where = f" while writing {error.filename}" if error.filename else ""
            _fail(f"the disk is full{where}; free some space and run the stage again")
        if error.filename and error.strerror:
            _fail(f"{error.filename!s:.200}: {error.strerror}")
        _fail(one_line(error) + _written_down(error))
    except Exception as error:
        _fail(one_line(error) + _written_down(error))


def _fail(*mistakes: str) -> NoReturn:
    lines = ("".join(character if character.isprintable() else " " for character in text) for text in mistakes)
    sys.exit("\n".join(f"error: {cut(line, MOST_TEXT)}" for line in lines))


def _disk_is_full(error: OSError) -> bool:
    """Whether an error means a full disk; NumPy gives no errno, only the number of items that it has written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or (error.errno is None and "requested and" in str(error))


def _written_down(error: Exception) -> str:
    """Write the traceback to a log file; return words that name the file, or none if it cannot be written."""
    script = Path(sys.argv[0])
    path = LOGS / f"{script.parent.name if script.stem == '__main__' else script.stem}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""
    return f"; the traceback is in {path}"
