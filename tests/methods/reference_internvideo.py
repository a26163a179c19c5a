"""InternVideo's two towers in numpy with loops, over weights under the release's own names (without "clip.").

Slow and obvious on purpose; nothing here is shared with narvid. One video or one sentence at a time, float64.

Legend: K frames of a video, S tokens of a frame (class token and patches), C width of the image tower, D joint
dimension.
"""

import numpy as np


def layer_norm(x, state, name):
    """Each row of x (..., C) to mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def feed_forward(x, state, name):
    """c_proj(QuickGELU(c_fc(x)))."""
    h = x @ state[f"{name}.c_fc.weight"].T + state[f"{name}.c_fc.bias"]
    h = h / (1 + np.exp(-1.702 * h))
    return h @ state[f"{name}.c_proj.weight"].T + state[f"{name}.c_proj.bias"]


def attend(queries, keys, state, name, causal=False):
    """Multi-head attention of queries (n, C) to keys (m, C), heads of 64."""
    width = queries.shape[1]
    weight, bias = state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]
    q = queries @ weight[:width].T + bias[:width]
    k = keys @ weight[width:2 * width].T + bias[width:2 * width]
    v = keys @ weight[2 * width:].T + bias[2 * width:]
    answer = np.zeros_like(queries)
    for head in range(width // 64):
        part = slice(64 * head, 64 * head + 64)
        for i in range(len(queries)):
            seen = i + 1 if causal else len(keys)
            logits = np.array([q[i, part] @ k[j, part] for j in range(seen)]) / 8.0
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            answer[i, part] = sum(weights[j] * v[j, part] for j in range(seen))
    return answer @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def block(x, state, name, causal=False):
    """CLIP's pre-LN block."""
    h = layer_norm(x, state, f"{name}.ln_1")
    x = x + attend(h, h, state, f"{name}.attn", causal)
    return x + feed_forward(layer_norm(x, state, f"{name}.ln_2"), state, f"{name}.mlp")


def count(state, prefix):
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def embed_frame(picture, state):
    """One normalised picture (3, side, side) -> its tokens (S, C), the class token first."""
    weight = state["visual.conv1.weight"][:, :, 0]  # (C, 3, p, p)
    p = weight.shape[-1]
    tokens = [state["visual.class_embedding"]]
    for top in range(0, picture.shape[1], p):
        for left in range(0, picture.shape[2], p):
            patch = picture[:, top:top + p, left:left + p]
            tokens.append(np.array([(kernel * patch).sum() for kernel in weight]))
    return layer_norm(np.stack(tokens) + state["visual.positional_embedding"], state, "visual.ln_pre")


def with_positions(tokens, state, name):
    """The depth-wise 3x3x3 convolution, zeros outside, added to the patch tokens of (K, S, C)."""
    frames, side = len(tokens), round((tokens.shape[1] - 1) ** 0.5)
    weight, out = state[f"{name}.weight"], tokens.copy()  # (C, 1, 3, 3, 3)
    for t in range(frames):
        for y in range(side):
            for x in range(side):
                total = state[f"{name}.bias"].copy()
                for dt, dy, dx in np.ndindex(3, 3, 3):
                    t2, y2, x2 = t + dt - 1, y + dy - 1, x + dx - 1
                    if 0 <= t2 < frames and 0 <= y2 < side and 0 <= x2 < side:
                        total += weight[:, 0, dt, dy, dx] * tokens[t2, 1 + y2 * side + x2]
                out[t, 1 + y * side + x] += total
    return out


def video(pictures, state):
    """A video of normalised pictures (K, 3, side, side), all of them taken for real -> (D,)."""
    layers, decoders = count(state, "visual.transformer.resblocks."), count(state, "visual.transformer.dec.")
    frames = [embed_frame(picture, state) for picture in pictures]
    token = state["visual.transformer.temporal_cls_token"].reshape(1, -1)
    for i in range(layers):
        frames = [block(tokens, state, f"visual.transformer.resblocks.{i}") for tokens in frames]
        j = i - (layers - decoders)
        if j >= 0:
            name = f"visual.transformer.dec.{j}"
            keys = with_positions(np.stack(frames), state, f"visual.transformer.dpe.{j}")
            keys = layer_norm(keys.reshape(-1, keys.shape[-1]), state, f"{name}.ln_3")
            token = token + attend(layer_norm(token, state, f"{name}.ln_1"), keys, state, f"{name}.attn")
            token = token + feed_forward(layer_norm(token, state, f"{name}.ln_2"), state, f"{name}.mlp")
    mean = sum(tokens[0] for tokens in frames) / len(frames)
    share = 1 / (1 + np.exp(-state["visual.transformer.balance"]))
    mixed = (1 - share) * token[0] + share * mean
    return layer_norm(mixed, state, "visual_ln_post") @ state["visual_proj"]


def sentence(tokens, state):
    """Token ids over all positions of the text tower -> the feature at the end token (D,)."""
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    for i in range(count(state, "transformer.resblocks.")):
        x = block(x, state, f"transformer.resblocks.{i}", causal=True)
    end = int(np.argmax(tokens))
    return layer_norm(x[end], state, "ln_final") @ state["text_projection"]
