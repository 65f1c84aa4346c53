"""`make bench`: one command for all of them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.__main__ import BENCHES, main
from bench.results_file import ROOT


def test_every_bench_is_a_module_that_can_be_run() -> None:
    for name in BENCHES:
        spec = find_spec(f"bench.{name}")
        assert spec is not None and spec.origin is not None, name
        assert '__name__ == "__main__"' in Path(spec.origin).read_text()


def test_an_unknown_bench_is_refused_before_any_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["model", "speed"])
    captured = capsys.readouterr()
    assert "there is no bench 'speed'" in captured.err and "===" not in captured.out


def test_the_script_for_a_gpu_names_what_there_is() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    for module in ("bench.model", "bench.exactness", "bench.prepare_meta"):
        assert f"-m {module}" in script
        assert find_spec(module) is not None
