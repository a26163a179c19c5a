"""CLIP4Clip and the zero-shot baseline once more in numpy, float64 and loops, one query and one video at a time.

Written before the torch code, from a description of the method; imports neither narvid nor torch. `state` holds the
keys
of CLIP4Clip's own checkpoints. K frames of a video, D joint dimension; masks True = real.
"""

import numpy as np
from reference import cosine, depth, layer_norm, linear, quick_gelu, temporal, transformer_block


def unit(x):
    """x of length 1."""
    return x / np.linalg.norm(x)


def mean_pool(frames, mask, *, normalize=True):
    """The mean of the real frames (K, D), each of length 1 unless `normalize` is off (MMAction2) -> (D,)."""
    real = [unit(frame) if normalize else frame for frame, is_real in zip(frames, mask) if is_real]
    return sum(real) / len(real)


def lstm(state, x):
    """One layer, gates in PyTorch's order (input, forget, cell, output): (K, D) -> (K, D)."""
    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    hidden, cell, outputs = np.zeros(x.shape[1]), np.zeros(x.shape[1]), []
    for step in x:
        gates = (state["lstm_visual.weight_ih_l0"] @ step + state["lstm_visual.bias_ih_l0"]
                 + state["lstm_visual.weight_hh_l0"] @ hidden + state["lstm_visual.bias_hh_l0"])
        write, keep, candidate, read = np.split(gates, 4)
        cell = sigmoid(keep) * cell + sigmoid(write) * np.tanh(candidate)
        hidden = sigmoid(read) * np.tanh(cell)
        outputs.append(hidden)
    return np.array(outputs)


def over_time(state, head, frames, mask):
    """The frames (K, D) after the head's temporal model, their own features added; padded rows are nobody's."""
    if head == "seqLSTM":
        out = frames.copy()
        out[mask] = lstm(state, frames[mask]) + frames[mask]  # packed: real frames only
        return out
    return temporal(state, frames, mask, "frames") if head == "seqTransf" else frames


def tight(state, eos, frames, mask):
    """tightTransf: the logit of one query and one video."""
    tokens = np.concatenate([eos[None], frames])
    tokens = tokens + state["cross.embeddings.position_embeddings.weight"][:len(tokens)]
    seen = [True, *mask]
    for i in range(depth(state, "cross.transformer.resblocks")):
        name = f"cross.transformer.resblocks.{i}"
        tokens = transformer_block(tokens, state, name, len(eos) // 64, [seen] * len(tokens), 1e-12)
    first = layer_norm(tokens[:1], state, "cross.pooler.ln_pool", 1e-12)
    pooled = quick_gelu(linear(first, state, "cross.pooler.dense"))
    return float(linear(pooled, state, "similarity_dense")[0, 0])


def score(state, head, eos, frames, mask, *, normalize=True):
    """One query's eos (D,) with one video's CLIP features (K, D)."""
    if head == "tightTransf":
        return tight(state, eos, frames, mask)
    return cosine(eos, mean_pool(over_time(state, head, frames, mask), mask, normalize=normalize))


def conv3d(kernel, video, mask):
    """Patch convolution over time, kernel (width, 3, 3 frames, p, p): video (K, 3, H, W) -> (K, width, H / p, W / p).

    Whatever is no real frame, before the first, after the last or padded, counts as zero.
    """
    width, _, spans, p, _ = kernel.shape
    grid = video.shape[-1] // p
    out = np.zeros((len(video), width, grid, grid))
    for k in range(len(video)):
        for span in range(spans):
            neighbour = k + span - 1
            if not 0 <= neighbour < len(video) or not mask[neighbour]:
                continue
            for row in range(grid):
                for column in range(grid):
                    square = video[neighbour, :, row * p:(row + 1) * p, column * p:(column + 1) * p]
                    for c in range(width):
                        out[k, c, row, column] += np.sum(square * kernel[c, :, span])
    return out
