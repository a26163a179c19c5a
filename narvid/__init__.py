"""NarVid: text-video retrieval with frame-level captions (Hur et al., CVPR 2025)."""

from importlib import import_module

__version__ = "0.1.0"

LONGEST = 1000  # letters of a sentence


class InputError(ValueError):
    """A user's mistake in a file, a flag or the data: one sentence that names it, shown without a traceback."""

    def __init__(self, message: str):
        # A loader's worker process hands its error on inside a printed traceback; the sentence is what stands last.
        super().__init__(one_line(str(message).rpartition("narvid.InputError: ")[2].strip()))


def one_line(sentence: str) -> str:
    """With line breaks spelt out and, where it quotes something huge, without its middle: files hold anything."""
    sentence = sentence.replace("\r", "\\r").replace("\n", "\\n")
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST - 200]} ... {sentence[-190:]}"


def __getattr__(name: str):
    """`narvid.Retriever`, whose file is read when it is asked for: torch takes a second, and workers do without it."""
    if name == "Retriever":
        return import_module("narvid.retriever").Retriever
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
