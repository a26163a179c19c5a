"""What NarVid is compared with, one file a method: same towers, data, trainer (--method NAME) and evaluation.

A method is an nn.Module over the towers `self.clip`, without a base class. What the trainer and evaluation ask of it:

    views, uses                                    keys of `score`; None, "narration" or "titles": the text it reads
    add_flags(group)                               its own flags, which are the constructor's keyword arguments
    __init__(towers, clip_config, **flags)
    forward(...) -> queries, videos, scale         a training batch; arguments as narvid.model.NarVid.forward
    encode_queries(tokens, word_mask)              NamedTuple of B rows; fields along words start with "word"
    encode_videos(frames, mask, sentences, ...)    NamedTuple of V rows
    score(queries, videos, *, block=None)          {view: (B, V)} cosines, any B and V
    loss(similarity, scale, exclude)               {name: scalar}, to be summed
    combine(scores, weight, statistics=None)       optional: (name, (B, V)) of the result table, the result last
    load_release(state, source)                    optional: a released checkpoint

Frames and text pass through clip.encode_frames and clip.encode_text of `self.clip`, which take the feature cache's
features too; where a method reaches deeper into the towers, the trainer's refuse_feature_cache must say so.

To add one: write the file and name it in METHODS; tests/methods/test_guards.py will look at it.
"""
