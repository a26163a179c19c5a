"""What a method answers for itself, so that no other file asks which method it is.

Of the class and the flags of a run (a Namespace), without a model:

    views(flags)                  keys of what `score` returns, in order
    reads(flags)                  what of the data it sees, a subset of {"frames", "narration", "titles"}
    trained                       False: the trainer only evaluates it
    max_frames                    the most frames it has positions for; None: any number
    score_has_parameters(flags)   True: what `score` computes is trained too, so a batch cannot be encoded in parts
    features_suffice(flags)       False: it reaches deeper into the towers than their features (--feature_cache)
    averages_clip(flags)          True: a released checkpoint is averaged with the weights of --clip_pretrained
    searchable(flags)             True: `narvid.search` can use it; its queries have an `eos` (B, D), it has `vectors`
    frames_alone                  what search tells a user whose index has no narration: what is lost; "" if nothing is
    loss_flags                    names of own flags that a checkpoint does not bring back: those of loss and data
    unread(flags)                 names of flags that this setting does not use: for tables, runs that differ in these
                                  alone are the same
    alike(flags)                  {own flag: value to compare runs by}, where two values mean the same
    describe_filter(flags)        in words, which frames and sentences count for a query; "" where all do
    add_flags(group)              declares its own flags in an argparse group; they stand nowhere else
    from_flags(towers, flags)     the model; ValueError for what cannot be built

Of the model, an nn.Module over `self.clip`:

    forward(batch...)             a training batch -> queries, videos, logit scale
    encode_queries(...)           -> NamedTuple of tensors with B rows; a field with an axis of words is named "word..."
    encode_videos(...)            -> NamedTuple of tensors with V rows
    score(queries, videos, *, block=None)                -> {view: (B, V)} cosines, any B and V
    loss(similarity, scale, exclude)                     -> {name: scalar}, to be summed
    combine(scores, weight, statistics=None)             -> (name, (B, V)) of the result table, the result last
    kept(queries, videos)                                -> {view: (B, V, K)} weights, 0 where dropped; None: no filter
    vectors(videos)                                      {view: (x, mask)} that search compares with a query's eos: a
                                                         vector a video, x (V, D), mask (V,), or one a frame or
                                                         sentence, x (V, K, D), mask (V, K); mask True = there is one
    unfiltered(queries, videos, *, block=None)           `score` with every frame and sentence counting alike: search's
                                                         "more like this", where the frames of a video are the words
    load_release(state, source)                          a released checkpoint; ValueError naming `source`

A video's features may come without a narration (a field that is None); `score` then leaves that view out.

Frames and text pass through encode_frames and encode_text of `self.clip` (narvid.towers.Towers), which take the
feature cache's features too. To add a method: write its file, name its class in METHODS, and
tests/methods/test_guards.py looks at it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from torch import Tensor

from narvid import fusion


def names_of(add_flags: Callable) -> frozenset[str]:
    """The flags that a function like `Method.add_flags` declares."""
    group = argparse.ArgumentParser().add_argument_group()
    add_flags(group)
    return frozenset(action.dest for action in group._group_actions)


class Method:
    """The answers of a method that scores one view, from frames, without a filter; a method states what differs."""

    trained = True
    max_frames: int | None = None
    loss_flags: frozenset[str] = frozenset()
    frames_alone = ""

    @classmethod
    def views(cls, flags) -> tuple[str, ...]:
        """Keys of what `score` returns, in order."""
        return ("video",)

    @classmethod
    def reads(cls, flags) -> set[str]:
        """A subset of {"frames", "narration", "titles"}."""
        return {"frames"}

    @classmethod
    def score_has_parameters(cls, flags) -> bool:
        """Whether what `score` computes is trained."""
        return False

    @classmethod
    def features_suffice(cls, flags) -> bool:
        """Whether the features of frozen towers can stand in for them."""
        return True

    @classmethod
    def averages_clip(cls, flags) -> bool:
        """Whether a released checkpoint is averaged with the weights of --clip_pretrained."""
        return False

    @classmethod
    def searchable(cls, flags) -> bool:
        """Whether `narvid.search` can use it."""
        return False

    @classmethod
    def unread(cls, flags) -> set[str]:
        """Names of own and common flags that this setting does not use."""
        return set() if len(cls.views(flags)) > 1 else {"fusion_weight"}

    @classmethod
    def alike(cls, flags) -> dict[str, object]:
        """{own flag: value to compare runs by}, where two values mean the same."""
        return {}

    @classmethod
    def describe_filter(cls, flags) -> str:
        """The query-aware filter in words."""
        return ""

    @staticmethod
    def add_flags(group) -> None:
        """No flags of its own."""

    @classmethod
    def from_flags(cls, towers, flags) -> Method:
        """The model over `towers`; its own flags are the constructor's keyword arguments."""
        return cls(towers, **{name: getattr(flags, name) for name in names_of(cls.add_flags)})

    def forward(self, tokens: Tensor, word_mask: Tensor, frames: Tensor, mask: Tensor, sentences: Tensor | None = None,
                sentence_of_frame: Tensor | None = None, narration_mask: Tensor | None = None) -> tuple:
        """A training batch -> queries, videos and logit scale; arguments as in `encode_queries`, `encode_videos`."""
        return (self.encode_queries(tokens, word_mask),
                self.encode_videos(frames, mask, sentences, sentence_of_frame, narration_mask),
                self.clip.logit_scale.exp())

    combine = staticmethod(fusion.combine)

    def unfiltered(self, queries, videos, *, block: int | None = None) -> dict[str, Tensor]:
        """`score` with every frame and sentence counting alike; of a method without a filter its score."""
        return self.score(queries, videos, block=block)

    def kept(self, queries, videos) -> dict[str, Tensor] | None:
        """The weights with which each query looks at frames and sentences; None without a filter."""
        return None
