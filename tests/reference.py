"""The paper once more in numpy, float64 and loops: slow and obvious, for the tests to compare the torch code with.

Written from the paper (Hur et al., CVPR 2025; "Sec.", "Eq." and "App." refer to it) alone; where the released code
differs, the README says how.
Nothing here imports narvid or torch, and nothing here is vectorised over queries or videos: a function sees one
query and one video wherever the paper does. `fidelity` is "paper" or "reported".

B queries, V videos, K frames of a video and sentences of its narration, L words of a query, D joint dimension.
Masks are bool, True = real.
"""

import math

import numpy as np


def softmax(values):
    """exp(x) / sum exp(x) of a list of numbers; an empty list stays empty."""
    if len(values) == 0:
        return np.zeros(0)
    top = max(values)
    exps = np.array([math.exp(x - top) for x in values])
    return exps / exps.sum()


def cosine(a, b):
    """Cosine of two vectors."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


# --------------------------------------------------------------------------------------- Sec. 3.4, query-aware filter


def nucleus(probabilities, p, fidelity):
    """Sec. 3.4: positions kept of the descending list `probabilities`. The two readings of its border."""
    if p >= 1:
        return list(range(len(probabilities)))  # a cumulative weight never exceeds 1, whatever rounding says
    kept, cumulated = [], 0.0
    for rank, probability in enumerate(probabilities):
        if fidelity == "paper":
            kept.append(rank)  # "add features one by one until the cumulative similarity exceeds p"
            if cumulated + probability > p:
                break
        elif rank == 0 or cumulated + probability <= p:
            kept.append(rank)
        cumulated += probability
    return kept


def filter_weights(cosines, mask, *, method="nucleus", p=0.4, k=None, temperature=0.1, fidelity="reported"):
    """Sec. 3.4, Eq. 4: the weights (K,) of one video's frames for one query, from their cosines with w_EOS."""
    real = [i for i in range(len(cosines)) if mask[i]]
    weights = np.zeros(len(cosines))
    if not real:
        return weights
    if method == "uniform":  # Table 3, filter switched off
        for i in real:
            weights[i] = 1 / len(real)
        return weights
    probability = dict(zip(real, softmax([float(cosines[i]) / temperature for i in real])))
    order = sorted(real, key=lambda i: -cosines[i])  # stable: equal frames in their own order
    if method == "nucleus":
        kept = [order[rank] for rank in nucleus([probability[i] for i in order], p, fidelity)]
    elif method == "topk":
        kept = order[:k]
    elif method == "none":
        kept = order
    total = sum(probability[i] for i in kept)
    for i in kept:
        weights[i] = probability[i] / total
    return weights


# ------------------------------------------------------------------------------------- Sec. 3.5 and App. A, matching


def coarse(eos, frames, weights):
    """App. A: cosine of w_EOS with the weighted sum of the normalised frames."""
    pooled = np.zeros(len(eos))
    for frame, weight in zip(frames, weights):
        if weight > 0:
            pooled += weight * frame / np.linalg.norm(frame)
    return cosine(eos, pooled) if np.any(pooled) else 0.0


def fine(words, word_mask, word_weights, frames, weights, fidelity):
    """App. A: max over frames weighted by the word weights, max over words weighted by the filter weights."""
    kept = [i for i in range(len(frames)) if weights[i] > 0]
    real = [j for j in range(len(words)) if word_mask[j]]
    if not kept:
        return 0.0
    zero = [0.0] if fidelity == "reported" else []  # what is dropped or padded competes with similarity 0
    s_f2w = sum(word_weights[j] * max([cosine(words[j], frames[i]) for i in kept] + zero) for j in real)
    s_w2f = sum(weights[i] * max([cosine(words[j], frames[i]) for j in real] + zero) for i in kept)
    return (s_f2w + s_w2f) / 2 if fidelity == "reported" else s_f2w + s_w2f


def score(eos, words, word_mask, word_weights, frames, mask, *, fine_grained=True, fidelity="reported", **filtering):
    """Sec. 3.5: one query, one view of one video -> the mean of its coarse and its fine score."""
    cosines = [cosine(eos, frames[i]) if mask[i] else 0.0 for i in range(len(frames))]
    weights = filter_weights(cosines, mask, fidelity=fidelity, **filtering)
    s_coarse = coarse(eos, frames, weights)
    if not fine_grained:
        return s_coarse
    return (s_coarse + fine(words, word_mask, word_weights, frames, weights, fidelity)) / 2


def score_matrix(eos, words, word_mask, word_weights, frames, mask, **options):
    """S_qv or S_qn (B, V) of Sec. 3.6.1: `score` of every query with every video."""
    matrix = np.zeros((len(eos), len(frames)))
    for b in range(len(eos)):
        for v in range(len(frames)):
            matrix[b, v] = score(eos[b], words[b], word_mask[b], word_weights[b], frames[v], mask[v], **options)
    return matrix


# -------------------------------------------------------------------------------------------- Sec. 3.6.1, the losses


def nce(similarity, scale, exclude=None):
    """Eq. 5 for one view, S times `scale`; excluded pairs (not the positive) leave both denominators."""
    size = len(similarity)
    total = 0.0
    for i in range(size):
        counts = [j for j in range(size) if j == i or exclude is None or not exclude[i][j]]
        counts_t = [j for j in range(size) if j == i or exclude is None or not exclude[j][i]]
        row = sum(math.exp(scale * similarity[i][j]) for j in counts)
        column = sum(math.exp(scale * similarity[j][i]) for j in counts_t)
        positive = math.exp(scale * similarity[i][i])
        total += math.log(positive / row) + math.log(positive / column)
    return -total / (2 * size)


def sigma(similarity, i):
    """Eq. 6: unbiased standard deviation of row i, its positive included; one value has none."""
    row = [float(x) for x in similarity[i]]
    if len(row) < 2:
        return 0.0
    mean = sum(row) / len(row)
    return math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))


def hard_negatives_of_view(similarity, lam, exclude=None):
    """Eq. 6: for every row i the set of j != i with S(i, i) - S(i, j) < lambda sigma_i."""
    sets = []
    for i in range(len(similarity)):
        margin = lam * sigma(similarity, i)
        near = {j for j in range(len(similarity)) if j != i and similarity[i][i] - similarity[i][j] < margin}
        sets.append({j for j in near if exclude is None or not exclude[i][j]})
    return sets


def hard_negatives(s_video, s_narration, lam, exclude=None):
    """Eq. 7: H_i, united over both views, and H_i^T, the same of the transposed matrices."""
    transposed = None if exclude is None else np.asarray(exclude).T
    pairs = zip(hard_negatives_of_view(s_video, lam, exclude), hard_negatives_of_view(s_narration, lam, exclude))
    pairs_t = zip(
        hard_negatives_of_view(s_video.T, lam, transposed), hard_negatives_of_view(s_narration.T, lam, transposed)
    )
    return [a | b for a, b in pairs], [a | b for a, b in pairs_t]


def as_matrix(sets):
    """List of B index sets -> bool (B, B)."""
    matrix = np.zeros((len(sets), len(sets)), dtype=bool)
    for i, indices in enumerate(sets):
        for j in indices:
            matrix[i, j] = True
    return matrix


def rank_hinge(similarity, sets, sets_t, lam, eta):
    """Eq. 8 with its sign turned: L^hard of one view; the transposed direction has its own sigma."""
    size = len(similarity)
    total = 0.0
    for matrix, negatives in ((similarity, sets), (similarity.T, sets_t)):
        for i in range(size):
            margin = eta * lam * sigma(matrix, i)
            for j in negatives[i]:
                total += max(0.0, matrix[i][j] - matrix[i][i] + margin)
    return total / (2 * size)


def cross_view_hard_negative(s_video, s_narration, lam, eta, exclude=None):
    """Eq. 9, its two parts."""
    sets, sets_t = hard_negatives(s_video, s_narration, lam, exclude)
    return {
        "hard_video": rank_hinge(s_video, sets, sets_t, lam, eta),
        "hard_narration": rank_hinge(s_narration, sets, sets_t, lam, eta),
    }


def hard_negative_nce(s_video, s_narration, lam, scale, exclude=None):
    """Eq. 12 as printed, its two parts with the last factor 1/2; an empty set contributes 0."""
    sets, sets_t = hard_negatives(s_video, s_narration, lam, exclude)
    parts = {}
    for name, similarity in (("hard_video", s_video), ("hard_narration", s_narration)):
        total = 0.0
        for matrix, negatives in ((similarity, sets), (similarity.T, sets_t)):
            for i in range(len(matrix)):
                if negatives[i]:
                    below = sum(math.exp(scale * matrix[i][j]) for j in negatives[i])
                    total += math.log(math.exp(scale * matrix[i][i]) / below)
        parts[name] = 0.5 * -total / (2 * len(similarity))
    return parts


# ------------------------------------------------------------------------ Sec. 3.6.2, inference, and post-processing


def statistics(similarity):
    """Eq. 11: mean and population standard deviation of all elements."""
    values = [float(x) for x in np.ravel(similarity)]
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))


def fuse(s_video, s_narration, weight=0.5, statistics_of_both=None):
    """Eq. 11 with a weight: 2 (w z(S_qv) + (1 - w) z(S_qn)); w = 0.5 is the printed sum."""
    (mean_v, std_v), (mean_n, std_n) = statistics_of_both or (statistics(s_video), statistics(s_narration))
    fused = np.zeros(s_video.shape)
    for b in range(s_video.shape[0]):
        for v in range(s_video.shape[1]):
            z_video = (s_video[b, v] - mean_v) / std_v
            z_narration = (s_narration[b, v] - mean_n) / std_n
            fused[b, v] = 2 * (weight * z_video + (1 - weight) * z_narration)
    return fused


def dsl(similarity, scale, over):
    """Dual softmax: S times the softmax of scale * S over all queries of a video, or over all videos of a query."""
    if over == "videos":
        return np.array([row * softmax(scale * row) for row in similarity])
    return np.array([column * softmax(scale * column) for column in similarity.T]).T


def qb_norm(similarity, querybank, beta=20.0, k=1):
    """Bogolin et al., CVPR 2022: dynamic inverted softmax; bank (N, V), activation set = videos in a bank top k."""
    activated = set()
    for row in querybank:
        activated |= set(sorted(range(len(row)), key=lambda v: -row[v])[:k])
    normalised = np.array(similarity, dtype=np.float64)
    for b, row in enumerate(similarity):
        if int(np.argmax(row)) in activated:
            for v in range(len(row)):
                normaliser = sum(math.exp(beta * bank[v]) for bank in querybank)
                normalised[b, v] = math.exp(beta * row[v]) / normaliser
    return normalised


# ----------------------------------------------------------------------------------------------- Sec. 4.1, the metrics


def rank(scores, right):
    """Number of candidates whose score is at least the right one's, itself included: ties count against."""
    return sum(1 for s in scores if s >= scores[right])


def summary(ranks):
    """Ranks -> R@1/5/10 in percent, median and mean rank."""
    ordered, n = sorted(ranks), len(ranks)
    result = {f"R@{k}": 100 * sum(r <= k for r in ranks) / n for k in (1, 5, 10)}
    result["MdR"] = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    result["MnR"] = sum(ranks) / n
    return result


def ndcg_at_10(scores, right):
    """Of one query's scores of all candidates, in percent; of equal scores the right candidate stands last.

    The general definition: gains 1 and 0, discounted by log2(1 + place), over those of the best possible order.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i == right))
    gain = sum((order[place - 1] == right) / np.log2(1 + place) for place in range(1, min(10, len(order)) + 1))
    best = 1 / np.log2(2)  # the right one first
    return 100 * gain / best


def text_to_video_ranks(similarity, video_of_query):
    """One rank a query, among all videos (those without a caption too)."""
    return [rank(list(row), right) for row, right in zip(similarity, video_of_query)]


def video_to_text_ranks(similarity, video_of_query):
    """One rank a video that has a caption: its best caption against every other video's best caption."""
    captioned = sorted({int(v) for v in video_of_query})
    ranks = []
    for v in captioned:
        best = [max(similarity[b][v] for b in range(len(similarity)) if video_of_query[b] == u) for u in captioned]
        ranks.append(rank(best, captioned.index(v)))
    return ranks


def retrieval_metrics(similarity, video_of_query):
    """Both directions."""
    return {
        "text_to_video": summary(text_to_video_ranks(similarity, video_of_query)),
        "video_to_text": summary(video_to_text_ranks(similarity, video_of_query)),
    }


# --------------------------------------------------------------- Sec. 3.3 and the towers: layers, from a state dict


def linear(x, state, name):
    """x W^T + b with the weights `name`.weight and `name`.bias."""
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x, state, name, eps):
    """Each row to mean 0 and population variance 1, then gain and bias."""
    rows = [(row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + eps) for row in x]
    return np.array(rows) * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x):
    """x Phi(x), the exact one."""
    return np.array([[u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in row] for row in x])


def quick_gelu(x):
    """x sigmoid(1.702 x), the one OpenAI's CLIP was trained with."""
    return x / (1 + np.exp(-1.702 * x))


def attention(queries, keys, values, heads, allowed):
    """softmax(q k^T / sqrt(width)) v head by head; allowed[i][j]: may i look at j. Nothing to look at gives 0."""
    width = queries.shape[1] // heads
    out = np.zeros(queries.shape)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in range(len(queries)):
            seen = [j for j in range(len(keys)) if allowed[i][j]]
            attended = softmax([np.dot(queries[i, part], keys[j, part]) / math.sqrt(width) for j in seen])
            for weight, j in zip(attended, seen):
                out[i, part] += weight * values[j, part]
    return out


def transformer_block(x, state, name, heads, allowed, eps):
    """Pre-LN block of CLIP: x + attention(LN x), then + feed-forward(LN x), QuickGELU, width 4 D."""
    qkv = layer_norm(x, state, f"{name}.ln_1", eps) @ state[f"{name}.attn.in_proj_weight"].T
    queries, keys, values = np.split(qkv + state[f"{name}.attn.in_proj_bias"], 3, axis=1)
    x = x + linear(attention(queries, keys, values, heads, allowed), state, f"{name}.attn.out_proj")
    hidden = quick_gelu(linear(layer_norm(x, state, f"{name}.ln_2", eps), state, f"{name}.mlp.c_fc"))
    return x + linear(hidden, state, f"{name}.mlp.c_proj")


def depth(state, name):
    """How many blocks `name`.0, `name`.1, ... the state dict holds."""
    return len({key[len(name) + 1 :].split(".")[0] for key in state if key.startswith(f"{name}.")})


# --------------------------------------------------------------------- Sec. 3.3 and App. A, heads, the release's keys


def word_weights(state, words, word_mask, temperature=0.1):
    """App. A: Linear-ReLU-Linear of one query's words (L, D), softmax over the real ones -> (L,)."""
    hidden = np.maximum(linear(words, state, "text_weight_fc.0"), 0)
    logits = linear(hidden, state, "text_weight_fc.2")[:, 0]
    real = [j for j in range(len(words)) if word_mask[j]]
    weights = np.zeros(len(words))
    weights[real] = softmax([logits[j] / temperature for j in real])
    return weights


def co_attention(state, frames, narration, mask, narration_mask):
    """Eq. 2: one video's frames ask its narration and its narration asks its frames, both (K, D) -> both (K, D)."""
    block = "co_connetion_transformer_model_block.0"
    heads = frames.shape[1] // 64

    def project(x, role):
        return linear(x, state, f"{block}.biattention.{role}")

    streams = {}
    for own, other, me, you, seen, feed in (
        (frames, narration, "1", "2", narration_mask, "v"),
        (narration, frames, "2", "1", mask, "t"),
    ):
        asked = project(own, f"query{me}"), project(other, f"key{you}"), project(other, f"value{you}")
        context = attention(*asked, heads, [seen] * len(own))
        x = linear(context, state, f"{block}.biOutput.dense{me}") + own
        x = layer_norm(x, state, f"{block}.biOutput.LayerNorm{me}", 1e-5)
        hidden = gelu(linear(x, state, f"{block}.{feed}_intermediate.dense"))
        x = linear(hidden, state, f"{block}.{feed}_output.dense") + x
        streams[feed] = layer_norm(x, state, f"{block}.{feed}_output.LayerNorm", 1e-5)
    return streams["v"], streams["t"]


def temporal(state, x, mask, view):
    """Eq. 3: x + positions -> blocks over the real slots -> + x; view "frames" or "narration"."""
    positions, blocks = {
        "frames": ("frame_position_embeddings.weight", "transformerClip.resblocks"),
        "narration": ("caption_position_embeddings.weight", "transformerCaption.resblocks"),
    }[view]
    hidden = x + state[positions][: len(x)]
    for i in range(depth(state, blocks)):
        hidden = transformer_block(hidden, state, f"{blocks}.{i}", x.shape[1] // 64, [mask] * len(x), 1e-12)
    return hidden + x


def enhance(state, frames, narration, mask, narration_mask):
    """Eqs. 2 and 3, one video."""
    frames, narration = co_attention(state, frames, narration, mask, narration_mask)
    return temporal(state, frames, mask, "frames"), temporal(state, narration, narration_mask, "narration")


# -------------------------------------------------------------------------------- CLIP's towers, OpenAI's state dict


def clip_image(state, image, heads=None):
    """Vision transformer: one image (3, H, W), already normalised -> its feature (D,)."""
    kernel = state["visual.conv1.weight"]  # (width, 3, patch, patch), no bias
    width, patch = kernel.shape[0], kernel.shape[-1]
    tokens = [state["visual.class_embedding"]]
    for top in range(0, image.shape[1] - patch + 1, patch):
        for left in range(0, image.shape[2] - patch + 1, patch):
            square = image[:, top : top + patch, left : left + patch]
            tokens.append(np.array([np.sum(square * kernel[c]) for c in range(width)]))
    x = np.array(tokens) + state["visual.positional_embedding"]
    x = layer_norm(x, state, "visual.ln_pre", 1e-5)
    everywhere = np.ones((len(x), len(x)), dtype=bool)
    blocks = "visual.transformer.resblocks"
    for i in range(depth(state, blocks)):
        x = transformer_block(x, state, f"{blocks}.{i}", heads or width // 64, everywhere, 1e-5)
    return (layer_norm(x[:1], state, "visual.ln_post", 1e-5) @ state["visual.proj"])[0]


def clip_text(state, tokens, heads=None):
    """Causal transformer: one text's token ids (L,) -> eos (D,), at the highest id, and every word (L, D)."""
    x = np.array([state["token_embedding.weight"][t] for t in tokens]) + state["positional_embedding"][: len(tokens)]
    causal = np.tril(np.ones((len(x), len(x)), dtype=bool))
    blocks = "transformer.resblocks"
    for i in range(depth(state, blocks)):
        x = transformer_block(x, state, f"{blocks}.{i}", heads or x.shape[1] // 64, causal, 1e-5)
    words = layer_norm(x, state, "ln_final", 1e-5) @ state["text_projection"]
    return words[int(np.argmax(tokens))], words
