#!/bin/sh
# Everything that benchmarks/README.md reports, one JSON line a file, into benchmarks/results/$(date +%F)*.json.
# Best on a quiet machine; about half an hour on two cores. The peer needs requirements-peer.txt.
set -e
cd "$(dirname "$0")/.."
out="benchmarks/results/$(date +%F)"
python=${PYTHON:-python}
for mode in full lora; do
  for kind in none elementwise layers; do
    $python benchmarks/peer_automodel.py --mode $mode --checkpointing $kind > "${out}_peer_${mode}_$kind.json"
  done
  for preset in tiny small mid; do
    $python benchmarks/train_step.py --preset $preset --mode $mode --threads 2 --cached_latents > "${out}_step_${preset}_$mode.json"
  done
done
$python benchmarks/compare.py "--mode full --cached_latents" "--mode full --cached_latents --checkpointing elementwise" --threads 2 > "${out}_compare_elementwise.json"
$python benchmarks/compare.py "--mode full --cached_latents" "--mode full --cached_latents --checkpointing layers" --threads 2 > "${out}_compare_layers.json"
$python benchmarks/compare.py "--mode full --cached_latents" "--mode full --cached_latents --compile" --threads 2 > "${out}_compare_compile.json"
$python benchmarks/compare.py "--mode full" "--mode full --cached_latents" --threads 2 > "${out}_compare_cached_latents.json"
$python benchmarks/compare.py "--mode lora --batch_size 4" "--mode lora --batch_size 2 --timesteps_per_image 2" --threads 2 > "${out}_compare_timesteps.json"
$python benchmarks/load.py > "${out}_load.json"
$python benchmarks/sample.py --threads 2 > "${out}_sample.json"
