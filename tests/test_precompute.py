"""`reca-trainer precompute`: shards of encoded images that a run learns from as from the images, and nothing else reads."""

import io
import json
from collections import Counter

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from reca_trainer import AutoUnifiedModel, RecATrainer
from reca_trainer.cli import main
from reca_trainer.data import Columns, encoded_shards
from reca_trainer.data.encoded_shards import check_column, check_source, finish, unfinished_folder, write_shards
from reca_trainer.images import ImageError
from tests import test_trainer
from tests.test_trainer import CHECKPOINT, config, losses

dataset, processor = test_trainer.dataset, test_trainer.processor


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


# --- a run on shards ---


@pytest.fixture(scope="module")
def source(tmp_path_factory, dataset, processor):
    """A model and a folder of ten images, one of them without a caption."""
    folder = tmp_path_factory.mktemp("precompute")
    AutoUnifiedModel.from_pretrained(CHECKPOINT).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for row in range(0, 20, 2):
        dataset[row]["image"].save(folder / "images" / f"{row:02d}.png")
        if row != 6:
            (folder / "images" / f"{row:02d}.txt").write_text(dataset[row]["caption"])
    return folder


def precompute(source, folder, *options):
    paths = ["--model_name_or_path", source / "model", "--dataset_name", source / "images", "--shards_dir", folder]
    return main(["precompute", *map(str, paths), "--use_cpu", "true", *options])


@pytest.fixture(scope="module")
def shards(source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded_shards, "ROWS_PER_SHARD", 4)
        assert precompute(source, source / "shards") == 0
    return source / "shards"


def run(source, folder, data, **options):
    options = {"per_device_train_batch_size": 1, "text_to_image_weight": 0.5, "max_steps": 4, **options}
    return RecATrainer(str(source / "model"), config(folder, dataset_name=str(data), **options))


def test_losses_are_those_of_a_run_on_the_images(tmp_path, source, shards):
    assert [file.name for file in sorted(shards.iterdir())] == [f"0000{n}-00000.parquet" for n in range(3)]
    assert not list(source.glob(".*"))
    of_stream = {"dataset_streaming": True, "dataloader_num_workers": 1}
    runs = {
        "images": run(source, tmp_path, source / "images"),
        "shards": run(source, tmp_path, shards, cache_latents=True),
        "stream of images": run(source, tmp_path, shards, **of_stream),
        "stream of shards": run(source, tmp_path, shards, cache_latents=True, **of_stream),
    }
    for each in runs.values():
        each.train()
    assert losses(runs["shards"]) == losses(runs["images"])
    assert losses(runs["stream of shards"]) == losses(runs["stream of images"])
    kept = next(iter(runs["stream of shards"].get_train_dataloader()))
    assert {"condition_embeds", "posterior"} < kept.keys() and not {name for name in kept if "pixel" in name}


def test_shards_of_other_encoders_or_another_framing_are_refused(tmp_path, source, shards):
    with pytest.raises(ValueError, match="written with other framing than this run's"):
        run(source, tmp_path, shards, cache_latents=True, max_image_size=32).get_train_dataloader()
    other = run(source, tmp_path, shards, cache_latents=True, dataset_streaming=True, bf16=True)
    other.model.connector.fc1.bias.data[0] += 1e-3
    with pytest.raises(ValueError, match="written with other encoders than this run's"):
        other.get_train_dataloader()
    check_column("encoded_0_1", "encoded_0_1")
    with pytest.raises(ValueError, match="other encoders and framing"):
        check_column("encoded_0_1", "encoded_1_0")


def test_nothing_is_written_over_or_mixed(tmp_path, source, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert precompute(source, tmp_path / "full") == 1
    assert "exists and is not empty" in capsys.readouterr().err
    begun = unfinished_folder(tmp_path / "shards")
    check_source(begun, {"dataset_name": "others", "columns": None})
    check_source(begun, {"dataset_name": "others", "columns": None})
    with pytest.raises(ValueError, match=r"dataset_name was 'others', now is 'mine'.*Delete it"):
        check_source(begun, {"dataset_name": "mine", "columns": None})
    with pytest.raises(ValueError, match="None of the images"):
        finish(begun, tmp_path / "shards")
    assert main(["precompute", "--shards_dir", str(tmp_path / "none")]) == 1
    assert "set --dataset_name" in capsys.readouterr().err


# --- the writing of shards ---


def encoded(colour, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(numbers, damaged=()):
    for number in numbers:
        data = encoded(number, (8, 6))
        yield {
            "image": {"bytes": data[:50] if number in damaged else data, "path": f"{number}.png"},
            "talk": [{"from": "human", "value": "?"}, {"from": "gpt", "value": str(number)}],
            "unused": number,
        }


def stream(*shards, damaged=()):
    """Of rows by shard."""

    def generate(shards):
        for shard in shards:
            yield from rows(shard, damaged)

    return IterableDataset.from_generator(generate, gen_kwargs={"shards": [list(shard) for shard in shards]})


class Encoder:
    """Stands for a model; notes what it encodes, and is interrupted behind so many images."""

    def __init__(self, limit=1000):
        self.colours, self.limit = [], limit

    def process(self, images, **options):
        return {"value": torch.tensor([images[0].getpixel((0, 0))[0]]), "size": options["size"]}

    def encode(self, batch):
        if len(self.colours) == self.limit:
            raise KeyboardInterrupt
        self.colours.append(int(batch["value"]))
        return {"value": batch["value"]}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encoded_shards, "ROWS_PER_SHARD", 4)


def write(folder, images, limit=1000, **options):
    encoder = Encoder(limit)
    columns = Columns("image", conversation="talk")
    sizes = lambda width, height: (height, width)  # noqa: E731
    write_shards(images, columns, "encoded_0_0", encoder.process, encoder.encode, sizes, folder, **options)
    return encoder.colours


def colours(folder):
    """What the files of a folder hold, in their order."""
    tables = [pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]
    images = [row["image"]["bytes"] for table in tables for row in table.to_pylist()]
    return [Image.open(io.BytesIO(image)).getpixel((0, 0))[0] for image in images]


@pytest.mark.parametrize("shards", [1, 3])
def test_every_process_writes_its_share_and_goes_on_where_it_was(tmp_path, shards):
    images = stream(*[range(30)[shard::shards] for shard in range(shards)])
    whole = write(tmp_path / "whole", images)
    assert sorted(whole) == list(range(30)) == sorted(colours(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", images, limit=6, num_processes=2, process_index=0)
    before = colours(tmp_path / "parts")
    assert len(before) == 4  # the second part was half done
    others = write(tmp_path / "parts", images, num_processes=2, process_index=1)
    rest = write(tmp_path / "parts", images)  # another number of processes
    assert Counter(before + others + rest) == Counter(range(30))
    assert colours(tmp_path / "parts") == colours(tmp_path / "whole")
    assert not write(tmp_path / "parts", images)


def test_rows_keep_what_tasks_learn_from(tmp_path):
    images = Dataset.from_list(list(rows(range(6)))).cast_column("image", datasets.Image())
    write(tmp_path, images)
    assert colours(tmp_path) == list(range(6))
    written = datasets.load_dataset(
        "parquet", data_files=[str(file) for file in sorted(tmp_path.iterdir())], split="train"
    )
    assert written.column_names == ["image", "talk", "width", "height", "encoded_0_0"]
    assert (written[5]["width"], written[5]["height"]) == (8, 6) == written[5]["image"].size
    assert json.loads(written[5]["talk"]) == next(iter(rows([5])))["talk"]


def test_damage_is_named_and_left_out_where_that_is_asked_for(tmp_path, caplog):
    images = stream(range(6), damaged=[2])
    with pytest.raises(ImageError, match=r"row 2 \(2.png\)"):
        write(tmp_path / "raise", images)
    assert not list((tmp_path / "raise").iterdir())
    write(tmp_path / "skip", images, on_bad_image="skip")
    assert colours(tmp_path / "skip") == [0, 1, 3, 4, 5] and "Left out: row 2 (2.png)" in caplog.text
    with pytest.raises(ImageError, match=r"rows cannot be used, more than max_bad_share=0.1 allows"):
        write(tmp_path / "many", stream(range(160), damaged=range(100, 130)), on_bad_image="skip")
