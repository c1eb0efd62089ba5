#!/bin/sh
# Everything that benchmarks/README.md reports, one JSON line a file, into benchmarks/results/$(date +%F)_*.json.
# On a quiet machine: under half an hour on two cores. The peer needs requirements-peer.txt in the same environment.
cd "$(dirname "$0")/.." || exit 1
out="benchmarks/results/$(date +%F)"
python=${PYTHON:-python}
threads=${THREADS:-2}
record() { # NAME SCRIPT OPTIONS…: a result is put in place when it is whole
  name=$1; shift
  echo "$(date +%T) $name" >&2
  $python "benchmarks/$@" > "${out}_$name.part" && mv "${out}_$name.part" "${out}_$name.json" || rm -f "${out}_$name.part"
}
for mode in full lora; do
  record peer_$mode peer_automodel.py --mode $mode --threads "$threads" --rounds 5 --steps 1
done
for preset in tiny small mid; do
  for mode in full lora; do
    record step_${preset}_$mode train_step.py --preset $preset --mode $mode --threads "$threads" --steps 5
  done
done
# Memory once more, with an allocator that gives back what is freed: what tensors take, which is what `plan` tells.
for preset in tiny small mid; do
  for mode in full lora; do
    MALLOC_MMAP_THRESHOLD_=131072 record memory_${preset}_$mode train_step.py --preset $preset --mode $mode --threads "$threads" --steps 2
  done
done
for mode in full lora; do
  MALLOC_MMAP_THRESHOLD_=131072 record memory_peer_$mode peer_automodel.py --mode $mode --threads "$threads" --warmup 1 --rounds 1 --steps 1
done
record compare_full compare.py "| --compile | --images encoded | --images encoded --compile | --checkpointing layers | \
  --checkpointing every_second | --checkpointing elementwise" \
  --common "--mode full" --threads "$threads" --rounds 3
record compare_timesteps compare.py "--batch_size 2 | --batch_size 1 --timesteps_per_image 2" \
  --common "--mode full --images pixels" --threads "$threads" --rounds 3
record compile_lengths train_step.py --preset small --compile --instruction_lengths 14 11 17 9 --threads "$threads" --warmup 6 --steps 6
record compare_cached compare.py "--images pixels | --images encoded | --images pixels --optimizer adamw_8bit" \
  --common "--mode full" --threads "$threads" --rounds 3
record timesteps timesteps.py --threads "$threads"
record data_wait_0 data_wait.py --threads "$threads"
record data_wait_1 data_wait.py --threads "$threads" --dataloader_num_workers 1
record load load.py
record sample sample.py --threads "$threads"
record peer_full_layers peer_automodel.py --mode full --checkpointing layers --threads "$threads" --warmup 2 --rounds 2 --steps 1
