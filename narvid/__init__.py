"""NarVid: text-video retrieval with frame-level captions (Hur et al., CVPR 2025)."""

__version__ = "0.1.0"


class InputError(ValueError):
    """A user's mistake in a file, a flag or the data: one sentence that names it, shown without a traceback."""

    def __init__(self, message: str):
        # A loader's worker process hands its error on inside a printed traceback; the sentence is what stands last.
        super().__init__(str(message).rpartition("narvid.InputError: ")[2].strip())
