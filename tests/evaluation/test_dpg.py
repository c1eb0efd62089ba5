import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from reca_trainer.cli import evaluate
from reca_trainer.evaluation import dpg
from reca_trainer.evaluation.endpoint_judge import EndpointJudge
from reca_trainer.evaluation.generation import Prompt, find_images

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
ROWS = [
    'balloons,"Red balloons, on a wall.",k,1,0,entity,whole,entity - whole (balloons),Are there balloons?',
    'balloons,"Red balloons, on a wall.",k,2,1,attribute,color,"attribute - color (balloons, red)",Are they red?',
    'balloons,"Red balloons, on a wall.",k,3,0,entity,whole,entity - whole (wall),Is there a wall?',
    'balloons,"Red balloons, on a wall.",k,4,"1,3",relation,spatial,"relation - spatial (balloons, wall, on)",On it?',
    'sky,A blue sky.,k,1,0,attribute,color,"attribute - color (sky, blue)",Is the sky blue?',
]


@pytest.fixture
def questions_csv(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text("\n".join([HEADER, *ROWS]))
    return path


def test_the_published_csv_is_read(questions_csv):
    balloons, sky = dpg.read_prompts(questions_csv)
    assert (balloons.id, balloons.text) == ("balloons", "Red balloons, on a wall.")
    assert balloons.metadata["questions"]["4"] == {
        "question": "On it?",
        "level": "relation - spatial",
        "parents": ["1", "3"],
    }
    assert list(balloons.metadata["questions"]) == ["1", "2", "3", "4"] and list(sky.metadata["questions"]) == ["1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b,t,k,one,0,e,w,e (x),q", "line 2: proposition_id"),
        ("b,t,k,1,2,e,w,e (x),q", "depends on question 2, which is not there"),
        ("b,t,k,1,1,e,w,e (x),q", "1 → 1 depend on each other"),
        ("b,t,k,1,2,e,w,e (x),q\nb,t,k,2,1,e,w,e (x),q", "depend on each other"),
        ("b,t,k,1,0,e,w,e (x),q\nb,t,k,1,0,e,w,e (x),q", "line 3: question 1 of b is already there"),
        ("../b,t,k,1,0,e,w,e (x),q", "name of a folder"),
    ],
)
def test_broken_questions_are_refused(tmp_path, row, message):
    (tmp_path / "q.csv").write_text(f"{HEADER}\n{row}\n")
    with pytest.raises(ValueError, match=message):
        dpg.read_prompts(tmp_path / "q.csv")


def test_missing_columns_and_files_are_named(tmp_path):
    (tmp_path / "q.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(ValueError, match="lacks proposition_id, dependency, tuple, question_natural_language"):
        dpg.read_prompts(tmp_path / "q.csv")
    with pytest.raises(ValueError, match="no file"):
        dpg.read_prompts(tmp_path / "missing.csv")


def test_a_failed_parent_fails_its_children_and_theirs():
    parents = {"1": [], "2": ["1"], "3": ["2"], "4": [], "5": ["4", "1"]}
    questions = {number: {"parents": above} for number, above in parents.items()}
    yes = dict.fromkeys(parents, True)
    assert dpg.apply_dependencies(questions, yes) == yes
    met = dpg.apply_dependencies(questions, {**yes, "1": False})
    assert met == {"1": False, "2": False, "3": False, "4": True, "5": False}
    met = dpg.apply_dependencies(questions, {**yes, "5": False})
    assert met == {**yes, "5": False}


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ("Yes", True),
        ("yes, it is", True),
        ("No.", False),
        ("**No**", False),
        ("nothing", None),
        ("", None),
        ("I know", None),
    ],
)
def test_answers_are_yes_no_or_neither(answer, meaning):
    assert dpg.read_answer(answer) is meaning


def test_grids_hold_the_images_in_reading_order(tmp_path):
    prompt = Prompt("item", "text")
    for index, color in enumerate(("red", "green", "blue", "white")):
        path = tmp_path / "images/item/samples" / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), color).save(path)
    dpg.write_grids([prompt], lambda drawn: find_images(tmp_path / "images", drawn.id), tmp_path / "grids")
    grid = Image.open(tmp_path / "grids/item.png")
    assert grid.size == (12, 8) and grid.getpixel((11, 0)) == (0, 128, 0) and grid.getpixel((0, 7)) == (0, 0, 255)
    (tmp_path / "grids/item.png").rename(tmp_path / "grids/item.PNG")
    dpg.read_grids(tmp_path / "grids", [prompt], tmp_path / "again")
    for first, other in zip(
        find_images(tmp_path / "images", "item"), find_images(tmp_path / "again", "item"), strict=True
    ):
        assert Image.open(first).tobytes() == Image.open(other).tobytes()
    Image.new("RGB", (5, 4)).save(tmp_path / "grids/item.PNG")
    with pytest.raises(ValueError, match="even sides"):
        dpg.read_grids(tmp_path / "grids", [prompt], tmp_path / "again")


@pytest.fixture
def server():
    """A chat completions endpoint that looks at the image: it says yes if the image is red and asked for that, or to
    anything else than colour."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append((self.path, dict(self.headers), body))
            picture, question = body["messages"][0]["content"]
            kind, data = picture["image_url"]["url"].split(",")
            assert kind == "data:image/png;base64" and body["temperature"] == 0
            red, green, blue = Image.open(io.BytesIO(base64.b64decode(data))).resize((1, 1)).getpixel((0, 0))
            seen = "red" if red > max(green, blue) else "blue"
            yes = seen in question["text"] if "red" in question["text"] or "blue" in question["text"] else True
            content = "Yes, it is." if yes else "No."
            message = {"role": "assistant", "content": content}
            body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def plane(color):
    return Image.new("RGB", (8, 8), color)


def test_dpg_is_scored_by_an_endpoint(server, questions_csv, tmp_path):
    for item, colors in {"balloons": ("red", "blue"), "sky": ("red", "blue")}.items():
        (tmp_path / "images" / item / "samples").mkdir(parents=True)
        for index, color in enumerate(colors):
            plane(color).save(tmp_path / "images" / item / "samples" / f"{index:05}.png")
    command = (
        f"--images {tmp_path / 'images'} --benchmark dpg --prompts {questions_csv} --output_dir {tmp_path / 'out'}"
    )
    command = [*command.split(), "--judge", "tiny", "--judge_url", server.url]
    evaluate.main(command)
    report = json.loads((tmp_path / "out/report.json").read_text())
    # Red balloons: 4 of 4; blue ones: all but "Are they red?", on which nothing depends; the sky: 0 and 1.
    assert report["overall"]["score"] == pytest.approx((1 + 0.75 + 0 + 1) / 4)
    scores = {name: estimate["score"] for name, estimate in report["categories"].items()}
    assert scores["entity"] == scores["entity - whole"] == scores["relation"] == 1
    assert scores["attribute"] == scores["attribute - color"] == 0.5
    assert report["scorer"]["judge"] == {"name": "tiny", "endpoint": server.url}
    assert "tiny" in (tmp_path / "out/report.md").read_text()
    assert len(server.requests) == 10 and {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert server.requests[0][2]["messages"][0]["content"][1]["text"].endswith("? Answer with yes or no.")
    evaluate.main(command)
    assert len(server.requests) == 10  # nothing is asked twice


def test_a_dependent_question_fails_with_its_parent_in_the_score_only(server):
    questions = {
        "1": {"question": "Is it red?", "level": "attribute", "parents": []},
        "2": {"question": "Is it flat?", "level": "attribute", "parents": ["1"]},
    }
    row = dpg.DPGBench(EndpointJudge(server.url, "m"))._row(questions, {"1": "no", "2": "yes"})
    assert row["score"] == 0 and row["categories"] == {"attribute": [1, 2]} and row["unreadable"] == 0


def test_the_key_is_sent_only_where_there_is_one(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    EndpointJudge(server.url, "m")([plane("red")], ["Is it red?"])
    EndpointJudge(server.url, "m", api_key="secret")([plane("red")], ["Is it red?"])
    sent = [headers.get("Authorization") for _, headers, _ in server.requests]
    assert sent == [None, "Bearer secret"]
