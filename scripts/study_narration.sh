#!/usr/bin/env bash
# When do filtering and narration pay? bash scripts/study_narration.sh [flags of study_narration.py]    Result: docs/study.md
#
# 1. towers, common to all runs and frozen there: the demo's (scripts/demo.sh, where runs/demo is not there), trained on
#    for 100 steps with narration matching alone, so with no filter, on clips of two events of which a query names one or
#    both, so on none of the shares that are compared.
# 2. three corpora of the demo's generator, demo_study/{1of6,1of3,2of3}: a query speaks of one of six events, of one of
#    three, of two of three; each narrated by captioners of which 0, 20 and 50 % of the sentences are of nothing shown.
# 3. study_narration.py trains every cell and writes demo_study/runs/study.md and study.png.
# What is done is skipped; --tiny makes and trains as little as possible, to see that it works.
set -euo pipefail
source "$(dirname "$0")/env.sh"
size=(--train 640 --val 50 --test 100) of_towers=(--train 320 --val 8 --test 20) batch=64 out=demo_study
for flag in "$@"; do
    if [ "$flag" = --tiny ]; then
        size=(--train 8 --val 2 --test 4) of_towers=("${size[@]}") batch=8 out=demo_study_tiny
    fi
done

videos() { # FOLDER SEED EVENTS MENTIONED [sizes]
    "$PYTHON" scripts/make_demo_corpus.py videos --out "$1" --seed "$2" --events "$3" --mentioned "$4" "${@:5}"
    "$PYTHON" data/prepare_msrvtt.py --annotations "$1/annotations" --protocol full --allow_partial \
        --videos "$1/videos" --out "$1"
    "$PYTHON" scripts/extract_frames.py --videos "$1/videos" --out "$1/frames"
}
narrate() { # FOLDER SEED PERCENT
    "$PYTHON" scripts/make_demo_corpus.py narrate --out "$1" --seed "$2" --colour_rate 0 --shape_rate 0 \
        --hallucination_rate "0.$(printf %02d "$3")"
}
corpus() { # NAME EVENTS MENTIONED
    folder=$out/$1
    [ -f "$folder/narrations_50.jsonl" ] && return # written last
    videos "$folder" 21 "$2" "$3" "${size[@]}"
    for percent in 0 20 50; do
        narrate "$folder" 21 "$percent" >"$folder/narrate_$percent.txt"
        mv "$folder/narrations.jsonl" "$folder/narrations_$percent.jsonl"
    done
}

echo "== 1/3 towers -> $out/runs/towers/"
if [ ! -f "$out/towers/narrations.jsonl" ]; then
    videos "$out/towers" 22 2 0 "${of_towers[@]}"
    narrate "$out/towers" 22 0
fi
[ -f runs/demo/best.pt ] || bash scripts/demo.sh
"$PYTHON" -c 'import sys; from pathlib import Path; from scripts.ablate_demo import export_towers
export_towers(Path("runs/demo"), Path(sys.argv[1]))' "$out/demo_towers.pt"
"$PYTHON" main_task_retrieval.py --config configs/demo.yaml --data_dir "$out/towers" --modules NM --temporal_layers 1 \
    --clip_pretrained "$out/demo_towers.pt" --no-quick_gelu --clip_lr 3e-4 --max_frames 2 --frame_sampling segments \
    --no-cache_frames --batch_size $batch --num_workers 0 --seed 7 --select_on last --output_dir "$out/runs/towers" --resume auto
echo "== 2/3 corpora -> $out/"
corpus 1of6 6 1
corpus 1of3 3 1
corpus 2of3 3 2
echo "== 3/3 the runs -> $out/runs/"
"$PYTHON" scripts/study_narration.py --corpora "$out" "$@"
