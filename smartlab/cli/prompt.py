"""What the prompt says when something is wrong: one line, an exit code, and how to write it instead."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from typer.core import TyperCommand, TyperGroup

from smartlab.core.errors import SmartlabError, UseError


class Program(TyperGroup):
    """Tells a pipe that broke inside the program from one whose reader has read enough: the latter is no error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if _nobody_reads():
                raise
            raise RuntimeError(f"{error}").with_traceback(error.__traceback__) from None


class WithSettings(TyperCommand):
    """Tells who writes a setting as an option how it is written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # click's, or that of the click which newer typers contain
            if type(error).__name__ != "NoSuchOption":
                raise
            name = error.option_name.lstrip("-").replace("-", "_")  # type: ignore[attr-defined]
            full = next((key for key in _known(ctx.info_name) if name in (key, key.rpartition(".")[2])), None)
            if full is None:
                raise
            raise UseError(f"no option --{name}", fix=f"settings have no dashes: {full}=…") from None


def _known(command: str) -> Iterable[str]:
    """The settings that a command takes."""
    if command == "pretrain":
        from smartlab.core.config import known_keys

        return known_keys()
    from smartlab.evaluation.evaluate import known_settings

    return known_settings()


def answer(program: Callable[..., Any]) -> None:
    """Run the program; errors become one line on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 must not stop the work
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        program(standalone_mode=True)
    except SmartlabError as error:
        _end(error, str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `smartlab … | head` has read enough
        sys.exit(1)
    except OSError as error:  # a folder that cannot be written, a disk that is gone
        place = f"{error.filename or 'the system'}: {error.strerror or error}. "
        _end(error, place + "Check that the folder exists, may be written and has space.")
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns the one into the other
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        print("smartlab: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _end(error, _unforeseen(error))


TRACEBACK = "SMARTLAB_TRACEBACK"  # set it to see where an error came from


def _end(error: Exception, text: str, code: int = 1) -> NoReturn:
    if os.environ.get(TRACEBACK):
        raise error
    print(f"smartlab: {text}", file=sys.stderr)
    if isinstance(error, UseError):
        print("Try `smartlab --help`.", file=sys.stderr)
    sys.exit(code)


def _unforeseen(error: Exception) -> str:
    """An error that nobody foresaw, in one line: what, and the last place in smartlab that it passed."""
    import traceback

    home = Path(__file__).parents[1]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(home)]
    place = f"{Path(frames[-1].filename).relative_to(home)}:{frames[-1].lineno}" if frames else "the start"
    what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return f"{what} (at {place}). This is a fault of smartlab: please report it with what {TRACEBACK}=1 shows"


def _nobody_reads() -> bool:
    """Whether the other end of standard output is closed."""
    output = select.poll()
    try:
        output.register(sys.stdout.fileno(), 0)
    except OSError:  # it is no file
        return False
    return any(event & select.POLLERR for _, event in output.poll(0))
