"""NarVid as a method: its flags, and what it does with queries and videos together (filter, matching, loss).

The model is narvid/model.py, the formulas narvid/similarity.py and narvid/losses.py.

Legend: B queries, V videos, K frames of a video and sentences of its narration.
"""

from __future__ import annotations

from torch import Tensor, nn

from narvid import losses, model
from narvid.flags import number, positive, positive_float, share
from narvid.methods.protocol import Method, names_of
from narvid.model import MODULES, NarVidConfig, Queries, Videos
from narvid.similarity import kept as weights_kept
from narvid.similarity import match, views_of

FILTERS = {  # --filter (Sec. 3.4) -> the flag that is its parameter, and the filter in words
    "nucleus": ("filter_p", "nucleus, p = {:g}"),
    "topk": ("filter_k", "the {} likeliest"),
    "none": (None, "softmax, nothing dropped"),
}


def _add_loss_flags(group) -> None:
    """Flags of the loss; a checkpoint does not bring them back."""
    _add_hard_negative_flags(group)


def _add_hard_negative_flags(group) -> None:
    """Flags of the loss that nothing reads without module CVH."""
    group.add_argument("--hard_loss", choices=["hinge", "nce"], default="hinge",
                       help="hard-negative loss of module CVH: hinge (Eqs. 8-9) or nce (Eq. 12)")
    group.add_argument("--lam", type=number, default=0.7, help="lambda: a negative is hard if it "
                       "scores more than the positive minus lambda standard deviations of its row (Eq. 6)")
    group.add_argument("--eta", type=number, default=1.8, help="eta: the positive must win by eta "
                       "lambda standard deviations (Eq. 8)")
    group.add_argument("--alpha", type=number, default=1.0, help="alpha: weight of the hard-negative loss (Eq. 10)")


class NarVid(Method, model.NarVid):
    """model.NarVid with the score, the loss and the filter that the flags ask for."""

    max_frames = NarVidConfig.positions
    loss_flags = names_of(_add_loss_flags)
    frames_alone = ("On MSR-VTT the paper's model finds the right video first for 46.3 % of the queries by frames and "
                    "for 51.0 % by frames and narration, on DiDeMo for 48.9 % and 53.0 % (Table 10); frames of "
                    "the second kind were enhanced by the narration (co-attention), which these are not")

    @staticmethod
    def add_flags(group) -> None:
        """The paper's own flags: modules, matching, loss."""
        group.add_argument("--modules", nargs="*", choices=MODULES, default=list(MODULES),
                           help="of Table 3: narration matching, cross-modal interaction (co-attention), query-aware "
                                "filter, cross-view hard negatives")
        group.add_argument("--temporal_layers", type=positive, default=4,
                           help="blocks of each temporal encoder (4 as in CLIP4Clip)")
        group.add_argument("--dropout", type=share, default=0.1, help="probability, in co-attention")
        group.add_argument("--fidelity", choices=["reported", "paper"], default="reported",
                           help="as the code behind the published tables, or as the text of the paper (README)")
        group.add_argument("--filter", choices=list(FILTERS), default="nucleus",
                           help="which frames and sentences count for a query (Sec. 3.4); needs module QAF")
        group.add_argument("--filter_p", type=share, default=0.4,
                           help="p of --filter nucleus: cumulative weight of what is kept")
        group.add_argument("--filter_k", type=positive, default=3, help="k of --filter topk: how many are kept")
        group.add_argument("--temperature", type=positive_float, default=0.1,
                           help="divides the cosines and logits before the softmax of filter and word weights")
        _add_loss_flags(group)

    @classmethod
    def from_flags(cls, towers: nn.Module, flags) -> NarVid:
        """Temporal encoders start from the text tower where it is as wide as the joint dimension."""
        config = NarVidConfig(towers.dim, tuple(flags.modules), flags.temporal_layers, dropout=flags.dropout,
                              temperature=flags.temperature, block=towers.block_form())
        made = cls(towers, config)
        made.flags = flags
        made.heads.start_from_text_tower(towers)
        return made

    # ---- of the flags alone ----

    @classmethod
    def views(cls, flags) -> tuple[str, ...]:
        """S_qn needs module NM."""
        return ("video", "narration") if "NM" in flags.modules else ("video",)

    @classmethod
    def reads(cls, flags) -> set[str]:
        """The narration with module NM."""
        return {"frames", "narration"} if "NM" in flags.modules else {"frames"}

    @classmethod
    def searchable(cls, flags) -> bool:
        """True, with any modules."""
        return True

    @classmethod
    def unread(cls, flags) -> set[str]:
        """Flags of modules that are off, and parameters of filters and losses that are not chosen."""
        unread = super().unread(flags)
        parameters = {parameter: name for name, (parameter, _) in FILTERS.items() if parameter}
        if "QAF" not in flags.modules:
            unread |= {"filter", *parameters}
        unread |= {parameter for parameter, name in parameters.items() if name != flags.filter}
        if "CMI" not in flags.modules:
            unread |= {"dropout"}
        if "CVH" not in flags.modules or not flags.alpha:
            unread |= names_of(_add_hard_negative_flags)
        return unread | ({"eta"} if flags.hard_loss == "nce" else set())

    @classmethod
    def alike(cls, flags) -> dict[str, object]:
        """Module CVH with weight 0 is off; the order of modules says nothing."""
        off = set() if flags.alpha else {"CVH"}
        return {"modules": [name for name in MODULES if name in flags.modules and name not in off]}

    @classmethod
    def describe_filter(cls, flags) -> str:
        """Module QAF's filter in words."""
        if "QAF" not in flags.modules:
            return "no filter: every frame counts alike"
        parameter, words = FILTERS[flags.filter]
        return words.format(parameter and getattr(flags, parameter))

    # ---- queries and videos together ----

    @staticmethod
    def filter_options(flags) -> dict:
        """Arguments of similarity.match and kept: without QAF every real frame counts alike."""
        return dict(method=flags.filter if "QAF" in flags.modules else "uniform", p=flags.filter_p, k=flags.filter_k,
                    temperature=flags.temperature, fidelity=flags.fidelity)

    def score(self, queries: Queries, videos: Videos, *, block: int | None = None) -> dict[str, Tensor]:
        """Sec. 3.5: {"video": (B, V), "narration": (B, V)}; without NM the coarse cosine alone."""
        return match(queries, videos, **self.filter_options(self.flags), fine="NM" in self.flags.modules, block=block)

    def unfiltered(self, queries: Queries, videos: Videos, *, block: int | None = None) -> dict[str, Tensor]:
        """As `score`, with uniform weights."""
        options = self.filter_options(self.flags) | {"method": "uniform"}
        return match(queries, videos, **options, fine="NM" in self.flags.modules, block=block)

    def kept(self, queries: Queries, videos: Videos) -> dict[str, Tensor] | None:
        """Eq. 4: the weights with which each query looks at frames and sentences; None without QAF."""
        return weights_kept(queries, videos, **self.filter_options(self.flags)) if "QAF" in self.flags.modules else None

    def vectors(self, videos: Videos) -> dict[str, tuple[Tensor, Tensor]]:
        """One vector a frame and a sentence: the filter and the fine score look at single ones."""
        return views_of(videos)

    def loss(self, similarity: dict[str, Tensor], scale: Tensor, exclude: Tensor | None) -> dict[str, Tensor]:
        """Eq. 10: NCE of each view and, with CVH, alpha times the hard-negative loss.

        similarity {view: (B, B)} of the global batch, pair (i, i) positive; scale: of NCE's logits; exclude (B, B)
        bool: pairs that are no negatives. Returns {name: scalar}, to be summed.
        """
        flags = self.flags
        # Eq. 5's 1/2; the released code has none.
        half = 0.5 if flags.fidelity == "paper" and "narration" in similarity else 1.0
        parts = {f"nce_{view}": half * losses.nce(s, scale, exclude) for view, s in similarity.items()}
        if "CVH" in flags.modules:
            views = (similarity["video"], similarity["narration"])
            if flags.hard_loss == "hinge":
                hard = losses.cross_view_hard_negative(*views, lam=flags.lam, eta=flags.eta, exclude=exclude)
            else:
                hard = losses.hard_negative_nce(*views, lam=flags.lam, scale=scale, exclude=exclude)
            parts |= {name: flags.alpha * value for name, value in hard.items()}
        return parts
