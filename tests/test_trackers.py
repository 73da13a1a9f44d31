"Trackers: which, with which options, and that none of them costs a run its work."

import json
import re

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vgpo.runs.callbacks
import vgpo.train as program
from vgpo.config import parse_config
from vgpo.runs.callbacks import failure, tracker_names

SMALL = [
    *("--epochs=3", "--save_every=1", "--model.lora_rank=2", "--reward=tiny_rewards:brightness", "--name=run"),
    *("--optim.lr_scheduler=constant", "--rollout.prompts_per_epoch=1", "--rollout.group_size=2"),
    *("--rollout.num_inference_steps=2", "--window.size=1", "--credit.num_scored_steps=1", "--optim.num_minibatches=1"),
    *("--evaluation.num_samples=1", "--evaluation.num_inference_steps=1"),
]


class Recorder(GeneralTracker):
    "Notes what it is told; what `fails` says of a call (`start`, `finish`, number of a log) is raised there."

    name, requires_logging_directory = "recorder", False
    made = []

    def __init__(self, project, fails=None, **options):
        super().__init__(_blank=True)
        self.project, self.fails, self.options, self.taken, self.calls = project, fails or {}, options, [], []
        self.made.append(self)

    def called(self, what):
        self.calls.append(what)
        if what in self.fails:
            raise {"os": OSError, "key": KeyError, "own": self.Away}[self.fails[what]]("nobody\nis there")

    class Away(Exception):
        "What only this client raises."

    def start(self):
        self.called("start")

    def log(self, values, step=None, **_):
        self.called(f"log {sum(call.startswith('log') for call in self.calls)}")
        self.taken.append((step, values))

    def finish(self):
        self.called("finish")


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    "The class of a tracker that accelerate knows, as a user makes one known."
    monkeypatch.setattr(Recorder, "made", [])
    before = dict(LOGGER_TYPE_TO_CLASS)
    register_tracker_class(Recorder)
    yield Recorder
    LOGGER_TYPE_TO_CLASS.clear()
    LOGGER_TYPE_TO_CLASS.update(before)


@pytest.fixture
def options(tiny_folder, tmp_path):
    return [*SMALL, f"--model.path={tiny_folder}", f"--output_dir={tmp_path}"]


def numbers(folder):
    "{epoch: its numbers} of metrics.jsonl."
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["epoch"]: {k: v for k, v in row.items() if isinstance(v, (int, float))} for row in rows}


def drawn(folder):
    "{epoch: {tag: value}} of TensorBoard's files in a folder, as TensorBoard reads them."
    found = {}
    events = EventAccumulator(str(folder)).Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    return found


def rounded(rows):
    return {epoch: {key: pytest.approx(value, rel=1e-6) for key, value in row.items()} for epoch, row in rows.items()}


def stopped(argv):
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


# --- which, and with what ---


def test_tensorboard_is_the_default(options, tmp_path):
    program.main(options)
    assert drawn(tmp_path / "run" / "tensorboard" / "vgpo") == rounded(numbers(tmp_path / "run"))


def test_several_at_once_with_options_of_their_own(options, tmp_path):
    words = ["--tracker=[tensorboard, recorder]", "--tracker_project=flowers", "--epochs=2"]
    program.main(
        [*options, *words, "--tracker_options={recorder: {color: red, tags: [a, b]}, tensorboard: {flush_secs: 1}}"]
    )
    (made,) = Recorder.made
    assert (made.project, made.options) == ("flowers", {"color": "red", "tags": ["a", "b"]})
    assert dict(made.taken) == numbers(tmp_path / "run") and len(made.taken) == 2
    assert made.calls == ["start", "log 0", "log 1", "finish"]
    assert drawn(tmp_path / "run" / "tensorboard" / "flowers") == rounded(numbers(tmp_path / "run"))
    program.main(["--resume", str(tmp_path / "run"), "--epochs=3", "--tracker=recorder", "--tracker_options={}"])
    assert [step for step, _ in Recorder.made[1].taken] == [2]  # another tracker leaves a run what it is


@pytest.mark.parametrize("word", ["recorder,tensorboard", "[recorder, tensorboard]", '["recorder", "tensorboard"]'])
def test_ways_to_name_them(word):
    assert tracker_names(parse_config([f"--tracker={word}"])) == ["recorder", "tensorboard"]
    assert tracker_names(parse_config(["--tracker", "recorder"])) == ["recorder"]


def test_a_recipe_names_them(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "tracker:\n- recorder\n- tensorboard\ntracker_options:\n  recorder:\n    color: red\n"
    )
    config = parse_config(["--recipe", str(tmp_path / "r.yaml")])
    assert tracker_names(config) == ["recorder", "tensorboard"] and config.tracker_options == {
        "recorder": {"color": "red"}
    }


def test_none_is_none(options, tmp_path):
    program.main([*options, "--tracker=[]", "--epochs=1"])
    assert not (tmp_path / "run" / "tensorboard").exists() and len(numbers(tmp_path / "run")) == 1


@pytest.mark.parametrize(("words", "message"), [
    (["--tracker=tensorbord"], "there is no tracker 'tensorbord'; known are aim, .*recorder.*wandb, and"),
    (["--tracker=[recorder, curves]"], "there is no tracker 'curves'; known are"),
    (["--tracker="], "there is no tracker ''; known are"),
    (["--tracker=wandb"], "the tracker wandb is not installed: pip install wandb, or choose another one by --tracker"),
    (["--tracker=recorder,comet_ml"], "the tracker comet_ml is not installed: pip install comet_ml"),
    (["--tracker_options={wandb: {name: a}}"], "tracker_options has wandb, which tracker has not; add it there"),
    (["--tracker=recorder", "--tracker_options={tensorboard: {}}"], "tracker_options has tensorboard, which tracker"),
    (["--tracker_options={wandb: name}"], "tracker_options"),
    (["--tracker_options=5"], "tracker_options"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_made(options, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(vgpo.runs.callbacks, "get_available_trackers", lambda: ["tensorboard"])
    text = stopped([*options, *words])
    assert re.search(message, text), text
    assert not list(tmp_path.iterdir()) and not Recorder.made


# --- what goes wrong ---


def weights(folder):
    return (folder / "lora" / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def untouched(tiny_folder, tmp_path_factory):
    "The weights of the same run without a tracker."
    root = tmp_path_factory.mktemp("untouched")
    program.main([*SMALL, f"--model.path={tiny_folder}", f"--output_dir={root}", "--tracker=[]"])
    return weights(root / "run")


@pytest.mark.parametrize(("fails", "taken", "said"), [
    ({"log 1": "os"}, [0, 1, 2], ["failed (OSError: nobody is there)", "the epochs from 1 on", "all epochs up to 2"]),
    ({"log 0": "own", "log 1": "key"}, [0, 1, 2], ["failed (Away: nobody is there)", "from 0 on", "all epochs up to"]),
    ({"log 0": "key", "log 1": "own", "log 2": "os"}, [], ["failed (KeyError: ", "the epochs from 0 on again"]),
    ({"finish": "own"}, [0, 1, 2], ["failed at its end (Away: nobody is there)"]),
])  # fmt: skip
def test_a_tracker_that_fails_costs_the_run_nothing(options, tmp_path, capsys, untouched, fails, taken, said):
    told = {"recorder": {"fails": fails}}
    program.main([*options, "--tracker=[recorder, tensorboard]", f"--tracker_options={json.dumps(told)}"])
    (made,) = Recorder.made
    assert [step for step, _ in made.taken] == taken and made.calls[-1] == "finish"
    assert all(values == numbers(tmp_path / "run")[step] for step, values in made.taken)
    assert weights(tmp_path / "run") == untouched and (tmp_path / "run" / "report.md").is_file()
    assert drawn(tmp_path / "run" / "tensorboard" / "vgpo") == rounded(numbers(tmp_path / "run"))  # the other goes on
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "the tracker recorder" in line]
    assert all(any(words in line for line in lines) for words in said) and len(lines) <= 2
    assert ("has taken all" in str(lines)) == any("all epochs" in words for words in said)


def test_one_that_cannot_start_is_said_before_the_first_epoch(options, tmp_path, untouched):
    told = {"recorder": {"fails": {"start": "own"}}}
    text = stopped([*options, "--tracker=recorder", f"--tracker_options={json.dumps(told)}"])
    assert "recorder could not be started (Away: nobody is there): check its login and --tracker_options" in text
    assert not numbers(tmp_path / "run")
    for lock in [path for path in tmp_path.rglob(".lock")]:
        lock.unlink()  # of a process that has ended, in truth
    program.main(["--resume", str(tmp_path / "run"), "--tracker=tensorboard", "--tracker_options={}"])
    assert weights(tmp_path / "run") == untouched


def test_options_that_a_tracker_has_not_are_said(options):
    text = stopped([*options, "--tracker_options={tensorboard: {colour: red}}"])
    assert "tensorboard could not be started (TypeError: " in text and "colour" in text and "--tracker_options" in text


def test_what_is_no_failure_of_a_tracker_passes():
    "The user's Ctrl-C, above all."

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failure(interrupted)
    assert failure(int, "5") is None and failure(int, "five").startswith("ValueError: invalid literal")


# --- a real one, without a network ---


@pytest.mark.skipif("mlflow" not in LOGGER_TYPE_TO_CLASS, reason="accelerate does not know mlflow")
def test_mlflow_offline(options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    store = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # files are enough here
    mlflow.set_tracking_uri(store.as_uri())
    told = {"mlflow": {"run_name": "first", "tags": {"kind": "test"}}}
    program.main(
        [*options, "--tracker=[mlflow, recorder]", "--tracker_project=garden", f"--tracker_options={json.dumps(told)}"]
    )
    (run,) = store.glob("*/*/metrics")
    found = {}
    for file in (path for path in run.rglob("*") if path.is_file()):
        for line in file.read_text().splitlines():
            _, value, step = line.split()[:3]
            found.setdefault(int(step), {})[str(file.relative_to(run))] = float(value)
    assert found == rounded(numbers(tmp_path / "run"))
    assert (run.parent / "tags" / "kind").read_text() == "test"
    assert "name: garden" in (run.parents[1] / "meta.yaml").read_text()
    assert "run_name: first" in (run.parent / "meta.yaml").read_text()
