"""The bento: what is in it, what its image would be, and that the built thing itself serves."""

import re
from pathlib import Path

import httpx

from examples.draw_shapes import SHAPES_JPG, mask_of
from sam3_runner.rle import from_coco, union

ROOT = Path(__file__).resolve().parents[2]


def files_under(folder: Path) -> set[str]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if "__pycache__" not in path}


def test_the_bento_holds_the_service_and_the_demo_weights_and_nothing_else(bento: Path) -> None:
    sources = {path for path in files_under(bento / "src") if not path.startswith("weights/demo/")}
    expected = {"service.py", "bentofile.yaml", ".env.example", "examples/shapes.jpg"}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "playground").iterdir()}
    for part in ("api", "sam3_runner", "storage", "tasks"):
        expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / part).rglob("*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tasks/migrations").glob("*.sql")}
    assert sources == {path for path in expected if not path.startswith("sam3_runner/training/")}
    assert files_under(bento / "src/weights/demo") == files_under(ROOT / "weights/demo")
    assert [path.name for path in (bento / "src/weights").iterdir()] == ["demo"]


def test_the_bento_installs_the_pins_of_the_project_with_their_hashes(bento: Path) -> None:
    def pins(path: Path) -> list[str]:
        return re.findall(r"^[a-z0-9].*?==[^\s;]+|--hash=\S+", path.read_text(), re.MULTILINE)

    ours, theirs = pins(ROOT / "requirements.txt"), pins(bento / "env/python/requirements.txt")
    assert sorted(set(theirs)) == sorted(set(ours))


def test_the_image_has_python_3_12_an_ordinary_user_port_8000_and_mounted_weights(bento: Path) -> None:
    dockerfile = (bento / "env/docker/Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.12-slim ", dockerfile, re.M)
    assert re.findall(r"^USER (.*)$", dockerfile, re.M)[-1] == "bentoml"
    defaults = dict(re.findall(r"^ARG (\w+)=(.*)$", dockerfile, re.M))
    assert defaults["BENTOML_PORT"] == "8000"
    assert defaults["SAM3_WEIGHTS_PATH"] == "/app/weights/sam3.pt"
    assert defaults["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_the_built_bento_finds_the_red_circles(bento_client: httpx.Client) -> None:
    upload = bento_client.put("/files/uploads/shapes.jpg", content=SHAPES_JPG.read_bytes())
    assert upload.status_code == 200, upload.text
    request = {
        "image_url": upload.json()["url"],
        "text_prompt": "red circle",
        "user_id": "someone",
        "task_id": "from-the-bento",
    }
    answer = bento_client.post("/api/v1/predict", json=request)
    assert answer.status_code == 200, answer.text
    found = [from_coco(instance["mask_rle"]) for instance in answer.json()["instances"]]
    assert len(found) == 3
    mask, truth = union(found, found[0].size_hw), mask_of("red", "circle")
    assert (mask & truth).sum() / (mask | truth).sum() > 0.85


def test_the_built_bento_serves_the_playground(bento_client: httpx.Client) -> None:
    assert "<title>SAM3 playground</title>" in bento_client.get("/").text
    assert bento_client.get("/playground/sample.jpg").content == SHAPES_JPG.read_bytes()


def test_the_built_bento_brought_the_demo_model(bento_client: httpx.Client) -> None:
    assert bento_client.get("/api/v1/model/info").json()["model_version"] == "demo"
