"""Train and evaluate NarVid: python main_task_retrieval.py --config configs/msrvtt_vitb16.yaml --output_dir runs/msrvtt

Works alike under plain python (CPU or one GPU) and torchrun (gloo or nccl). From top to bottom: a training step, an
evaluation, the run and its loop. Flags are declared in narvid/run/settings.py, and a method's own in its file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from narvid import InputError, distributed
from narvid.data.datasets import FrameDataset, PairSampler, collate, make_loader, read_queries
from narvid.evaluation import (encode_videos, frames_kept, score_queries, selection_score, show, show_kept,
                               table_of_matrices, with_dsl, with_qb_norm)
from narvid.metrics import text_to_video_ranks
from narvid.model import TemporalBlock
from narvid.profiling import Profile, all_reduce, stage
from narvid.progress import tqdm
from narvid.run import optim
from narvid.run.build import build_model, encoding_of, load_data
from narvid.run.feature_cache import with_features
from narvid.run.gradient_cache import backward_in_parts
from narvid.run.run_dir import RunDir
from narvid.run.settings import autocast, parse_args

# --------------------------------------------------------------------------------------------------------- training


def train_step(model, batches: list, optimizer, scaler, where: str, split, args,
               world) -> tuple[dict[str, float], float]:
    """One optimiser step over the parts of one global batch that have a loss each -> mean loss parts, gradient norm."""
    totals: dict[str, torch.Tensor] = {}
    optimizer.zero_grad(set_to_none=True)

    def loss_of(batch, queries, videos, scale) -> torch.Tensor:
        """This rank's features -> the loss of the whole batch, on every rank; scaled for backward."""
        # Every rank scores its queries with all videos, then the rows meet: words stay where they are.
        videos = distributed.gather_features(videos)
        with stage("matching"):
            similarity = {view: distributed.gather(s) for view, s in plain(model).score(queries, videos).items()}
        video = distributed.gather(batch.video.to(world.device, non_blocking=True))
        exclude = video[:, None] == video[None, :] if args.exclude_same_video else None
        with stage("loss"):  # Eq. 10, as named parts to be summed
            parts = plain(model).loss(similarity, scale, exclude)
        for name, value in parts.items():
            totals[name] = totals.get(name, 0) + value.detach().double() / len(batches)
        return scaler.scale(sum(parts.values()) / len(batches))

    encode = partial(features_of, model, args=args, world=world)
    no_sync = model.no_sync if world.size > 1 else contextlib.nullcontext
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        if 0 < args.micro_batch < len(batch.video):
            backward_in_parts(encode, partial(loss_of, batch), batch, args.micro_batch, no_sync, reduce=last)
        else:
            with contextlib.nullcontext() if last else no_sync():
                loss = loss_of(batch, *encode(batch))
                with stage("backward"):
                    loss.backward()
    with stage("optimiser"):
        scaler.unscale_(optimizer)
        norm = optim.clip_gradients(model.parameters(), args.max_grad_norm)
        *values, norm = torch.stack([*totals.values(), norm.double()]).tolist()  # the CPU waits for the GPU
        stop_unless_finite(sum(values), f"the loss at {where}", batches, split, world)
        if not scaler.is_enabled():  # a scaler skips such a step and halves its scale
            stop_unless_finite(norm, f"the gradient at {where}", batches, split, world)
        scaler.step(optimizer)
        scaler.update()
        if scaler.is_enabled() and scaler.get_scale() < 1:
            stop_unless_finite(norm, f"even at loss scale 1 the gradient at {where}", batches, split, world)
        with torch.no_grad():  # CLIP's own bound; not inside forward, where the gradient would vanish at it
            plain(model).clip.logit_scale.clamp_(max=np.log(100))
    return dict(zip(totals, values)), norm


def features_of(model, batch, args, world) -> tuple:
    """A batch -> queries, videos and logit scale."""
    with stage("data"):
        batch = batch.to(world.device)
    with stage("heads"), autocast(args, world.device):  # less the towers, which have a mark of their own
        return model(batch.tokens, batch.word_mask, batch.frames, batch.mask, batch.sentences, batch.sentence_of_frame,
                     batch.narration_mask)


def stop_unless_finite(value: float, what: str, batches: list, split, world) -> None:
    """Loss and gradient norm are the same on all ranks, so all stop; last.pt stays as it is."""
    if not np.isfinite(value):
        index = distributed.gather(torch.cat([batch.video for batch in batches]).to(world.device))
        names = ", ".join(split.videos[v] for v in index.tolist())
        raise InputError(f"{what} is {value}; videos of the batch: {names}. The last good checkpoint is kept; "
                         "lower the learning rates or look at these videos")


def plain(model) -> torch.nn.Module:
    """The model below DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluate(model, splits: dict, name: str, args, world, run: RunDir, *, final: bool = False) -> dict:
    """One split -> {"split", "metrics", "dsl"?, "qb_norm"?, ...}; post-processing is for the final evaluation."""
    model = plain(model).eval()
    split = splits[name]
    encoding = encoding_of(model, args, world)
    videos = encode_videos(model, split, encoding, world)
    scores = score_queries(model, split.queries, videos, encoding, world)
    result = {"split": name, "select_on": args.select_on, "queries": len(split.queries), "videos": len(split.videos),
              "videos_without_narration": len(split.skipped), "videos_missing": split.missing}
    truth = (split.video_of_query, partial(model.combine, weight=args.fusion_weight))
    result["metrics"] = distributed.from_first(lambda: table_of_matrices(scores, *truth), world)
    if final and world.rank == 0:
        ranks = {name: text_to_video_ranks(s.numpy(), split.video_of_query) for name, s in truth[1](scores)}
        run.save_csv("ranks.csv", {"video": [split.videos[v] for v in split.video_of_query], "query": split.queries,
                                   **ranks})
    if final and (kept := frames_kept(model, split.queries, videos, encoding, world)):
        result["frames_kept"] = kept
    if final and args.show_kept:
        run.log(show_kept(model, args.show_kept, split, videos, scores, encoding, world, truth[1]))
    if final and args.dsl_scale:
        result["dsl"] = distributed.from_first(lambda: with_dsl(scores, *truth, args.dsl_scale), world)
    if final and args.qb_norm_queries:
        queries = read_queries(Path(args.data_dir, "train.jsonl"))
        queries = random.Random(args.seed).sample(queries, min(args.qb_norm_queries, len(queries)))
        bank = score_queries(model, queries, videos, encoding, world)
        result["qb_norm"] = distributed.from_first(lambda: with_qb_norm(scores, bank, *truth), world)
    if final and args.save_similarity:
        names = {"video": "S_qv", "narration": "S_qn"}
        run.save_arrays("similarity.npz", {"video_of_query": split.video_of_query, "videos": np.array(split.videos),
                                           "queries": np.array(split.queries),
                                           **{names.get(view, f"S_{view}"): s.numpy() for view, s in scores.items()}})
    model.train()
    return result


# ------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """One run -> the test metrics {"S_qv" | "S_qn" | "S_sum" | "S_fusion": what retrieval_metrics returns}."""
    args = parse_args(argv)
    try:
        return run_task(args, distributed.start())["metrics"]
    except InputError as error:
        sys.exit(f"error: {error}")
    finally:
        distributed.stop()


def run_task(args: argparse.Namespace, world: distributed.World) -> dict:
    run = RunDir(args.output_dir, vars(args), resume=args.resume == "auto", writes=world.rank == 0)
    if args.resume == "auto" and (result := run.final_result()):
        run.log(f"{args.output_dir}: this run has ended\n{show(result)}")
        return result
    seed_everything(args)
    splits = load_data(args, world)
    model = build_model(args)
    model.to(world.device)
    if args.feature_cache:
        splits = with_features(splits, args.feature_cache, model.clip, encoding_of(model, args, world), world)
    test = partial(evaluate, splits=splits, name="test", args=args, world=world, run=run, final=True)
    if args.eval_only:
        run.open()
        return finish(run, [], test(model) | model.progress)

    train = splits["train"]
    sampler = PairSampler(len(train.queries), args.batch_size, rank=world.rank, world_size=world.size,
                          seed=args.seed, accumulation=args.gradient_accumulation_steps)
    dataset = FrameDataset(train, train.video_of_query, model.clip.config.image_size, cache=args.cache_frames,
                           seed=args.seed, segments=args.max_frames if args.frame_sampling == "segments" else None)
    to_batch = partial(collate, split=train, max_words=args.max_words, max_frames=args.max_frames, with_queries=True)
    loader = make_loader(dataset, to_batch, sampler, num_workers=args.num_workers)
    optimizer = optim.build_optimizer(model, recipe=args.recipe, lr=args.lr, clip_lr=args.clip_lr,
                                      weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.recipe == "modern" and args.precision == "fp16")
    progress = resume(run, model, optimizer, scaler)
    run.open(tensorboard=args.tensorboard, step=progress["global_step"])
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    profile = Profile(args.profile, world.device)
    if args.profile and world.size > 1:
        wrapped.register_comm_hook(None, all_reduce)
    run.log(f"{len(train.queries)} pairs of {len(train.videos)} videos, {sampler.steps} steps an epoch; {world.size} "
            f"process(es), {world.device.type}; from epoch {progress['epoch'] + 1}, step {progress['step']}")

    def save(name: str) -> None:
        if not all(p.isfinite().all() for p in model.parameters()):
            raise InputError(f"the weights are not finite after step {progress['global_step']}; the last good "
                             "checkpoint is kept, lower the learning rates")
        # What a checkpoint says of its choice: only best.pt was chosen.
        stored = vars(args) | ({"select_on": "last"} if name == "last.pt" else {})
        state = {"model": model.state_dict(), "clip_config": asdict(model.clip.config), "args": stored, **progress}
        if name == "last.pt":
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        run.save(name, state)

    def select() -> None:
        """Evaluate the split that chooses the epoch, keep the best; then write last.pt, which knows of both."""
        if args.select_on != "last":
            result = evaluate(model, splits, args.select_on, args, world, run)
            result |= {"epoch": progress["epoch"], "step": progress["step"]}
            progress["results"].append(result)
            run.log(show(result))
            run.scalars({f"{args.select_on}/R@1": selection_score(result)}, progress["global_step"])
            if selection_score(result) > progress["best"]:
                progress["best"] = selection_score(result)
                save("best.pt")
            run.write_results(progress["results"])
        save("last.pt")

    while progress["epoch"] < args.epochs:
        train_one_epoch(wrapped, loader, sampler, optimizer, scaler, progress, train, args, world, run, profile,
                        save=partial(save, "last.pt"), select=select)
    if args.select_on == "last":
        save("best.pt")
    distributed.barrier(world)  # rank 0 has written best.pt
    best = run.load("best.pt")
    model.load_state_dict(best["model"])
    return finish(run, progress["results"], test(model) | {"epoch": best["epoch"], "step": best["step"]})


def resume(run: RunDir, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler) -> dict:
    """Where to go on: 1. weights, 2. optimiser, 3. loss scale, 4. progress and results so far.

    Nothing random is stored: the order of samples comes from (seed, epoch), dropout from (seed, step, rank).
    """
    state = run.load("last.pt")
    fresh = {"epoch": 0, "step": 0, "global_step": 0, "best": -1.0, "results": []}
    if state is None:
        return fresh
    if (state["clip_config"].get("temporal_quick_gelu", True) != model.clip.config.temporal_quick_gelu
            and any(isinstance(module, TemporalBlock) for module in model.modules())):
        raise InputError(f"{run.path}: was started by an earlier version, whose temporal blocks ran with QuickGELU; "
                         f"start a new run with --checkpoint {run.path / 'last.pt'}, which keeps it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    run.write_results(state["results"])
    progress = {key: state[key] for key in fresh}
    best = run.load("best.pt")
    if best and best["global_step"] > progress["global_step"]:
        progress["best"] = fresh["best"]  # written just before the kill; on a GPU its score may not come again
    return progress


def train_one_epoch(model, loader, sampler: PairSampler, optimizer, scaler, progress: dict, split, args, world,
                    run: RunDir, profile: Profile, *, save, select) -> None:
    """From progress["step"] to the end of progress["epoch"]; leaves progress at the start of the next epoch."""
    epoch, total = progress["epoch"], sampler.steps * args.epochs
    sampler.set(epoch, progress["step"])
    loader.dataset.epoch.fill_(epoch)
    batches, interval = iter(loader), Interval(world.device)
    steps = tqdm(range(progress["step"], sampler.steps), initial=progress["step"], total=sampler.steps,
                 desc=f"epoch {epoch + 1}/{args.epochs}", unit="step", disable=world.rank > 0)
    for step in steps:
        factor = optim.warmup_cosine(progress["global_step"] / total, args.warmup)
        optim.set_lr(optimizer, factor)
        seed = np.random.SeedSequence([args.seed, progress["global_step"], world.rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))  # dropout
        with profile.step():
            with stage("data"), interval.waiting():
                of_step = [next(batches) for _ in range(args.gradient_accumulation_steps)]
            parts, norm = train_step(model, of_step, optimizer, scaler, f"epoch {epoch + 1}, step {step + 1}", split,
                                     args, world)
        if table := profile.table():
            run.log(table)
        progress["step"], progress["global_step"] = step + 1, progress["global_step"] + 1
        loss = sum(parts.values())
        steps.set_postfix(loss=f"{loss:.3f}", refresh=False)
        interval.pairs += args.batch_size
        if progress["global_step"] % args.log_every == 0:
            values = {"loss": loss, **parts, "lr": factor * args.lr, "clip_lr": factor * args.clip_lr,
                      "gradient_norm": norm, "scale": plain(model).clip.logit_scale.exp().item(),
                      **interval.measured()}
            run.log(f"{time.strftime('%H:%M:%S')} epoch {epoch + 1} step {step + 1}/{sampler.steps} "
                    + " ".join(f"{name} {value:{FORMATS.get(name, '.4f')}}" for name, value in values.items()))
            run.scalars(values, progress["global_step"])
        if step + 1 == sampler.steps:
            progress["epoch"], progress["step"] = epoch + 1, 0
            select()
        elif args.eval_every and (step + 1) % args.eval_every == 0:
            select()
        elif args.save_every and (step + 1) % args.save_every == 0:
            save()


FORMATS = {"lr": ".2e", "clip_lr": ".2e", "scale": ".1f", "gradient_norm": ".3g", "pairs/s": ".1f",
           "data_wait": ".0%", "peak_GiB": ".1f"}  # of a logged value; a loss has four decimals


class Interval:
    """What is measured between two logged lines: pairs a second, the share of time waiting for data, peak memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self.start, self.waited, self.pairs = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        """The time inside is spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def measured(self) -> dict[str, float]:
        """{"pairs/s", "data_wait"} since the last call, and on a GPU "peak_GiB" so far."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        values = {"pairs/s": self.pairs / seconds, "data_wait": self.waited / seconds}
        if self.device.type == "cuda":
            values["peak_GiB"] = torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        self._begin()
        return values


def finish(run: RunDir, results: list[dict], result: dict) -> dict:
    """Record and print the test result that ends a run."""
    result |= {"final": True}
    run.write_results([*results, result])
    run.log(show(result))
    return result


def seed_everything(args: argparse.Namespace) -> None:
    """Seeds for the initial weights; every later draw is seeded where it is made."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


if __name__ == "__main__":
    main()
