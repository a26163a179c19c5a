"""python -m narvid.narration COMMAND: narrate a folder of frames, check a narration file, convert a published one;
requests and answers: the same as `narrate` through the batch files of an engine; import: what is said in videos; judge:
how well sentences fit their frames."""

import sys

from narvid import InputError
from narvid.flags import command
from narvid.narration import batch_answers, batches, check, convert, judge, narrate, speech

COMMANDS = {"narrate": narrate.main, "requests": batches.requests, "answers": batch_answers.answers,
            "check": check.main, "convert": convert.main, "import": speech.main,
            "judge": judge.main}


def main(argv: list[str] | None = None) -> None:
    """The first word says which command; the rest are its flags."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip() + "\n\n" + "\n".join(f"  python -m narvid.narration {each} --help" for each in COMMANDS))
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name}; say one of {', '.join(COMMANDS)}")
    try:
        COMMANDS[name](rest)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command(main)
