"""Kill stages at random moments, and see that nothing is lost and nothing is half written.

    python tests/faults/kill_stages.py --kills 200 --signals 100
    python tests/faults/kill_stages.py --kills 60 --signals 0 --case "a changed list"

After every kill each file must hold either what it held before or what an undisturbed run writes,
and the same command must end with that run's own bits. A run that a signal ends, at any moment and
however users' tools send it, must end with the signal's code, keep its steps whenever one had
ended, and go on from the step that it said it kept.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import numpy as np
import typer
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

STAGE_0 = ("stages/stage0_image_encoder.py", "--batch_size", "1")
STAGE_1 = ("stages/stage1_text_encoder.py",)
STAGE_2 = ("stages/stage2_unet.py", "--batch_size", "1", "--checkpoint_every", "1")
STAGE_3 = ("stages/stage3_vae_decoder.py", "--batch_size", "1")
RUN_ALL = ("tools/run_all.py", "--warm=never", "--batch_size", "1", "--checkpoint_every", "1")
NEW = ("--prompt", "a small green ring", "--num_inference_steps", "5", "--seed", "9")
SIZES = ("--num_images_per_prompt", "3")
OLD = ("--prompt", "a large red star", "--num_inference_steps", "2", "--seed", "1", *SIZES)
# Of a list two prompts are gone, two are new, one has another negative prompt, one is moved.
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
OLD_LIST = [
    {"prompt": f"a {colour} star", "negative_prompt": "dull", "seed": seed}
    for seed, colour in enumerate(COLOURS)
]
NEW_LIST = [
    *(OLD_LIST[5], {"prompt": "a large ring", "seed": 77}, OLD_LIST[0]),
    *(OLD_LIST[1] | {"negative_prompt": "blurry"}, OLD_LIST[2], {"prompt": "a cross", "seed": 78}),
]
OF_LISTS = ("--num_inference_steps", "3", "--height", "64", "--width", "64")
CHANGED, STREAMED = "a changed list", "a list, streamed"
PICTURES = [f"picture{number}.png" for number in range(3)]  # in the folder of all runs
# What is killed; the settings of the new run stand where the command takes them.
CASES: dict[str, tuple[str, ...]] = {
    "stage 0": STAGE_0,
    "stage 1": (*STAGE_1, *NEW, *SIZES),
    "stage 2": STAGE_2,
    "stage 3": STAGE_3,
    "run_all.sh": (*RUN_ALL, *NEW, *SIZES),
    "run_all.sh alone": (*RUN_ALL, *NEW, *SIZES, "--wait"),
    CHANGED: (*RUN_ALL, "--prompts_file", "{folder}/new.jsonl", *OF_LISTS),
    STREAMED: (*RUN_ALL, "--prompts_file", "{folder}/new.jsonl", *OF_LISTS, "--stream"),
}
STEPS_TO_STOP = 40
# What users' tools send, and to whom: timeout and kill to the process, terminals and Slurm to its
# group, supervisors to one after the other.
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
WAYS = ("process", "group", "process, then group", "group, then process")
MOST_SECONDS_BETWEEN = 0.2
MOST_TRIES = 8
TIMEOUT = 900  # seconds; a busy machine is no fault
SOON = 0.6  # seconds after the first sign of progress, for every other kill


@dataclass
class Result:
    """What was seen."""

    kills: int = 0
    signals: int = 0
    too_late: int = 0  # the process was done when the signal was to come; not counted as kills
    exceptions: list[str] = field(default_factory=list)


def hear_all_signals() -> None:
    """What this program ignores, as in the background or under nohup, its processes would too."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def start(command: tuple[str, ...], run_dir: Path) -> "subprocess.Popen[str]":
    """Start a script in a session of its own, so that all of its processes can be killed."""
    script, *flags = command
    return subprocess.Popen(
        [sys.executable, str(PROJECT_DIR / script), "--output_dir", str(run_dir), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_all_signals,
    )


def finish(command: tuple[str, ...], run_dir: Path) -> tuple[int, str]:
    """Run a script to its end. Returns its exit code and what it said."""
    process = start(command, run_dir)
    said, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, said


def content_of(path: Path) -> object:
    """What is compared of a file: tensors' bytes, decoded pixels, or all of its text."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image).tobytes()
    return path.read_text(encoding="utf-8")


def contents(run_dir: Path) -> dict[str, object]:
    """Every output of a run by its name; reports tell times, so they are not compared."""
    outputs = [
        *run_dir.glob("stage[012]_[el]*.safetensors"),
        *run_dir.glob("output_*.png"),
        run_dir / "generation_config.json",
    ]
    return {path.name: content_of(path) for path in outputs if path.exists()}


class Faults:
    """Run directories to start from, and what undisturbed runs make of them."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """`names` are the cases' that are to be killed."""
        self.folder = folder
        self.commands = {
            name: tuple(part.format(folder=folder) for part in CASES[name]) for name in names
        }
        self.old, self.new = folder / "old", folder / "new"
        self.starts = {name: folder / f"start of {name}" for name in {*names, "stage 2"}}
        self.after: dict[str, dict[str, object]] = {}
        self.seconds: dict[str, float] = {}
        if {*names} - {CHANGED, STREAMED}:
            self._run((*RUN_ALL, *OLD), self.old)
            shutil.copytree(self.old, self.new)
            seconds = self._run((*RUN_ALL, *NEW, *SIZES), self.new)
            for name in names:
                if name.startswith("run_all.sh"):
                    self.seconds[name], self.after[name] = seconds, contents(self.new)
        self._make_starts()
        self.before = {name: contents(start_dir) for name, start_dir in self.starts.items()}
        for name in self.commands.keys() - self.after.keys():
            run_dir = folder / f"undisturbed {name}"
            shutil.copytree(self.starts[name], run_dir)
            self.seconds[name] = self._run(self.commands[name], run_dir)
            self.after[name] = contents(run_dir)
        if "stage 3" in names:
            assert self.after["stage 3"] == contents(self.new), "stages give other bits"
        if {CHANGED, STREAMED} <= {*names}:
            assert self.after[CHANGED] == self.after[STREAMED], "streams give other bits"

    def _make_starts(self) -> None:
        """Where each case starts: what the stages before it have written already."""
        known = {"stage 2": ("generation_config.json", "stage1_embeddings.safetensors")}
        known["stage 3"] = (*known["stage 2"], "stage2_latents.safetensors")
        for name, prompts in (("old", OLD_LIST), ("new", NEW_LIST)):
            text = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
            (self.folder / f"{name}.jsonl").write_text(text)
        for name, start_dir in self.starts.items():
            if name == "stage 0":
                self._begin_with_pictures(start_dir)
            elif name in (CHANGED, STREAMED):
                old = ("--prompts_file", str(self.folder / "old.jsonl"))
                self._run((*RUN_ALL, *old, *OF_LISTS), start_dir)
            elif self.old.exists():
                shutil.copytree(self.old, start_dir)
                for file in known.get(name, ()):
                    shutil.copy(self.new / file, start_dir / file)

    def _begin_with_pictures(self, run_dir: Path) -> None:
        """A run whose pictures are encoded, and then are others."""
        images = [flag for name in PICTURES for flag in ("--image", str(self.folder / name))]
        for made in (self.old, self.new):
            for number, name in enumerate(PICTURES):
                shutil.copy(made / f"output_image_{number:04d}.png", self.folder / name)
            self._run((*STAGE_1, *NEW, *images), run_dir)
            if made is self.old:
                self._run(STAGE_0, run_dir)

    @staticmethod
    def _run(command: tuple[str, ...], run_dir: Path) -> float:
        """Run a script undisturbed. Returns its seconds."""
        began = time.perf_counter()
        code, said = finish(command, run_dir)
        if code:
            raise RuntimeError(f"an undisturbed run ended with {code}: {said}")
        return time.perf_counter() - began

    def kill(self, name: str, number: int, seed: int, result: Result) -> None:
        """Kill one run at a random moment, look at its files, and let the command end."""
        chance = random.Random(f"{seed} {number}")
        run_dir = self.folder / f"kill {number}"
        for tries in itertools.count():
            shutil.copytree(self.starts[name], run_dir)
            process = start(self.commands[name], run_dir)
            if number % 2 and not tries:
                self._wait_for_progress(process, run_dir)
                time.sleep(chance.uniform(0, SOON))
            else:
                time.sleep(chance.uniform(0, self.seconds[name]) / 2**tries)
            if process.poll() is None:
                break
            result.too_late += 1
            shutil.rmtree(run_dir)
        if name.endswith("alone"):
            process.kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=TIMEOUT)
        result.kills += 1
        found = contents(run_dir)
        for file, content in found.items():
            if content not in (self.before[name].get(file), self.after[name].get(file)):
                result.exceptions.append(f"kill {number} of {name}: {file} is neither old nor new")
        if lost := self.before[name].keys() - found.keys():
            result.exceptions.append(f"kill {number} of {name}: {sorted(lost)} were lost")
        code, said = finish(self.commands[name], run_dir)
        if code:
            result.exceptions.append(f"kill {number} of {name}: the next run ended {code}: {said}")
        elif contents(run_dir) != self.after[name]:
            result.exceptions.append(f"kill {number} of {name}: the next run gave other bits")
        elif left := [*run_dir.glob(".*"), *run_dir.glob("*progress*")]:
            result.exceptions.append(f"kill {number} of {name}: {left} were left behind")
        else:
            shutil.rmtree(run_dir)

    def signal(self, number: int, seed: int, result: Result) -> None:
        """Send stage 2 a signal as users' tools do, and let it go on."""
        chance = random.Random(f"signal {seed} {number}")
        sent, way = chance.choice(list(CODES)), chance.choice(WAYS)
        told = f"signal {number}, {sent.name} to {way}"
        run_dir = self.folder / f"signal {number}"
        command = (*STAGE_2, "--num_inference_steps", str(STEPS_TO_STOP))
        for tries in range(MOST_TRIES):
            shutil.copytree(self.starts["stage 2"], run_dir)
            process = start(command, run_dir)
            if number % 2 and not tries:  # else it would seldom denoise
                self._wait_for_progress(process, run_dir)
                time.sleep(chance.uniform(0, 2.0))
            else:
                time.sleep(chance.uniform(0, self.seconds_of_stop) / 2**tries)
            had_steps = (run_dir / "stage2_progress.safetensors").exists()
            for k, to in enumerate(way.split(", then ")):
                if k:
                    time.sleep(chance.uniform(0, MOST_SECONDS_BETWEEN))
                with suppress(ProcessLookupError):
                    (os.kill if to == "process" else os.killpg)(process.pid, sent)
            said, _ = process.communicate(timeout=TIMEOUT)
            if process.returncode != 0 or [*run_dir.glob("stage2_progress*")]:
                break
            result.too_late += 1
            shutil.rmtree(run_dir)
        result.signals += 1
        # Python has no handlers while it starts; a shell gives the same code then.
        if process.returncode not in (CODES[sent], -sent) or "Traceback" in said:
            result.exceptions.append(f"{told}: ended {process.returncode}: {said}")
        # When the latents are written, what was kept has served.
        is_written = "when " in said and "was written" in said
        if had_steps and not is_written and not [*run_dir.rglob("*progress*.safetensors")]:
            result.exceptions.append(f"{told}: steps were lost: {said}")
        kept = re.search(r"error: \w+(?: up)? after step (\d+) of \d+, which are kept", said)
        code, then = finish(command, run_dir)
        went_on = re.search(r"goes on after step (\d+) of", then)
        if code:
            result.exceptions.append(f"{told}: then ended {code}: {then}")
        if kept is not None and (went_on is None or went_on[1] != kept[1]):
            result.exceptions.append(f"{told}: {kept[0]}, but then {then}")
        if content_of(run_dir / "stage2_latents.safetensors") != self.long_latents():
            result.exceptions.append(f"{told}: other bits")
        else:
            shutil.rmtree(run_dir)

    def long_latents(self) -> object:
        """The latents of an undisturbed run of as many steps as are stopped."""
        run_dir = self.folder / "undisturbed long"
        if not run_dir.exists():
            shutil.copytree(self.starts["stage 2"], run_dir)
            command = (*STAGE_2, "--num_inference_steps", str(STEPS_TO_STOP))
            self.seconds_of_stop = self._run(command, run_dir)
        return content_of(run_dir / "stage2_latents.safetensors")

    @staticmethod
    def _wait_for_progress(process: "subprocess.Popen[str]", run_dir: Path) -> None:
        """Wait until a file is written, or the process ends."""
        before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < TIMEOUT:
            for path in run_dir.iterdir():
                try:
                    changed = path.stat().st_mtime_ns != before.get(path)
                except OSError:
                    continue
                if changed and not path.name.startswith("."):
                    return
            time.sleep(0.01)


def main(
    kills: Annotated[int, typer.Option("--kills", help="By SIGKILL, over all cases.")] = 200,
    signals: Annotated[int, typer.Option("--signals", help="SIGTERM, SIGINT or SIGHUP.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Of the moments.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", help="Runs at once.")] = 2,
    case: Annotated[list[str] | None, typer.Option("--case", help="What is killed.")] = None,
) -> None:
    """Kill and signal stages, and print what was found; ends with 1 where anything was wrong."""
    result = Result()
    with tempfile.TemporaryDirectory() as folder:
        names = case or list(CASES)
        faults = Faults(Path(folder), names)
        if signals:
            faults.long_latents()
        with ThreadPoolExecutor(jobs) as pool:
            tasks = [
                pool.submit(faults.kill, names[number % len(names)], number, seed, result)
                for number in range(kills)
            ]
            tasks += [pool.submit(faults.signal, number, seed, result) for number in range(signals)]
            for task in tqdm(tasks, desc="faults", disable=None):
                task.result()
    for line in result.exceptions:
        print(line)
    print(
        f"{result.kills} kills, {result.signals} signals (and {result.too_late} of both that came "
        f"too late), seed {seed}: {len(result.exceptions)} exceptions"
    )
    raise typer.Exit(bool(result.exceptions))


if __name__ == "__main__":
    typer.run(main)
