"""Cap4Video once more in numpy, float64 and loops, from the description of the method alone, for test_cap4video.py.

One query, one video, one direction at a time; nothing here imports narvid or torch. Layers come from reference.py.
`state` is a state dict of arrays under our own names.

K frames of a video, T titles of a video, L words of a query, D joint dimension. Masks are bool, True = real.
"""

import numpy as np
import reference
from reference import layer_norm, linear


def item_weights(state, name, items, mask):
    """Linear-ReLU-Linear of each word or frame, softmax over the real ones without a temperature -> as long as mask."""
    logits = linear(np.maximum(linear(items, state, f"{name}.0"), 0), state, f"{name}.2")[:, 0]
    weights = np.zeros(len(mask))
    real = [i for i in range(len(mask)) if mask[i]]
    for i, weight in zip(real, reference.softmax([logits[i] for i in real])):
        weights[i] = weight
    return weights


def word_token_interaction(words, word_mask, word_weights, frames, mask, frame_weights):
    """Each word's best frame, weighted by the word; each frame's best word, weighted by the frame; their mean."""
    real_words = [i for i in range(len(words)) if word_mask[i]]
    real_frames = [k for k in range(len(frames)) if mask[k]]
    if not real_frames:
        return 0.0
    of_words = of_frames = 0.0
    for i in real_words:
        of_words += word_weights[i] * max(reference.cosine(words[i], frames[k]) for k in real_frames)
    for k in real_frames:
        of_frames += frame_weights[k] * max(reference.cosine(words[i], frames[k]) for i in real_words)
    return (of_words + of_frames) / 2


def co_attend(state, frames, titles, title_mask):
    """The frames' half of a two-stream block: frames ask, titles answer; residual and LayerNorm after each part."""
    name = "co_attention"
    allowed = np.array([[bool(t) for t in title_mask]] * len(frames))
    answer = reference.attention(
        linear(frames, state, f"{name}.query"),
        linear(titles, state, f"{name}.key"),
        linear(titles, state, f"{name}.value"),
        frames.shape[1] // 64,
        allowed,
    )
    x = layer_norm(frames + linear(answer, state, f"{name}.out"), state, f"{name}.norm_attention", 1e-5)
    hidden = reference.gelu(linear(x, state, f"{name}.feed_forward.0"))
    hidden = linear(hidden, state, f"{name}.feed_forward.2")
    return layer_norm(x + hidden, state, f"{name}.norm_feed_forward", 1e-5)


def enhance(state, frames, titles, mask, title_mask):
    """What the words are compared with: co-attention, positions and blocks over the real frames, plus its input."""
    x = co_attend(state, frames, titles, title_mask)
    h = x + state["temporal.positions"][: len(x)]
    allowed = np.array([[bool(m) for m in mask]] * len(x))
    for i in range(reference.depth(state, "temporal.blocks")):
        h = reference.transformer_block(h, state, f"temporal.blocks.{i}", x.shape[1] // 64, allowed, 1e-12)
    return x + h


def pool_titles(state, titles, title_mask):
    """Titles (T, D) plus their positions through post-LN ReLU layers, nothing added around; mean over the real ones."""
    real = [t for t in range(len(titles)) if title_mask[t]]
    if not real:
        return np.zeros(titles.shape[1])
    x = np.array([titles[t] + state["titles.positions"][t] for t in real])
    everything = np.ones((len(x), len(x)), dtype=bool)
    for i in range(reference.depth(state, "titles.layers")):
        name = f"titles.layers.{i}"
        packed = x @ state[f"{name}.self_attn.in_proj_weight"].T + state[f"{name}.self_attn.in_proj_bias"]
        heads = x.shape[1] // 64
        answer = reference.attention(*np.split(packed, 3, axis=1), heads, everything)
        x = layer_norm(x + linear(answer, state, f"{name}.self_attn.out_proj"), state, f"{name}.norm1", 1e-5)
        hidden = np.maximum(linear(x, state, f"{name}.linear1"), 0)
        x = layer_norm(x + linear(hidden, state, f"{name}.linear2"), state, f"{name}.norm2", 1e-5)
    return sum(x) / len(x)


def title_score(eos, pooled):
    """Cosine; a video without one title scores 0."""
    return reference.cosine(eos, pooled) if np.any(pooled) else 0.0


def fuse(s_video, s_titles, title_weight):
    """The raw cosines of both branches, added with weights that sum to 1."""
    fused = np.zeros(s_video.shape)
    for i in range(len(fused)):
        for j in range(len(fused[i])):
            fused[i][j] = (1 - title_weight) * s_video[i][j] + title_weight * s_titles[i][j]
    return fused
