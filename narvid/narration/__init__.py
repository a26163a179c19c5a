"""Making and judging the sentences of frames: `python -m narvid.narration narrate | check | convert`."""
