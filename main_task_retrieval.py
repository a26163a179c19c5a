"""Train and evaluate NarVid: python main_task_retrieval.py --config configs/msrvtt_vitb16.yaml --output_dir runs/msrvtt

Works alike under plain python (CPU or one GPU) and torchrun (gloo or nccl). From top to bottom: a training step, an
evaluation, the run and its loop. Flags are declared in narvid/run/settings.py, and a method's own in its file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from narvid import InputError, distributed
from narvid.data.datasets import FrameDataset, Split, collate, read_queries
from narvid.data.loader import PairSampler, make_loader
from narvid.flags import command
from narvid.evaluation import (choose_weight, frames_kept, score_queries, score_split, selection_score, show, show_kept,
                               table_of_matrices, with_dsl, with_qb_norm)
from narvid.metrics import text_to_video_ranks
from narvid.profiling import Interval, Profile, all_reduce, stage
from narvid.progress import tqdm
from narvid.run import optim, same_run
from narvid.run.build import build_model, encoding_of, load_data, with_cached_features
from narvid.run.endings import Signals, Stopped, in_one_sentence
from narvid.run.gradient_cache import backward_in_parts
from narvid.run.run_dir import RunDir
from narvid.run.settings import ON_VAL, autocast, parse_args

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
        plain(model).clip.bound_scale()  # not inside forward, where the gradient would vanish at the bound
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
        raise distributed.SaidByAll(f"{what} is {value}; videos of the batch: {names}. The last good checkpoint is "
                                    "kept; lower the learning rates or look at these videos")


def plain(model) -> torch.nn.Module:
    """The model below DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluate(model, splits: dict, name: str, args, world, run: RunDir, *, final: bool = False,
             bank: list[str] | None = None) -> dict:
    """One split -> {"split", "metrics", "dsl"?, "qb_norm"?, ...}; post-processing is for the final evaluation.

    bank: other queries, for QB-Norm.
    """
    trained = plain(model).eval()
    model = trained if args.eval_precision == "train" else optim.in_fp32(trained)
    split = splits[name]
    encoding = encoding_of(model, args, world)
    videos, scores = score_split(model, split, encoding, world)
    result = {"split": name, "select_on": args.select_on, "queries": len(split.queries), "videos": len(split.videos),
              "videos_without_narration": len(split.skipped), "videos_missing": split.missing,
              "eval_precision": args.eval_precision}
    weight = args.fusion_weight
    if weight == ON_VAL:
        of_val = scores if name == "val" else score_split(model, splits["val"], encoding, world)[1]
        weight = distributed.from_first(
            lambda: choose_weight(of_val, splits["val"].video_of_query, model.combine), world)
        result |= {"fusion_weight": weight, "fusion_weight_on": "val"}
    elif weight != 0.5:  # not Eq. 11's
        result |= {"fusion_weight": weight}
    truth = (split.video_of_query, partial(model.combine, weight=weight))
    result["metrics"] = distributed.from_first(lambda: table_of_matrices(scores, *truth, ndcg=args.ndcg), world)
    if final and world.rank == 0:
        ranks = {name: text_to_video_ranks(s.numpy(), split.video_of_query) for name, s in truth[1](scores)}
        run.save_csv("ranks.csv", {"video": [split.videos[v] for v in split.video_of_query], "query": split.queries,
                                   **ranks})
    if final and (kept := frames_kept(model, split.queries, videos, encoding, world)):
        result["frames_kept"] = kept
    if final and args.show_kept:
        run.log(show_kept(model, args.show_kept, split, videos, scores, encoding, world, truth[1]))
    if final and args.dsl_scale:
        result["dsl"] = distributed.from_first(lambda: with_dsl(scores, *truth, args.dsl_scale, ndcg=args.ndcg), world)
    if final and bank:
        of_bank = score_queries(model, bank, videos, encoding, world)
        result["qb_norm"] = distributed.from_first(lambda: with_qb_norm(scores, of_bank, *truth, ndcg=args.ndcg), world)
    if final and args.save_similarity:
        names = {"video": "S_qv", "narration": "S_qn"}
        run.save_arrays("similarity.npz", {"video_of_query": split.video_of_query, "videos": np.array(split.videos),
                                           "queries": np.array(split.queries),
                                           **{names.get(view, f"S_{view}"): s.numpy() for view, s in scores.items()}})
    trained.train()
    return result


# ------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """One run, of flags as on the command line -> {"S_qv" | "S_qn" | "S_sum" | "S_fusion": retrieval_metrics of test}.
    A user's mistake, a signal or a lost process ends it by SystemExit, with one sentence."""
    with in_one_sentence(), Signals() as signals:
        args, error = None, None
        try:
            args = parse_args(argv)
        except SystemExit as left:
            if not isinstance(left.code, str):  # --help
                raise
            error = left.code.removeprefix("error: ")
        world = distributed.start(args.rank_timeout) if args else distributed.start()
        distributed.agree(error, world)
        with contextlib.closing(RunDir(args.output_dir, vars(args), writes=world.rank == 0)) as run:
            return run_task(args, world, run, signals)["metrics"]


def run_task(args: argparse.Namespace, world: distributed.World, run: RunDir, signals: Signals) -> dict:
    """All of a run, from where its folder says that it is -> its final result."""
    with signals.at_once():
        last, ended = begin(args, world, run)
        if ended:
            run.log(f"{args.output_dir}: this run has ended\n{show(ended)}")
            return ended
        seed_everything(args)
        with distributed.together(world):
            model = build_model(args, last)
            run.try_writing(model, trained=not args.eval_only)
            bank = read_queries(Path(args.data_dir, "train.jsonl")) if args.qb_norm_queries else []
        model.to(world.device)
        splits = load_data(args, world, model.clip.tokenizer.lengths)
        with distributed.together(world):
            identity = same_run.identity_of(args, splits, world)
        distributed.check_same(identity["data"], world)
        with distributed.together(world):
            said = same_run.check(args.output_dir, last, identity, args) if last and world.rank == 0 else []
        if args.feature_cache:
            splits = with_cached_features(splits, model, args, world)
        test = partial(evaluate, splits=splits, name="test", args=args, world=world, run=run, final=True,
                       bank=random.Random(args.seed).sample(bank, min(args.qb_norm_queries, len(bank))))
        if args.eval_only:
            run.open()
            return finish(run, [], test(model) | model.progress)
        with distributed.together(world):
            parts = training_parts(model, splits["train"], args, world)
            progress = resume(run, last, parts)
        progress, last = distributed.from_first(lambda: progress, world), None
        with distributed.together(world):
            run.open(tensorboard=args.tensorboard, step=progress["global_step"])
            if progress["global_step"]:  # it must not keep evaluations of steps that are run again
                run.write_results(progress["results"])
            for sentence in said:
                run.log(sentence)
    train(parts, progress, splits, identity, args, world, run, signals)
    with signals.at_once():
        with distributed.together(world):
            best = run.load("best.pt") if world.rank == 0 else None
            if world.rank == 0 and best is None:
                raise InputError(f"{run.path / 'best.pt'}: is gone; evaluate last.pt, --eval_only --checkpoint")
        if best:
            model.load_state_dict(best["model"])
        distributed.spread(model, world)
        of_best = distributed.from_first(lambda: {name: best[name] for name in ("epoch", "step")}, world)
        return finish(run, progress["results"], test(model) | of_best)


class Training(NamedTuple):
    """What is trained, and with what."""

    model: torch.nn.Module
    split: Split
    sampler: PairSampler
    loader: DataLoader
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def training_parts(model: torch.nn.Module, split: Split, args: argparse.Namespace,
                   world: distributed.World) -> Training:
    """The training split's batches for this rank, and the optimiser."""
    sampler = PairSampler(len(split.queries), args.batch_size, rank=world.rank, world_size=world.size, seed=args.seed,
                          accumulation=args.gradient_accumulation_steps)
    dataset = FrameDataset(split, split.video_of_query, model.clip.picture, cache=args.cache_frames,
                           seed=args.seed, segments=args.max_frames if args.frame_sampling == "segments" else None)
    to_batch = partial(collate, split=split, tokenize=model.clip.tokenizer, max_words=args.max_words,
                       max_frames=args.max_frames, with_queries=True)
    loader = make_loader(dataset, to_batch, sampler, num_workers=args.num_workers)
    optimizer = optim.build_optimizer(model, recipe=args.recipe, lr=args.lr, clip_lr=args.clip_lr,
                                      weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.recipe == "modern" and args.precision == "fp16")
    return Training(model, split, sampler, loader, optimizer, scaler)


def train(parts: Training, progress: dict, splits: dict[str, Split], identity: dict, args: argparse.Namespace,
          world: distributed.World, run: RunDir, signals: Signals) -> None:
    """From `progress` to the last epoch; best.pt and last.pt are written. A signal ends it with Stopped."""
    model, saved_at = parts.model, [time.monotonic()]

    def write(name: str, result: dict | None = None) -> None:
        if not all(p.isfinite().all() for p in model.parameters()):
            raise InputError(f"the weights are not finite after step {progress['global_step']}; the last good "
                             "checkpoint is kept, lower the learning rates")
        # What a checkpoint says of its choice: only best.pt was chosen.
        stored = vars(args) | ({"select_on": "last"} if name == "last.pt" else {})
        stored |= {"fusion_weight": result["fusion_weight"]} if result and "fusion_weight" in result else {}
        state = {"model": model.state_dict(), "clip_config": asdict(model.clip.config), "args": stored,
                 "identity": identity, **progress}
        if name == "last.pt":
            state |= {"optimizer": parts.optimizer.state_dict(), "scaler": parts.scaler.state_dict()}
        run.save(name, state)
        saved_at[0] = time.monotonic()

    def save(name: str, result: dict | None = None) -> None:
        with distributed.together(world):
            write(name, result)

    def heed(error: InputError | None = None) -> None:
        """Between two steps: all ranks end if one has failed or got a signal; rank 0's clock saves for all."""
        failed, due = error is not None, 0 < 60 * args.save_every_minutes < time.monotonic() - saved_at[0]
        failed, number, due = distributed.highest([failed, signals.number, due and world.rank == 0], world)
        if number:  # first: the signal may have gone to the loader's workers too, which are missed then
            raise Stopped(number)
        if failed:
            if progress["global_step"]:
                save("last.pt")
            distributed.agree(error and str(error), world)
        if due:
            save("last.pt")

    def select() -> None:
        """Evaluate the split that chooses the epoch, keep the best; then write last.pt, which knows of both."""
        if args.select_on != "last":
            heed()
            with signals.at_once():
                result = evaluate(model, splits, args.select_on, args, world, run)
            result |= {"epoch": progress["epoch"], "step": progress["step"]}
            progress["results"].append(result)
            run.log(show(result))
            run.scalars({f"{args.select_on}/R@1": selection_score(result)}, progress["global_step"])
            progress["to_select"] = False
            if selection_score(result) > progress["best"]:
                progress["best"] = selection_score(result)
                save("best.pt", result)
            run.write_results(progress["results"])
        progress["to_select"] = False
        save("last.pt")

    try:
        train_epochs(parts, progress, args, world, run, save=partial(save, "last.pt"), select=select, heed=heed)
    except (Stopped, RuntimeError, InputError) as end:
        # What was interrupted, a step before its update or an evaluation, had changed nothing yet.
        if isinstance(end, Stopped) or distributed.is_lost(end) or progress["to_select"]:
            write("last.pt")
            end.saved = f"last.pt holds epoch {progress['epoch'] + 1}, step {progress['step']}"
        raise
    if args.select_on == "last":
        with signals.at_once():  # best.pt holds the weight that is chosen on val
            result = evaluate(model, splits, "val", args, world, run) if args.fusion_weight == ON_VAL else None
        save("best.pt", result)


def begin(args: argparse.Namespace, world: distributed.World, run: RunDir) -> tuple[dict | None, dict | None]:
    """Own the run's folder -> what it holds of this run: last.pt and, if the run has ended, its final result."""
    with distributed.together(world):
        before = run.own(resume=args.resume == "auto")
        if before is not None:
            same_run.check_settings(args.output_dir, before, args)
    last = ended = None
    with distributed.together(world):
        last = run.load("last.pt") if args.resume == "auto" and not args.eval_only else None
        # At another path the data may be another: then it is read and compared before the result is printed.
        if before is not None and all(before.get(name) == getattr(args, name, None) for name in same_run.OF_DATA):
            ended = run.final_result()
    distributed.check_same({name: last[name] if last else 0 for name in ("epoch", "step", "global_step")}, world)
    return last, distributed.from_first(lambda: ended, world)


def resume(run: RunDir, last: dict | None, parts: Training) -> dict:
    """Where to go on: progress and results so far; the optimiser and the loss scale take theirs from last.pt.

    Nothing random is stored: the order of samples comes from (seed, epoch), dropout from (seed, step, rank).
    """
    fresh = {"epoch": 0, "step": 0, "global_step": 0, "best": -1.0, "results": []}
    if last is None:
        return fresh | {"to_select": False}
    try:
        parts.optimizer.load_state_dict(last["optimizer"])
        parts.scaler.load_state_dict(last["scaler"])
        progress = {key: last[key] for key in fresh} | {"to_select": last.get("to_select", False)}
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise run.damaged("last.pt", f"{run.path / 'last.pt'}: is damaged ({error})") from error
    best = run.load("best.pt")
    if best and best["global_step"] > progress["global_step"]:
        progress["best"] = fresh["best"]  # written just before the kill; on a GPU its score may not come again
    return progress


def train_epochs(parts: Training, progress: dict, args, world, run: RunDir, *, save, select, heed) -> None:
    """All epochs that are left; `progress` is always that of the last whole step."""
    model = DistributedDataParallel(parts.model, gradient_as_bucket_view=True) if world.size > 1 else parts.model
    profile = Profile(args.profile, world.device)
    if args.profile and world.size > 1:
        model.register_comm_hook(None, all_reduce)
    run.log(f"{len(parts.split.queries)} pairs of {len(parts.split.videos)} videos, {parts.sampler.steps} steps an "
            f"epoch; {world.size} process(es), {world.device.type}; from epoch {progress['epoch'] + 1}, step "
            f"{progress['step']}")
    if progress["to_select"]:  # a signal came before the evaluation was over
        select()
    while progress["epoch"] < args.epochs:
        train_one_epoch(model, parts, progress, args, world, run, profile, save=save, select=select, heed=heed)
    if said := profile.cut_short():
        run.log(said)


def train_one_epoch(model, parts: Training, progress: dict, args, world, run: RunDir, profile: Profile, *, save, select,
                    heed) -> None:
    """From progress["step"] to the end of progress["epoch"]; leaves progress at the start of the next epoch."""
    epoch, sampler = progress["epoch"], parts.sampler
    sampler.set(epoch, progress["step"])
    parts.loader.dataset.epoch.fill_(epoch)
    try:
        batches = iter(parts.loader)
    except InputError as error:  # a worker died at its start: of a signal to the whole group, or of itself
        heed(error)
    interval = Interval(world.device)
    steps = tqdm(range(progress["step"], sampler.steps), initial=progress["step"], total=sampler.steps,
                 desc=f"epoch {epoch + 1}/{args.epochs}", unit="step", disable=world.rank > 0)
    for step in steps:
        factor = optim.warmup_cosine(progress["global_step"] / (sampler.steps * args.epochs), args.warmup)
        optim.set_lr(parts.optimizer, factor)
        seed = np.random.SeedSequence([args.seed, progress["global_step"], world.rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))  # dropout
        with profile.step():
            of_step, error = [], None
            with stage("data"), interval.waiting():
                try:
                    of_step += [next(batches) for _ in range(args.gradient_accumulation_steps)]
                except InputError as bad:
                    error = bad
            heed(error)
            values, norm = train_step(model, of_step, parts.optimizer, parts.scaler,
                                      f"epoch {epoch + 1}, step {step + 1}", parts.split, args, world)
        if table := profile.table():
            run.log(table)
        ends = step + 1 == sampler.steps
        progress |= {"epoch": epoch + ends, "step": 0 if ends else step + 1, "global_step": progress["global_step"] + 1,
                     "to_select": bool(ends or args.eval_every and (step + 1) % args.eval_every == 0)}
        loss = sum(values.values())
        steps.set_postfix(loss=f"{loss:.3f}", refresh=False)
        interval.pairs += args.batch_size
        if progress["global_step"] % args.log_every == 0:
            values = {"loss": loss, **values, "lr": factor * args.lr, "clip_lr": factor * args.clip_lr,
                      "gradient_norm": norm, "scale": parts.model.clip.logit_scale.exp().item(),
                      **interval.measured()}
            run.log(f"{time.strftime('%H:%M:%S')} epoch {epoch + 1} step {step + 1}/{sampler.steps} "
                    + " ".join(f"{name} {value:{FORMATS.get(name, '.4f')}}" for name, value in values.items()))
            run.scalars(values, progress["global_step"])
        if progress["to_select"]:
            select()
        elif args.save_every and (step + 1) % args.save_every == 0:
            save()


FORMATS = {"lr": ".2e", "clip_lr": ".2e", "scale": ".1f", "gradient_norm": ".3g", "pairs/s": ".1f",
           "data_wait": ".0%", "peak_GiB": ".1f"}  # of a logged value; a loss has four decimals


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
    command(main)
