"""A training run keeps to itself: no network, no file outside its output and cache, no pickle."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor
from tests.reliability.run import CHECKPOINT, dataset

ROOT = Path(__file__).parents[2]


def test_a_training_run_stays_in_its_folders_and_off_the_network(tmp_path, request):
    processor = AutoUnifiedProcessor.from_pretrained(
        CHECKPOINT, generation_size=(64, 32, 16), condition_size=(42, 42, 14), understanding_size=(70, 28, 14)
    )
    AutoUnifiedModel.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for index, row in enumerate(dataset(9)):
        row["image"].save(tmp_path / "images" / f"{index}.png")
    # Workers pass tensors through sockets in the temporary folder, and a socket's path holds at most 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="reca-"))
    request.addfinalizer(lambda: shutil.rmtree(temporary))
    folders = [tmp_path / "output", tmp_path / "cache", temporary]
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "images",
        "output_dir": folders[0],
        "use_peft": True,
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 1,
        "eval_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "preview_steps": 1,
        "preview_images": 1,
        "preview_generation_kwargs": '{"num_inference_steps": 1}',
    }
    script = [ROOT / "recipes" / "bagel_lora.py", *(f"--{name}={value}" for name, value in options.items())]
    place = {"HF_HOME": folders[1], "TMPDIR": folders[2], "XDG_CACHE_HOME": folders[1], "HOME": tmp_path / "home"}
    place |= {"TORCHINDUCTOR_CACHE_DIR": folders[1], "MPLCONFIGDIR": folders[1]}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {name: str(folder) for name, folder in place.items()}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_this_is_a_secret_token"}
    command = [sys.executable, "-m", "tests.reliability.confined", tmp_path / "record", ":".join(map(str, folders))]
    done = subprocess.run(
        list(map(str, command + script)),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert (folders[0] / "checkpoint-2").is_dir()
    assert (tmp_path / "record").read_text().splitlines() == []
    assert not (tmp_path / "home").exists()
    written = b"".join(path.read_bytes() for path in folders[0].rglob("*") if path.is_file())
    assert b"hf_this_is_a" not in written and "hf_this_is_a" not in done.stdout + done.stderr
