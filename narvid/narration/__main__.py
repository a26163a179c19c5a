"""python -m narvid.narration COMMAND: make, import, check and judge the sentences of a folder of frames.

  narrate     write a sentence for each frame, with a model on this machine or a server
  requests    the same through batch files: write the requests,
  answers     and read what the engine answered
  import      take what is said in the videos: subtitles, transcripts, or speech that is transcribed here
  convert     a published narration file -> one in our form
  check       compare a narration file with the frames: what is missing, misaligned, cut, copied
  judge       measure how well sentences fit their frames
"""

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
