"""Optimisation: the two recipes, their parameter groups and schedule, gradient clipping, freezing, fp16 weights.

Only this file knows how parameters are updated. It sees parameters, their names and plain numbers: no argparse
namespace, no rank, no loss, no file. Parameters have shapes of their own; no axis of the legend occurs here.

`reported` is the optimiser behind the published tables, as the released code runs it: BertAdam over fp16 tower
weights with fp16 state and no loss scaling. `modern` is AdamW over fp32 weights. Sec. B.2 of the paper says only
"Adam", 1e-7 for CLIP, 1e-4 for the rest, a cosine schedule and warm-up 0.1; the rest is CLIP4Clip's.
"""

import copy
import math
from collections.abc import Iterable

import torch
from open_clip.model import convert_weights_to_lp
from torch import Tensor, nn

from narvid import InputError
from narvid.towers import Towers

BETAS = (0.9, 0.98)
EPS = 1e-6


# ---------------------------------------------------------------- the optimiser of the published tables


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled weight decay and a clip of each parameter's own gradient.

    update = m / (sqrt(v) + eps) + weight_decay * p, then p -= lr * update. State and arithmetic are in the parameter's
    dtype and every operation rounds to it. In fp16 that decides what is learned: the squares of gradients under about
    1e-3 vanish, v stays exactly 0 and the weight takes steps of lr * m / eps; once v is not 0 the steps are near lr,
    which at 1e-7 is below the spacing of fp16, and the weight stands still. A rate tuned so means nothing in fp32.
    """

    def __init__(self, params, lr: float, *, betas: tuple[float, float] = BETAS, eps: float = EPS,
                 weight_decay: float = 0.0, max_grad_norm: float = 1.0):
        """params: parameters or groups; max_grad_norm: norm to which each parameter's gradient is clipped in step."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient; the gradients are left clipped in place."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for dtype in dict.fromkeys(p.dtype for p in trained):  # multi-tensor kernels want one dtype a call
                self._update([p for p in trained if p.dtype == dtype], group)

    def _update(self, params: list[nn.Parameter], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params]
        m = [self.state[p]["exp_avg"] for p in params]
        v = [self.state[p]["exp_avg_sq"] for p in params]
        beta1, beta2 = group["betas"]

        norms = torch.stack(torch._foreach_norm(grads))
        shrink = (group["max_grad_norm"] / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(shrink.unbind()))

        _scale(m, beta1)
        torch._foreach_add_(m, grads, alpha=1 - beta1)
        _scale(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, group["eps"])
        update = torch._foreach_div(m, denominator)
        # Products are formed before they are added: a fused `add(p, alpha=...)` rounds once where the release rounds
        # twice, and in fp16 the product lr * update often rounds to 0.
        if group["weight_decay"] > 0:
            torch._foreach_add_(update, [p * group["weight_decay"] for p in params])
        _scale(update, group["lr"])
        torch._foreach_sub_(params, update)


def _scale(tensors: list[Tensor], factor: float) -> None:
    """Multiplies in place, tensor by tensor: _foreach_mul_ on a CPU rounds the factor to fp16 first, 1e-7 to 1.2e-7."""
    for tensor in tensors:
        tensor.mul_(factor)


# ---------------------------------------------------------------- groups


def build_optimizer(model: nn.Module, *, recipe: str, lr: float, clip_lr: float, weight_decay: float,
                    layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """The recipe's optimiser ("reported": BertAdam, "modern": AdamW) over the trainable parameters of `model`.

    Groups are {clip, heads} x {decay, no_decay}, empty ones left out; each has "name" and "base_lr" (clip_lr for the
    CLIP tower, whose parameters are named clip.*, else lr). layer_decay < 1: a tower's rate falls by that factor with
    each block from what stands behind the last one down to the embeddings, and each depth has groups of its own. Call
    it on the model in its final place and dtype. The groups' rates are part of the state dict, so loading one restores
    them too. Raises InputError for an unknown recipe and where nothing is left to train.
    """
    if recipe not in ("reported", "modern"):
        raise InputError(f"there is no recipe {recipe!r}: choose reported or modern")
    below = _blocks_below_the_top(model) if layer_decay < 1 else {}
    groups = _parameter_groups(model, recipe, lr=lr, clip_lr=clip_lr, weight_decay=weight_decay,
                               layer_decay=layer_decay, below=below)
    if not groups:
        raise InputError("nothing is left to train: every parameter of the model is frozen; freeze fewer layers")
    if recipe == "reported":
        return BertAdam(groups, lr)
    return torch.optim.AdamW(groups, lr, betas=BETAS, eps=EPS, fused=True)  # fused: one pass, on CPU as on GPU


def _blocks_below_the_top(model: nn.Module) -> dict[str, int]:
    """Name of a towers' parameter in the model -> how many blocks it stands below what is behind the last one."""
    return {f"{at}.{name}" if at else name: top - depth
            for at, towers in model.named_modules() if isinstance(towers, Towers)
            for name, (depth, top) in towers.depths().items()}


def _parameter_groups(model: nn.Module, recipe: str, *, lr: float, clip_lr: float, weight_decay: float,
                      layer_decay: float, below: dict[str, int]) -> list[dict]:
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = "clip" if ".clip." in f".{name}" else "heads"  # also below a wrapper's prefix, such as module.clip.
        decayed = _is_decayed(name, parameter, recipe)
        key = f"{tower}_{'decay' if decayed else 'no_decay'}"
        rate = clip_lr if tower == "clip" else lr
        if below.get(name):
            key += f"_{below[name]}_below"
            rate *= layer_decay ** below[name]
        new = {"name": key, "params": [], "lr": rate, "base_lr": rate, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


def _is_decayed(name: str, parameter: nn.Parameter, recipe: str) -> bool:
    """Whether weight decay applies.

    reported: the release spares names that contain "bias" or "LayerNorm.weight". Of all its weights only those of the
    LayerNorms after the co-attention's feed-forward match the latter: the ones after its attention are called
    LayerNorm1 and LayerNorm2, those of the towers and the temporal encoders ln_*. So all other LayerNorms, the
    embeddings and the logit scale are decayed. modern: vectors, scalars and position or class embeddings are spared.
    """
    if recipe == "reported":
        return "bias" not in name and not name.endswith("norm_feed_forward.weight")
    spared = {"positions", "positional_embedding", "class_embedding", "logit_scale",
              "pos_embed", "cls_token", "reg_token", "latent", "cls_emb"}  # timm's names, and CoCa's
    return parameter.ndim >= 2 and spared.isdisjoint(name.split("."))


# ---------------------------------------------------------------- schedule and clipping


def warmup_cosine(x: float, warmup: float = 0.1) -> float:
    """The learning rate's factor after the share x of all steps, 0 <= x < 1, for both recipes.

    Linear from 0 up to `warmup`, then 0.5 * (1 + cos(pi * x)): the cosine starts at x = 0, not at the end of the
    warm-up, so the factor steps from 1 down to 0.976 there. The first step (x = 0) has rate 0.
    """
    if x < warmup:
        return x / warmup
    return 0.5 * (1.0 + math.cos(math.pi * x))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's rate to its base_lr * factor. The step count is all a resumed run needs to call it."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float = 1.0) -> Tensor:
    """Scales all gradients in place to a joint L2 norm of at most max_norm; returns the norm before that, a scalar.

    fp16 and fp32 gradients may be mixed; with one fp32 gradient among them the norm is fp32. Each fp16 gradient's own
    norm is rounded to fp16, as in the release, and is inf above 65,504. Where the norm returned is not finite the
    gradients are useless (0 or NaN): do not step.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


# ---------------------------------------------------------------- what of the towers is trained, and in which format


def freeze(clip: Towers, layers: int) -> None:
    """Freezes the input side of the towers and their first `layers` blocks; sets requires_grad of every parameter.

    -1 trains everything. n >= 0 freezes what stands before the first block (patches, stem, class, position and token
    embeddings, the LayerNorm before CLIP's image blocks) and the first n blocks of both towers; 0 is the family's
    setting. Raises InputError for any other number and for more layers than the deeper tower has.
    """
    depths = clip.depths()
    deepest = max(top for _, top in depths.values()) - 1
    if not -1 <= layers <= deepest:
        raise InputError(f"cannot freeze {layers} layers of towers with {deepest}: choose -1 (none) or 0 to {deepest}")
    for name, parameter in clip.named_parameters():
        depth, top = depths.get(name, (1, 1))
        parameter.requires_grad_(not (depth <= layers and depth < top))


def freeze_but_last(clip: Towers, blocks: int) -> None:
    """Trains the last `blocks` blocks of both towers, what stands behind them and the logit scale; freezes the rest."""
    depths = clip.depths()
    for name, parameter in clip.named_parameters():
        depth, top = depths.get(name, (1, 1))
        parameter.requires_grad_(depth >= top - blocks and depth > 0)


def to_half(clip: Towers) -> None:
    """Converts towers of OpenAI's form, in place, to the fp16 weights the family trains (recipe `reported`).

    Convolution, linear and attention weights and biases and both projections become fp16; LayerNorms, embeddings and
    the logit scale stay fp32. Build the towers with cast_dtype=torch.float16: their LayerNorms then compute in fp32
    and accept fp16 features, which the ordinary ones refuse on a GPU.
    """
    convert_weights_to_lp(clip, torch.float16)
    clip.visual.conv1.half()  # no nn.Conv2d and no open_clip.CLIP, which are what open_clip looks for
    clip.text_projection.data = clip.text_projection.data.half()


def in_fp32(model: nn.Module) -> nn.Module:
    """The model, or a copy of it in fp32 where it has fp16 weights: the optimiser and DDP hold on to the original."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return copy.deepcopy(model).float()
