"""CLIP2Video once more in numpy, float64 and loops, from the names in a released checkpoint: slow and obvious.

Written from a description of the method. One query or one video at a time, real frames and words only: padding does not
occur here, so whatever the torch code does with it must change nothing. Layers come from reference.py.

K frames of a video, L words of a query, C centers, D joint dimension.
"""

import numpy as np
from reference import layer_norm, softmax, transformer_block

EPS = 1e-12  # of the LayerNorms in the blocks; the one after the difference block has 1e-5


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def unit(x):
    """A vector divided by its length."""
    return x / np.linalg.norm(x)


def difference_tokens(state, frames):
    """Temporal difference block: frames (K, D) -> tokens (2 K - 1, D): frame, difference, frame, ..., frame."""
    positions, types = state["frame_position_embeddings.weight"], state["type_position_embeddings.weight"]
    count = len(frames)
    differences = np.array([frames[i + 1] - frames[i] + positions[i + 1] for i in range(count - 1)])
    if count > 1:
        everywhere = np.ones((count - 1, count - 1), dtype=bool)
        heads = frames.shape[1] // 64
        differences = transformer_block(differences, state, "frame2t_attention.resblocks.0", heads, everywhere, EPS)
        differences = 2 * sigmoid(layer_norm(differences, state, "trans_layernorm", 1e-5)) - 1
    tokens = []
    for i in range(count):
        tokens.append(frames[i] + positions[i] + types[1])
        if i < count - 1:
            tokens.append(differences[i] + positions[i] + types[0])
    return np.array(tokens)


def attended(state, frames, blocks):
    """The frames' tokens after `blocks`, each plus its frame: (K, D) -> (K, D)."""
    tokens = difference_tokens(state, frames)
    everywhere = np.ones((len(tokens), len(tokens)), dtype=bool)
    for block in blocks:
        tokens = transformer_block(tokens, state, block, frames.shape[1] // 64, everywhere, EPS)
    return np.array([tokens[2 * i] + frames[i] for i in range(len(frames))])


def pooled(state, frames):
    """Global branch: frames (K, D) -> one unit vector (D,)."""
    count = len({key.split(".")[2] for key in state if key.startswith("transformerClip.")})
    enhanced = attended(state, frames, [f"transformerClip.resblocks.{i}" for i in range(count)])
    return unit(np.mean([unit(frame) for frame in enhanced], axis=0))


def aligned(state, tokens):
    """Tokens of either side (T, D) -> one unit vector (D,): every center collects its share of the residuals."""
    centers, embeddings = state["weight_center"], state["emb_center"]
    collected = np.zeros(embeddings.shape)
    for token in tokens:
        share = softmax([float(np.dot(token, center)) for center in centers])
        for k in range(len(centers)):
            collected[k] += share[k] * (token - embeddings[k])
    return unit(np.mean([unit(vector) for vector in collected], axis=0))


def aligned_video(state, frames):
    """Alignment branch of a video: its frames and every second of them once more, seen through their differences."""
    again = attended(state, frames[::2], ["actionClip.resblocks.0"])
    return aligned(state, np.concatenate([frames, again]))


def aligned_query(state, words):
    """Alignment branch of a query: its words (L, D) without the start token, the end token included."""
    return aligned(state, words[1:])


def released(dim, layers=4, centers=5, seed=0, positions=77):
    """The heads of a released checkpoint, every key with a random value of its shape (numpy)."""
    rng = np.random.default_rng(seed)
    state = {}

    def put(name, *shape, around=0.0, spread=0.1):
        state[name] = np.float32(around + spread * rng.normal(size=shape)).astype(np.float64)  # as a file holds it

    def put_pair(name, *shape, around=0.0):
        put(f"{name}.weight", *shape, around=around)
        put(f"{name}.bias", shape[0])

    put("frame_position_embeddings.weight", positions, dim)
    put("type_position_embeddings.weight", 2, dim)
    put("weight_center", centers, dim, spread=0.5)
    put("emb_center", centers, dim, spread=0.5)
    put_pair("trans_layernorm", dim, around=1.0)
    blocks = [f"transformerClip.resblocks.{i}" for i in range(layers)]
    for block in [*blocks, "frame2t_attention.resblocks.0", "actionClip.resblocks.0"]:
        put(f"{block}.attn.in_proj_weight", 3 * dim, dim)
        put(f"{block}.attn.in_proj_bias", 3 * dim)
        put_pair(f"{block}.attn.out_proj", dim, dim)
        put_pair(f"{block}.ln_1", dim, around=1.0)
        put_pair(f"{block}.ln_2", dim, around=1.0)
        put_pair(f"{block}.mlp.c_fc", 4 * dim, dim)
        put_pair(f"{block}.mlp.c_proj", dim, 4 * dim)
    return state
