"""Push and pull over real HTTP: huggingface_hub's client in processes of its own against a Hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reca_trainer.models import janus
from reca_trainer.models.auto import AutoUnifiedModel
from reca_trainer.models.weights import CheckpointError
from reca_trainer.saving.card import model_card
from reca_trainer.saving.export import export
from reca_trainer.saving.hub import push, uploaded_files
from tests.hub_server import HubServer, Repo

CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"

COMMON = f"""
import json, os, sys, time
from pathlib import Path
import torch
from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer, adapters
from reca_trainer.saving import hub
from reca_trainer.saving.export import export
from reca_trainer.saving.merge import merge_adapter
time.sleep = lambda seconds: None  # the waits between tries
CHECKPOINT = Path({str(CHECKPOINT)!r})

def velocity(model):
    base = adapters.unwrap(model)
    generator = torch.Generator().manual_seed(0)
    batch = {{"condition_pixel_values": torch.rand(2, 3, 42, 42, generator=generator),
             "pixel_values": torch.rand(2, 3, 64, 48, generator=generator), "input_ids": torch.tensor([[5, 6, 7]])}}
    corruption = base.sample_corruption(batch, generator)
    with torch.no_grad():
        return model.eval()(task="reconstruct", corruption=corruption, **batch).prediction

def attempt(function, *args, **kwargs):
    try:
        result = function(*args, **kwargs)
        return "ok " + str(getattr(result, "pr_url", None) or "")
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
"""


@pytest.fixture
def server():
    with HubServer() as server:
        yield server
        server.shutdown()


def client(server, home, code):
    """Run `code` as a user of `server` with an empty cache; returns the JSON it prints last, and all its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    env["HF_TOKEN"] = server.token
    done = subprocess.run([sys.executable, "-c", COMMON + code], env=env, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stdout + done.stderr


TRAIN = """
import numpy as np
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

export(CHECKPOINT, "base")
Path("base/README.md").write_text("---\\nlicense: apache-2.0\\n---\\n")
hub.push("base", "me/base")
rng = np.random.default_rng(0)
images = [Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)) for _ in range(4)]
processor = AutoUnifiedProcessor.from_pretrained("me/base", generation_size=(64, 32, 16), condition_size=(42, 42, 14))
trainer = RecATrainer(
    "me/base",
    RecAConfig(output_dir="run", hub_model_id="me/adapter", hub_private_repo=True, hub_token=os.environ["HF_TOKEN"],
               push_to_hub=True, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True, report_to="none",
               save_strategy="steps", save_steps=2, preview_steps=2, preview_images=1, preview_prompts=["boat"],
               preview_generation_kwargs={"num_inference_steps": 2}, dataset_name=None),
    train_dataset=Dataset.from_dict({"image": images}), processing_class=processor, peft_config=LoraConfig(r=4),
)
trainer.train()
trainer.push_to_hub()
trainer.push_merged_to_hub("me/merged", layout="published")
print(json.dumps(velocity(trainer.model).flatten().tolist()))
"""

PULL = """
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 65536  # what has arrived is kept in whole chunks
model, merged = (AutoUnifiedModel.from_pretrained(name) for name in ("me/adapter", "me/merged"))
expected = torch.tensor(json.loads(Path("expected.json").read_text()))
merge_adapter("me/base", "me/adapter", "again")
again = AutoUnifiedModel.from_pretrained("again")
distances = [(velocity(m).flatten() - expected).abs().max().item() for m in (model, merged, again)]
revision = model.active_peft_config.revision
processor = AutoUnifiedProcessor.from_pretrained("me/adapter")
from huggingface_hub import hf_hub_download
card = Path(hf_hub_download("me/adapter", "README.md")).read_text()
exec(card.split("```python")[1].split("```")[0])
print(json.dumps({"distances": distances, "revision": revision, "sizes": processor.target_size(64, 64),
                  "image": Path("image.png").is_file()}))
"""


def test_adapter_and_merged_model_travel(tmp_path, server):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    velocity, output = client(server, tmp_path / "a", TRAIN)
    base = server.repos["me/base"].branches["main"]
    adapter, merged = server.repos["me/adapter"], server.repos["me/merged"]
    assert adapter.private and not server.repos["me/base"].private
    assert sorted(adapter.files()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        *sorted(name for name in adapter.files() if name.startswith("previews/")),
        *sorted(name for name in adapter.files() if name.startswith(("processor", "tokenizer"))),
    ]
    assert "previews/before_after.png" in adapter.files() and "previews/before_after.png" in merged.files()
    assert {"ema.safetensors", "ae.safetensors", "llm_config.json", "tokenizer.json"} <= merged.files().keys()
    everything = b"".join([*adapter.files().values(), *merged.files().values()]) + output.encode()
    assert b"hf_test" not in everything
    assert str(tmp_path).encode() not in b"".join(adapter.files().values()) + b"".join(merged.files().values())
    card = adapter.files()["README.md"].decode()
    for part in ("license: apache-2.0", "base_model: me/base", "base_model_relation: adapter", "| learning_rate | 0.01 |",
                 "3 steps on", "reconstruction_loss", "torch 2", "](previews/before_after.png)"):  # fmt: skip
        assert part in card, part
    run = tmp_path / "a" / "run"
    assert not (run / ".merged").exists()
    assert len(adapter.commits) >= 3 and (run / "checkpoint-3").is_dir()  # empty, while training, and at its end
    assert not any(b"hf_test" in path.read_bytes() for path in run.rglob("*") if path.is_file())

    # The base moves on, and the adapter stays with the revision it was trained on; a download that is cut off goes on.
    server.repos["me/base"].commit("main", {"ema.safetensors": b"other weights"})
    server.fail.append(["CUT", r"ema\.safetensors", 0, 1])
    (tmp_path / "b" / "expected.json").write_text(json.dumps(velocity))
    results, _ = client(server, tmp_path / "b", PULL)
    assert results["revision"] == base
    assert results["distances"][0] == 0 and 0 < results["distances"][1] == results["distances"][2] < 1e-4
    assert results["image"]
    ranges = [request for request in server.requests if "ema.safetensors bytes=" in request]
    assert len(ranges) == 1 and not ranges[0].endswith("bytes=0-"), server.requests


ATTEMPTS = """
export(CHECKPOINT, "model", "transformers")
results = {name: attempt(hub.push, "model", f"me/{name}") for name in ("busy", "down", "taken")}
results["pr"] = attempt(hub.push, "model", "me/busy", create_pr=True)
results["branch"] = attempt(hub.push, "model", "me/busy", revision="experiment")
results["unknown"] = attempt(AutoUnifiedModel.from_pretrained, "me/nothing")
results["forbidden"] = attempt(hub.push, "model", "me/busy", token="hf_somebody_else")
results["anonymous"] = attempt(hub.push, "model", "me/model", token=False)
print(json.dumps(results))
"""


def test_refusals_are_clear_and_retries_are_bounded(tmp_path, server):
    server.fail += [
        ["POST", "me/busy/commit", 429, 2],
        ["POST", "me/down/commit", 503, 1000],
        ["POST", "me/taken/commit", 409, 1000],
    ]
    results, output = client(server, tmp_path, ATTEMPTS)
    assert results["busy"].startswith("ok")
    assert "503" in results["down"]
    assert (
        "409" in results["taken"]
        and "me/taken was changed by someone else during the upload; push again" in results["taken"]
    )
    assert results["pr"].endswith("/me/busy/discussions/1")
    assert "me/nothing" in results["unknown"] and "RepositoryNotFoundError" in results["unknown"]
    assert "PermissionError: The Hub does not let you write to me/busy (403)" in results["forbidden"]
    assert "PermissionError" in results["anonymous"] and "(401). Log in with `hf auth login`" in results["anonymous"]
    assert "hf_somebody_else" not in output
    commits = {name: sum(f"me/{name}/commit" in request for request in server.requests) for name in ("busy", "down")}
    assert commits == {"busy": 3 + 2, "down": 6}
    busy = server.repos["me/busy"]
    assert busy.files("experiment").keys() == busy.files("main").keys() == busy.files("refs/pr/1").keys()
    assert not server.repos["me/down"].files() and not server.repos["me/taken"].files()


def test_upload_cut_off_in_the_middle_goes_on_without_loss(tmp_path, server):
    code = """
if not Path("model").exists():
    export(CHECKPOINT, "model", "transformers", max_shard_size="200KB")
print(json.dumps(attempt(hub.push, "model", "me/model")))
"""
    server.cut_after = 2
    results, _ = client(server, tmp_path, code)
    assert results.startswith("ConnectionError") and "Push again: what has arrived is not sent again" in results
    assert not server.repos["me/model"].files()
    assert len(server.objects) == 2
    server.cut_after = None
    results, _ = client(server, tmp_path, code)
    assert results.startswith("ok")
    files = server.repos["me/model"].files()
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()
    }
    shards = {content for name, content in files.items() if name.endswith(".safetensors")}
    assert server.received == sum(map(len, shards))


def test_dangerous_and_unfit_repositories_are_refused(tmp_path, server):
    adapter = tmp_path / "adapter"
    code = f"""
from peft import LoraConfig
model = adapters.attach(AutoUnifiedModel.from_pretrained(CHECKPOINT), LoraConfig(r=2))
model.save_pretrained({str(adapter)!r})
from safetensors.torch import load_file, save_file
export(CHECKPOINT, "own", "transformers")
weights = load_file("own/model.safetensors")
torch.save(weights, "own/pytorch_model.bin")
weights.pop("vae2llm.bias")
save_file(weights, "own/partial.safetensors", metadata={{"format": "pt"}})
print(json.dumps(0))
"""
    client(server, tmp_path, code)
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    config = json.loads((adapter / "adapter_config.json").read_text())
    checkpoint = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}

    def repo(name, files):
        server.repos[f"me/{name}"] = Repo(private=False)
        server.repos[f"me/{name}"].commit("main", files)

    def adapter_files(base, **changes):
        return {"adapter_config.json": json.dumps({**config, "base_model_name_or_path": base, **changes}).encode()}

    whole = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    full, partial, pickle = (
        whole.pop(name) for name in ("model.safetensors", "partial.safetensors", "pytorch_model.bin")
    )
    repo("own", {**whole, "model.safetensors": full})
    repo("partial", {**whole, "model.safetensors": partial})
    repo("pickle", {**whole, "pytorch_model.bin": pickle})
    repo("base", checkpoint)
    repo("good", {**adapter_files("me/base"), "adapter_model.safetensors": weights})
    repo("pickled", {**adapter_files("me/base"), "adapter_model.bin": b"pickle"})
    repo("climbing", {**checkpoint, "../../../../evil.json": b"{}"})
    repo("outside", {**adapter_files("../base"), "adapter_model.safetensors": weights})
    repo("absolute", {**adapter_files(str(CHECKPOINT)), "adapter_model.safetensors": weights})
    repo("named", {**adapter_files("base"), "adapter_model.safetensors": weights})
    repo("unpinned", {**adapter_files("me/base", revision="0" * 40), "adapter_model.safetensors": weights})
    repo("other", {**adapter_files("me/base", target_modules="no_such_layer", modules_to_save=None), "adapter_model.safetensors": weights})  # fmt: skip
    code = """
names = ("good", "own", "partial", "pickle", "pickled", "climbing", "outside", "absolute", "named", "unpinned", "other")
print(json.dumps({name: attempt(AutoUnifiedModel.from_pretrained, f"me/{name}") for name in names}))
"""
    results, _ = client(server, tmp_path, code)
    assert results["good"].startswith("ok") and results["own"].startswith("ok")
    assert (
        results["partial"].startswith("CheckpointError: The weights in me/partial")
        and "vae2llm.bias" in results["partial"]
    )
    assert "no file named model.safetensors" in results["pickle"]
    assert "adapter_model.bin is a pickle" in results["pickled"] and "refused" in results["pickled"]
    assert not results["climbing"].startswith("ok") and not list(tmp_path.parent.glob("**/evil.json"))
    for name in ("outside", "absolute", "named"):
        assert "is a path and not a Hub repository; pass base_model" in results[name]
    assert "RevisionNotFoundError" in results["unpinned"]
    assert "does not fit me/base" in results["other"]


def test_a_folder_without_weights_is_not_pushed(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        push(tmp_path, "me/model")


@pytest.mark.parametrize("family", ["bagel", "harmon", "janus", "lance", "openuni", "show_o"])
@pytest.mark.parametrize("layout", ["transformers", "published"])
def test_all_that_an_export_writes_is_uploaded(tmp_path, family, layout):
    folder = CHECKPOINT.parents[1] / family / "checkpoint"
    if family == "janus":
        config = janus.Config.tiny(image_size=16)
        model, processor = janus.Model(config), janus.Processor.tiny(config)
    else:
        options = {"vq_model": folder / "magvitv2"} if family == "show_o" else {}
        folder = folder / "show-o-w-clip-vit" if family == "show_o" else folder
        model, processor = AutoUnifiedModel.from_pretrained(folder, **options), None
    export(model, tmp_path / "model", layout, processor=processor, max_shard_size="200KB")
    assert uploaded_files(tmp_path / "model")[1] == []


STRAY = (
    *(
        ".env",
        ".git/config",
        ".merged/model/model.safetensors",
        "secrets.json",
        "nohup.out",
        "notes.txt",
        "config.json~",
    ),
    *("training_args.bin", "training_args.json", "trainer_state.json", "optimizer.pt", "optimizer.safetensors"),
    *("weight_average.safetensors", "rng_state_0.pth", "pytorch_model.bin", "pytorch_model_fsdp_0/__0_0.distcp"),
    *("runs/checkpoint-5/model.safetensors", "checkpoint-5/model.safetensors", "checkpoint-5/config.json", "model.py"),
    *("previews/secrets.json", "previews/a/step-1.png", "wandb/config.json", "sana/secrets.json", "sana/config.json"),
)


def test_only_what_belongs_to_a_model_is_uploaded(tmp_path, server):
    code = f"""
export(CHECKPOINT, "model", "transformers")
names = sorted(path.name for path in Path("model").iterdir())
for name in {(*STRAY, "previews/before_after.png", "score.md", "LICENSE")!r}:
    (Path("model") / name).parent.mkdir(parents=True, exist_ok=True)
    (Path("model") / name).write_text("secret")
results = [attempt(hub.push, "model", "me/model") for _ in range(2)]
results.append(attempt(hub.push, "model", "me/more", also=["notes.txt"]))
results.append(attempt(hub.push, "model", "me/none", also=["no.txt"]))
print(json.dumps({{"results": results, "names": names}}))
"""
    report, output = client(server, tmp_path, code)
    uploaded = {*report["names"], "previews/before_after.png", "score.md", "LICENSE"}
    assert [result.split()[0] for result in report["results"]] == ["ok", "ok", "ok", "FileNotFoundError:"]
    assert server.repos["me/model"].files().keys() == uploaded
    assert server.repos["me/more"].files().keys() == uploaded | {"notes.txt"}
    assert "me/none" not in server.repos
    shown = "previews/a/step-1.png, previews/secrets.json, pytorch_model.bin, pytorch_model_fsdp_0/, rng_state_0.pth"
    assert output.count("Not uploaded, being no part of a model: .env, .git/, .merged/, checkpoint-5/, ") == 2
    assert output.count(", nohup.out, notes.txt, ") == 1 and output.count(", nohup.out, optimizer.pt, ") == 1
    assert output.count(shown) == 2


def test_the_command_writes_a_card(tmp_path, server):
    code = """
from reca_trainer.cli.push import main
from peft import LoraConfig
export(CHECKPOINT, "base", "transformers")
Path("base/README.md").write_text("---\\nlicense: mit\\n---\\nwritten by hand\\n")
main(["base", "me/base"])
model = adapters.attach(AutoUnifiedModel.from_pretrained("me/base"), LoraConfig(r=2))
model.save_pretrained("adapter")
main(["adapter", "me/adapter", "--private"])
print(json.dumps(Path("adapter/README.md").read_text()))
"""
    card, _ = client(server, tmp_path, code)
    assert b"written by hand" in server.repos["me/base"].files()["README.md"]
    assert server.repos["me/adapter"].files()["README.md"].decode() == card
    assert server.repos["me/adapter"].private
    for part in ("license: mit", "base_model: me/base\n", "# adapter\n", "| rank, alpha | 2, 8 |", "Inherited"):
        assert part in card, part


REVISIONS = """
from PIL import Image
from reca_trainer import toy
from reca_trainer.cli.train import run
Path("pictures").mkdir()
Image.new("RGB", (64, 64)).save("pictures/0.png")
Path("empty.yaml").write_text("{}")
options = "--model_name_or_path me/base --dataset_name pictures --config empty.yaml --use_cpu --use_peft --lora_r 2"
options += " --max_steps 1 --max_image_size 32 --report_to none --save_strategy no --output_dir"
for branch in (None, "trial"):
    hub.push(toy.CHECKPOINT, "me/base", revision=branch)
commands = [f"{options} main", f"{options} trial --model_revision trial"]
print(json.dumps([run(None, "", words.split()).model.active_peft_config.revision for words in commands]))
"""


def test_the_command_line_trains_the_revision_that_it_names(tmp_path, server):
    trained, _ = client(server, tmp_path, REVISIONS)
    branches = server.repos["me/base"].branches
    assert trained == [branches["main"], branches["trial"]] and len(set(trained)) == 2
    assert "base_model: me/base\n" in (tmp_path / "trial" / "README.md").read_text()


MERGE = """
import numpy as np
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
export(CHECKPOINT, "base")
hub.push("base", "me/base")
processor = AutoUnifiedProcessor.from_pretrained("me/base", generation_size=(64, 32, 16), condition_size=(42, 42, 14))
trainer = RecATrainer(
    "me/base", RecAConfig(output_dir="a run", use_cpu=True, report_to="none", preview_steps=0),
    train_dataset=Dataset.from_dict({"image": [Image.fromarray(np.zeros((48, 64, 3), np.uint8))]}),
    processing_class=processor, peft_config=LoraConfig(r=4),
)
merged = Path("a run/.merged/model")
results = {}
for name in ("down", "up"):
    try:
        trainer.push_merged_to_hub(f"me/{name}", private=True)
        results[name] = []
    except Exception as error:
        results[name] = [type(error).__name__, *error.__notes__]
        names = sorted(path.name for path in merged.iterdir())
        AutoUnifiedModel.from_pretrained(merged)
        hub.push(merged, "me/again")
print(json.dumps({**results, "names": names, "left": merged.parent.exists()}))
"""


def test_a_merged_copy_outlives_the_hub(tmp_path, server):
    server.fail += [
        ["GET", r"^/api/models/me/base$", 0, 1000],  # where the card would look up the licence
        ["POST", "me/down/commit", 0, 1000],
    ]
    report, _ = client(server, tmp_path, MERGE)
    command = "reca-trainer push 'a run/.merged/model' me/down --private"
    assert report["down"] == [
        "ConnectionError",
        f"a run/.merged/model is unharmed. To push it again: {command}",
    ]
    assert report["up"] == [] and not report["left"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} < set(report["names"])
    assert sorted(server.repos["me/up"].files()) == sorted(server.repos["me/again"].files()) == report["names"]
    assert b"That of the base model." in server.repos["me/up"].files()["README.md"]
    assert "GET /api/models/me/base" in server.requests


def test_a_token_that_cannot_be_sent_is_not_shown(tmp_path, server):
    code = """
export(CHECKPOINT, "model", "transformers")
tokens = {"spaced": f" {os.environ['HF_TOKEN']}\\n", "broken": "hf_sec\\nret", "quoted": "“hf_secret”"}
print(json.dumps({name: attempt(hub.push, "model", "me/model", token=token) for name, token in tokens.items()}))
"""
    results, output = client(server, tmp_path, code)
    assert results["spaced"].startswith("ok")
    assert results["broken"] == results["quoted"] and results["broken"].startswith("ValueError: The Hub token holds")
    assert "hf_sec" not in output and "ret" not in results["broken"].split()


def test_card_of_an_adapter_on_a_local_base_says_how_to_load_it():
    about = {"datasets": [], "hyperparameters": {}, "losses": {}, "steps": 1}
    card = str(model_card("me/adapter", base_model="/home/me/secret/bagel", is_adapter=True, **about))
    assert 'AutoUnifiedModel.from_pretrained("me/adapter", base_model="path/to/bagel")' in card
    assert "secret" not in card and "base_model:" not in card


RUN = """
import numpy as np
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from concurrent.futures import Future
from transformers.utils import PushInProgress

images = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))] * 2

def make(name, model=CHECKPOINT, **options):
    sizes = {"generation_size": (64, 32, 16), "condition_size": (42, 42, 14)}
    options = {"hub_token": os.environ["HF_TOKEN"], "push_to_hub": True, **options}
    args = RecAConfig(output_dir=name, hub_model_id=f"me/{name}", max_steps=3, per_device_train_batch_size=2, use_cpu=True,
                      report_to="none", save_strategy="steps", save_steps=1, **options)
    model = AutoUnifiedModel.from_pretrained(model) if model == CHECKPOINT else model
    return RecATrainer(model, args, train_dataset=Dataset.from_dict({"image": images}), peft_config=LoraConfig(r=2),
                       processing_class=AutoUnifiedProcessor.from_pretrained(CHECKPOINT, **sizes))
"""

STRATEGIES = (
    RUN
    + """
for name, options in (("standard", {}), ("end", {"hub_strategy": "end"}), ("branch", {"hub_revision": "trial"})):
    trainer = make(name, **options)
    trainer.train()
    trainer.push_to_hub()
for name, options in (("waits", {}), ("always", {"hub_always_push": True})):
    trainer = make(name, **options)
    trainer.push_in_progress = PushInProgress([Future()])  # an upload that does not end
    trainer.create_model_card()
    trainer.save_model("folder", _internal_call=True)
    trainer._push_from_checkpoint("folder")
    for job in trainer.push_in_progress.jobs[1:]:
        job.result()
print(json.dumps(attempt(trainer.init_hf_repo, token="hf_may_read")))
"""
)


def test_options_of_the_hub_change_what_is_uploaded(tmp_path, server):
    refused, _ = client(server, tmp_path, STRATEGIES)
    assert refused.startswith("PermissionError: The Hub does not let you write to me/always (403)")
    assert "# waits\n" in (tmp_path / "waits" / "README.md").read_text()
    commits = {name: len(server.repos[f"me/{name}"].commits) for name in ("standard", "end", "waits", "always")}
    assert commits["standard"] > commits["end"] == 2  # when it is made, and at the end
    assert commits["waits"] == 1 and commits["always"] == 2
    branch = server.repos["me/branch"]
    assert "adapter_model.safetensors" in branch.files("trial") and not branch.files("main")


BEFORE = (
    RUN
    + """
results = {
    "down": attempt(make, "down", model="no/such/model"),
    "denied": attempt(make, "denied", model="no/such/model", hub_token="hf_somebody_else"),
    "read_only": attempt(make, "read_only", model="no/such/model", hub_token="hf_may_read"),
    "broken": attempt(make, "broken", model="no/such/model", hub_token="hf_sec\\nret"),
}
print(json.dumps(results))
"""
)


def test_a_hub_that_will_not_take_the_model_is_named_before_it_is_loaded(tmp_path, server):
    server.fail.append(["POST", "api/repos/create", 0, 1])
    server.repos["me/read_only"] = Repo(private=False)
    results, output = client(server, tmp_path, BEFORE)
    assert results["denied"].startswith("PermissionError: The Hub does not let you write to me/denied (403). Log in")
    assert "PermissionError: The Hub does not let you write to me/read_only (403). Log in" in results["read_only"]
    model = "/api/models/me/read_only"
    asked = [request for request in server.requests if "read_only" in request]
    assert asked == [f"GET {model}", f"GET {model}/auth-check/write"]
    assert results["broken"].startswith("ValueError: The Hub token holds") and "hf_sec" not in output
    assert results["down"].startswith("ConnectionError: The connection to http://127.0.0.1")
