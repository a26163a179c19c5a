#!/usr/bin/env bash
# When do filtering and narration pay? bash scripts/study_narration.sh [flags of study_narration.py]
#
# 1. towers: those of the demo (scripts/demo.sh, where runs/demo is not there), common to all runs.
# 2. three corpora of the demo's generator, demo_study/{1of6,1of3,2of3}: a query speaks of one of six events, of one of three,
#    of two of three; each narrated by captioners of which 0, 20 and 50 % of the sentences are of nothing shown.
# 3. study_narration.py trains every cell and writes demo_study/runs/study.md and study.png.
# What is done is skipped; --tiny makes and trains as little as possible, to see that it works.
set -euo pipefail
source "$(dirname "$0")/env.sh"
size="--train 320 --val 8 --test 100" out=demo_study
for flag in "$@"; do [ "$flag" = --tiny ] && size="--train 8 --val 2 --test 4" out=demo_study_tiny; done

[ -f runs/demo/best.pt ] || bash scripts/demo.sh
corpus() { # NAME EVENTS MENTIONED
    folder=$out/$1
    [ -f "$folder/narrations_50.jsonl" ] && return # written last
    # shellcheck disable=SC2086
    "$PYTHON" scripts/make_demo_corpus.py videos --out "$folder" --seed 21 --events "$2" --mentioned "$3" $size
    "$PYTHON" data/prepare_msrvtt.py --annotations "$folder/annotations" --protocol full --allow_partial \
        --videos "$folder/videos" --out "$folder"
    "$PYTHON" scripts/extract_frames.py --videos "$folder/videos" --out "$folder/frames"
    for percent in 0 20 50; do
        "$PYTHON" scripts/make_demo_corpus.py narrate --out "$folder" --seed 21 --colour_rate 0 --shape_rate 0 \
            --hallucination_rate "0.$(printf %02d "$percent")" >"$folder/narrate_$percent.txt"
        mv "$folder/narrations.jsonl" "$folder/narrations_$percent.jsonl"
    done
}
corpus 1of6 6 1
corpus 1of3 3 1
corpus 2of3 3 2
"$PYTHON" scripts/study_narration.py --corpora "$out" "$@"
