#!/usr/bin/env bash
# Tables 3, 4 and 11 of the paper on the demo's generator: bash scripts/ablate_demo.sh [flags of ablate_demo.py]
#
# 1. towers: as the paper starts from CLIP, every row starts from towers that know pictures and sentences. They are
#    trained once, with narration matching alone, on videos of another seed (demo_ablate_towers/).
# 2. every row, with every seed, goes on from them on demo_ablate/: 1,280 training, 100 val, 400 test videos with 20
#    queries each; then runs/ablate/ablation.md.
# Measured on two busy cores: towers 12 minutes, a run of 60 steps about 80 s of one core; 33 runs, two at a time.
# What is done is skipped; delete demo_ablate*/ and runs/ablate/ to start over.
set -euo pipefail
source "$(dirname "$0")/env.sh"

corpus() { # FOLDER SEED PROTOCOL [flags of make_demo_corpus.py videos]
    folder=$1 seed=$2 protocol=$3
    shift 3
    [ -f "$folder/narrations.jsonl" ] && return # written last
    "$PYTHON" scripts/make_demo_corpus.py videos --out "$folder" --seed "$seed" "$@"
    "$PYTHON" data/prepare_msrvtt.py --annotations "$folder/annotations" --protocol "$protocol" --allow_partial \
        --videos "$folder/videos" --out "$folder"
    "$PYTHON" scripts/extract_frames.py --videos "$folder/videos" --out "$folder/frames"
    "$PYTHON" scripts/make_demo_corpus.py narrate --out "$folder" --frames "$folder/frames" --seed "$seed"
}

echo "== 1/3 corpora -> demo_ablate_towers/, demo_ablate/"
corpus demo_ablate_towers 7 9k --train 1280 --test 100
corpus demo_ablate 0 full --train 1280 --val 100 --test 400
echo "== 2/3 towers -> runs/ablate/towers/"
"$PYTHON" main_task_retrieval.py --config configs/demo.yaml --data_dir demo_ablate_towers --modules NM \
    --temporal_layers 1 --seed 7 --output_dir runs/ablate/towers --resume auto
echo "== 3/3 the rows -> runs/ablate/"
"$PYTHON" scripts/ablate_demo.py "$@"
