"The table of several seeds: finished runs are kept, begun ones resumed, others started."

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("seeds", Path(__file__).parent.parent / "benchmarks" / "seeds.py")
seeds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(seeds)


def result(after):
    means = {"before": {"mean": 0.5}, "after": {"mean": after}, "change": {"mean": after - 0.5, "stderr": 0.1}}
    return {key: {"reward": {"strict": value}} for key, value in means.items()} | {"images": 12, "seconds": 9.0}


def test_finished_runs_are_kept_begun_ones_resumed_and_others_started(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny-ocr-0").mkdir()
    (tmp_path / "tiny-ocr-0" / "results.json").write_text(json.dumps(result(0.6)))
    (tmp_path / "tiny-ocr-1").mkdir()
    (tmp_path / "tiny-ocr-1" / "config.yaml").touch()
    calls = []

    def train(command, check):
        calls.append(command[3:])
        folder = tmp_path / f"tiny-ocr-{len(calls)}"
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(result(0.6 + 0.1 * len(calls))))

    monkeypatch.setattr(seeds.subprocess, "run", train)
    seeds.main(["--recipe", "tiny-ocr", "--output", str(tmp_path), "--epochs=2"])
    assert calls[0] == ["--resume", str(tmp_path / "tiny-ocr-1")]
    start = ["--recipe", "tiny-ocr", "--seed=2", f"--output_dir={tmp_path}", "--name=tiny-ocr-2", "--epochs=2"]
    assert calls[1:] == [start]
    assert "change +0.200, from +0.100 to +0.300" in capsys.readouterr().out


def test_a_folder_without_checkpoint_is_an_error_of_one_line(tmp_path):
    (tmp_path / "tiny-geneval-0").mkdir()
    with pytest.raises(SystemExit, match="tiny-geneval-0 is no run; remove it"):
        seeds.main(["--seeds", "0", "--output", str(tmp_path)])
