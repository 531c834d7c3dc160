"""The parser of every command, and how a command ends. Imports nothing of the package.

    @command
    def main(argv: list[str] | None = None) -> None:
        parser = Parser(prog="miniflux canny", description="Find the edges of an image.")
        args = parser.parse_args(argv)
        ...
        say(args.output)

A mistake of the user ends in one line and exit code 2, Ctrl-C in one line and exit code 130. A
reader that has gone away (`... | head -1`) ends the output silently, and nothing depends on the
encoding of the console.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, NoReturn

# What other programs call our flags.
HABITS = {
    "-o": "--output",
    "-m": "--model",
    "-s": "--seed",
    "-n": "--num-images",
    "-q": "--quantize",
    "--num-inference-steps": "--steps",
    "--guidance-scale": "--guidance",
    "--batch-size": "--num-images",
    "--image-path": "--image",
    "--image-strength": "--strength",
    "--lora-paths": "--lora",
    "--cfg": "--guidance",
}


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line and exit code 2."""

    def __init__(self, *args: Any, **keywords: Any):
        # Note: with abbreviations, --image would be taken for --image-encoder without a word.
        super().__init__(*args, **{"allow_abbrev": False} | keywords)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.describe(unknown))
        return found

    def describe(self, unknown: list[str]) -> str:
        """What is wrong with arguments that belong nowhere, and what was probably meant."""
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if flag is None:
            return (f"unexpected arguments: {' '.join(unknown)}; text of several words needs "
                    "quotes, and several prompts need several calls")
        mine = [option for action in self._actions for option in action.option_strings]
        meant = HABITS.get(flag, flag.replace("_", "-"))
        close = [meant] if meant in mine else get_close_matches(meant, mine, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the flags"
        return f"there is no flag {flag}: {hint}"

    def error(self, message: str) -> NoReturn:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):              # nobody reads: no mistake of the user
            raise error
        self.exit(2, f"{self.prog}: {' '.join(in_flags(self, str(message)).split())}\n")


def in_flags(p: argparse.ArgumentParser, message: str) -> str:
    """The error of a function with flags in place of keywords: `steps is 0` -> `--steps is 0`."""
    for action in p._actions:
        if not action.option_strings:
            continue
        name, flag = action.dest, action.option_strings[-1]
        # At the beginning, and as in "choose with transformer=x".
        message = re.sub(rf"^{name} (?=is |are |has )", f"{flag} ", message)
        message = re.sub(rf"(?<![\w./-]){name}=", f"{flag} ", message)
        if "_" in name:                                     # no English word, so it is the keyword
            message = re.sub(rf"(?<![\w./-]){name}(?![\w./-])", flag, message)
    return message


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates the main function of a command; see above."""
    @wraps(main)
    def run(*args: Any, **keywords: Any) -> None:
        if signal.getsignal(signal.SIGINT) is stop_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (sys.stdout, sys.stderr):
            accept_all_characters(stream)
        try:
            main(*args, **keywords)
            flush(sys.stdout)
        except KeyboardInterrupt as interrupt:
            tell(str(interrupt) or "stopped")
            raise SystemExit(130) from None
        except BrokenPipeError:
            discard(sys.stdout)
            raise SystemExit(141) from None                 # as the shell has it for SIGPIPE
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            tell(f"out of memory: {str(error).strip().partition(chr(10))[0]:.200}")
            raise SystemExit(2) from None

    return run


def expect_interrupt() -> None:
    """Until `command` takes over, Ctrl-C ends the program at once, in one line."""
    try:
        signal.signal(signal.SIGINT, stop_at_once)
    except ValueError:                                      # not in the main thread
        pass


def stop_at_once(*_: Any) -> NoReturn:
    """The answer to Ctrl-C while a command still imports PyTorch, which takes seconds.

    There is nothing to tidy up yet."""
    tell("stopped")
    os._exit(130)


def say(text: object) -> None:
    """Print a result on stdout; silently not, where nobody reads it."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        print(ascii(str(text))[1:-1], flush=True)
    except (BrokenPipeError, ValueError):                   # ValueError: closed
        discard(sys.stdout)


def tell(text: str) -> None:
    """Print a remark on stderr, if there is one."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass


def accept_all_characters(stream: Any) -> None:
    """What the console cannot show is written as an escape such as \\u72d0, not an error."""
    try:
        stream.reconfigure(errors="backslashreplace")
    except (AttributeError, ValueError, OSError):           # none, closed, or of another kind
        pass


def flush(stream: Any) -> None:
    try:
        stream.flush()
    except (AttributeError, ValueError):
        pass


def discard(stream: Any) -> None:
    """Send the rest of the output nowhere.

    Note: Python would write what is still in the buffer when it ends, and complain."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (AttributeError, ValueError, OSError):
        pass


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory or the computer's was too small.

    Note: PyTorch has a class for the first, and only a text for the second."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    texts = ("DefaultCPUAllocator", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
